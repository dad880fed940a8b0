"""What the browser app, the terminal chat and explanations share: how a conversation is asked about, how the canvas is
followed while it is denoised, and how its tokens become text and their confidence a look."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from lladamedv.evaluation.answering import question_about
from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationOutput
from lladamedv.processing import LLaDAMedVProcessor


NOTICE = "Research only. Not a medical device: nothing it says is a diagnosis, and no clinical decision may rest on it."
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
    """A streamer for `generate` that shows the canvas, as a list of ids, at first and after every forward pass.

    `put_draft` gets what is right of the finished blocks, but a block that the same pass has finished comes with the
    `put` that follows. So a draft that does not complete the canvas waits for that; or, where the canvas became shorter
    because a stop was found, for the next pass. Then a `put` is shorter than a block, because it ends at the stop.

    Args:
        length, block_length: of the canvas, in tokens.
        mask_token_id: the mask.
        show: called with each canvas; `generate` ends with what it raises.
    """

    def __init__(self, length: int, block_length: int, mask_token_id: int, show: Callable[[list[int]], object]):
        self._length, self._block_length, self._callback = length, block_length, show
        self._prompt_is_next = True
        self._finished: list[int] = []
        self._draft = [mask_token_id] * length  # that waits: at first for the prompt

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, then finished blocks, 1-D."""
        if self._prompt_is_next:
            self._prompt_is_next = False
        else:
            if len(tokens) < self._block_length:
                self.end()
            self._finished += tokens.tolist()
        self._show()

    def put_draft(self, tokens: torch.Tensor) -> None:
        """The unfinished rest of the canvas, `(1, rest)`."""
        self.end()
        self._draft = tokens[0].tolist()
        if len(self._finished) + len(self._draft) == self._length:
            self._show()

    def end(self) -> None:
        """Show the draft that waits, if there is one."""
        if self._draft:
            self._show()

    def _show(self):
        canvas = self._finished + self._draft
        self._length, self._draft = len(canvas), []
        self._callback(canvas)


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
    "LEVELS", "MASK", "NOTICE", "CanvasStreamer", "Level", "chat_about", "generate_answer", "level_of", "pieces",
    "printable",
]  # fmt: skip
