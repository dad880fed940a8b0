"""`lladamedv convert` and `lladamedv init`: complete model folders from released weights, or from their parts.

The weights themselves are handled by `modeling_lladamedv/convert_checkpoint.py`; here is what lies around them (config,
tokenizer, processor, prompts, remote code, card), and how a folder comes into being whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from transformers.dynamic_module_utils import custom_object_save

import lladamedv
from lladamedv.hub_cards import Component, ModelFacts, find_component, hash_files, save_model_card
from lladamedv.hub_cards.checks import check_folder
from lladamedv.hub_cards.push import check_target, push_folder
from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationConfig
from lladamedv.modeling_lladamedv.convert_checkpoint import plan_conversion, write_weights
from lladamedv.modeling_lladamedv.presets_lladamedv import PRESETS, SPECIAL_TOKENS
from lladamedv.modeling_lladamedv.released_lladamedv import read_checkpoint, resolve_source
from lladamedv.modeling_lladamedv.stored_weights_lladamedv import KeyReport
from lladamedv.processing.released import released_processor

from .loading import DTYPES
from .paths import check_new_folder, check_shard_size


_SPARE_BYTES = 2**26  # for everything that is not a weight


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: str | None = None,
    preset: str | None = None,
    max_shard_size: int | str = "2GB",
    revision: str | None = None,
    push: str | None = None,
    public: bool = False,
    report: Callable[[str], object] = print,
) -> KeyReport:
    """Convert a released checkpoint into a complete folder of ours: `out` is whole, or not there.

    Args:
        source: folder or Hub id with LLaDA, LLaDA-V or LLaDA-MedV weights in one of the released layouts.
        out: folder to create; it must not exist, or be empty.
        tokenizer: folder or Hub id of the tokenizer, if it is not in `source`.
        vision_tower: folder or Hub id of the stand-alone SigLIP: for its configuration if `source` does not carry it
            and it is not SigLIP2 so400m/14-384, and for its weights if `source` holds none.
        dtype: "float32", "bfloat16" or "float16"; by default the source's.
        preset: one of `PRESETS`: which prompt and which generation options the model expects. By default known from
            the source's name, or else its layout.
        max_shard_size: bytes or a text such as "2GB"; at most one shard is held in memory.
        revision: of `source` on the Hub.
        push: Hub id to upload the folder to when it is complete.
        public: whether a repository that `push` creates is public; it is private otherwise.
        report: called with each line of text.

    Returns:
        What became of each key of the source.

    Raises:
        ValueError: before anything is written, if an argument or the source is not what it should be, or the disk has
            not enough room; and with nothing left behind, if writing fails.
    """
    out = _check_options(out, dtype, max_shard_size)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"`preset` is {preset!r}; allowed are {', '.join(PRESETS)}.")
    if push is not None:  # before hours of conversion
        check_target(push, private=not public, argument="push")
    tower = None if vision_tower is None else check_folder(resolve_source(vision_tower))
    checkpoint = read_checkpoint(check_folder(resolve_source(source, revision)), tower, source)
    plan = plan_conversion(checkpoint, tower)
    text_only = plan.config.text_only
    preset = preset or checkpoint.preset
    if (PRESETS[preset].chat_template == "llada") != text_only:
        kind = "text-only" if text_only else "vision-language"
        raise ValueError(
            f"`preset` is {preset!r}, but {str(source)!r} is a {kind} model; see `lladamedv convert --help`."
        )
    medical = ["llada-medv", "llava-med-data"] if preset.startswith("llada-medv") else []
    facts = {
        "kind": "converted",
        "description": PRESETS[preset].description,
        "components": [*map(find_component, medical), *([Component("LLaDA-V weights", None)] * (preset == "llada-v"))],
        "relation": None if text_only else "finetune",
    }
    sources = {"checkpoint": source, "tokenizer": tokenizer, "vision tower": vision_tower}
    _write_folder(plan, out, checkpoint.folder, preset, dtype, max_shard_size, sources, facts, report)
    if push is not None:
        try:
            push_folder(out, push, private=not public, report=report)
        except ValueError as error:
            raise ValueError(
                f"`push` failed: {error} The folder {str(out)!r} is complete; `lladamedv push {out} {push}` tries "
                "again."
            ) from None
    return plan.report


def initialize_checkpoint(
    language_model: str | Path,
    vision_tower: str | Path,
    out: str | Path,
    projector: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    aspect_ratio: str = "anyres_max_4",
    seed: int = 0,
    max_shard_size: int | str = "2GB",
    report: Callable[[str], object] = print,
) -> KeyReport:
    """Put a new model together, as the paper does: LLaDA, SigLIP2, and a projector that is untrained or from stage 1.

    Args:
        language_model: folder or Hub id of LLaDA-8B-Instruct, in either of its layouts.
        vision_tower: folder or Hub id of SigLIP2: the tower or the whole model.
        out: folder to create; it must not exist, or be empty.
        projector: file that stage 1 wrote: safetensors, or `.bin`, which is unpickled with
            `torch.load(weights_only=True)` and refused if it holds anything but tensors.
        tokenizer: folder or Hub id of the tokenizer, if it is not in `language_model`.
        dtype: as for [`convert_checkpoint`].
        aspect_ratio: the model's `vision_aspect_ratio`; the paper aligns with "square" and trains with "anyres_max_4".
        seed: for the untrained weights.
        max_shard_size, report: as for [`convert_checkpoint`].

    Returns:
        What became of each key of the parts.

    Raises:
        ValueError: as [`convert_checkpoint`].
    """
    out = _check_options(out, dtype, max_shard_size)
    tower = check_folder(resolve_source(vision_tower))
    checkpoint = read_checkpoint(check_folder(resolve_source(language_model)))
    plan = plan_conversion(checkpoint, tower, aspect_ratio, None if projector is None else Path(projector), seed)
    facts = {
        "kind": "initialized",
        "description": f"A new LLaDA-MedV, with {'an un' if projector is None else 'a '}trained projector",
        # A projector of one's own has the licence of its training data.
        "components": [] if projector is None else [Component("the projector", None)],
    }
    sources = {
        "language model": language_model,
        "vision tower": vision_tower,
        "projector": projector or "untrained",
        "tokenizer": tokenizer,
    }
    _write_folder(plan, out, checkpoint.folder, "llada-medv", dtype, max_shard_size, sources, facts, report)
    return plan.report


def _check_options(out: str | Path, dtype: str | None, max_shard_size: int | str) -> Path:
    if dtype is not None and dtype not in DTYPES[1:]:
        raise ValueError(f"`dtype` is {dtype!r}; allowed are {', '.join(DTYPES[1:])}.")
    check_shard_size(max_shard_size)
    return check_new_folder(out)


def _write_folder(
    plan, out: Path, tokenizer: Path, preset: str, dtype: str | None, max_shard_size, sources: dict, facts: dict, report
) -> None:
    """Write everything beside `out` and move it there when it is complete; `config.json` comes last."""
    dtype = None if dtype is None else getattr(torch, dtype)
    settings, config, num_bytes = PRESETS[preset], plan.config, sum(plan.num_bytes(dtype).values())
    if sources["tokenizer"] is not None:
        tokenizer = check_folder(resolve_source(sources["tokenizer"]))
    processor = released_processor(tokenizer, config, settings.chat_template, SPECIAL_TOKENS)
    # A Hub id as it is; of a local folder only the last part, because cards are read by others.
    named = {part: name for part, name in sources.items() if name is not None}
    sources = {part: Path(name).name if Path(name).exists() else str(name) for part, name in named.items()}
    summary = plan.report.summary()
    for line in (*summary, f"preset {preset}: {settings.description}"):
        report(line)
    needed = num_bytes + _SPARE_BYTES
    free = shutil.disk_usage(next(parent for parent in out.parents if parent.exists())).free
    if free < needed:
        raise ValueError(
            f"`out` is {str(out)!r}, which needs {needed / 1e9:.2f} GB; only {free / 1e9:.2f} GB are free there."
        )
    with _whole_or_not_at_all(out) as folder:
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Converting weights") as bar:
            write_weights(plan, folder, dtype, max_shard_size, progress=bar.update)
        processor.save_pretrained(folder)
        LLaDAMedVGenerationConfig(**settings.generation_options()).save_pretrained(folder)
        account = {"source": sources, "version": lladamedv.__version__, "preset": preset, **asdict(plan.report)}
        text = json.dumps(account, indent=2) + "\n"
        (folder / "conversion_report.json").write_text(text, encoding="utf-8")
        config.dtype = plan.output_dtype("lm_head.weight", dtype)
        facts["components"] = [*map(find_component, settings.base_models), *facts["components"]]
        card = ModelFacts(
            name=out.name,
            version=lladamedv.__version__,
            base_models=settings.base_models,
            medical=preset.startswith("llada-medv"),
            text_only=config.text_only,
            generation=settings.generation_options(),
            chat_template=settings.chat_template,
            num_parameters=sum(torch.Size(weight.shape).numel() for weight in plan.weights.values()),
            dtype=str(config.dtype).removeprefix("torch."),
            source=sources,
            key_report=summary,
            hashes=hash_files(folder),
            **facts,
        )
        save_model_card(card, folder)
        with torch.device("meta"):
            model = LLaDAMedVForConditionalGeneration(config)
        config.architectures = [type(model).__name__]
        custom_object_save(model, folder, config=config)  # the remote code
        config.save_pretrained(folder)
    report(f"wrote {out}")


@contextmanager
def _whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if all goes well and vanishes if not.

    What a killed process left there is no model (its `config.json` is missing) and is cleared by the next attempt.
    """
    partial = out.with_name(f".{out.name}.partial")
    lock = FileLock(partial / ".lock")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"`out` is {str(out)!r}, which another process is writing.") from error
    except OSError as error:
        raise ValueError(f"`out` is {str(out)!r}, which cannot be written: {error}") from error
    try:
        for leftover in partial.iterdir():
            if leftover.name != ".lock":
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield partial
        (partial / ".lock").unlink(missing_ok=True)
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`out` is {str(out)!r}, which cannot be written: {error}") from error
    finally:
        lock.release()
        shutil.rmtree(partial, ignore_errors=True)
