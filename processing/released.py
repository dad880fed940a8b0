"""The processor of a checkpoint as it was released, which has a tokenizer beside it and nothing more.

Converting, asking and training take it from here, so that all three see the same prompt. What the checkpoint holds is
for `modeling_lladamedv`; callers hand it over.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from .image_processing_lladamedv import LLaDAMedVImageProcessor
from .processing_lladamedv import CHAT_TEMPLATES, LLaDAMedVProcessor


def load_tokenizer(folder: Path, special_tokens: dict[str, int]) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, with LLaDA's roles for its special tokens and with `<image>`.

    Raises:
        ValueError: if it is missing, cannot be read, or lacks a special token or ids.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"The folder {str(folder)!r} holds no tokenizer.json; give `tokenizer`.")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception for files that it cannot read
        raise ValueError(f"The tokenizer in {str(folder)!r} cannot be read: {error}") from error
    vocabulary = tokenizer.get_vocab()
    if absent := [token for token in special_tokens if token not in vocabulary]:
        raise ValueError(f"The tokenizer in {str(folder)!r} lacks the special tokens {', '.join(absent)}.")
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|startoftext|>", "<|endoftext|>", "<|endoftext|>"
    tokenizer.chat_template = None  # the processor carries the templates
    image_id = LLaDAMedVProcessor(LLaDAMedVImageProcessor(), tokenizer).image_token_id
    if max(tokenizer.get_vocab().values()) != len(tokenizer) - 1:
        raise ValueError(
            f"The tokenizer in {str(folder)!r} has {len(vocabulary)} tokens but ids up to {max(vocabulary.values())}; "
            f"with unused ids among them, <image> would get the id {image_id} of another token."
        )
    return tokenizer


def build_processor(
    config, tokenizer: PreTrainedTokenizerFast, template: str, special_tokens: dict[str, int]
) -> LLaDAMedVProcessor:
    """The processor of a model, with all templates, of which `template` is the default.

    Raises:
        ValueError: if the vocabulary has LLaDA's size, but the tokenizer other ids than LLaDA's.
    """
    if config.text_config.vocab_size == type(config)().text_config.vocab_size:
        moved = [f"{token} {found} instead of {wanted}" for token, wanted in special_tokens.items()
                 if (found := tokenizer.convert_tokens_to_ids(token)) != wanted]  # fmt: skip
        if moved:
            raise ValueError(f"The tokenizer is not the one of these weights: it has {', '.join(moved)}.")
    images = LLaDAMedVImageProcessor()
    if not config.text_only:
        side = config.vision_config.image_size
        images = LLaDAMedVImageProcessor(
            size={"height": side, "width": side},
            patch_size=config.vision_config.patch_size,
            vision_aspect_ratio=config.vision_aspect_ratio,
            image_grid_pinpoints=config.image_grid_pinpoints,
        )
    templates = {"default": CHAT_TEMPLATES[template], **CHAT_TEMPLATES}
    return LLaDAMedVProcessor(images, tokenizer, chat_template=templates)
