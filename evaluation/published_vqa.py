"""Published results on VQA-RAD, SLAKE and PathVQA, to be read beside one's own.

From table 2 of LLaDA-MedV (arXiv 2508.01617), which takes most of it from LLaVA-Med (arXiv 2306.00890). Open questions:
recall of words, where a repeated word counts as often as it is repeated; closed ones: the truth is a substring of the
answer. Numbers of one column need not be about the same questions: there are several versions of each test split.
"""

LLADA_MEDV = "LLaDA-MedV"
# (open, closed) in percent; `None` where nothing was published.
PUBLISHED_VQA: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "vqa-rad": {
        "LLaVA": (50.00, 65.07),
        "LLaVA-Med": (61.52, 84.19),
        "VL Encoder-Decoder": (71.49, 82.47),
        "Q2ATransformer": (79.19, 82.47),
        "PubMedCLIP": (60.10, 80.00),
        "BiomedCLIP": (67.60, 79.80),
        "M2I2": (66.50, 83.50),
        LLADA_MEDV: (45.60, 84.93),
    },
    "slake": {
        "LLaVA": (78.18, 63.22),
        "LLaVA-Med": (83.08, 85.34),
        "Prefix T. Medical LM": (84.30, 82.01),
        "PubMedCLIP": (78.40, 82.50),
        "BiomedCLIP": (82.05, 89.70),
        "M2I2": (74.70, 91.10),
        LLADA_MEDV: (68.85, 92.31),
    },
    "path-vqa": {
        "LLaVA": (7.74, 63.20),
        "LLaVA-Med": (37.95, 91.21),
        "VL Encoder-Decoder": (71.49, 85.61),
        "Q2ATransformer": (54.85, 88.85),
        "Prefix T. Medical LM": (40.00, 87.00),
        "M2I2": (36.30, 88.00),
        LLADA_MEDV: (31.96, 95.15),
    },
}


__all__ = ["LLADA_MEDV", "PUBLISHED_VQA"]
