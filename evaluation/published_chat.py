"""Scores that others have published on LLaVA-Med's open-ended chat benchmark, to stand beside new ones.

Source: Table 1 of LLaDA-MedV (arXiv 2508.01617): relative scores in percent, judged by GPT-4.1 mini with the text-only
GPT-4's answer always first. A relative score depends on the judge, so only scores of the same judge and prompt compare.
"""

GROUP_SIZES = {
    "conversation": 143, "detailed_description": 50,
    "chest_xray": 37, "mri": 38, "histology": 44, "gross": 34, "ct_scan": 40,
    "all": 193,
}  # fmt: skip

# In the order of GROUP_SIZES. LLaVA's last number is as printed; its other numbers weighted by the sizes of their
# groups give 39.9, as they give the last number of every other row.
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

__all__ = ["GROUP_SIZES", "RELATIVE_SCORES"]
