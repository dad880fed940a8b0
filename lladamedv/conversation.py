"""What the browser app, the terminal chat and explanations share: how a conversation is asked about, how the canvas is
followed while it is denoised, and how its tokens become text and their confidence a look."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from lladamedv.evaluation.answering import question_about
from lladamedv.modeling_lladamedv import (
    LLaDAMedVConfig,
    LLaDAMedVForConditionalGeneration,
    LLaDAMedVGenerationOutput,
)
from lladamedv.processing import LLaDAMedVProcessor

from .loading import DEMO_MODEL


NOTICE = "Research only. Not a medical device: nothing it says is a diagnosis, and no clinical decision may rest on it."
DEMO_NOTICE = (
    "This is the demo model, or one made from it: it knows only the synthetic pictures of `lladamedv demo`. About any "
    "other picture its answers mean nothing, however sure it is."
)
MASK = "░"


class Level(NamedTuple):
    """How tokens look that are at least so sure: never by their colour alone."""

    least: float
    name: str
    color: str
    underline: str | None  # a style of CSS


LEVELS = (
    Level(0.9, "at least 90 %", "#d6ebff", None),
    Level(0.7, "70 to 90 %", "#fff2c2", "dotted"),
    Level(0.5, "50 to 70 %", "#ffdcb8", "dashed"),
    Level(0.0, "below 50 %", "#ffc9c9", "wavy"),
)


def level_of(confidence: float) -> int:
    """Index of the confidence's level in `LEVELS`."""
    return next(index for index, level in enumerate(LEVELS) if confidence >= level.least)


def demo_notice(model: LLaDAMedVForConditionalGeneration) -> str | None:
    """`DEMO_NOTICE` if a model has the demo's few hundred words, as it and all that is trained from it do."""
    words = LLaDAMedVConfig.from_pretrained(DEMO_MODEL).text_config.vocab_size
    return DEMO_NOTICE if model.config.text_config.vocab_size == words else None


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Text that does nothing to a terminal or to the order of its neighbours: controls are escaped, as in `\x1b`."""
    risky = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in risky and letter not in keep
        else letter
        for letter in text
    )


def chat_about(image: Image.Image, turns: Iterable[tuple[str, str]], question: str) -> list[dict]:
    """Messages for the chat template: the image, questions with their answers so far, and a new question."""
    texts = [text for turn in turns for text in turn] + [question]
    later = [
        {"role": ("user", "assistant")[index % 2], "content": [{"type": "text", "text": text}]}
        for index, text in enumerate(texts)
    ]
    return question_about(image, texts[0]) + later[1:]


def generate_answer(
    model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor, messages: list[dict], **options
) -> tuple[list[int], LLaDAMedVGenerationOutput]:
    """Answer a chat: the ids of the answer, and all that `generate`, whose `options` these are, returns."""
    inputs = processor.apply_chat_template(
        [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, tokenizer=processor.tokenizer, **options, return_dict_in_generate=True)
    return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), output


class CanvasStreamer:
    """A streamer for `generate` that shows the canvas at first and after every forward pass.

    Args:
        length: of the canvas, in tokens.
        mask_token_id: the mask.
        show: called with each canvas up to its stop, a list of ids, and with the confidence of each of its tokens, NaN
            for those that were not committed; `generate` ends with what it raises.
    """

    def __init__(self, length: int, mask_token_id: int, show: Callable[[list[int], list[float]], object]):
        self._first = [mask_token_id] * length
        self._show = show

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, whereupon the loop begins; then finished blocks, which are in the canvases, too."""
        if self._first:
            self._show(self._first, [float("nan")] * len(self._first))
            self._first = []

    def put_canvas(self, tokens: torch.Tensor, confidence: torch.Tensor) -> None:
        """The canvas after a forward pass, and its tokens' confidence, both `(1, canvas)`."""
        self._show(tokens[0].tolist(), confidence[0].tolist())

    def end(self) -> None:
        """The answer is whole: nothing that was not shown."""


def pieces(
    tokens: Sequence[int], decode: Callable[[list[int]], str], mask_token_id: int
) -> Iterator[tuple[str | None, list[int]]]:
    """Text and positions of each token; of several tokens where they share a character, and `None` for a mask."""
    group: list[int] = []
    for position, token in enumerate(tokens):
        if token == mask_token_id:
            if group:
                yield decode([tokens[each] for each in group]), group
            yield None, [position]
            group = []
            continue
        group.append(position)
        text = decode([tokens[each] for each in group])
        if not text.endswith("\ufffd") or len(group) == 4:  # UTF-8 has at most four bytes
            yield text, group
            group = []
    if group:
        yield decode([tokens[each] for each in group]), group


__all__ = [
    "DEMO_NOTICE", "LEVELS", "MASK", "NOTICE", "CanvasStreamer", "Level", "chat_about", "demo_notice",
    "generate_answer", "level_of", "pieces", "printable",
]  # fmt: skip
