"""`load_model`: the one way from a name to a model and its processor, for all commands and for Python.

Nothing heavy is imported before a model is loaded: the command line reads what is allowed here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch

    from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
    from lladamedv.processing import LLaDAMedVProcessor


DEMO = "demo"  # as a name: the tiny model that comes with this package
DEMO_MODEL = Path(__file__).parent / "demo_model"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_CONFIG, _ADAPTERS = "config.json", "adapter_config.json"


def load_model(
    name: str | Path = DEMO,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
) -> tuple[LLaDAMedVForConditionalGeneration, LLaDAMedVProcessor]:
    """Load a model and its processor, ready to answer.

    Args:
        name: "demo" for the tiny model that comes with this package; or a folder or Hub id of a model of this package,
            of LLaDA, LLaDA-V or LLaDA-MedV weights as they were released (with their tokenizer beside them), or of
            adapters (PEFT), which are merged into the model that they name.
        dtype: "auto", "float32", "bfloat16" or "float16". "auto" is the checkpoint's on a GPU and float32 on a CPU.
        device: "auto" or a device of PyTorch. "auto" is a GPU (CUDA, then MPS) if there is one, or else the CPU.
        revision: of `name` on the Hub.

    Returns:
        The model, in evaluation mode and on the device, and its processor. The model has what it was calibrated on as
        `calibration`, or `None`.

    Raises:
        ValueError: if `dtype` or `device` is not allowed or cannot be used, which is known before anything is loaded;
            if there is nothing of that name, or what is there is no such model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` is {dtype!r}; allowed are {', '.join(DTYPES)}.")
    device = find_device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    folder = find_folder(name)
    try:
        model, processor, folder = _load(folder or name, dtype, revision)
    except Exception as error:  # the libraries raise many kinds for files that hold something else than they expect
        where = "cannot be loaded" if folder else "is no folder, and cannot be loaded from the Hub"
        raise ValueError(f"The model {str(name)!r} {where}: {' '.join(str(error).split())}") from error
    from lladamedv.evaluation.answer_sets import attach_calibration

    attach_calibration(model.eval().to(device), processor, folder)
    return model, processor


def check_name(name: str | Path) -> Path | None:
    """The folder that a name means; `None` for a Hub id, which is not asked for.

    Raises:
        ValueError: if it is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        what = "a file" if folder.exists() else "no folder"
        raise ValueError(f"{str(name)!r} is {what}; allowed are a folder and a Hub id (OWNER/NAME).")
    return None


def find_folder(name: str | Path) -> Path | None:
    """The folder that a model's name means; `None` for a Hub id. Files are looked for and not read.

    Raises:
        ValueError: if there is no such folder and it is no Hub id, or the folder holds no model.
    """
    folder = DEMO_MODEL if str(name) == DEMO else check_name(name)
    # Whatever has the name counts: what is no regular file is refused, by name, when the folder is checked.
    if folder is not None and not any(os.path.lexists(folder / file) for file in (_CONFIG, _ADAPTERS)):
        inside = sorted(file.parent.name for config in (_CONFIG, _ADAPTERS) for file in folder.glob(f"*/{config}"))
        raise ValueError(
            f"{str(name)!r} is a folder with neither {_CONFIG} (a model) nor {_ADAPTERS} (adapters)."
            + (f" Such are in it: {', '.join(inside)}." if inside else "")
        )
    return folder


def find_device(device: str | torch.device = "auto") -> torch.device:
    """The device that is meant, tried before a large model is loaded for it.

    Raises:
        ValueError: if it cannot be used.
    """
    import torch

    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"The device {str(device)!r} cannot be used: {reason}") from error
    if found.type == "meta":
        raise ValueError("The device 'meta' cannot be used: it holds no numbers.")
    return found


def _load(name: str | Path, dtype: str, revision: str | None):
    from lladamedv.hub_cards.checks import check_folder
    from lladamedv.modeling_lladamedv.released_lladamedv import resolve_source
    from lladamedv.modeling_lladamedv.stored_weights_lladamedv import read_json
    from lladamedv.processing import LLaDAMedVProcessor

    folder = resolve_source(name, revision)
    if not (folder / _ADAPTERS).is_file():
        return *_load_whole(folder, name, dtype), folder
    from peft import PeftModel  # takes a second

    adapters = read_json(check_folder(folder) / _ADAPTERS)
    base = adapters.get("base_model_name_or_path") or ""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError("it holds adapters without adapter_model.safetensors; pickled weights are not loaded.")
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise ValueError(f"`base_model_name_or_path` in {_ADAPTERS} is {base!r}; there is no such model here.")
    base = find_folder(base) or base
    model, processor = _load_whole(resolve_source(base, adapters.get("revision")), base, dtype)
    # Without memory for what the adapters' configuration says before their weights are seen.
    model = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True).merge_and_unload()
    if (folder / "processor_config.json").is_file():
        processor = LLaDAMedVProcessor.from_pretrained(folder)
    return model, processor, folder


def _load_whole(folder: Path, name: str | Path, dtype: str):
    """A model that is no adapters, and its processor."""
    from lladamedv.hub_cards.checks import check_model
    from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
    from lladamedv.modeling_lladamedv.presets_lladamedv import PRESETS, SPECIAL_TOKENS
    from lladamedv.processing.released import checkpoint_processor

    checkpoint = check_model(folder, name)
    processor = checkpoint_processor(checkpoint, PRESETS, SPECIAL_TOKENS)
    return checkpoint.load(LLaDAMedVForConditionalGeneration, dtype=dtype), processor


__all__ = ["DEMO", "DEMO_MODEL", "DTYPES", "check_name", "find_device", "find_folder", "load_model"]
