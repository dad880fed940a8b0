"""A model's answers to a batch of chats: the text, how sure the model is, and what the answer cost.

Everything here that asks a model (the benchmarks, the analysis of decoding, the lmms-eval plug-in) asks it this way.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import align_module_device
from datasets import Dataset

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationConfig
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.datasets import image_source


_VALUES_PER_TENSOR = 256
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a value in bytes
_OF_ADAPTERS = ("scaling", "_active_adapter", "_disable_adapters")  # attributes of PEFT's layers
_NO_MATTER_IN_CONFIG = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache"}
_ALWAYS_TOLD = {"max_new_tokens", "block_length", "steps", "remasking"}
# These change what else is returned, or say where the options are from.
_NO_MATTER = {
    "return_dict_in_generate", "output_history", "output_cache_drift", "transformers_version", "_from_model_config",
    "_commit_hash",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without special tokens and without white space around it.
        confidence: geometric mean of the probabilities of its tokens, in [0, 1]; `None` if nothing was decided.
        num_tokens: its length up to the token that ended it.
        num_forwards: forward passes that it took part in.
        seconds: wall-clock time of its batch, divided by the batch's size.
    """

    text: str
    confidence: float | None
    num_tokens: int
    num_forwards: int
    seconds: float

    def as_record(self) -> dict:
        """The answer as a part of a line of predictions, where its text is called `prediction`."""
        fields = asdict(self)
        return {"prediction": fields.pop("text"), **fields}


def answer_batch(
    model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor, chats: Sequence[list[dict]], **options
) -> list[Answer]:
    """Answer all chats in one batch. A row's answer does not depend on what it is batched with.

    Args:
        model, processor: as loaded.
        chats: each a list of messages with their images, as `apply_chat_template` takes them.
        options: those of `generate`.

    Returns:
        An [`Answer`] for each chat.

    Raises:
        ValueError: as `generate` does.
    """
    model.eval()  # with dropout, an answer would be a matter of chance
    started = time.perf_counter()
    inputs = processor.apply_chat_template(
        list(chats), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    output = model.generate(
        **inputs.to(model.device), tokenizer=processor.tokenizer, **options, return_dict_in_generate=True
    )
    new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    confidences = [None if math.isnan(value) else value for value in output.answer_confidence.tolist()]
    forwards = output.num_forwards.tolist()
    lengths = (output.tokens_per_forward * output.num_forwards).round().long().tolist()
    seconds = (time.perf_counter() - started) / len(texts)
    return [Answer(*row, seconds) for row in zip(texts, confidences, lengths, forwards)]


def question_about(image, question: str) -> list[dict]:
    """A chat of one question about one image."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def open_image(processor: LLaDAMedVProcessor, image, question_id: str):
    """A question's image as an 8-bit RGB `PIL.Image`, read as everywhere (`fetch_images`), also out of an archive.

    Raises:
        ValueError: naming the question, if it cannot be read.
    """
    try:
        return processor.image_processor.fetch_images(image_source(image))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"The image of question {question_id!r} cannot be read: {error}") from error


def undecoded(records: Sequence[dict] | Dataset) -> Sequence[dict] | Dataset:
    """The same records, of which `datasets` does not decode the images: it would read some otherwise, and not DICOM."""
    if isinstance(records, Dataset) and isinstance(records.features.get("image"), datasets.Image):
        return records.cast_column("image", datasets.Image(decode=False))
    return records


def model_fingerprint(model: torch.nn.Module) -> str:
    """sha256 of the names, shapes and some values of all weights and of the sum of their bits, and of what adapters are
    scaled by and which are active: tells checkpoints apart in seconds, also where little differs."""
    digest = hashlib.sha256()
    for place, module in model.named_modules():
        digest.update(f"{place} {[vars(module).get(name) for name in _OF_ADAPTERS]}".encode())
        weights = {}
        with align_module_device(module):  # which fetches what is offloaded
            module._save_to_state_dict(weights, f"{place}.", keep_vars=False)
            for name, tensor in weights.items():
                if not isinstance(tensor, torch.Tensor):
                    continue
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                values = tensor.detach().reshape(-1)
                if len(values):
                    places = torch.linspace(0, len(values) - 1, _VALUES_PER_TENSOR, device=values.device).round().long()
                    digest.update(values[places].float().cpu().numpy().tobytes())
                    if type(values) is torch.Tensor:  # a sum of whole numbers is the same on every device
                        digest.update(str(int(values.view(_BITS[values.itemsize]).sum(dtype=torch.int64))).encode())
    return digest.hexdigest()


def _config_in_force(config: dict) -> dict:
    """A model's configuration without what changes no answer, or is recorded elsewhere."""
    return {
        name: _config_in_force(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _NO_MATTER_IN_CONFIG
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
        if name not in _NO_MATTER and (name in _ALWAYS_TOLD or value != defaults.get(name))
    }


def run_settings(
    model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor, options: dict, rows: Iterable[dict]
) -> dict:
    """All that answers depend on, for the settings of a run, as it is in force and not as somebody asked for it.

    Args:
        model, processor: as loaded.
        options: of `generate`, as the caller gives them.
        rows: what is asked, not decoded: a run does not go on with other texts or pictures under the same ids.

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
        "data_sha256": _fingerprint(rows),
    }


def _fingerprint(rows: Iterable[dict]) -> str:
    digest, files = hashlib.sha256(), {}
    for row in rows:
        image = row.get("image")
        path = image.get("path") if isinstance(image, dict) else image
        if isinstance(path, (str, PathLike)):
            if path not in files:
                files[path] = _image_fingerprint(image)
            image = files[path]
        else:
            image = _image_fingerprint(image)
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


__all__ = [
    "Answer", "answer_batch", "decoding_in_force", "model_fingerprint", "open_image", "question_about", "run_settings",
    "undecoded",
]  # fmt: skip
