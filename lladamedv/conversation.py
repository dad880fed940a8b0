"""A conversation about an image, for `ask`, `chat` and the app: how it is asked, how its answer is followed while it is
denoised, and how the answer's tokens become text whose look is their confidence."""

from __future__ import annotations

import copy
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

import torch
from PIL import Image

from lladamedv.evaluation.answer_sets import distance_warning, picture_distances, picture_warning
from lladamedv.evaluation.answering import encode_chats, question_about
from lladamedv.modeling_lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.continuous_batching_lladamedv import ContinuousBatch
from lladamedv.modeling_lladamedv.generation_lladamedv import LLaDAMedVGenerationOutput
from lladamedv.processing import LLaDAMedVProcessor

from .evidence import Evidence
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


def level_styles(prefix: str) -> str:
    """CSS of the levels, as classes `{prefix}level-0` and so on."""
    return "".join(
        f".{prefix}level-{index} {{ background: {level.color}; "
        + (f"text-decoration: underline {level.underline} 2px; }}" if level.underline else "}")
        for index, level in enumerate(LEVELS)
    )


class Token(NamedTuple):
    """A token of an answer, or several that share a character.

    Attributes:
        text: what it says, `MASK` for a mask; `None` for what ended the answer.
        step: the forward pass, from 1, that committed it, the last one if there are several; `None` for a mask.
        confidence: its probability then, the least one if there are several; `None` for a mask.
    """

    text: str | None
    step: int | None
    confidence: float | None

    @property
    def level(self) -> int:
        """Index of the confidence's level in `LEVELS`."""
        return next(index for index, level in enumerate(LEVELS) if self.confidence >= level.least)


@dataclass(frozen=True)
class Reply:
    """An answer and how it came about.

    Attributes:
        text: without special tokens and without white space around it.
        confidence: as `generate` returns it; `None` if nothing was decided.
        tokens: in reading order, and at last what ended the answer, if anything did. A token that is committed never
            changes, so that these are all canvases, as far as the answer reaches.
        length: tokens up to the end.
        num_forwards: how many passes there were.
        abstained: whether the confidence is below `abstention_threshold`.
        suffix: the text behind the answer that `generation_suffix` gave.
        image_reliance: as `generate` returns it, in nats; `None` without `output_image_reliance`.
        warning: that the picture is unlike those that the model was calibrated on, if it is.
        ids: of each token of the answer, without what ended it.
    """

    text: str
    confidence: float | None
    tokens: tuple[Token, ...]
    length: int
    num_forwards: int
    abstained: bool
    suffix: str
    image_reliance: float | None = None
    warning: str | None = None
    ids: tuple[tuple[int, ...], ...] = ()

    @property
    def words(self) -> list[tuple[str, tuple[int, int]]]:
        """Words of the answer, each with the (start, end) of its ids."""
        found, end = [], 0
        for token, ids in zip(self.tokens, self.ids):
            text, start, end = token.text, end, end + len(ids)
            if found and not text[:1].isspace():
                before, (start, _) = found.pop()
                text = before + text
            found.append((text, (start, end)))
        return found

    @property
    def summary(self) -> str:
        """Confidence, length and cost, in one line."""
        sure = "unknown" if self.confidence is None else f"{self.confidence:.1%}"
        line = f"confidence {sure}, {self.length} token{'s' * (self.length != 1)}, "
        line += f"{self.num_forwards} forward pass{'es' * (self.num_forwards != 1)}"
        line += "" if self.image_reliance is None else f", {self.image_reliance:+.2f} nats from the picture"
        return line + ("; below the model's threshold: take it as no answer" if self.abstained else "")


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


def reply_to(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    image: Image.Image,
    question: str,
    turns: Sequence[tuple[str, str]] = (),
    show: Callable[[list[Token]], object] | None = None,
    **options,
) -> Reply:
    """Answer a question about an image.

    Args:
        model, processor: as loaded.
        image: what the conversation is about.
        question: the new question.
        turns: the questions before it, with their answers.
        show: called with the canvas before the first and after every forward pass, up to its stop; `generate` ends with
            what it raises.
        options: those of `generate`.

    Raises:
        ValueError: as `generate` does.
    """
    asked = _ask(model, processor, image, question, turns, options)
    if show is not None:
        asked["streamer"] = _Canvases(model, options, lambda *canvas: show(_tokens(*canvas, processor, model)))
    warning = picture_warning(model, asked.get("pixel_values"))
    return _reply(model, processor, asked, model.generate(**asked), warning)


class SharedConversations:
    """Conversations of many people with one model, whose answers are denoised side by side.

    Use it from any number of threads.

    Args:
        model, processor: as loaded.
    """

    def __init__(self, model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor):
        self._model, self._processor = model, processor
        self._batch = ContinuousBatch(model, describe_pictures=picture_distances(model))
        # A tokenizer that encodes must not be used by two threads: one thread at a time asks, with its own.
        self._asking, self._own_processor = Lock(), copy.deepcopy(processor)
        self._batch.start()

    def close(self) -> None:
        """End all answers; no other ones can be had."""
        self._batch.stop()

    def reply_to(
        self, image: Image.Image, question: str, turns: Sequence[tuple[str, str]] = (), **options
    ) -> Iterator[list[Token] | Reply]:
        """Answer a question as [`reply_to`] does: yields the canvases that it shows, and at last the reply.

        If the iterator is closed before, its place is free for others after the forward pass that runs.

        Raises:
            ValueError: as [`ContinuousBatch.submit`] does.
            RuntimeError: after [`close`].
        """
        model, canvases = self._model, SimpleQueue()
        with self._asking:
            asked = _ask(model, self._own_processor, image, question, turns, options)
            streamer = _Canvases(model, options, lambda *canvas: canvases.put(canvas))
            request = self._batch.submit(**asked, streamer=streamer)
        request.future.add_done_callback(lambda _: canvases.put(None))
        try:
            for canvas in iter(canvases.get, None):
                yield _tokens(*canvas, self._processor, model)
        finally:
            self._batch.cancel(request)
        warning = distance_warning(model, streamer.distances)
        yield _reply(model, self._processor, asked, request.future.result(), warning)

    def find_evidence(self, image: Image.Image, question: str, reply: Reply, turns=(), **options) -> Evidence:
        """As [`find_evidence`] does."""
        with self._asking:
            inputs = _inputs(self._model, self._own_processor, image, question, turns)
        return explain_reply(self._model, inputs, reply, **options)


def find_evidence(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    image: Image.Image,
    question: str,
    reply: Reply,
    turns: Sequence[tuple[str, str]] = (),
    **options,
) -> Evidence:
    """Where in the image an answer comes from, as `explain_image` finds it by occlusion.

    Args:
        model, processor, image, question, turns: as of [`reply_to`].
        reply: its answer.
        options: those of [`explain_reply`].

    Raises:
        ValueError: as `explain_image` does, such as for an empty answer.
    """
    return explain_reply(model, _inputs(model, processor, image, question, turns), reply, **options)


def explain_reply(
    model: LLaDAMedVForConditionalGeneration,
    inputs: Mapping[str, torch.Tensor],
    reply: Reply,
    word: int | None = None,
    callback: Callable[[int, int], object] | None = None,
) -> Evidence:
    """The same for what the processor makes of the question.

    Args:
        inputs: of the processor.
        word: number of the word of the answer that is explained; by default all of them together.
        callback: called with the rows done and those there will be; what it raises ends the search.
    """
    ids = [each for token in reply.ids for each in token]
    spans = None if word is None else [reply.words[word][1]]
    has_end = len(reply.tokens) > len(reply.ids)
    found = model.explain_image(**inputs, answer=ids, spans=spans, append_eos=has_end, callback=callback)
    return Evidence(found.maps[0][0].numpy(), float(found.whole_fall[0, 0]))


def _ask(model, processor, image, question, turns, options) -> dict:
    """Arguments of `generate`, for the last question of a conversation."""
    inputs = _inputs(model, processor, image, question, turns)
    return {**inputs, "tokenizer": processor.tokenizer, **options, "return_dict_in_generate": True}


def _inputs(model, processor, image, question, turns) -> Mapping[str, torch.Tensor]:
    """What the processor makes of the last question of a conversation."""
    texts = [text for turn in turns for text in turn] + [question]
    later = [
        {"role": ("user", "assistant")[index % 2], "content": [{"type": "text", "text": text}]}
        for index, text in enumerate(texts)
    ]
    return encode_chats(model, processor, [question_about(image, texts[0]) + later[1:]])


def _reply(model, processor, asked: dict, output: LLaDAMedVGenerationOutput, warning: str | None) -> Reply:
    """What was answered, in words, and how."""
    ids = output.sequences[0, asked["input_ids"].shape[1] :].tolist()
    length = round(float(output.tokens_per_forward[0] * output.num_forwards[0]))  # up to the end, without a suffix
    steps = [step + 1 for step in output.commit_step[0].tolist()]
    confidences = output.commit_confidence[0].tolist()
    confidence, reliance = (
        None if values is None or math.isnan(values[0]) else float(values[0])
        for values in (output.answer_confidence, output.image_reliance)
    )
    tokens = _tokens(ids[:length], steps, confidences, processor, model)
    if length < len(steps):
        tokens.append(Token(None, steps[length], confidences[length]))
    return Reply(
        text=processor.decode(ids, skip_special_tokens=True).strip(),
        confidence=confidence,
        tokens=tuple(tokens),
        length=length,
        num_forwards=int(output.num_forwards[0]),
        abstained=output.abstained is not None and bool(output.abstained[0]),
        suffix=processor.decode(ids[length:], skip_special_tokens=True),
        image_reliance=reliance,
        warning=warning,
        ids=tuple(tuple(ids[place] for place in group) for group in _groups(ids[:length], processor, model)),
    )


class _Canvases:
    """A streamer for `generate` with these options: shows the ids of each canvas, and the step and confidence of each
    of them."""

    def __init__(self, model, options: dict, show: Callable[[list[int], list[int], list[float]], object]):
        self._length = model.resolve_generation_config(**options, return_dict_in_generate=True).max_new_tokens
        self._mask, self._show, self._passes, self._begun = model.config.mask_token_id, show, 0, False
        self._steps, self.distances = {}, []

    def put_descriptions(self, distances: list[float]) -> None:
        """How unusual the pictures are."""
        self.distances = distances

    def put(self, tokens: torch.Tensor) -> None:
        """First the prompt, when the loop begins; then finished blocks, which the canvases hold, too."""
        if not self._begun:
            self._begun = True
            self._show([self._mask] * self._length, [], [])

    def put_canvas(self, tokens: torch.Tensor, confidence: torch.Tensor) -> None:
        """The canvas after a forward pass, and its tokens' confidence, both `(1, canvas)`."""
        self._passes += 1
        ids = tokens[0].tolist()
        for place, token in enumerate(ids):
            if token != self._mask:
                self._steps.setdefault(place, self._passes)
        self._show(ids, [self._steps.get(place) for place in range(len(ids))], confidence[0].tolist())

    def end(self) -> None:
        """The answer is whole: nothing that was not shown."""


def _tokens(
    ids: Sequence[int],
    steps: Sequence[int | None],
    confidences: Sequence[float],
    processor: LLaDAMedVProcessor,
    model: LLaDAMedVForConditionalGeneration,
) -> list[Token]:
    """The tokens of a canvas; several ids are one where they share a character."""
    return [
        Token(MASK, None, None)
        if ids[group[0]] == model.config.mask_token_id
        else Token(
            processor.decode([ids[place] for place in group]),
            max(steps[place] for place in group),
            min(confidences[place] for place in group),
        )
        for group in _groups(ids, processor, model)
    ]


def _groups(ids: Sequence[int], processor, model) -> Iterator[list[int]]:
    """Places of the ids of each token."""
    group: list[int] = []
    for place, token in enumerate(ids):
        is_mask = token == model.config.mask_token_id
        if is_mask and group:
            yield group
            group = []
        group.append(place)
        # UTF-8 has at most four bytes.
        if is_mask or len(group) == 4 or not processor.decode([ids[each] for each in group]).endswith("\ufffd"):
            yield group
            group = []
    if group:
        yield group


__all__ = [
    "DEMO_NOTICE", "LEVELS", "MASK", "NOTICE", "Level", "Reply", "SharedConversations", "Token", "demo_notice",
    "explain_reply", "find_evidence", "level_styles", "printable", "reply_to",
]  # fmt: skip
