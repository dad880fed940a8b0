"""The browser app: ask a model about an image, and watch the answer appear while it is denoised.

Images may be of patients, so nothing is kept: an upload is deleted from the disk as soon as it is read, pictures travel
to the browser inside the page, and neither images nor questions are logged, flagged, counted or saved in the browser.
A conversation and its pictures stay in memory as long as it lasts. All HTML is made here and in `app_viewer`, `app_log`
and `app_looks`, from templates that escape texts of people, files and the model.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.generation_options_lladamedv import GenerationOptionError
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.medical_images import MedicalImageError, read_medical_image
from lladamedv.processing.phantoms import PhantomVQA

from .app_log import Answer, Turn, show_answer, show_draft, show_legend_of_tokens, show_log, to_html, to_markdown
from .app_looks import DOWNLOAD, FOCUS_ON_BOX, ON_LOAD, SHOW_ATTACHED, STYLE, TELL_CLICK, TELL_POINTER
from .app_viewer import CONTROLS, Controls, Shown, read_file, read_upload, show_picture
from .conversation import NOTICE, Reply, SharedConversations, demo_notice
from .demo import HELD_OUT_SEED, one_per_domain
from .doors import LOOPBACK_HOSTS, OwnPageOnly
from .explanation import image_as_url, options_in_force, render
from .loading import DEMO, DEMO_MODEL


logger = logging.getLogger(__name__)
_UPLOADS = "Do not upload images that could identify a person."
_MAX_QUESTION = 4_000  # characters
_SESSION_SECONDS = 3_600
_NOTHING, _WHOLE = "nothing", "answer"  # values beside the numbers of words
_AT_ONCE = 8  # questions that are answered side by side
# Options of `generate` that have a slider: what it is called, and what it says.
_SLIDERS = {
    "max_new_tokens": ("Canvas length", "The longest answer, in tokens."),
    "block_length": ("Block length", "Must divide the canvas length."),
    "steps": ("Steps", "Must be a multiple of the number of blocks. Fewer are faster."),
    "confidence_threshold": (
        "Confidence threshold",
        "Commit all tokens that are at least this probable, instead of so many a step; 0 is off.",
    ),
}
_QUESTIONS = ("Describe the image.", "What is the imaging modality?", "Which organ is shown?")  # of any model
_HEAD = """\
<div class="ldm-head"><h1>{{ title }}</h1>
<p>{% for name, millions, device in models %}
<b>{{ name }}</b>, {{ "{:,.1f}".format(millions) }} M parameters, on {{ device }}{{ "; " if not loop.last }}
{%- endfor %}</p>
<p role="note" class="ldm-note">{{ notice }}</p></div>"""
_EXAMPLES = """\
<p>{{ lead }}</p><div class="ldm-examples">
{% for question, url in examples %}
<button type="button" data-example="{{ loop.index0 }}">{% if url %}<img src="{{ url }}" alt="">{% endif %}
{{ question }}</button>
{% endfor %}
</div>"""
_GONE = "The image has changed, so this ended."


class _Model(NamedTuple):
    """A model to ask."""

    name: str
    model: LLaDAMedVForConditionalGeneration
    conversations: SharedConversations


@dataclass
class _Tab:
    """What one browser tab is about; lives in memory only.

    Attributes:
        shown: the picture on the screen. An answer about another one ends.
        turns: questions and answers so far.
        asking: the question on its way; an answer to an earlier one ends.
    """

    shown: Shown = field(default_factory=Shown)
    turns: tuple[Turn, ...] = ()
    asking: object = None


def _show_message(message: str) -> str:
    return str(render('<p role="alert" class="ldm-alert">{{ message }}</p>', message=message))


def _explain(error: Exception) -> str:
    """An error in the names of the controls; a message of a library may quote what it was given, and is not shown."""
    if isinstance(error, MedicalImageError):
        return error.told(CONTROLS.__getitem__)
    if isinstance(error, GenerationOptionError) and error.options[0] in _SLIDERS:
        return f"{_SLIDERS[error.options[0]][0]}: {error}"
    if isinstance(error, (ValueError, ImportError)):
        return str(error)
    logger.error("a question could not be answered: %s", type(error).__name__)
    return f"This could not be answered ({type(error).__name__})."


def import_gradio():
    """Import Gradio.

    Raises:
        ImportError: if it is not installed; the message says how to install it.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError('The app needs Gradio: pip install "lladamedv[app]".') from error
    return gradio


@contextmanager
def own_temporary_files() -> Iterator[None]:
    """A folder for the temporary files of this process, which is deleted at its end, also by SIGTERM or SIGHUP.

    Uploads are among them, also those that were cut off or never asked about.
    """

    def end(number, frame):
        raise SystemExit(128 + number)

    variable = "GRADIO_TEMP_DIR"
    parent, tempdir = os.environ.get(variable), tempfile.tempdir
    if parent is not None:
        os.makedirs(parent, exist_ok=True)
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.signal(number, end) for number in signals}
    try:
        with tempfile.TemporaryDirectory(prefix="lladamedv-", dir=parent) as folder:
            os.environ[variable] = tempfile.tempdir = folder
            yield
    finally:
        tempfile.tempdir = tempdir
        os.environ.pop(variable) if parent is None else os.environ.update({variable: parent})
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Page:
    """The components of the page, and what happens when they are used.

    Each event returns new values of the components that it changes.
    """

    def __init__(self, gradio, models: Sequence[_Model], title: str, longest_canvas: int, max_file_size: int):
        self._gradio, self.models, self._max_file_size = gradio, models, max_file_size
        self._longest_canvas, self._reading = longest_canvas, Lock()  # files may take much memory while they are read
        first = models[0].model
        known = demo_notice(first)
        self._notices = tuple(filter(None, (NOTICE, known)))
        self._examples = one_per_domain(list(PhantomVQA(HELD_OUT_SEED, 60))) if known else []
        examples = [(each.question, image_as_url(each.image, side=160)) for each in self._examples]
        lead = "Click an example, or attach an image of your own below." if known else "Attach an image below, and ask:"
        self._nothing = render(_EXAMPLES, lead=lead, examples=examples or [(each, "") for each in _QUESTIONS])

        self.tab = gradio.State(_Tab(), time_to_live=_SESSION_SECONDS)
        facts = [(name, model.num_parameters() / 1e6, model.device) for name, model, _ in models]
        notice = " ".join(filter(None, (NOTICE, _UPLOADS, known)))
        gradio.HTML(f"<style>{STYLE}</style>{render(_HEAD, title=title, models=facts, notice=notice)}", label="Notice")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                self.picture = gradio.HTML(show_picture(Shown()), label="Image", js_on_load=TELL_POINTER)
                self.controls = Controls(gradio)
                self.where = gradio.Dropdown(
                    [("nothing", _NOTHING)], value=_NOTHING, visible=False, label="Show where it comes from",
                    info="Of the last answer: hides parts of the image, and looks how likely it is then.",
                )  # fmt: skip
            with gradio.Column(scale=2, min_width=320):
                nothing = show_log((), None, nothing=self._nothing)
                self.log = gradio.HTML(nothing, label="Conversation", js_on_load=TELL_CLICK)
                small, after = {"size": "sm", "min_width": 120}, {"elem_classes": "ldm-after"}
                with gradio.Row():
                    self.again_button = gradio.Button("Ask again", **small, **after)
                    self.clear_button = gradio.Button("New conversation", **small, elem_id="ldm-new")
                    self.html_button = gradio.Button("Save as HTML", **small, **after)
                    self.markdown_button = gradio.Button("Save as Markdown", **small, **after)
                self._place_options()
                gradio.HTML(str(show_legend_of_tokens()), label="Legend")
        self.attached = gradio.Button("Show the attached file", elem_id="ldm-attached", visible="hidden")
        self.saved = gradio.Textbox(visible="hidden", label="Saved conversation")
        with gradio.Column(elem_id="ldm-ask"):
            self.alert = gradio.HTML("", label="Message", elem_id="ldm-alert")
            self.box = gradio.MultimodalTextbox(
                label="Question about the image", show_label=False, sources=["upload"], file_count="single",
                placeholder="Question about the image", max_plain_text_length=_MAX_QUESTION, elem_id="ldm-box",
            )  # fmt: skip
            self.stop_button = gradio.Button("Stop", size="sm", variant="stop", elem_id="ldm-stop")
        self._connect()

    def _place_options(self) -> None:
        """Sliders for options of `generate`, and a second set of them to compare with."""
        gradio = self._gradio
        with gradio.Accordion("How to denoise", open=False, elem_id="ldm-options") as self.options:
            self.sliders = self._place_sliders("")
            self.follow = gradio.Checkbox(
                value=not self._examples, label="Send earlier questions and answers along",
                info="Of the same image. The demo model has learnt single questions only." if self._examples else
                "Of the same image.",
            )  # fmt: skip
            self.compare = gradio.Checkbox(
                label="Compare: answer each question twice, side by side", info="A is as set above, B as set below.",
            )  # fmt: skip
            with gradio.Group(visible=False) as self.second:
                names = [each.name for each in self.models]
                self.other = gradio.Dropdown(names, value=names[-1], label="Model of B", visible=len(names) > 1)
                self.other_sliders = self._place_sliders("B: ")

    def _place_sliders(self, prefix: str) -> list:
        gradio, longest, defaults, sliders = self._gradio, self._longest_canvas, self._resolve(), []
        for name, (label, info) in _SLIDERS.items():
            is_count = name != "confidence_threshold"
            bounds, more = ((1, longest), {"step": 1, "precision": 0}) if is_count else ((0, 1), {"step": 0.01})
            value = min(getattr(defaults, name) or 0, bounds[1])
            sliders.append(gradio.Slider(*bounds, value, label=f"{prefix}{label} ({name})", info=info, **more))
        return sliders

    def _connect(self) -> None:
        gradio, choices = self._gradio, self.controls.all
        shown = [self.picture, self.log, self.alert, self.tab, *choices, self.where]
        settings = [*self.sliders, self.follow, self.compare, self.other, *self.other_sliders]
        quiet, asks = {"show_progress": "hidden"}, {"concurrency_limit": _AT_ONCE, "concurrency_id": "ask"}

        def with_event(event, kind=gradio.EventData):
            event.__annotations__["event"] = kind
            return event

        def ask_example(tab, event, *settings):
            yield from self.ask_example(tab, event.example, settings)

        asked = [
            self.box.submit(
                self.ask, [self.box, self.tab, *settings], [self.box, *shown], api_name="ask", trigger_mode="once",
                **quiet, **asks,
            ),
            self.again_button.click(
                self.ask_again, [self.tab, *settings], [self.box, *shown], api_name="again", **quiet, **asks
            ),
            self.log.select(
                with_event(ask_example), [self.tab, *settings], [self.box, *shown], api_visibility="private",
                **quiet, **asks,
            ),
        ]  # fmt: skip
        self.box.change(js=SHOW_ATTACHED, inputs=self.box, api_visibility="private")
        opened = self.attached.click(self.show, [self.box, self.tab], shown, api_name="show", **quiet)
        opened.then(  # in the browser, where the question is being written
            js="message => ({...message, files: []})", inputs=self.box, outputs=self.box, api_visibility="private"
        )
        # A slider also changes where a number is typed that is too large; a menu changes when a drag sets it.
        moves = [choice.change if isinstance(choice, gradio.Slider) else choice.input for choice in choices]
        gradio.on(
            moves, self.choose, [self.tab, *choices], shown, api_name="choose", trigger_mode="always_last", **quiet
        )

        def drag(tab, event):
            wanted = tab.shown.chosen | {name: None for name in tab.shown.chosen if name == "full_range"}
            return self._read_again(tab, wanted | {"window": event.window}, dragged=True)

        self.picture.input(
            with_event(drag), self.tab, shown, api_visibility="private", trigger_mode="multiple", **quiet
        )
        for sliders in (self.sliders, self.other_sliders):
            gradio.on(  # the arrow keys release nothing, and the button that resets is no input
                [sliders[0].input, sliders[0].release], self.fit, sliders[0], sliders[1:3], trigger_mode="always_last",
                api_name="fit" if sliders is self.sliders else "fit_other", **quiet,
            )  # fmt: skip
        self.compare.change(lambda on: gradio.update(visible=on), self.compare, self.second, api_visibility="private")

        shows_progress = gradio.Progress()

        def look(tab, chosen, progress=shows_progress):
            return self.look(tab, len(tab.turns) - 1, chosen, progress)

        def look_at_word(tab, event, progress=shows_progress):
            turn, chosen = event.word.split("-", 1)
            is_last = int(turn) == len(tab.turns) - 1
            return *self.look(tab, int(turn), chosen, progress), gradio.update(value=chosen if is_last else None)

        self.where.input(
            look, [self.tab, self.where], [self.picture, self.alert], api_name="look", show_progress_on=self.picture,
            trigger_mode="always_last",
        )  # fmt: skip
        self.log.click(
            with_event(look_at_word), self.tab, [self.picture, self.alert, self.where], api_visibility="private",
            show_progress_on=self.picture, trigger_mode="multiple",  # "always_last" would repeat the first word
        )  # fmt: skip
        for button, name, save in (
            (self.html_button, "html", to_html), (self.markdown_button, "md", to_markdown)
        ):  # fmt: skip
            saved = button.click(
                lambda tab, save=save: save(tab.turns, self._notices) if tab.turns else "", self.tab, self.saved,
                api_name=f"save_{name}", **quiet,
            )  # fmt: skip
            js = f"text => {{ ({DOWNLOAD})('conversation.{name}', text); return ''; }}"
            saved.then(js=js, inputs=self.saved, outputs=self.saved, api_visibility="private")
        stopped = self.stop_button.click(
            lambda tab: (self._log(tab), ""), self.tab, [self.log, self.alert], cancels=asked,
            api_visibility="private", **quiet,
        )  # fmt: skip
        cleared = self.clear_button.click(
            self.clear, self.tab, [self.box, *shown], cancels=asked, api_name="clear", **quiet
        )
        for event in (*asked, stopped, cleared):
            event.then(js=FOCUS_ON_BOX, api_visibility="private")

    def _resolve(self, **options):
        return self.models[0].model.resolve_generation_config(**options, return_dict_in_generate=True)

    def _log(self, tab: _Tab, **pending) -> str:
        nothing = "Ask about the image below." if self._examples and tab.shown.picture else self._nothing
        return show_log(tab.turns, tab.shown.view, nothing=nothing, **pending)

    def _show(self, tab: _Tab, alert: str = "") -> dict:
        """The parts of the page that show a conversation, with no map on the picture."""
        return {
            self.tab: tab, self.picture: show_picture(tab.shown), self.log: self._log(tab), self.alert: alert,
            self.where: self._offer(tab),
        }  # fmt: skip

    def _offer(self, tab: _Tab):
        """What of the last answers can be looked for in the picture, if it is still that one."""
        choices = [("nothing", _NOTHING)]
        if tab.turns and tab.turns[-1].view is tab.shown.view:
            answers = tab.turns[-1].answers
            for place, answer in enumerate(answers):
                of = f"{answer.side}, " if len(answers) > 1 else ""
                choices.append((f"{of}the whole answer", f"{place}-{_WHOLE}"))
                choices += [
                    (f"{of}{n + 1}: {text.strip()}", f"{place}-{n}") for n, (text, _) in enumerate(answer.reply.words)
                ]
        return self._gradio.update(visible=len(choices) > 2, choices=choices, value=_NOTHING)

    # The picture

    def _open(self, tab: _Tab, files: Sequence[str]) -> None:
        """Take over an upload; once, if it is shown and asked about at the same time."""
        with self._reading:
            if files[0] != tab.shown.upload or Path(files[0]).exists():
                tab.shown = read_upload(files, self._max_file_size)

    def show(self, message, tab):
        """Show an upload as soon as it is attached."""
        try:
            if message["files"]:
                self._open(tab, message["files"])
        except Exception as error:
            return {self.alert: _show_message(_explain(error))}
        alert = _show_message(tab.shown.refusal) if tab.shown.refusal else ""
        return self._show(tab, alert) | self.controls.show(tab.shown)

    def choose(self, tab, *controls):
        """Read another picture from the same file. What was said about the one before is not sent along."""
        if None in controls[:2]:  # a number that is being typed
            return self._gradio.skip()
        return self._read_again(tab, self.controls.wanted(tab.shown, *controls))

    def _read_again(self, tab: _Tab, wanted: dict, dragged: bool = False):
        """
        Args:
            wanted: arguments of `read_medical_image`.
            dragged: whether this is a window that its menu does not say yet.
        """
        with self._reading:
            old = tab.shown
            if wanted == old.chosen:
                return self._gradio.skip()
            if wanted.get("axis") != old.chosen.get("axis"):
                wanted.pop("slice_index", None)  # it counts along the axis
            try:
                tab.shown = read_file(old.source, **wanted)
            except (ValueError, ImportError) as error:
                return {self.alert: _show_message(_explain(error)), **self.controls.show(old)}
        changed = self._show(tab, _show_message(tab.shown.refusal) if tab.shown.refusal else "")
        controls = self.controls.show(tab.shown)
        if tab.shown.chosen == wanted:  # controls that are right stay untouched: one of them may be moving
            controls = {self.controls.window: controls[self.controls.window]} if dragged else {}
        return changed | controls

    # Questions

    def ask(self, message, tab, *settings):
        """Show an upload, answer a question, and show the drafts after every forward pass."""
        question, files = (message["text"] or "").strip(), message["files"]
        box = {self.box: {"text": question, "files": []}}
        try:
            if files:
                self._open(tab, files)
                yield box | self._show(tab) | self.controls.show(tab.shown)
                if not question and tab.shown.picture is not None:
                    return
        except Exception as error:
            yield box | {self.log: self._log(tab), self.alert: _show_message(_explain(error))}
        else:
            yield from self._answer(tab, question, settings)

    def ask_example(self, tab, number: int, settings):
        """Ask an example about its picture, or, where there is none, write its question into the box."""
        if not self._examples:
            yield {self.box: {"text": _QUESTIONS[number], "files": []}}
            return
        example = self._examples[number]
        tab.shown = Shown(read_medical_image(example.image))
        yield self._show(tab) | self.controls.show(tab.shown)
        yield from self._answer(tab, example.question, settings)

    def ask_again(self, tab, *settings):
        """Ask the last question again, with the settings as they are now: beside its answers, if the picture is the
        same, or else about the new one."""
        if tab.turns:
            last = tab.turns[-1]
            yield from self._answer(tab, last.question, settings, last if last.view is tab.shown.view else None)

    def _sides(self, settings) -> list[tuple[str, _Model, tuple]]:
        """Whom to ask and how: (side, model, values of the sliders)."""
        count = len(_SLIDERS)
        compare, other = settings[count + 1 : count + 3]
        second = next(model for model in self.models if model.name == other)
        sides = [("A", self.models[0], settings[:count]), ("B", second, settings[count + 3 :])]
        return sides if compare else sides[:1]

    def _answer(self, tab: _Tab, question: str, settings, beside: Turn | None = None):
        """Answer a question; if `beside` a turn, which is the last one, as more of its answers."""
        shown, message, sides = tab.shown, "", self._sides(settings)
        asking = tab.asking = object()
        try:
            if shown.picture is None:
                raise ValueError(shown.refusal or "There is no image yet; add one to the question.")
            if not 0 < len(question) <= _MAX_QUESTION:
                raise ValueError(f"The question has {len(question)} characters; allowed are 1 to {_MAX_QUESTION}.")
            kept = () if beside is None else beside.answers
            before = tab.turns if beside is None else tab.turns[:-1]
            follow = settings[len(_SLIDERS)]
            history = [turn for turn in before if turn.view is shown.view] if follow else []
            earlier, streams, heads = _Tab(shown, before), [], []
            with ExitStack() as stack:
                for side, model, sliders in sides:
                    message = f"{side}: " if len(sides) > 1 else ""
                    options = dict(zip(_SLIDERS, sliders))
                    said = ", ".join(f"{_SLIDERS[name][0].lower()} {value}" for name, value in options.items() if value)
                    said += f", after {len(history)} earlier question{'s' * (len(history) > 1)}" if history else ""
                    options["confidence_threshold"] = options["confidence_threshold"] or None
                    options["generation_suffix"] = None  # it would stand behind the answer, with no confidence
                    heads.append((side, model.name, said, options_in_force(model.model, **options)))
                    turns = [(turn.question, turn.said(side)) for turn in history]
                    streams.append(stack.enter_context(closing(
                        model.conversations.reply_to(shown.picture.image, question, turns, **options)
                    )))  # fmt: skip
                message = ""
                pending = [(answer, answer.shown) for answer in kept]
                drafts = [(f"{side}, {model}", show_draft(())) for side, model, *_ in heads]
                replies: list[Reply | None] = [None] * len(heads)
                yield {self.log: self._log(earlier, pending=(question, pending + drafts)), self.alert: ""}
                for canvases in zip_longest(*streams):
                    if tab.asking is not asking:
                        return
                    if tab.shown is not shown:
                        raise ValueError(f"{_GONE} Ask again, about the one that is shown now.")
                    for place, canvas in enumerate(canvases):
                        if isinstance(canvas, Reply):
                            replies[place] = canvas
                            html = show_answer(canvas, heads[place][2], len(before), len(kept) + place)
                            drafts[place] = (drafts[place][0], html)
                        elif canvas is not None:
                            drafts[place] = (drafts[place][0], show_draft(canvas))
                    if None in replies:
                        yield {self.log: self._log(earlier, pending=(question, pending + drafts))}
            answers = (*kept, *(Answer(*head, reply, html) for head, reply, (_, html) in zip(heads, replies, drafts)))
            tab.turns = (*before, Turn(question, shown.view, answers))
            yield {self.box: {"text": "", "files": []}} | self._show(tab)
        except Exception as error:
            yield {
                self.box: {"text": question, "files": []}, self.log: self._log(tab),
                self.alert: _show_message(message + _explain(error)),
            }  # fmt: skip

    def look(self, tab, turn, chosen, progress):
        """Show where in the picture an answer of a turn comes from, or a word of it."""
        shown = tab.shown
        if chosen == _NOTHING or not tab.turns:
            return show_picture(shown), ""
        *before, turn = tab.turns[: turn + 1]
        place, _, word = chosen.partition("-")
        answer = turn.answers[int(place)]

        def report(done, total):
            if tab.shown is not shown:
                raise ValueError(_GONE)
            progress(done / total)

        try:
            if turn.view is not shown.view:
                raise ValueError("That answer is about another image than the one that is shown.")
            model = next(each for each in self.models if each.name == answer.model)
            evidence = model.conversations.find_evidence(
                shown.picture.image, turn.question, answer.reply,
                [(each.question, each.said(answer.side)) for each in before if each.view is shown.view],
                word=None if word == _WHOLE else int(word), callback=report,
            )  # fmt: skip
        except Exception as error:
            return self._gradio.skip(), _show_message(_explain(error))
        said = "the answer" if word == _WHOLE else f"“{answer.reply.words[int(word)][0].strip()}”"
        if len(turn.answers) > 1:
            said += f" of {answer.side}"
        return show_picture(shown, evidence, said), ""

    def fit(self, canvas_length):
        """Block length and steps that suit a canvas."""
        options = self._resolve(max_new_tokens=canvas_length)
        return options.block_length, min(options.steps, self._longest_canvas)

    def clear(self, tab):
        """Begin anew, with no image; an answer on its way ends."""
        tab.shown, tab.turns = Shown(), ()
        return {self.box: {"text": "", "files": []}} | self._show(tab) | self.controls.show(tab.shown)


def _short(name: str) -> str:
    """A model's name for the page, which shows no folder of this computer."""
    folder = Path(name).expanduser()
    return DEMO if folder == DEMO_MODEL else folder.name if folder.is_dir() else name


def _launch_options(gradio, given: dict) -> dict:
    """What `launch` is called with: nothing is kept, and foreign names and pages are refused."""
    from starlette.middleware import Middleware  # which Gradio brings

    # Gradio's own fonts have no bold letters.
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    theme = gradio.themes.Default(primary_hue="blue", **fonts)
    private = {"run_history": False, "enable_monitoring": False, "footer_links": [], "mcp_server": False}
    options = private | {"theme": theme} | given
    host = options.get("server_name") or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    if not options.get("share") and "SPACE_ID" not in os.environ:  # these have names that are not known here
        own = Middleware(OwnPageOnly, hosts=LOOPBACK_HOSTS if host in LOOPBACK_HOSTS else None)
        more = options.get("app_kwargs") or {}
        options["app_kwargs"] = more | {"middleware": [own, *more.get("middleware", ())]}
    return options


def build_app(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    *,
    name: str | None = None,
    others: Mapping[str, tuple] | None = None,
    title: str = "LLaDA-MedV",
    longest_canvas: int | None = None,
    max_file_size: int = 100_000_000,
    queue_size: int = 16,
):
    """Build the app around a model; `launch()` of what is returned serves it.

    Up to eight questions are answered side by side, from now until it is closed. `launch` takes what Gradio's does, but
    by default limits uploads, keeps no history, monitoring or footer, and listens on 127.0.0.1.

    Args:
        model: the model, on the device it is to run on.
        processor: its processor.
        name: what the page calls the model; of a folder the last part. By default where it was loaded from.
        others: more models to compare it with, by their names, each with its processor: `{name: (model, processor)}`.
        title: heading of the page.
        longest_canvas: up to how many tokens the canvas slider goes; by default four times the model's own canvas, as
            far as its context has room.
        max_file_size: largest upload, in bytes.
        queue_size: how many questions may wait; more are turned away with a message.

    Returns:
        A `gradio.Blocks`. Its API name `ask` takes `{"text": …, "files": […]}` and the values of the four sliders, and
        for a comparison whether to make one, the name of the other model, and the same four for it. `choose` takes the
        place (frame, page or slice), volume, axis, window and background of another picture from the same file, and
        whether it may be one with text burned in.

    Raises:
        ImportError: if Gradio is not installed.
        ValueError: if an argument is not allowed.
    """
    gradio = import_gradio()
    own_canvas = model.resolve_generation_config(return_dict_in_generate=True).max_new_tokens
    if longest_canvas is None:
        longest_canvas = min(4 * own_canvas, model.config.get_text_config().max_position_embeddings)
    for limit, value, least in (
        ("longest_canvas", longest_canvas, own_canvas), ("max_file_size", max_file_size, 1),
        ("queue_size", queue_size, 1),
    ):  # fmt: skip
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{limit}` is {value!r}; allowed are whole numbers of at least {least}.")

    class App(gradio.Blocks):
        def launch(self, **options):
            limits = {"max_file_size": max_file_size, "state_session_capacity": 4 * queue_size + _AT_ONCE}
            return super().launch(**_launch_options(gradio, limits | options))

        def close(self, verbose: bool = True) -> None:
            for each in models:
                each.conversations.close()
            super().close(verbose)

    models = [_Model(_short(name or model.name_or_path), model, SharedConversations(model, processor))]
    for other, (its_model, its_processor) in (others or {}).items():
        other = _short(other) if _short(other) != models[0].name else f"{_short(other)} (B)"
        models.append(_Model(other, its_model, SharedConversations(its_model, its_processor)))
    with App(title=title, analytics_enabled=False, delete_cache=(60, 600)) as app:
        page = _Page(gradio, models, title, longest_canvas, max_file_size)
        app.load(js=ON_LOAD, api_visibility="private")
        # Gradio's own button does not say whether it is open.
        for event, expanded in ((app.load, "false"), (page.options.expand, "true"), (page.options.collapse, "false")):
            js = f"() => document.querySelector('#ldm-options button').setAttribute('aria-expanded', {expanded})"
            event(js=js, api_visibility="private")
    return app.queue(max_size=queue_size, default_concurrency_limit=1, api_open=False)


__all__ = ["build_app", "import_gradio", "own_temporary_files"]
