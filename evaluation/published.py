"""Published results, to be read beside one's own, and how they were decoded. Needs no library.

All from LLaDA-MedV (arXiv 2508.01617). A relative score depends on the judge, there GPT-4.1 mini with the answer of the
text-only GPT-4 always first, so only scores of the same judge and prompt compare. The VQA results, most of them taken
from LLaVA-Med (arXiv 2306.00890), count a repeated word as often as it is repeated and look for substrings; numbers of
one column need not be about the same questions, because there are several versions of each test split.
"""

# How the paper decodes: canvas, block and steps for short answers, and for chat.
VQA_DECODING = {"max_new_tokens": 64, "block_length": 64, "steps": 64}
CHAT_DECODING = {"max_new_tokens": 256, "block_length": 64, "steps": 256}

# Table 1: relative scores in percent, in the order of GROUP_SIZES. LLaVA's last number is as printed; its other numbers
# weighted by the sizes of their groups give 39.9, as they give the last number of every other row.
GROUP_SIZES = {
    "conversation": 143, "detailed_description": 50,
    "chest_xray": 37, "mri": 38, "histology": 44, "gross": 34, "ct_scan": 40,
    "all": 193,
}  # fmt: skip
RELATIVE_SCORES = {
    "LLaMA": (27.850, 27.750, 33.505, 23.841, 24.684, 31.764, 26.458, 27.824),
    "LLaVA": (43.509, 29.671, 45.935, 41.761, 42.726, 33.905, 33.4, 34.653),
    "LLaVA-Med": (51.750, 24.730, 40.819, 39.928, 51.452, 48.880, 42.083, 44.750),
    "Med-Flamingo": (16.339, 13.702, 16.238, 17.502, 15.823, 13.311, 15.174, 15.656),
    "MedVLM-R1": (52.774, 42.663, 52.944, 49.159, 53.801, 53.122, 41.984, 50.154),
    "Qwen-RL-Med": (46.408, 40.016, 50.225, 41.181, 50.081, 41.929, 39.618, 44.752),
    "Qwen-VL": (51.546, 40.143, 58.929, 43.186, 51.344, 47.106, 42.401, 48.592),
    "RetinalGPT": (20.535, 13.349, 19.477, 15.722, 21.839, 17.875, 17.932, 18.673),
    "LLaDA-V": (53.574, 42.627, 57.545, 38.445, 64.191, 49.055, 42.753, 50.738),
    "LLaDA-MedV": (54.141, 48.214, 64.352, 47.348, 51.073, 50.432, 50.268, 52.605),
}

# Table 2: open recall and closed accuracy in percent, `None` where nothing was published.
LLADA_MEDV = "LLaDA-MedV"
PUBLISHED_VQA: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "vqa-rad": {
        "LLaVA": (50.00, 65.07), "LLaVA-Med": (61.52, 84.19), "VL Encoder-Decoder": (71.49, 82.47),
        "Q2ATransformer": (79.19, 82.47), "PubMedCLIP": (60.10, 80.00), "BiomedCLIP": (67.60, 79.80),
        "M2I2": (66.50, 83.50), LLADA_MEDV: (45.60, 84.93),
    },
    "slake": {
        "LLaVA": (78.18, 63.22), "LLaVA-Med": (83.08, 85.34), "Prefix T. Medical LM": (84.30, 82.01),
        "PubMedCLIP": (78.40, 82.50), "BiomedCLIP": (82.05, 89.70), "M2I2": (74.70, 91.10),
        LLADA_MEDV: (68.85, 92.31),
    },
    "path-vqa": {
        "LLaVA": (7.74, 63.20), "LLaVA-Med": (37.95, 91.21), "VL Encoder-Decoder": (71.49, 85.61),
        "Q2ATransformer": (54.85, 88.85), "Prefix T. Medical LM": (40.00, 87.00), "M2I2": (36.30, 88.00),
        LLADA_MEDV: (31.96, 95.15),
    },
}  # fmt: skip

# Table 3: seconds per question, words per question, seconds per word, steps, overall relative score in percent.
# LLaDA-MedV has a canvas of 256 and blocks of 64.
PUBLISHED_EFFICIENCY = (
    ("LLaVA-Med", 1.317, 36.332, 0.036, None, 44.750),
    ("LLaVA-Med200", 1.392, 40.922, 0.034, None, 44.582),
    (LLADA_MEDV, 38.382, 166.585, 0.230, 256, 52.605),
    (LLADA_MEDV, 30.874, 170.399, 0.181, 128, 44.276),
    (LLADA_MEDV, 21.234, 172.839, 0.123, 64, 28.523),
    (LLADA_MEDV, 13.945, 182.596, 0.076, 32, 18.581),
    (LLADA_MEDV, 8.595, 192.090, 0.045, 16, 13.525),
)
# The ablations: canvas, block, steps, overall relative score in percent.
PUBLISHED_ABLATION = (
    (32, 32, 32, 37.057), (64, 32, 64, 39.135), (128, 32, 128, 33.222), (256, 32, 256, 51.215),
    (256, 64, 256, 52.605), (256, 128, 256, 51.641), (256, 256, 256, 51.470),
    (256, 256, 128, 44.020), (256, 256, 64, 31.774), (256, 256, 32, 20.165),
)  # fmt: skip

__all__ = [
    "CHAT_DECODING", "GROUP_SIZES", "LLADA_MEDV", "PUBLISHED_ABLATION", "PUBLISHED_EFFICIENCY", "PUBLISHED_VQA",
    "RELATIVE_SCORES", "VQA_DECODING",
]  # fmt: skip
