"""The conversation of the browser app: questions, answers side by side, which picture they are about, and how they are
saved, as one HTML file or one Markdown file.

Saved files hold pictures, texts and the options that were used, and no file name, metadata or date.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from markupsafe import Markup

from .app_looks import ANSWER_STYLE
from .app_viewer import View
from .conversation import LEVELS, MASK, Reply, Token, printable
from .explanation import render


# HTML, of which white space is shown inside .ldm-text

_SURE = "{{ '%.1f%%' % (100 * token.confidence) }}"
_TOKENS = (
    "{% for token in tokens %}{% if token.step is none %}"
    f'<span class="ldm-mask" title="still masked" aria-hidden="true">{2 * MASK}</span>'
    "{% elif token.text %}"
    '<span class="ldm-token ldm-level-{{ token.level }}"{% if words %} data-word="{{ words[loop.index0] }}"{% endif %} '
    f'title="confidence {_SURE}">{{{{ token.text }}}}</span>'
    "{% endif %}{% endfor %}"
)
_DRAFT = f'<span class="ldm-text">{_TOKENS}</span>'
_ANSWER = """\
<span class="ldm-text">{{ spans or "(an empty answer)" }}</span>
{% if reply.warning %}<p class="ldm-alert"><b>The model does not know pictures like this. </b>{{ reply.warning }}</p>
{% endif %}
<p><b>{{ reply.how_sure | capitalize }}</b>: {{ reply.summary }}. {{ settings }}.</p>
<details><summary>Confidence of every token</summary><table class="ldm-table"><thead><tr>
<th scope="col">Token</th><th scope="col">Confidence</th></tr></thead><tbody>
{% for token in reply.tokens if token.text and token.step is not none %}
<tr><td>{{ token.text }}</td><td>{{ "%.1f%%" % (100 * token.confidence) }}</td></tr>
{% endfor %}
</tbody></table></details>"""
_TURN = """\
<article class="ldm-turn"><p class="ldm-question"><b>You: </b><span>{{ question }}</span></p><div class="ldm-answers">
{% for title, answer in answers %}
<div class="ldm-answer"><b>{{ title }}: </b>{{ answer }}</div>
{% endfor %}
</div></article>"""
_LOG = """\
<section role="log" aria-live="polite" aria-label="Conversation" aria-busy="{{ busy | lower }}">
{% for view, turns in groups %}
<p class="ldm-view"><img src="{{ view.thumbnail }}" alt=""><span>About image {{ loop.index }}: {{ view.said }}
{%- if not turns %}. No question about it yet; those above and their answers are not sent along{% endif %}.</span></p>
{% for turn in turns %}{{ turn }}{% endfor %}
{% endfor %}
{% if empty %}{{ nothing }}{% endif %}
</section>"""
_LEGEND = """\
<section aria-label="Legend" class="ldm-legend"><p>Confidence: the probability of a token when it was committed. It says
how sure the model was, not whether it is right. Point at a token for its own
{%- if mask %}; click it to see where in the image its word comes from{% endif %}.</p><ul>
{% for level in levels %}
<li><span class="ldm-token ldm-level-{{ loop.index0 }}">{{ level.words }}: {{ level.name }}</span></li>
{% endfor %}
{% if mask %}<li>{{ mask }} still masked</li>{% endif %}</ul></section>"""
_PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>A conversation about images</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff; }
figure { margin: 0 0 1rem; } figure img { width: min(100%, 24rem); }
dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
{{ style }}</style></head>
<body><main><h1>A conversation about images</h1>
<p role="note" class="ldm-note"><b>{{ notices | join(" ") }}</b></p>
{% for view, turns in groups %}
<h2>Image {{ loop.index }}</h2>
<figure><img src="{{ view.url }}" alt="Image {{ loop.index }}, {{ view.size[1] }} by {{ view.size[0] }} pixels">
<figcaption>{{ view.size[1] }} by {{ view.size[0] }} pixels (width by height). What was done to them:
{{ view.steps | join("; ") }}</figcaption></figure>
{% for turn in turns %}{{ turn.shown }}
<details><summary>Models and options of generate</summary><dl>
{% for answer in turn.answers %}
<dt>{{ answer.title }}</dt>
<dd>{% for name, value in answer.options.items() %}{{ name }} = {{ value }}<br>{% endfor %}</dd>
{% endfor %}
</dl></details>
{% endfor %}
{% endfor %}
{{ legend }}
</main></body></html>
"""


@dataclass(frozen=True)
class Answer:
    """One answer to a question.

    Attributes:
        side: `"A"` or, for that of the second settings, `"B"`.
        model: its name.
        settings: in words.
        options: those of `generate` in force that differ from its defaults.
        reply: the answer itself.
        shown: it as HTML.
    """

    side: str
    model: str
    settings: str
    options: dict
    reply: Reply
    shown: Markup

    @property
    def title(self) -> str:
        return f"{self.side}, {self.model}"


@dataclass(frozen=True, eq=False)
class Turn:
    """A question about a picture, and its answers, of which the newest stand last."""

    question: str
    view: View
    answers: tuple[Answer, ...]

    @property
    def shown(self) -> Markup:
        return _show_turn(self.question, [(each, each.shown) for each in self.answers])

    def said(self, side: str) -> str:
        """The answer that a follow-up of this side goes on from."""
        return next((each for each in self.answers[::-1] if each.side == side), self.answers[-1]).reply.text


def show_answer(reply: Reply, settings: str, turn: int, place: int) -> Markup:
    """An answer, shaded, and the confidence of its tokens as a table; a word knows its turn, answer and number.

    It holds a mask where the model proposed the mask itself until the steps were used up.
    """
    begins = (index > 0 and (token.text or " ")[:1].isspace() for index, token in enumerate(reply.tokens))
    words = [f"{turn}-{place}-{word}" for word in accumulate(begins, initial=0)][1:]
    spans = render(_TOKENS, tokens=reply.tokens, words=words)
    return render(_ANSWER, spans=spans, reply=reply, settings=settings.capitalize())


def show_draft(tokens: Sequence[Token]) -> Markup:
    return render(_DRAFT, tokens=tokens)


def show_legend_of_tokens(masks: bool = True) -> Markup:
    mask = render(_TOKENS, tokens=[Token(MASK, None, None)]) if masks else ""
    return render(_LEGEND, levels=LEVELS, mask=mask)


def _show_turn(question: str, answers: Sequence[tuple[Answer | str, Markup]]) -> Markup:
    """A question and its answers, which say whose they are where there are several."""
    if len(answers) == 1:
        answers = [("Model", answers[0][1])]
    else:
        answers = [(each if isinstance(each, str) else each.title, shown) for each, shown in answers]
    return render(_TURN, question=question, answers=answers)


def _groups(turns: Iterable[Turn]) -> list[tuple[View, list[Turn]]]:
    """Turns by the picture that they are about."""
    return [(view, list(group)) for view, group in groupby(turns, lambda turn: turn.view)]


def show_log(
    turns: Sequence[Turn],
    view: View | None,
    pending: tuple[str, Sequence[tuple[Answer | str, Markup]]] | None = None,
    nothing: Markup | str = "",
) -> str:
    """The conversation.

    Args:
        turns: what was asked and answered.
        view: the picture that the next question is about.
        pending: a question whose answers are on their way, and these.
        nothing: what stands there while there is no question.
    """
    groups = [(of, [turn.shown for turn in group]) for of, group in _groups(turns)]
    if view is not None and (turns or pending) and (not groups or groups[-1][0] is not view):
        groups.append((view, []))
    if pending is not None:
        groups[-1][1].append(_show_turn(*pending))
    return str(render(_LOG, groups=groups, busy=pending is not None, empty=not groups, nothing=nothing))


# Saved conversations


def to_html(turns: Sequence[Turn], notices: Sequence[str]) -> str:
    """A conversation as a page that needs nothing else and runs nothing."""
    legend = show_legend_of_tokens(masks=False)
    return str(render(_PAGE, groups=_groups(turns), notices=notices, style=Markup(ANSWER_STYLE), legend=legend))


def to_markdown(turns: Sequence[Turn], notices: Sequence[str]) -> str:
    """A conversation as CommonMark with its pictures inside; markup in it means nothing."""
    lines = ["# A conversation about images", f"**{_plain(' '.join(notices))}**"]
    for number, (view, group) in enumerate(_groups(turns), 1):
        height, width = view.size
        steps = _plain("; ".join(view.steps))
        lines += [f"## Image {number}", f"![Image {number}]({view.url})"]
        lines += [f"{width} by {height} pixels (width by height). What was done to them: {steps}"]
        for turn in group:
            lines += ["### Question", _quote(turn.question)]
            for answer in turn.answers:
                reply = answer.reply
                lines += [f"**{_plain(answer.title)}:**", _quote(reply.text or "(an empty answer)")]
                if reply.warning:
                    lines.append(f"**The model does not know pictures like this.** {_plain(reply.warning)}")
                options = ", ".join(f"{name} = {value!r}" for name, value in answer.options.items())
                said = f"{reply.how_sure}: {reply.summary}. {answer.settings.capitalize()}. Options: {options}."
                lines.append(_plain(said.capitalize()))
    return "\n\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that means nothing to Markdown or HTML."""
    text = re.sub(r"[\\`*_{}\[\]<>#|~&$!]", r"\\\g<0>", printable(text))
    text = re.sub(r"(?m)^([ \t]*\d+)([.)])", r"\1\\\2", text)
    return re.sub(r"(?m)^[ \t]*([+=-])", r"\\\1", text)


def _quote(text: str) -> str:
    """Lines of a quotation, each of which stays a line."""
    lines = [line.strip() for line in _plain(text).splitlines()]
    return "\n".join(f"> {line}" + "\\" * bool(line and after) for line, after in zip(lines, [*lines[1:], ""]))


__all__ = [
    "Answer", "Turn", "show_answer", "show_draft", "show_legend_of_tokens", "show_log", "to_html", "to_markdown",
]  # fmt: skip
