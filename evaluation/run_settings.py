"""Everything that the answers of a run depend on, so that a run continues only under the same conditions.

What is recorded is what is in force (weights, configuration, adapters, the checkpoint's generation options, template,
tokenizer, data), not what the caller asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import align_module_device

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationConfig
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets import image_source


_VALUES_PER_TENSOR = 256
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a value in bytes
_OF_ADAPTERS = ("scaling", "_active_adapter", "_disable_adapters")  # attributes of PEFT's layers
_NOT_OF_CONFIG = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache"}
_ALWAYS_SHOWN = {"max_new_tokens", "block_length", "steps", "remasking"}
# These change what else is returned, or say where the options are from.
_NOT_OF_DECODING = {
    "return_dict_in_generate", "output_history", "output_cache_drift", "transformers_version", "_from_model_config",
    "_commit_hash",
}  # fmt: skip


def run_settings(
    model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor, options: dict, rows: Iterable[dict]
) -> dict:
    """The settings of a run, JSON-able.

    Args:
        model, processor: as loaded.
        options: of `generate`, as the caller gives them.
        rows: the questions, with images as they are stored; their texts and pictures are part of the settings.

    Raises:
        ValueError: as `generate` does for its options.
    """
    image_processor = processor.image_processor.to_dict()
    image_processor.pop("auto_map", None)  # of a checkpoint's code, whatever it computes
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    del tokenizer["padding"], tokenizer["truncation"]  # left there by the last call
    return {
        "model_revision": getattr(model.config, "_commit_hash", None),
        "model_sha256": model_fingerprint(model),
        "config": _config_in_force(json.loads(model.config.to_json_string(use_diff=False))),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "decoding": decoding_in_force(model, options),
        "chat_template": processor.chat_template,
        "image_processor": image_processor,
        "tokenizer_sha256": hashlib.sha256(json.dumps(tokenizer).encode()).hexdigest(),
        "data_sha256": data_fingerprint(rows),
    }


def _config_in_force(config: dict) -> dict:
    """A model's configuration without what changes no answer, or is recorded elsewhere."""
    return {
        name: _config_in_force(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _NOT_OF_CONFIG
    }


def decoding_in_force(model: LLaDAMedVForConditionalGeneration, options: dict) -> dict:
    """The options that `generate(**options)` follows: the caller's, and where there are none the checkpoint's.

    Options that have their default in this package are left out, except for the length, the block, the steps and
    `remasking`.

    Raises:
        ValueError: as `generate` does.
    """
    in_force = model.resolve_generation_config(**options).to_dict()
    defaults = LLaDAMedVGenerationConfig().to_dict()
    return {
        name: value
        for name, value in in_force.items()
        if name not in _NOT_OF_DECODING and (name in _ALWAYS_SHOWN or value != defaults.get(name))
    }


def model_fingerprint(model: torch.nn.Module, any_dtype: bool = False) -> str:
    """sha256 of the names, shapes and some values of all weights and of the sum of their bits, and of what adapters are
    scaled by and which are active: tells checkpoints apart in seconds, also where little differs.

    With `any_dtype` weights of the same values have the same digest in another dtype.
    """
    digest = hashlib.sha256()
    for place, module in model.named_modules():
        digest.update(f"{place} {[vars(module).get(name) for name in _OF_ADAPTERS]}".encode())
        children = tuple(f"{name}." for name, _ in module.named_children())
        with align_module_device(module):  # which fetches what is offloaded
            for name, tensor in module.state_dict().items():
                if name.startswith(children) or not isinstance(tensor, torch.Tensor):
                    continue
                if any_dtype:
                    tensor = tensor.float()
                digest.update(f"{place}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                values = tensor.detach().reshape(-1)
                if len(values):
                    places = torch.linspace(0, len(values) - 1, _VALUES_PER_TENSOR, device=values.device).round().long()
                    digest.update(values[places].float().cpu().numpy().tobytes())
                    if type(values) is torch.Tensor:  # a sum of whole numbers is the same on every device
                        digest.update(str(int(values.view(_BITS[values.itemsize]).sum(dtype=torch.int64))).encode())
    return digest.hexdigest()


def data_fingerprint(rows: Iterable[dict]) -> str:
    """sha256 of the texts and pictures of questions, with images as they are stored."""
    digest, files = hashlib.sha256(), {}
    for row in rows:
        image = row.get("image")
        path = image.get("path") if isinstance(image, dict) else image
        if not isinstance(path, (str, PathLike)):
            image = _image_fingerprint(image)
        else:
            if path not in files:
                files[path] = _image_fingerprint(image)
            image = files[path]
        digest.update(json.dumps({**row, "image": image}, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _image_fingerprint(image) -> str:
    source = image_source(image)
    if isinstance(source, (str, PathLike)):
        source = Path(source).read_bytes() if Path(source).is_file() else str(source).encode()  # a URL
    elif not isinstance(source, bytes):  # a PIL image or an array
        array = np.asarray(source)
        source = f"{array.shape} {array.dtype} ".encode() + array.tobytes()
    return hashlib.sha256(source).hexdigest()


__all__ = ["data_fingerprint", "decoding_in_force", "model_fingerprint", "run_settings"]
