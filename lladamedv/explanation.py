"""How an answer was denoised, as one HTML file or PNG picture: which token was committed when, and how surely.

Neither holds anything but the picture, the question, the answer and the options: no file name, metadata or date. All
text from people and models is escaped, and nothing is fetched from elsewhere.
"""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lladamedv.evaluation.answering import question_about
from lladamedv.modeling_lladamedv import (
    LLaDAMedVForConditionalGeneration,
    LLaDAMedVGenerationConfig,
    LLaDAMedVGenerationOutput,
)
from lladamedv.processing import LLaDAMedVProcessor

from .conversation import LEVELS, MASK, NOTICE, demo_notice, generate_answer, level_of, pieces, printable
from .paths import EXPLANATION_SUFFIXES, check_new_file, whole_file


_PREVIEW = (640, 640)
_NOT_SHOWN = ("bos_token_id", "pad_token_id", "return_dict_in_generate", "output_history", "transformers_version")


@dataclass(frozen=True)
class Token:
    """A token of an answer, or several that share a character.

    Attributes:
        text: what it says; `None` for what ended the answer.
        step: the forward pass, from 1, that committed it; `None` if it stayed a mask.
        confidence: its probability then, the least one if there are several; `None` if it stayed a mask.
    """

    text: str | None
    step: int | None
    confidence: float | None


@dataclass(frozen=True)
class Explanation:
    """An answer and how it came about.

    Attributes:
        image, question: what was asked.
        image_steps: what was done to the image when it was read, as [`read_medical_image`] says it.
        text: the answer, without white space around it.
        confidence: of the answer, as `generate` returns it; `None` if nothing was decided.
        summary: its confidence, length and cost, in one line.
        tokens: of the answer, in reading order, and at last what ended it, if anything did. A token that is committed
            never changes, so that these are all canvases, as far as the answer reaches.
        num_forwards: how many passes there were.
        options: those of `generate` that differ from its defaults.
        notices: what a reader must know about the model, a line each.
    """

    image: Image.Image
    question: str
    image_steps: Sequence[str]
    text: str
    confidence: float | None
    summary: str
    tokens: tuple[Token, ...]
    num_forwards: int
    options: dict
    notices: tuple[str, ...] = (NOTICE,)

    def save(self, file: Path) -> None:
        """Write the explanation as `file` says by its suffix; a file that exists is overwritten.

        Raises:
            ValueError: if `file` has another suffix than `.html` or `.png`, or cannot be written there.
        """
        check_new_file(file, EXPLANATION_SUFFIXES)
        with whole_file(file) as partial:
            if file.suffix.lower() == ".html":
                partial.write_text(to_html(self), encoding="utf-8")
            else:
                draw_explanation(self).save(partial, "PNG", optimize=True)


def explain_answer(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    image: Image.Image,
    question: str,
    image_steps: Sequence[str] = (),
    **options,
) -> Explanation:
    """Answer a question about an image, and keep how that was done; `options` are those of `generate`.

    Raises:
        ValueError: as `generate` does.
    """
    ids, output = generate_answer(model, processor, question_about(image, question), **options)
    used = model.resolve_generation_config(**options, return_dict_in_generate=True)
    defaults = vars(LLaDAMedVGenerationConfig())
    confidence = float(output.answer_confidence[0])
    return Explanation(
        image=image,
        question=question,
        image_steps=image_steps,
        text=processor.decode(ids, skip_special_tokens=True).strip(),
        confidence=None if math.isnan(confidence) else confidence,
        summary=summarize(output),
        tokens=tuple(answer_tokens(ids, output, processor.decode, model.config.mask_token_id)),
        num_forwards=int(output.num_forwards[0]),
        options={
            name: value
            for name, value in vars(used).items()
            if not name.startswith("_") and name not in _NOT_SHOWN and value != defaults[name]
        },
        notices=tuple(filter(None, (NOTICE, demo_notice(model)))),
    )


def answer_length(output: LLaDAMedVGenerationOutput) -> int:
    """Tokens of the first row's answer up to its end, without a suffix that was given."""
    return round(float(output.tokens_per_forward[0] * output.num_forwards[0]))


def answer_tokens(
    ids: Sequence[int],
    output: LLaDAMedVGenerationOutput,
    decode: Callable[[list[int]], str],
    mask_token_id: int,
) -> Iterator[Token]:
    """The tokens of an answer, as `generate_answer` returns it, and what ended it; not a suffix that was given."""
    length = answer_length(output)
    steps, confidences = output.commit_step[0].tolist(), output.commit_confidence[0].tolist()
    for text, places in pieces(ids[:length], decode, mask_token_id):
        if text is None:
            yield Token(MASK, None, None)
        else:
            yield Token(text, max(steps[place] for place in places) + 1, min(confidences[place] for place in places))
    if length < len(steps):
        yield Token(None, steps[length] + 1, confidences[length])


def summarize(output: LLaDAMedVGenerationOutput) -> str:
    """Confidence, length and cost of the first row's answer, in one line."""
    sure, passes = float(output.answer_confidence[0]), int(output.num_forwards[0])
    length = answer_length(output)
    line = f"confidence {'unknown' if math.isnan(sure) else f'{sure:.1%}'}, {length} token{'s' * (length != 1)}, "
    line += f"{passes} forward pass{'es' * (passes != 1)}"
    if output.abstained is not None and bool(output.abstained[0]):
        line += "; below the model's threshold: take it as no answer"
    return line


# HTML

_STYLE = (
    "body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; "
    "color: #111; background: #fff; }"
    "h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }"
    "figure { float: right; margin: 0 0 1rem 1rem; width: min(40%, 18rem); } img { width: 100%; border-radius: 6px; }"
    "dt { font-weight: bold; } dd { margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }"
    ".note { border: 2px solid #8a4b00; background: #fff6e5; padding: 8px 12px; clear: both; }"
    ".answer { line-height: 2.4; overflow-wrap: anywhere; } h2 { clear: both; }"
    ".token { display: inline-block; white-space: pre-wrap; border-radius: 4px; padding: 0 3px; margin-right: 3px; "
    "line-height: 1.7; text-underline-offset: 4px; } em { margin-left: .3em; }"
    ".token sub { font-size: .65rem; color: #333; margin-left: 2px; } li { margin: .4rem 0; }"
    "table { border-collapse: collapse; } caption { text-align: left; }"
    "th, td { border-bottom: 1px solid #999; padding: 3px 12px 3px 0; text-align: left; vertical-align: top; }"
    "thead th { white-space: nowrap; } .canvas td:last-child { white-space: pre-wrap; overflow-wrap: anywhere; }"
    ".canvas i { color: #767676; font-style: normal; } .canvas b { background: #d6ebff; }"
    + "".join(
        f".level-{index} {{ background: {level.color};"
        f"{f' text-decoration: underline {level.underline} 2px;' if level.underline else ''} }}"
        for index, level in enumerate(LEVELS)
    )
)


def image_as_html(image: Image.Image, alternative: str) -> str:
    """An `img` that holds the image itself, reduced to at most 640 pixels a side and without metadata."""
    preview, file = Image.fromarray(np.asarray(image.convert("RGB"))), io.BytesIO()
    preview.thumbnail(_PREVIEW)
    preview.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alternative)}">'


def to_html(explanation: Explanation) -> str:
    """The explanation as a page that needs nothing else, for browsers and for screen readers."""
    width, height = explanation.image.size
    facts = {
        "Question": explanation.question,
        "Answer": explanation.text,
        "How sure, how long": explanation.summary,
        "Options of generate": "\n".join(f"{name} = {value!r}" for name, value in explanation.options.items()),
    }
    legend = "".join(
        f'<li><span class="token level-{index}">{html.escape(level.name)}</span></li>'
        for index, level in enumerate(LEVELS)
    )
    answer, rows = [], []
    for token in explanation.tokens:
        if token.step is None:
            answer.append(f" {MASK}")
            continue
        shown = "<em>end</em>" if token.text is None else _escape(token.text)
        level, sure = level_of(token.confidence), f"{token.confidence:.1%}"
        answer.append(
            f'<span class="token level-{level}" title="step {token.step}, confidence {sure}">{shown}'
            f"<sub>{token.step}</sub></span>"
        )
        rows.append(f"<tr><td>{shown}</td><td>{token.step}</td><td>{sure}</td></tr>")
    canvases = "".join(
        f'<tr><th scope="row">{step}</th><td>{sum(_is_masked(token, step) for token in explanation.tokens)}</td>'
        f"<td>{''.join(_canvas_as_html(explanation.tokens, step))}</td></tr>"
        for step in range(explanation.num_forwards + 1)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>How an answer was denoised</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>How an answer was denoised</h1><p role="note" class="note">'
        f"<b>{html.escape(' '.join(explanation.notices))}</b></p>"
        f"<figure>{image_as_html(explanation.image, f'The image asked about, {width} by {height} pixels')}"
        f"<figcaption>{_escape('; '.join(explanation.image_steps))}</figcaption></figure>"
        f"<dl>{''.join(f'<dt>{name}</dt><dd>{_escape(value)}</dd>' for name, value in facts.items())}</dl>"
        "<h2>The answer, token by token</h2>"
        f'<p class="answer">{"".join(answer)}</p>'
        "<p>The small number is the step, that is the forward pass, that committed the token. Colour and underline are "
        "its confidence, the probability that it had then: how sure the model was, not whether it is right.</p>"
        f'<ul aria-label="Confidence">{legend}</ul>'
        "<h2>The canvas after every step</h2>"
        f'<table class="canvas"><caption>{MASK} is a mask; bold and coloured is what the step committed. What lies '
        "right of the end is left out.</caption>"
        '<thead><tr><th scope="col">Step</th><th scope="col">Masks</th><th scope="col">Canvas</th></tr></thead>'
        f"<tbody>{canvases}</tbody></table>"
        "<h2>Every token</h2>"
        '<table class="tokens"><thead><tr><th scope="col">Token</th><th scope="col">Step</th>'
        f'<th scope="col">Confidence</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</main></body></html>\n"
    )


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _is_masked(token: Token, step: int) -> bool:
    return token.step is None or token.step > step


def _canvas_as_html(tokens, step):
    """The canvas after a step, from 1; runs of masks, of old and of new tokens are one element each."""
    tags = {"mask": ('<i aria-hidden="true">', "</i>"), "old": ("", ""), "new": ("<b>", "</b>")}

    def kind(token):
        return "mask" if _is_masked(token, step) else "new" if token.step == step else "old"

    for name, run in groupby(tokens, kind):
        begin, end = tags[name]
        if name == "mask":
            texts = [f" {MASK}" for _ in run]
        else:
            texts = ["<em>end</em>" if token.text is None else _escape(token.text) for token in run]
        yield begin + "".join(texts) + end


# PNG: in units of which `scale` pixels make one

_WIDTH, _MARGIN, _PICTURE, _ROW = 1000, 24, 176, 21
_LEFT = _MARGIN + _PICTURE + 24  # where texts begin
_CELLS = _LEFT + 26  # where canvases begin, behind the numbers of their steps
_MOST_ROWS = 64  # of canvases; of more steps some are drawn
_INK, _GREY, _ANSWER, _EMPTY, _EDGE = "#1b2430", "#566070", "#0b5394", "#e6e9ee", "#0b5394"


@cache
def _font(size: float, ascii_only: bool) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which has little more than ASCII; for other texts a common one, if the machine has it."""
    for name in () if ascii_only else ("DejaVuSans.ttf", "Arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _text_width(text: str, size: float) -> float:
    return _font(2 * size, text.isascii()).getlength(text) / 2


def _wrap(text: str, size: float) -> Iterator[str]:
    """Lines that fit beside the picture: each the longest, in characters, with which all fit."""
    for line in printable(text).splitlines():
        for columns in range(min(len(line), 160), 0, -1):
            lines = textwrap.wrap(line.strip(), columns)
            if all(_text_width(each, size) <= _WIDTH - _MARGIN - _LEFT for each in lines):
                yield from lines
                break


def _lay_out(widths: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Lines of cells: the index and left edge of each."""
    lines, x = [[]], _CELLS
    for index, width in enumerate(widths):
        if lines[-1] and x + width > _WIDTH - _MARGIN:
            lines.append([])
            x = _CELLS
        lines[-1].append((index, x))
        x += width + 2
    return lines


class _Pen:
    """Draws on a white sheet."""

    def __init__(self, height: float, scale: float):
        self.scale = scale
        self.sheet = Image.new("RGB", (round(_WIDTH * scale), round(height * scale)), "white")
        self._draw = ImageDraw.Draw(self.sheet)

    def text(self, x: float, y: float, text: str, size: float, color: str = _INK, anchor: str = "lm") -> None:
        font = _font(size * self.scale, text.isascii())
        self._draw.text((x * self.scale, y * self.scale), text, fill=color, font=font, anchor=anchor)

    def box(self, x: float, y: float, width: float, fill: str, edge: str | None = None) -> None:
        """A cell whose row begins at `y`."""
        corners = [round(each * self.scale) for each in (x, y, x + width, y + _ROW - 3)]
        self._draw.rounded_rectangle(corners, 3 * self.scale, fill, edge, round(1.5 * self.scale) if edge else 0)

    def picture(self, x: float, y: float, image: Image.Image) -> None:
        fitting = ImageOps.contain(image, (round(_PICTURE * self.scale),) * 2, Image.Resampling.LANCZOS)
        self.sheet.paste(fitting, (round(x * self.scale), round(y * self.scale)))


def draw_explanation(explanation: Explanation, scale: float = 2.0, note: str = "") -> Image.Image:
    """The explanation as a picture, 1000 `scale` pixels wide and as high as it needs to be.

    Args:
        explanation: what to draw. If its steps do not fit into 64 lines, some are drawn, evenly spread.
        scale: pixels per unit; 2 for sharp pictures in a text, less for large sheets.
        note: a line more, below the answer.
    """
    tokens, options = explanation.tokens, explanation.options
    caption = ", ".join(f"{name} {options[name]}" for name in ("max_new_tokens", "block_length", "steps"))
    texts = (
        (explanation.question, 17, _INK),
        (explanation.text, 15, _ANSWER),
        (f"{explanation.summary} ({caption})", 11, _GREY),
        (note, 11, _GREY),
    )
    paragraphs = [(line, size, color) for text, size, color in texts for line in _wrap(text, size)]
    words = [_word(token) for token in tokens]
    widths = [max(16.0, _text_width(word, 12) + 8) for word in words]
    lines = _lay_out(widths)
    count = min(explanation.num_forwards + 1, max(2, _MOST_ROWS // len(lines)))
    steps = np.linspace(0, explanation.num_forwards, count).round().astype(int).tolist()

    top = _MARGIN + sum(1.5 * size for _, size, _ in paragraphs) + 10
    gap = 0 if len(lines) == 1 else 8  # between canvases
    bottom = max(top + (_ROW * count + 30) * len(lines) + gap * count + 20, _MARGIN + _PICTURE + 150)
    pen = _Pen(bottom + 26 + 14 * len(explanation.notices), scale)
    pen.picture(_MARGIN, _MARGIN, explanation.image)
    y = _MARGIN
    for line, size, color in paragraphs:
        pen.text(_LEFT, y + 0.75 * size, line, size, color)
        y += 1.5 * size
    y = top
    for previous, step in zip([-1, *steps], steps):
        pen.text(_CELLS - 10, y + _ROW / 2 - 1, str(step), 10, _GREY, "rm")
        for line in lines:
            for index, x in line:
                masked = _is_masked(tokens[index], step)
                new = not masked and tokens[index].step > previous
                color = _EMPTY if masked else LEVELS[level_of(tokens[index].confidence)].color
                center = x + widths[index] / 2
                pen.box(x, y, widths[index], color, _EDGE if new else None)
                if not masked:
                    pen.text(center, y + _ROW / 2 - 1.5, words[index], 12, anchor="mm")
                if not masked and step == explanation.num_forwards:
                    pen.text(center, y + _ROW + 7, str(tokens[index].step), 10, anchor="mm")
                    pen.text(center, y + _ROW + 19, f"{100 * tokens[index].confidence:.0f}", 8, _GREY, "mm")
            y += _ROW + 30 * (step == explanation.num_forwards)
        y += gap
    pen.text(_CELLS, y + 6, "step that committed the token; below it the confidence in %", 10, _GREY)

    y = _MARGIN + _PICTURE + 16
    swatches = [(_EMPTY, None, "mask"), ("white", _EDGE, "committed in this step")]
    swatches += [(level.color, None, f"confidence {level.name}") for level in LEVELS]
    for fill, edge, name in swatches:
        pen.box(_MARGIN, y, 22, fill, edge)
        pen.text(_MARGIN + 30, y + _ROW / 2 - 1, name, 10, _GREY)
        y += _ROW
    for number, line in enumerate(explanation.notices):
        pen.text(_MARGIN, bottom + 16 + 14 * number, line, 10, _GREY)
    return pen.sheet


def _word(token: Token) -> str:
    """What stands in a token's cell: on one line, and never nothing."""
    if token.text is None:
        return "end"
    text = printable(token.text, keep="")
    return (text.strip() or text)[:40]


__all__ = [
    "Explanation", "Token", "answer_length", "answer_tokens", "draw_explanation", "explain_answer", "image_as_html",
    "summarize", "to_html",
]  # fmt: skip
