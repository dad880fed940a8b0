"""Released weights -> ours, shard by shard; and a new model from a LLaDA, a SigLIP and a projector.

A plan (`plan_conversion`, `plan_initialization`) is made from headers alone, with every key accounted for; then
`write_weights` copies one shard at a time. What lies around the weights in a folder: `lladamedv/conversion.py`.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .checkpoint_layouts_lladamedv import (
    TEXT_LAYOUTS,
    KeyReport,
    StoredWeight,
    convert_vision_config,
    match_keys,
    read_checkpoint,
    read_config,
    read_header,
    read_weights,
    rename,
)
from .configuration_lladamedv import LLaDAMedVConfig
from .modeling_lladamedv import LLaDAMedVForConditionalGeneration


_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What a file of tensors names in its pickle.
_PICKLED = r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)"
_VISION_PARTS = ("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline")


@dataclass
class ConversionPlan:
    """Everything about a converted model but its bytes.

    Args:
        config: ours.
        weights: for each of our names, in the model's order, where its weight is, or the weight itself if it is new.
        report: what became of each source key.
        layout: the layout of the (main) source.
    """

    config: LLaDAMedVConfig
    weights: dict[str, StoredWeight | torch.Tensor]
    report: KeyReport
    layout: str

    def output_dtype(self, name: str, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype in which a weight is written; `None` keeps the source's."""
        weight = self.weights[name]
        return dtype or (_STORED_DTYPES[weight.dtype] if isinstance(weight, StoredWeight) else weight.dtype)

    def num_bytes(self, dtype: torch.dtype | None = None) -> dict[str, int]:
        """Size of each weight as written."""
        sizes = {name: torch.Size(weight.shape).numel() for name, weight in self.weights.items()}
        return {name: self.output_dtype(name, dtype).itemsize * size for name, size in sizes.items()}


def plan_conversion(folder: str | Path, vision_tower: str | Path | None = None, **ids: int) -> ConversionPlan:
    """Plan the conversion of a checkpoint in a released layout.

    Args:
        folder: see [`read_checkpoint`].
        vision_tower: folder of the stand-alone SigLIP: its configuration, and its weights where the checkpoint holds
            none of a vision tower.
        ids: see [`read_checkpoint`].

    Raises:
        ValueError: if a key is missing, unknown or of the wrong shape, or for the reasons of [`read_checkpoint`].
    """
    checkpoint = read_checkpoint(folder, vision_tower, **ids)
    if vision_tower is not None and checkpoint.layout in TEXT_LAYOUTS:
        raise ValueError(
            f"`vision_tower` is {str(vision_tower)!r}, but {str(folder)!r} is a text-only checkpoint (layout "
            f"{checkpoint.layout}); put a new model together from the two with `lladamedv init`."
        )
    expected = LLaDAMedVForConditionalGeneration.parameter_shapes(checkpoint.config)
    weights, report = checkpoint.match(expected)
    if vision_tower is not None and not any(name.startswith("model.vision_tower.") for name in weights):
        weights |= _add_tower(report, Path(vision_tower), expected, checkpoint.config)
    report.check(folder)
    _check_dtypes(weights.values())
    return ConversionPlan(checkpoint.config, {name: weights[name] for name in expected}, report, checkpoint.layout)


def plan_initialization(
    language_model: str | Path,
    vision_tower: str | Path,
    projector: str | Path | None = None,
    aspect_ratio: str = "anyres_max_4",
    seed: int = 0,
    **ids: int,
) -> ConversionPlan:
    """Plan a new model: a LLaDA, a SigLIP, and between them a projector that is untrained or that stage 1 trained.

    An untrained projector is initialised as `nn.Linear` is and the newline embedding with standard deviation
    1/sqrt(hidden size), as in the authors' training code.

    Args:
        language_model: folder with LLaDA-8B in one of its two layouts.
        vision_tower: folder with SigLIP(2): the tower alone or the whole model.
        projector: `mm_projector.safetensors`, or `.bin`, which is unpickled with `torch.load(weights_only=True)`.
        aspect_ratio: the new model's `vision_aspect_ratio`.
        seed: for the untrained weights.
        ids: see [`read_checkpoint`].

    Raises:
        ValueError: if a part is not what it should be, or does not fit the others.
    """
    text = read_checkpoint(language_model, **ids)
    if text.layout not in TEXT_LAYOUTS:
        raise ValueError(
            f"`language_model` is {str(language_model)!r}, which is in layout {text.layout} and has a vision tower "
            "already; allowed is a LLaDA without one. Use `lladamedv convert` for this one."
        )
    vision_tower = Path(vision_tower)
    config = text.config.to_dict() | {
        "vision_config": convert_vision_config(read_config(vision_tower)),
        "text_only": False,
        "vision_aspect_ratio": aspect_ratio,
    }
    config = LLaDAMedVConfig(**config)
    expected = LLaDAMedVForConditionalGeneration.parameter_shapes(config)
    language = {name: shape for name, shape in expected.items() if not name.startswith(_VISION_PARTS)}
    weights, report = text.match(language)
    report.check(language_model)
    weights |= _add_tower(report, vision_tower, expected, config)
    _check_dtypes(weights.values())

    dtype = _STORED_DTYPES[weights["lm_head.weight"].dtype]
    new = _untrained_parts(config, seed)
    if projector is not None:
        trained, part = _read_projector(Path(projector), new)
        new |= trained
        report.add(part)
    weights |= {name: weight.to(dtype) for name, weight in new.items()}
    return ConversionPlan(config, {name: weights[name] for name in expected}, report, text.layout)


def _add_tower(report, folder, expected, config) -> dict[str, StoredWeight]:
    """The weights of a stand-alone SigLIP, accounted for in `report`."""
    expected = {name: shape for name, shape in expected.items() if name.startswith("model.vision_tower.")}
    weights, part = match_keys("siglip", read_weights(folder), expected, config)
    part.check(folder)
    report.add(part)
    report.missing = [name for name in report.missing if name not in weights]
    return weights


def _untrained_parts(config, seed) -> dict[str, torch.Tensor]:
    hidden = config.text_config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaOnevisionMultiModalProjector(config)
        for module in (projector.linear_1, projector.linear_2):
            nn.Linear.reset_parameters(module)
        parts = {f"model.multi_modal_projector.{name}": weight for name, weight in projector.state_dict().items()}
        if config.max_anyres_tiles is not None:
            parts["model.image_newline"] = torch.randn(hidden) / hidden**0.5
    return parts


def _read_projector(file, untrained) -> tuple[dict[str, torch.Tensor], KeyReport]:
    """The weights of a stage-1 projector file by our names."""
    if not file.is_file():
        raise ValueError(f"`projector` is {str(file)!r}, and there is no such file.")
    if file.suffix == ".safetensors":
        read_header(file)
        stored = load_file(file)
    else:
        try:
            _check_pickle(file)
            stored = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"`projector` is {str(file)!r}, which is refused: {' '.join(str(error).split())}. Nothing else than "
                "tensors is unpickled; save it as safetensors."
            ) from error
    if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise ValueError(f"`projector` is {str(file)!r}, which holds no tensors by name.")
    report = KeyReport("projector")
    weights = {}
    for key, weight in stored.items():
        ours = rename(key, "projector")
        if ours in untrained:
            report.mapped[key] = ours
            weights[ours] = weight
            if weight.shape != untrained[ours].shape:
                report.misshaped[key] = f"{tuple(weight.shape)} instead of {tuple(untrained[ours].shape)}"
        elif ours == "model.image_newline":
            report.ignored[key] = "newline embedding: images of one tile have no rows to end"
        else:
            report.unexpected.append(key)
    # Stage 1 may leave the newline alone: images are one tile there.
    report.missing = [name for name in untrained if name not in weights and name != "model.image_newline"]
    report.check(file)
    return weights, report


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
                    if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not re.fullmatch(_PICKLED, named):
                        raise ValueError(f"it names {named!r} in its pickle")


def _check_dtypes(weights) -> None:
    for weight in weights:
        if weight.dtype not in _STORED_DTYPES:
            raise ValueError(
                f"{weight.key} in {weight.file.name} is stored as {weight.dtype}; allowed are {list(_STORED_DTYPES)}: "
                "quantised weights are not converted."
            )


def write_weights(
    plan: ConversionPlan,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "2GB",
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Write the weights as safetensors shards with an index, holding one shard in memory at a time.

    Args:
        plan: from [`plan_conversion`] or [`plan_initialization`].
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
            shard[name] = _read(plan.weights[name], plan.output_dtype(name, dtype), name)
            progress(sizes[name])
        save_file(shard, Path(folder) / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (Path(folder) / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _read(weight: StoredWeight | torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    key = name
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
