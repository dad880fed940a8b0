"""The numbers recorded from the authors' code: `../shared/parity` where it is, else the copy in `data`."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lladamedv.processing import LLaDAMedVImageProcessor


COPY = Path(__file__).parent / "data"
SHARED = Path(os.environ.get("LLADAMEDV_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
FIXTURES = SHARED if (SHARED / "manifest.json").is_file() else COPY
NAMES = ("pad_mha", "anyres_gqa")
LLADA_NAMES = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}


def numbers(name: str, part: str) -> dict:
    return json.loads((FIXTURES / name / f"{part}.json").read_text())


@cache
def tensors(name: str, part: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / name / f"{part}.safetensors")


def counter_uniform(shape, seed: int, scale: float) -> torch.Tensor:
    """The recipe of the fixtures' large matrices: splitmix64 of a counter, the top 24 bits as −scale…scale."""
    with np.errstate(over="ignore"):
        state = np.arange(1, np.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
    unit = (state >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return torch.from_numpy((unit * np.float32(scale)).reshape(shape))


def write_checkpoint(name: str, folder: Path, layout: str = "checkpoint") -> Path:
    """Write the complete checkpoint of a fixture: the released layout, or `"llada_text"`, LLaDA's own."""
    source, matrices = FIXTURES / name / layout, FIXTURES / name / "checkpoint"
    recipe = json.loads((matrices / "embed_lm_head_recipe.json").read_text())
    overrides = load_file(matrices / recipe["overrides_file"])
    weights = load_file(source / "model.safetensors")
    for key, spec in recipe["tensors"].items():
        weight = counter_uniform(spec["shape"], spec["seed"], spec["scale"])
        stem = key.removesuffix(".weight")
        if f"{stem}.ids" in overrides:
            weight[overrides[f"{stem}.ids"]] = overrides[f"{stem}.rows"]
        assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == spec["sha256"], key
        weights[LLADA_NAMES[key] if layout == "llada_text" else key] = weight
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    if layout == "checkpoint":
        (folder / "siglip_tower").mkdir()
        tower = "siglip_tower/config.json"
        (folder / tower).write_bytes((source / tower).read_bytes())
    return folder


def image_processor(model) -> LLaDAMedVImageProcessor:
    vision = model.config.vision_config
    return LLaDAMedVImageProcessor(
        size={"height": vision.image_size, "width": vision.image_size},
        patch_size=vision.patch_size,
        vision_aspect_ratio=model.config.vision_aspect_ratio,
    )
