"""How an answer was denoised, as one HTML file or PNG picture: which token was committed when, and how surely.

Neither holds anything but the picture, the question, the answer and the options: no file name, metadata or date. All
text from people and models is escaped, and nothing is fetched from elsewhere.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment
from markupsafe import Markup, escape
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.generation_options_lladamedv import OPTIONS
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.pictures import as_url, reduced

from .conversation import LEVELS, MASK, NOTICE, Reply, Token, demo_notice, level_styles, printable, reply_to
from .evidence import Evidence, draw_evidence, evidence_legend
from .paths import EXPLANATION_SUFFIXES, check_new_file, whole_file


_NOT_SHOWN = ("bos_token_id", "pad_token_id", "return_dict_in_generate", "output_history", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class Explanation(Reply):
    """An answer and how it came about: what [`reply_to`] returns, and what was asked.

    Attributes:
        image, question: what was asked.
        image_steps: what was done to the image when it was read, as [`read_medical_image`] says it.
        options: those of `generate` that differ from its defaults.
        notices: what a reader must know about the model, a line each.
        evidence: where in the image the answer comes from, for pages.
    """

    image: Image.Image
    question: str
    image_steps: Sequence = ()
    options: dict
    notices: tuple[str, ...] = (NOTICE,)
    evidence: Evidence | None = None

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
    image_steps: Sequence = (),
    **options,
) -> Explanation:
    """Answer a question about an image, and keep how that was done; `options` are those of `generate`.

    Raises:
        ValueError: as `generate` does.
    """
    in_force = options_in_force(model, **options)
    reply = reply_to(model, processor, image, question, **options)
    return Explanation(
        **vars(reply),
        image=image,
        question=question,
        image_steps=image_steps,
        options=in_force,
        notices=tuple(filter(None, (NOTICE, demo_notice(model), reply.warning))),
    )


def options_in_force(model: LLaDAMedVForConditionalGeneration, **options) -> dict:
    """The options of `generate` that differ from its defaults, with those of the model itself.

    Raises:
        ValueError: as `generate` does.
    """
    used = model.resolve_generation_config(**options, return_dict_in_generate=True)
    in_force = {name: getattr(used, name) for name in OPTIONS if name not in _NOT_SHOWN}
    return {name: value for name, value in in_force.items() if value != OPTIONS[name].default}


# HTML


def _escaped(value: object) -> Markup:
    """Text for HTML that also means nothing to Gradio's template languages, which the app's HTML goes through."""
    if isinstance(value, Markup):
        return value
    return Markup(str(escape(printable(str(value)))).translate({ord(sign): f"&#{ord(sign)};" for sign in "${}`"}))


_templates = Environment(autoescape=True, finalize=_escaped, trim_blocks=True, lstrip_blocks=True)


@cache
def _template(source: str):
    return _templates.from_string(source)


def render(template: str, **values) -> Markup:
    """HTML from a Jinja template, whose values are escaped unless they are HTML themselves."""
    return Markup(_template(template).render(values))


def image_as_url(image: Image.Image, evidence: Evidence | None = None, side: int = 640) -> str:
    """A URL that holds the image itself, reduced to at most `side` pixels a side and without metadata, and what is
    laid over it."""
    preview = reduced(image, side)
    if evidence is not None:
        preview = draw_evidence(preview, *evidence, legend=False)
    return as_url(preview)


_EVIDENCE = """\
<ul>
{% for colour, line in lines %}
<li>{% if colour %}<span aria-hidden="true" style="display: inline-block; width: 1em; height: 1em; background:
{{- colour }}"></span> {{ ("orange", "blue")[loop.index0] }}: {% endif %}{{ line }}</li>
{% endfor %}
</ul>
<p>A map says what the model's answer rests on, not whether the answer is right.</p>"""
_PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>How an answer was denoised</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; clear: both; }
figure { float: right; margin: 0 0 1rem 1rem; width: min(40%, 18rem); } img { width: 100%; border-radius: 6px; }
dt { font-weight: bold; } dd { margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
figure.map { float: none; margin: 0; }
.note { border: 2px solid #8a4b00; background: #fff6e5; padding: 8px 12px; clear: both; }
.answer { line-height: 2.4; overflow-wrap: anywhere; }
.token { display: inline-block; white-space: pre-wrap; border-radius: 4px; padding: 0 3px; margin-right: 3px;
  line-height: 1.7; text-underline-offset: 4px; } em { margin-left: .3em; }
.token sub { font-size: .65rem; color: #333; margin-left: 2px; } li { margin: .4rem 0; }
table { border-collapse: collapse; } caption { text-align: left; }
th, td { border-bottom: 1px solid #999; padding: 3px 12px 3px 0; text-align: left; vertical-align: top; }
thead th { white-space: nowrap; } .canvas td:last-child { white-space: pre-wrap; overflow-wrap: anywhere; }
.canvas i { color: #767676; font-style: normal; } .canvas b { background: #d6ebff; }
{{ styles }}</style></head>
{% macro said(token) %}{% if token.text is none %}<em>end</em>{% else %}{{ token.text }}{% endif %}{% endmacro %}
<body><main><h1>How an answer was denoised</h1>
<p role="note" class="note"><b>{{ notices | join(" ") }}</b></p>
<figure><img src="{{ url }}" alt="The image asked about, {{ image.width }} by {{ image.height }} pixels">
<figcaption>{{ image_steps | join("; ") }}</figcaption></figure>
<dl>
{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl>
<h2>The answer, token by token</h2>
<p class="answer">
{%- for token in tokens %}
{% if token.step is none %} {{ token.text }}{% else %}
<span class="token level-{{ token.level }}" title="step {{ token.step }}, confidence {{ '%.1f%%' % (100 *
token.confidence) }}">{{ said(token) }}<sub>{{ token.step }}</sub></span>
{%- endif %}{% endfor %}
</p>
<p>The small number is the step, that is the forward pass, that committed the token. Colour and underline are its
confidence, the probability that it had then: how sure the model was, not whether it is right.</p>
<ul aria-label="Confidence">
{% for level in levels %}
<li><span class="token level-{{ loop.index0 }}">{{ level.name }}</span></li>
{% endfor %}
</ul>
{% if evidence %}
<h2>Where in the image the answer comes from</h2>
<figure class="map"><img src="{{ map_url }}" alt="The image with the map laid over it"></figure>
{{ legend }}
{% endif %}
<h2>The canvas after every step</h2>
<table class="canvas"><caption>{{ mask }} is a mask; bold and coloured is what the step committed. What lies right of
the end is left out.</caption>
<thead><tr><th scope="col">Step</th><th scope="col">Masks</th><th scope="col">Canvas</th></tr></thead><tbody>
{% for masks, runs in canvases %}
<tr><th scope="row">{{ loop.index0 }}</th><td>{{ masks }}</td><td>
{%- for kind, run in runs %}
{% if kind == "mask" %}<i aria-hidden="true">{% elif kind == "new" %}<b>{% endif %}
{%- for token in run %}
{% if kind == "mask" %} {{ mask }}{% else %}{{ said(token) }}{% endif %}
{%- endfor %}
{% if kind == "mask" %}</i>{% elif kind == "new" %}</b>{% endif %}
{%- endfor %}</td></tr>
{% endfor %}
</tbody></table>
<h2>Every token</h2>
<table class="tokens"><thead><tr><th scope="col">Token</th><th scope="col">Step</th><th scope="col">Confidence</th></tr>
</thead><tbody>
{% for token in tokens if token.step is not none %}
<tr><td>{{ said(token) }}</td><td>{{ token.step }}</td><td>{{ "%.1f%%" % (100 * token.confidence) }}</td></tr>
{% endfor %}
</tbody></table></main></body></html>
"""


def show_legend(evidence: Evidence) -> Markup:
    """What the colours of a map mean, and what they do not."""
    return render(_EVIDENCE, lines=evidence_legend(*evidence))


def to_html(explanation: Explanation) -> str:
    """The explanation as a page that needs nothing else, for browsers and for screen readers."""
    facts = {
        "Question": explanation.question,
        "Answer": explanation.text,
        "How sure, how long": explanation.summary,
        "Options of generate": "\n".join(f"{name} = {value!r}" for name, value in explanation.options.items()),
    }
    return render(
        _PAGE, styles=Markup(level_styles("")), notices=explanation.notices, url=image_as_url(explanation.image),
        image=explanation.image, image_steps=list(map(str, explanation.image_steps)), facts=facts,
        tokens=explanation.tokens, levels=LEVELS, mask=MASK, **_map(explanation),
        canvases=[_canvas(explanation.tokens, step) for step in range(explanation.num_forwards + 1)],
    )  # fmt: skip


def _map(explanation: Explanation) -> dict:
    evidence = explanation.evidence
    if evidence is None:
        return {}
    url = image_as_url(explanation.image, evidence)
    return {"evidence": evidence, "map_url": url, "legend": show_legend(evidence)}


def _kind(token: Token, step: int, previous: int) -> str:
    """What a token is in the canvas after a step: a mask, new since the canvas before, or old."""
    if token.step is None or token.step > step:
        return "mask"
    return "new" if token.step > previous else "old"


def _canvas(tokens: Iterable[Token], step: int) -> tuple[int, list[tuple[str, list[Token]]]]:
    """How many masks the canvas after a step has, and its runs of masks, of old and of new tokens."""
    runs = [(kind, list(run)) for kind, run in groupby(tokens, lambda token: _kind(token, step, step - 1))]
    return sum(len(run) for kind, run in runs if kind == "mask"), runs


# PNG: in units of which `scale` pixels make one

_WIDTH, _MARGIN, _PICTURE, _ROW = 1000, 24, 176, 21
_LEFT = _MARGIN + _PICTURE + 24  # where texts begin
_CELLS = _LEFT + 26  # where canvases begin, behind the numbers of their steps
_MOST_ROWS = 64  # of canvases; of more steps some are drawn
_INK, _GREY, _BLUE, _EMPTY = "#1b2430", "#566070", "#0b5394", "#e6e9ee"


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


def _word(token: Token) -> str:
    """What stands in a token's cell: on one line, and never nothing."""
    text = "end" if token.text is None else printable(token.text, keep="")
    return (text.strip() or text)[:40]


class _Pen:
    """Draws on a white sheet."""

    def __init__(self, height: float, scale: float):
        self.scale = scale
        self.sheet = Image.new("RGB", (round(_WIDTH * scale), round(height * scale)), "white")
        self._draw = ImageDraw.Draw(self.sheet)

    def text(self, x: float, y: float, text: str, size: float, color: str = _GREY, anchor: str = "lm") -> None:
        font = _font(size * self.scale, text.isascii())
        self._draw.text((x * self.scale, y * self.scale), text, fill=color, font=font, anchor=anchor)

    def box(self, x: float, y: float, width: float, fill: str, edge: str | None = None) -> None:
        """A cell whose row begins at `y`."""
        corners = [round(each * self.scale) for each in (x, y, x + width, y + _ROW - 3)]
        self._draw.rounded_rectangle(corners, 3 * self.scale, fill, edge, round(1.5 * self.scale) if edge else 0)


def draw_explanation(explanation: Explanation, scale: float = 2.0, note: str = "") -> Image.Image:
    """The explanation as a picture, 1000 `scale` pixels wide and as high as it needs to be.

    Args:
        explanation: what to draw. If its steps do not fit into 64 lines, some are drawn, evenly spread.
        scale: pixels per unit; 2 for sharp pictures in a text, less for large sheets.
        note: a line more, below the answer.
    """
    tokens, last = explanation.tokens, explanation.num_forwards
    caption = ", ".join(f"{name} {explanation.options[name]}" for name in ("max_new_tokens", "block_length", "steps"))
    paragraphs = [
        (line, size, color)
        for text, size, color in (
            (explanation.question, 17, _INK),
            (explanation.text, 15, _BLUE),
            (f"{explanation.summary} ({caption})", 11, _GREY),
            (note, 11, _GREY),
        )
        for line in _wrap(text, size)
    ]
    words = [_word(token) for token in tokens]
    widths = [max(16.0, _text_width(word, 12) + 8) for word in words]
    lines = _lay_out(widths)
    count = min(last + 1, max(2, _MOST_ROWS // len(lines)))
    steps = np.linspace(0, last, count).round().astype(int).tolist()

    top = _MARGIN + sum(1.5 * size for _, size, _ in paragraphs) + 10
    gap = 0 if len(lines) == 1 else 8  # between canvases
    bottom = max(top + (_ROW * count + 30) * len(lines) + gap * count + 20, _MARGIN + _PICTURE + 150)
    pen = _Pen(bottom + 26 + 14 * len(explanation.notices), scale)
    fitting = ImageOps.contain(explanation.image, (round(_PICTURE * scale),) * 2, Image.Resampling.LANCZOS)
    pen.sheet.paste(fitting, (round(_MARGIN * scale),) * 2)
    y = _MARGIN
    for line, size, color in paragraphs:
        pen.text(_LEFT, y + 0.75 * size, line, size, color)
        y += 1.5 * size
    y = top
    for previous, step in zip([-1, *steps], steps):
        pen.text(_CELLS - 10, y + _ROW / 2 - 1, str(step), 10, anchor="rm")
        for line in lines:
            for index, x in line:
                token, center = tokens[index], x + widths[index] / 2
                kind = _kind(token, step, previous)
                if kind == "mask":
                    pen.box(x, y, widths[index], _EMPTY)
                    continue
                pen.box(x, y, widths[index], LEVELS[token.level].color, _BLUE if kind == "new" else None)
                pen.text(center, y + _ROW / 2 - 1.5, words[index], 12, _INK, "mm")
                if step == last:
                    pen.text(center, y + _ROW + 7, str(token.step), 10, _INK, "mm")
                    pen.text(center, y + _ROW + 19, f"{100 * token.confidence:.0f}", 8, anchor="mm")
            y += _ROW + 30 * (step == last)
        y += gap
    pen.text(_CELLS, y + 6, "step that committed the token; below it the confidence in %", 10)
    _draw_legend(pen)
    for number, line in enumerate(explanation.notices):
        pen.text(_MARGIN, bottom + 16 + 14 * number, line, 10)
    return pen.sheet


def _draw_legend(pen: _Pen) -> None:
    """What the looks of cells mean, below the picture."""
    swatches = [(_EMPTY, None, "mask"), ("white", _BLUE, "committed in this step")]
    swatches += [(level.color, None, f"confidence {level.name}") for level in LEVELS]
    for row, (fill, edge, name) in enumerate(swatches):
        y = _MARGIN + _PICTURE + 16 + row * _ROW
        pen.box(_MARGIN, y, 22, fill, edge)
        pen.text(_MARGIN + 30, y + _ROW / 2 - 1, name, 10)


__all__ = [
    "Explanation", "draw_explanation", "explain_answer", "image_as_url", "options_in_force", "render", "show_legend",
    "to_html",
]  # fmt: skip
