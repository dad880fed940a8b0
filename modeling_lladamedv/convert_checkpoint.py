"""Released weights -> ours, shard by shard; and a new model from a LLaDA, a SigLIP and a projector.

`plan_conversion` reads headers alone and accounts for every key; then `write_weights` copies one shard at a time. What
lies around the weights in a folder: `lladamedv/conversion.py`.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .configuration_lladamedv import LLaDAMedVConfig
from .modeling_lladamedv import LLaDAMedVForConditionalGeneration
from .released_lladamedv import TEXT_LAYOUTS, Checkpoint, compare, convert_vision_config
from .stored_weights_lladamedv import KeyReport, StoredWeight, read_header, read_json, read_weights


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors writes them
_TOWER, _PROJECTOR, _NEWLINE = "model.vision_tower.", "model.multi_modal_projector.", "model.image_newline"
# What a file of tensors names in its pickle.
_PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}


@dataclass
class ConversionPlan:
    """Everything about a converted model but its bytes."""

    config: LLaDAMedVConfig
    # For each of our names, in the model's order, where its weight is, or the weight itself if it is new.
    weights: dict[str, StoredWeight | torch.Tensor]
    report: KeyReport

    def __post_init__(self):
        for weight in self.weights.values():
            if isinstance(weight, StoredWeight) and weight.dtype not in _DTYPES:
                raise ValueError(
                    f"{weight.key} in {weight.file.name} is stored as {weight.dtype}; allowed are {list(_DTYPES)}: "
                    "quantised weights are not converted."
                )

    def output_dtype(self, name: str, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype in which a weight is written; `None` keeps the source's."""
        stored = self.weights[name].dtype
        return dtype or _DTYPES.get(stored, stored)

    def num_bytes(self, dtype: torch.dtype | None = None) -> dict[str, int]:
        """Size of each weight as written."""
        sizes = {name: torch.Size(weight.shape).numel() for name, weight in self.weights.items()}
        return {name: self.output_dtype(name, dtype).itemsize * size for name, size in sizes.items()}


def plan_conversion(
    checkpoint: Checkpoint,
    vision_tower: Path | None = None,
    aspect_ratio: str | None = None,
    projector: Path | None = None,
    seed: int = 0,
) -> ConversionPlan:
    """Plan the conversion of a checkpoint in a released layout, or a new model around the LLaDA that it is.

    Args:
        checkpoint: from [`read_checkpoint`]; for a new model LLaDA-8B in one of its two layouts.
        vision_tower: folder of the stand-alone SigLIP(2), for weights if the checkpoint holds none of a vision tower.
        aspect_ratio: the new model's `vision_aspect_ratio`; `None` converts what is there.
        projector: of the new model: `mm_projector.safetensors`, or `.bin`, which is unpickled with
            `torch.load(weights_only=True)`. By default an untrained one, initialised as `nn.Linear` is, with a newline
            embedding of standard deviation 1/sqrt(hidden size), as in the authors' training code.
        seed: for untrained weights.

    Raises:
        ValueError: if a part is not what it should be or does not fit the others: another layout or configuration, or
            keys that are missing, unknown or of the wrong shape.
    """
    source, is_new, layout = repr(str(checkpoint.folder)), aspect_ratio is not None, checkpoint.layout
    if is_new and layout not in TEXT_LAYOUTS:
        raise ValueError(
            f"`language_model` is {source}, which is in layout {layout} and has a vision tower already; allowed is a "
            "LLaDA without one. Use `lladamedv convert` for this one."
        )
    if not checkpoint.is_released:
        raise ValueError(f"{source} has this package's own names already: load it as it is.")
    if not is_new and vision_tower is not None and layout in TEXT_LAYOUTS:
        raise ValueError(
            f"`vision_tower` is {str(vision_tower)!r}, but {source} is a text-only checkpoint (layout {layout}); put a "
            "new model together from the two with `lladamedv init`."
        )
    config = checkpoint.config
    if is_new:
        vision = convert_vision_config(read_json(vision_tower / "config.json"))
        parts = {"vision_config": vision, "text_only": False, "vision_aspect_ratio": aspect_ratio}
        config = LLaDAMedVConfig(**config.to_dict() | parts)
    expected = LLaDAMedVForConditionalGeneration.parameter_shapes(config)
    vision = () if not is_new else (_TOWER, _PROJECTOR, _NEWLINE)
    own = {name: shape for name, shape in expected.items() if not name.startswith(vision)}
    weights, report = checkpoint.compare(own, config)
    if vision_tower is not None and not any(name.startswith(_TOWER) for name in weights):
        tower = {name: shape for name, shape in expected.items() if name.startswith(_TOWER)}
        weights |= _add_part("siglip", vision_tower, read_weights([*vision_tower.iterdir()]), tower, config, report)
    report.check(checkpoint.folder)
    if is_new:
        new = _untrained_parts(expected, seed)
        if projector is not None:
            shapes = {name: weight.shape for name, weight in new.items()}
            new |= _add_part("projector", projector, _read_projector(projector), shapes, config, report)
        dtype = _DTYPES.get(weights["lm_head.weight"].dtype)
        weights |= {name: weight.to(dtype) for name, weight in new.items()}
    return ConversionPlan(config, {name: weights[name] for name in expected}, report)


def _add_part(layout: str, source: Path, stored: dict, expected: dict, config, report: KeyReport) -> dict:
    """The weights of a part by our names, accounted for in `report`."""
    weights, part = compare(layout, stored, expected, config)
    part.missing = [name for name in part.missing if name != _NEWLINE]  # in stage 1 images are one tile
    part.check(source)
    report.add(part)
    return weights


def _untrained_parts(expected, seed) -> dict[str, torch.Tensor]:
    """The projector's layers as `nn.Linear` makes them, and the newline embedding."""
    parts = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in ("linear_1", "linear_2"):
            rows, columns = expected[f"{_PROJECTOR}{layer}.weight"]
            weights = nn.Linear(columns, rows).state_dict()
            parts |= {f"{_PROJECTOR}{layer}.{name}": weight for name, weight in weights.items()}
        if _NEWLINE in expected:
            (hidden,) = expected[_NEWLINE]
            parts[_NEWLINE] = torch.randn(hidden) / hidden**0.5
    return parts


def _read_projector(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise ValueError(f"`projector` is {str(file)!r}, and there is no such file.")
    if file.suffix == ".safetensors":
        read_header(file)
        return load_file(file)
    try:
        _check_pickle(file)
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickletools and torch raise many kinds
        raise ValueError(
            f"`projector` is {str(file)!r}, which is refused: {' '.join(str(error).split())}. Only tensors are "
            "unpickled; save it as safetensors."
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise ValueError(f"`projector` is {str(file)!r}, which holds no tensors by name.")
    return stored


def _check_pickle(file: Path) -> None:
    """Refuse what would make `torch.load(weights_only=True)` take memory without end, though it runs no code: packed
    tensors, and calls such as `bytearray(10**12)`.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, which torch.save does not do")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("it holds parts of the same name")
        for member in members:
            if member.filename.endswith("data.pkl"):
                for operation, argument, _ in pickletools.genops(archive.read(member)):
                    named = argument if operation.name in ("GLOBAL", "INST") else operation.name
                    is_storage = str(named).startswith("torch ") and named.endswith("Storage")
                    if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not (is_storage or named in _PICKLED):
                        raise ValueError(f"it names {named!r} in its pickle")


def write_weights(
    plan: ConversionPlan,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "2GB",
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Write the weights as safetensors shards with an index, holding one shard in memory at a time.

    Args:
        plan: from [`plan_conversion`].
        folder: an existing folder.
        dtype: of the written weights; `None` keeps each weight's own.
        max_shard_size: bytes, or a text such as `"2GB"`; a weight that is larger gets a shard of its own.
        progress: called with the number of bytes after each weight.

    Raises:
        ValueError: if a weight is not finite, or not in the range of `dtype`.
    """
    sizes = plan.num_bytes(dtype)
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )  # fmt: skip
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = _read(name, plan.weights[name], plan.output_dtype(name, dtype))
            progress(sizes[name])
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _read(key: str, weight: StoredWeight | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(weight, StoredWeight):
        key = f"{weight.key} in {weight.file.name}"
        with safe_open(weight.file, framework="pt") as handle:
            weight = handle.get_tensor(weight.key)
    converted = weight.to(dtype).contiguous()
    # The extremes show NaN and infinity without a temporary copy of the weight.
    if converted.numel() and not torch.stack(converted.aminmax()).isfinite().all():
        if dtype != weight.dtype and torch.stack(weight.aminmax()).isfinite().all():
            raise ValueError(f"{key} does not fit into {dtype}: its values go from {weight.min()} to {weight.max()}.")
        raise ValueError(f"{key} holds values that are not finite: the file is damaged.")
    return converted
