"""The processor of a checkpoint as it was released, which has a tokenizer beside it and nothing more.

Converting, asking and training take it from here, so that all three see the same prompt. What the checkpoint holds is
for `modeling_lladamedv`; callers hand it over.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from .image_processing_lladamedv import LLaDAMedVImageProcessor
from .processing_lladamedv import CHAT_TEMPLATES, LLaDAMedVProcessor


def checkpoint_processor(checkpoint, presets: dict, special_tokens: dict[str, int]) -> LLaDAMedVProcessor:
    """The processor that stands beside a checkpoint or, for a released one, the one that goes with its preset.

    Args:
        checkpoint: a `Checkpoint`.
        presets, special_tokens: `PRESETS` and `SPECIAL_TOKENS` of `released_lladamedv`.

    Raises:
        ValueError: for the reasons of [`released_processor`]; other errors as from `from_pretrained`.
    """
    if not checkpoint.is_released:
        return LLaDAMedVProcessor.from_pretrained(checkpoint.folder)
    template = presets[checkpoint.preset].chat_template
    return released_processor(checkpoint.folder, checkpoint.config, template, special_tokens)


def released_processor(folder: Path, config, template: str, special_tokens: dict[str, int]) -> LLaDAMedVProcessor:
    """The processor of a released model, with all templates.

    Args:
        folder: with `tokenizer.json`.
        config: of the model.
        template: name of the default template, one of `CHAT_TEMPLATES`.
        special_tokens: ids by the tokens that the model's weights know.

    Raises:
        ValueError: if the tokenizer is missing, cannot be read, or has other ids than the weights.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"The folder {str(folder)!r} holds no tokenizer.json; give `tokenizer`.")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception for files that it cannot read
        raise ValueError(f"The tokenizer in {str(folder)!r} cannot be read: {error}") from error
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|startoftext|>", "<|endoftext|>", "<|endoftext|>"
    tokenizer.chat_template = None  # the processor carries the templates
    options = {}
    if not config.text_only:
        side = config.vision_config.image_size
        options = {name: getattr(config, name) for name in ("vision_aspect_ratio", "image_grid_pinpoints")}
        options |= {"size": {"height": side, "width": side}, "patch_size": config.vision_config.patch_size}
    templates = {"default": CHAT_TEMPLATES[template], **CHAT_TEMPLATES}
    known = tokenizer.get_vocab()
    processor = LLaDAMedVProcessor(LLaDAMedVImageProcessor(**options), tokenizer, chat_template=templates)
    ids = {token: known.get(token) for token in special_tokens} | {"<image>": processor.image_token_id}
    due = special_tokens | {"<image>": config.image_token_id}
    if wrong := [f"{token} {found} instead of {due[token]}" for token, found in ids.items() if found != due[token]]:
        raise ValueError(
            f"The tokenizer in {str(folder)!r} is not the one of these weights: it has {', '.join(wrong)}."
        )
    return processor
