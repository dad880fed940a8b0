"""The browser app: ask a model about an image, and watch the answer appear while it is denoised.

Images may be of patients, so nothing is kept: an upload is deleted from the disk as soon as it is read, pictures travel
to the browser inside the page, and neither images nor questions are logged, flagged, counted or saved in the browser.
A conversation and its picture stay in memory as long as it lasts. All HTML is made here, from templates that escape
texts of people, files and the model.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Lock

from markupsafe import Markup

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.generation_options_lladamedv import GenerationOptionError
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.medical_images import WINDOW_PRESETS, MedicalImage, MedicalImageError, read_medical_image
from lladamedv.processing.nifti import AXES

from .conversation import LEVELS, MASK, NOTICE, Reply, SharedConversations, Token, demo_notice, level_styles
from .doors import LOOPBACK_HOSTS, OwnPageOnly
from .evidence import Evidence
from .explanation import image_as_url, render, show_legend


logger = logging.getLogger(__name__)
_UPLOADS = "Do not upload images that could identify a person."
_MAX_PIXELS = 2**25  # of an image that is kept in memory while its conversation lasts: 100 MB
_MAX_QUESTION = 4_000  # characters
_SESSION_SECONDS = 3_600
_NOTHING, _WHOLE = "nothing", "answer"  # values beside the numbers of words
_AT_ONCE = 8  # questions that are answered side by side
_DEFAULT, _FULL_RANGE = "default", "full range"  # of the controls
# What the arguments of `read_medical_image` are called here.
_CONTROLS = {
    "source": "The file", "frame": "Frame", "page": "Page", "slice_index": "Slice", "time_index": "Volume",
    "axis": "Axis", "window": "Window", "full_range": f"Window ({_FULL_RANGE})", "background": "Background",
    "allow_burned_in": "Burned-in text",
}  # fmt: skip
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
_BURNED_IN = (
    "The file says that text is burned into its pixels, which may identify the patient. If you know that it does not, "
    "tick Burned-in text."
)

# Gradio sets the colour of all that is in its HTML, its subdued texts have too little contrast, and it does not show
# everywhere what has the keyboard's focus. The lines of an answer are so far apart that the shading of one leaves the
# underlines of the one above.
_STYLE = (
    """<style>
.ldm-note, .ldm-note *, .ldm-alert, .ldm-token { color: #111 !important; }
.ldm-note { border: 2px solid #8a4b00; background: #fff6e5; padding: 8px 12px; }
.ldm-alert { border: 2px solid #a40000; background: #ffecec; padding: 8px 12px; }
.ldm-turn { border-top: 1px solid #767676; padding: 8px 0; }
.ldm-text, .ldm-question span { white-space: pre-wrap; overflow-wrap: anywhere; }
.ldm-text { line-height: 1.9; }
.ldm-token[data-word] { cursor: pointer; }
.ldm-token { padding-bottom: 7px; text-underline-offset: 2px; }
.ldm-mask { background: #767676; color: #767676 !important; border: 1px solid #fff; border-radius: 3px;
margin: 0 1px; display: inline-block; height: 1.3em; overflow: hidden; vertical-align: text-bottom; }
.ldm-picture img { width: 100%; max-height: 70vh; object-fit: contain; object-position: left; }
.ldm-picture figcaption { margin-top: 8px; }
.ldm-legend ul { display: flex; flex-wrap: wrap; gap: 4px 24px; list-style: none !important; padding: 0; }
.ldm-table td, .ldm-table th { padding: 0 12px 0 0; text-align: left; white-space: pre; }
.gradio-container { --body-text-color-subdued: var(--body-text-color);
--block-info-text-color: var(--body-text-color); --input-placeholder-color: #767676; }
.gradio-container :focus-visible { outline: 3px solid var(--body-text-color) !important; outline-offset: 2px; }
.dark .gradio-container, .dark.gradio-container { --input-placeholder-color: #9e9e9e; }
"""
    + level_styles("ldm-")
    + "</style>"
)

# Gradio takes pasted pictures. Other files, copied where files are listed, go the way of those that are attached.
_TAKE_PASTED_FILES = """() => document.addEventListener("paste", event => {
    const file = [...event.clipboardData.files].find(file => !file.type.startsWith("image/"));
    if (!file) return;
    const input = document.querySelector("input[type=file]"), files = new DataTransfer();
    files.items.add(file);
    input.files = files.files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
    event.preventDefault();
})"""

_TELL_WORD = """element.addEventListener("click", ({target}) => {
    if (target.dataset.word) trigger("click", {word: target.dataset.word});
})"""


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
<span class="ldm-text">{{ spans or "(an empty answer)" }}</span><p>{{ reply.summary | capitalize }}.</p>
{% if reply.warning %}<p><b>Warning: </b>{{ reply.warning }}</p>
{% endif %}
<details><summary>Confidence of every token</summary><table class="ldm-table"><thead><tr>
<th scope="col">Token</th><th scope="col">Confidence</th></tr></thead><tbody>
{% for token in reply.tokens if token.text and token.step is not none %}
<tr><td>{{ token.text }}</td><td>{{ "%.1f%%" % (100 * token.confidence) }}</td></tr>
{% endfor %}
</tbody></table></details>"""
_CONVERSATION = """\
<section role="log" aria-live="polite" aria-label="Conversation" aria-busy="{{ busy | lower }}">
{% for question, answer in turns %}
<article class="ldm-turn"><p class="ldm-question"><b>You: </b><span>{{ question }}</span></p>
<div class="ldm-answer"><b>Model: </b>{{ answer }}</div></article>
{% else %}
<p>{{ nothing }}</p>
{% endfor %}
</section>"""
_PICTURE = """\
<figure class="ldm-picture">
<img src="{{ url }}" alt="The uploaded image as it was read, {{ width }} by {{ height }} pixels
{%- if said %}, with a map of where {{ said }} comes from{% endif %}">
<figcaption>{% if said %}<div class="ldm-where"><b>Where {{ said }} comes from:</b>{{ legend }}</div>{% endif %}
{{ width }} by {{ height }} pixels (width by height). What was done to them:<ol>
{% for step in steps %}
<li>{{ step }}</li>
{% endfor %}
</ol></figcaption></figure>"""
_LEGEND = """\
<section aria-label="Legend" class="ldm-legend"><p>Confidence: the probability of a token when it was committed. It says
how sure the model was, not whether it is right. Point at a token for its own; click it to see where in the
image its word comes from.</p><ul>
{% for level in levels %}
<li><span class="ldm-token ldm-level-{{ loop.index0 }}">{{ level.name }}</span></li>
{% endfor %}
<li>{{ mask }} still masked</li></ul></section>"""


def _show_answer(reply: Reply, turn: int) -> Markup:
    """An answer, shaded, and the confidence of its tokens as a table; a word knows its number and that of its turn.

    It holds a mask where the model proposed the mask itself until the steps were used up.
    """
    begins = (index > 0 and (token.text or " ")[:1].isspace() for index, token in enumerate(reply.tokens))
    words = [f"{turn}-{word}" for word in accumulate(begins, initial=0)][1:]
    return render(_ANSWER, spans=render(_TOKENS, tokens=reply.tokens, words=words), reply=reply)


def _show_turns(
    turns: Iterable[_Turn], question: str | None = None, draft: Sequence[Token] = (), nothing: str = "No question yet."
) -> str:
    """The conversation, and a question whose answer is on its way."""
    pairs = [(turn.question, turn.shown) for turn in turns]
    if question is not None:
        pairs.append((question, render(_DRAFT, tokens=draft)))
    return str(render(_CONVERSATION, turns=pairs, busy=question is not None, nothing=nothing))


def _show_picture(picture: MedicalImage | None, evidence: Evidence | None = None, said: str = "") -> str:
    """The picture as it was read, and what was done to its pixels; over it where what was `said` comes from."""
    if picture is None:
        return '<p class="ldm-picture">No image yet.</p>'
    height, width = picture.size
    steps = [*map(str, picture.steps)] or ["nothing: read as it is"]
    url, legend = image_as_url(picture.image, evidence), "" if evidence is None else show_legend(evidence)
    return str(render(_PICTURE, url=url, width=width, height=height, steps=steps, said=said, legend=legend))


def _show_message(message: str) -> str:
    return str(render('<p role="alert" class="ldm-alert">{{ message }}</p>', message=message))


# Conversations


@dataclass(frozen=True)
class _Turn:
    """A question, its answer, and the answer as HTML."""

    question: str
    reply: Reply
    shown: Markup


@dataclass
class _Conversation:
    """What one browser tab is about; lives in memory only.

    Attributes:
        picture: the picture as it was read.
        turns: questions and answers so far.
        source: the uploaded file, if another picture can be read from it.
        chosen: all arguments of `read_medical_image` that can be chosen for it, as they are.
        refusal: why there is no picture, although there is a file.
        over: set when another picture has been read from the file, so that an answer on its way ends.
    """

    picture: MedicalImage | None = None
    turns: tuple[_Turn, ...] = ()
    source: bytes = b""
    chosen: dict = field(default_factory=dict)
    refusal: str = ""
    over: bool = False


def _begin(source: bytes, **chosen) -> _Conversation:
    """A conversation about a file; about its first page or volume where one must be chosen and is not.

    Args:
        source: what is in the file.
        chosen: arguments of `read_medical_image`.

    Raises:
        MedicalImageError, ImportError: as `read_medical_image` does.
    """
    read = partial(read_medical_image, source, max_pixels=_MAX_PIXELS, **chosen)
    try:
        picture = read()
    except MedicalImageError as error:
        if error.missing == "allow_burned_in":
            return _Conversation(source=source, chosen={"allow_burned_in": False}, refusal=_BURNED_IN)
        if error.missing is None:
            raise
        picture = read(**{error.missing: 0})
    can_be_chosen = {name: index[1] if index else chosen.get(name) for name, index in picture.choices.items()}
    if "allow_burned_in" in chosen:
        can_be_chosen["allow_burned_in"] = True
    return _Conversation(picture, source=source if can_be_chosen else b"", chosen=can_be_chosen)


def _read_upload(files: Sequence[str], max_file_size: int) -> _Conversation:
    """Read the uploaded file and delete it, whatever happens."""
    try:
        if len(files) > 1:
            raise ValueError(f"{len(files)} files came with the question; allowed is one.")
        size = Path(files[0]).stat().st_size
        if size > max_file_size:
            raise ValueError(f"The file has {size / 1e6:.1f} MB; allowed are {max_file_size / 1e6:.1f} MB.")
        return _begin(Path(files[0]).read_bytes())
    finally:
        for file in map(Path, files):
            file.unlink(missing_ok=True)
            with suppress(OSError):  # named after the content; not empty if another file has the same
                file.parent.rmdir()


def _explain(error: Exception) -> str:
    """An error in the names of the controls; a message of a library may quote what it was given, and is not shown."""
    if isinstance(error, MedicalImageError):
        return error.told(_CONTROLS.__getitem__)
    if isinstance(error, GenerationOptionError) and error.options[0] in _SLIDERS:
        return f"{_SLIDERS[error.options[0]][0]}: {error}"
    if isinstance(error, (ValueError, ImportError)):
        return str(error)
    logger.error("a question could not be answered: %s", type(error).__name__)
    return f"This could not be answered ({type(error).__name__})."


# The page


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

    def __init__(self, gradio, model, processor, title: str, longest_canvas: int, max_file_size: int):
        self._gradio, self._model, self._max_file_size = gradio, model, max_file_size
        self._longest_canvas, self._reading = longest_canvas, Lock()  # files may take much memory while they are read
        self.conversations = SharedConversations(model, processor)
        notice = " ".join(filter(None, (NOTICE, _UPLOADS, demo_notice(model))))
        heading = '<h1>{{ title }}</h1><p role="note" class="ldm-note"><b>{{ notice }}</b></p>'
        self.state = gradio.State(_Conversation(), time_to_live=_SESSION_SECONDS)
        gradio.HTML(_STYLE + str(render(heading, title=title, notice=notice)), label="Notice")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                self.picture = gradio.HTML(_show_picture(None), label="Image")
                self.where = gradio.Dropdown(
                    [("nothing", _NOTHING)], value=_NOTHING, visible=False, label="Show where it comes from",
                    info="Of the last answer: hides parts of the image, and looks how likely it is then.",
                )  # fmt: skip
                self._place_choices()
            with gradio.Column(scale=2, min_width=320):
                self.log = gradio.HTML(_show_turns(()), label="Conversation", js_on_load=_TELL_WORD)
                self.alert = gradio.HTML("", label="Message")
                self.box = gradio.MultimodalTextbox(
                    label="Image and question", show_label=True, sources=["upload"], file_count="single",
                    info="Attach or paste a picture, DICOM or NIfTI file; press Enter to see it, or ask at once. Then "
                    "ask follow-up questions.",
                    placeholder="Question about the image", max_plain_text_length=_MAX_QUESTION,
                )  # fmt: skip
                with gradio.Row(equal_height=True):
                    self.stop_button = gradio.Button("Stop")
                    self.clear_button = gradio.Button("New conversation")
                self._place_options()
        mask = render(_TOKENS, tokens=[Token(MASK, None, None)])
        gradio.HTML(str(render(_LEGEND, levels=LEVELS, mask=mask)), label="Legend")
        self._connect()

    def _place_choices(self) -> None:
        """Controls for another picture from the same file; each is shown where its file offers it."""
        gradio = self._gradio
        self.window = gradio.Dropdown(
            [_DEFAULT, *WINDOW_PRESETS], value=_DEFAULT, allow_custom_value=True, visible=False,
            label="Window (grey values to show)",
            info="A preset in Hounsfield units, or LEVEL/WIDTH, such as 40/400. The default is the file's own.",
        )  # fmt: skip
        self.axis = gradio.Radio([*reversed(AXES)], value="axial", visible=False, label="Axis")
        self.background = gradio.Dropdown(
            [_DEFAULT, "black", "white"], value=_DEFAULT, allow_custom_value=True, visible=False,
            label="Background (of transparent pixels)",
            info="A colour's name, or #rrggbb. The default shows the colours that transparency hid.",
        )  # fmt: skip
        self.burned_in = gradio.Checkbox(label="Burned-in text: read the file anyway", visible=False)
        self.volume, self.place = (
            gradio.Slider(0, 1, 0, step=1, precision=0, visible=False, label=label, buttons=[])
            for label in ("Volume", "Frame, page or slice")
        )
        self.choices = [self.place, self.volume, self.axis, self.window, self.background, self.burned_in]

    def _place_options(self) -> None:
        """Sliders for options of `generate`."""
        gradio, longest, defaults = self._gradio, self._longest_canvas, self._resolve()
        self.sliders = []
        with gradio.Accordion("How to denoise", open=False, elem_id="ldm-options") as self.options:
            for name, (label, info) in _SLIDERS.items():
                is_count = name != "confidence_threshold"
                bounds, more = ((1, longest), {"step": 1, "precision": 0}) if is_count else ((0, 1), {"step": 0.01})
                value = min(getattr(defaults, name) or 0, bounds[1])
                self.sliders.append(gradio.Slider(*bounds, value, label=f"{label} ({name})", info=info, **more))

    def _connect(self) -> None:
        gradio, shown = self._gradio, [self.picture, self.log, self.alert, self.state]
        asked = self.box.submit(
            self.ask, [self.box, self.state, *self.sliders], [self.box, *shown, *self.choices, self.where],
            api_name="ask", show_progress="hidden", concurrency_limit=_AT_ONCE, trigger_mode="once",
        )  # fmt: skip
        gradio.on(
            [choice.change for choice in self.choices], self.choose, [self.state, *self.choices],
            [*shown, *self.choices, self.where], api_name="choose", show_progress="hidden", trigger_mode="always_last",
        )  # fmt: skip
        gradio.on(  # the arrow keys release nothing, and the button that resets is no input
            [self.sliders[0].input, self.sliders[0].release], self.fit, self.sliders[0], self.sliders[1:3],
            api_name="fit", show_progress="hidden", trigger_mode="always_last",
        )  # fmt: skip

        shows_progress = gradio.Progress()

        def look(conversation, word, progress=shows_progress):
            return self.look(conversation, len(conversation.turns) - 1, word, progress)

        def look_at_word(conversation, event, progress=shows_progress):
            turn, word = event.word.split("-")
            is_last = int(turn) == len(conversation.turns) - 1
            return *self.look(conversation, int(turn), word, progress), gradio.update(value=word if is_last else None)

        look_at_word.__annotations__["event"] = gradio.EventData
        self.where.input(
            look, [self.state, self.where], [self.picture, self.alert], api_name="look", show_progress_on=self.picture,
            trigger_mode="always_last",
        )  # fmt: skip
        self.log.click(
            look_at_word, self.state, [self.picture, self.alert, self.where], api_visibility="private",
            show_progress_on=self.picture, trigger_mode="always_last",
        )  # fmt: skip
        self.stop_button.click(
            lambda conversation: (_show_turns(conversation.turns), ""), self.state, [self.log, self.alert],
            cancels=[asked], api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        self.clear_button.click(
            self.clear, None, [self.box, *shown, *self.choices, self.where], cancels=[asked], api_name="clear",
            show_progress="hidden",
        )  # fmt: skip

    def _resolve(self, **options):
        return self._model.resolve_generation_config(**options, return_dict_in_generate=True)

    def _show(self, conversation: _Conversation, alert: str = "", **more) -> dict:
        """The parts of the page that show a conversation."""
        return {
            self.state: conversation, self.picture: _show_picture(conversation.picture),
            self.log: _show_turns(conversation.turns, **more), self.alert: alert, self.where: self._offer(conversation),
        }  # fmt: skip

    def _offer(self, conversation: _Conversation):
        """What of the last answer can be looked for in the picture."""
        choices = [("nothing", _NOTHING)]
        if conversation.turns:
            words = enumerate(conversation.turns[-1].reply.words)
            choices += [("the whole answer", _WHOLE), *((f"{n + 1}: {text.strip()}", str(n)) for n, (text, _) in words)]
        return self._gradio.update(visible=len(choices) > 2, choices=choices, value=_NOTHING)

    def _show_choices(self, conversation: _Conversation) -> dict:
        """Show the controls for what can be chosen from the file, and hide the others."""
        update, chosen = self._gradio.update, conversation.chosen
        counts = {} if conversation.picture is None else conversation.picture.choices
        counts = {name: index for name, index in counts.items() if index}
        volume_count = counts.pop("time_index", None)

        def slider(counted):
            unit, index, count = counted or ("frame", 0, 2)
            visible = counted is not None
            return update(visible=visible, label=f"{unit.capitalize()} (from 0)", maximum=count - 1, value=index)

        windows = [_DEFAULT, *([_FULL_RANGE] if "full_range" in chosen else []), *WINDOW_PRESETS]
        window = _FULL_RANGE if chosen.get("full_range") else chosen.get("window") or _DEFAULT
        return {
            self.place: slider(next(iter(counts.values()), None)),
            self.volume: slider(volume_count),
            self.axis: update(visible="axis" in chosen, value=chosen.get("axis") or "axial"),
            self.window: update(visible="window" in chosen, choices=windows, value=window),
            self.background: update(visible="background" in chosen, value=chosen.get("background") or _DEFAULT),
            self.burned_in: update(visible="allow_burned_in" in chosen, value=bool(chosen.get("allow_burned_in"))),
        }

    def choose(self, conversation, place, volume, axis, window, background, burned_in):
        """Read another picture from the same file and begin the conversation anew."""
        values = [(text or _DEFAULT).strip() for text in (axis, window, background)]
        axis, window, background = (None if value == _DEFAULT else value for value in values)
        given = {
            "time_index": volume, "axis": None if axis == "axial" else axis, "background": background,
            "window": None if window == _FULL_RANGE else window, "full_range": window == _FULL_RANGE or None,
            "allow_burned_in": burned_in,
        }  # fmt: skip
        wanted = {argument: given.get(argument, place) for argument in conversation.chosen}
        # Controls change also when they are shown or emptied.
        if wanted == conversation.chosen or place is None or volume is None:
            return self._gradio.skip()
        if wanted.get("axis") != conversation.chosen.get("axis"):
            wanted.pop("slice_index", None)  # it counts along the axis
        try:
            with self._reading:
                begun = _begin(conversation.source, **wanted)
        except (ValueError, ImportError) as error:
            return {self.alert: _show_message(_explain(error)), **self._show_choices(conversation)}
        conversation.over = True
        changed = self._show(
            begun, _show_message(begun.refusal) if begun.refusal else "",
            nothing="The image was read anew, so the conversation begins anew.",
        )  # fmt: skip
        # Controls that are right stay untouched: one of them may be moving.
        return changed if begun.chosen == wanted else changed | self._show_choices(begun)

    def ask(self, message, conversation, canvas_length, block_length, steps, threshold):
        """Show an upload, answer a question, and show the draft after every forward pass."""
        question, files = (message["text"] or "").strip(), message["files"]
        box = {self.box: {"text": question, "files": []}}
        try:
            if files:
                with self._reading:
                    conversation = _read_upload(files, self._max_file_size)
                yield box | self._show(conversation) | self._show_choices(conversation)
                if not question and conversation.picture is not None:
                    return
            if conversation.picture is None:
                raise ValueError(conversation.refusal or "There is no image yet; add one to the question.")
            if not 0 < len(question) <= _MAX_QUESTION:
                raise ValueError(f"The question has {len(question)} characters; allowed are 1 to {_MAX_QUESTION}.")
            turns = [(turn.question, turn.reply.text) for turn in conversation.turns]
            for shown in self.conversations.reply_to(
                conversation.picture.image, question, turns,
                max_new_tokens=canvas_length, block_length=block_length, steps=steps,
                confidence_threshold=threshold or None,
                generation_suffix=None,  # it would stand behind the answer, with no confidence
            ):  # fmt: skip
                if conversation.over:
                    return
                if not isinstance(shown, Reply):
                    yield {self.log: _show_turns(conversation.turns, question, shown), self.alert: ""}
            turn = _Turn(question, shown, _show_answer(shown, len(conversation.turns)))
            conversation = replace(conversation, turns=(*conversation.turns, turn))
            yield {self.box: {"text": "", "files": []}} | self._show(conversation)
        except Exception as error:
            yield box | {self.log: _show_turns(conversation.turns), self.alert: _show_message(_explain(error))}

    def look(self, conversation, turn, word, progress):
        """Show where in the picture the answer of a turn comes from, or a word of it."""
        if word == _NOTHING or not conversation.turns:
            return _show_picture(conversation.picture), ""
        *before, turn = conversation.turns[: turn + 1]

        def report(done, total):
            if conversation.over:
                raise ValueError("The image was read anew.")
            progress(done / total)

        try:
            evidence = self.conversations.find_evidence(
                conversation.picture.image, turn.question, turn.reply,
                [(each.question, each.reply.text) for each in before],
                word=None if word == _WHOLE else int(word), callback=report,
            )  # fmt: skip
        except Exception as error:
            return self._gradio.skip(), _show_message(_explain(error))
        said = "the answer" if word == _WHOLE else f"“{turn.reply.words[int(word)][0].strip()}”"
        return _show_picture(conversation.picture, evidence, said), ""

    def fit(self, canvas_length):
        """Block length and steps that suit a canvas."""
        options = self._resolve(max_new_tokens=canvas_length)
        return options.block_length, min(options.steps, self._longest_canvas)

    def clear(self):
        """Begin anew, with no image."""
        conversation = _Conversation()
        box = {self.box: {"text": "", "files": []}}
        return box | self._show(conversation) | self._show_choices(conversation)


def _launch_options(gradio, given: dict) -> dict:
    """What `launch` is called with: nothing is kept, and foreign names and pages are refused."""
    from starlette.middleware import Middleware  # which Gradio brings

    # Gradio's own fonts have no bold letters.
    theme = gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
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
        title: heading of the page.
        longest_canvas: up to how many tokens the canvas slider goes; by default four times the model's own canvas, as
            far as its context has room.
        max_file_size: largest upload, in bytes.
        queue_size: how many questions may wait; more are turned away with a message.

    Returns:
        A `gradio.Blocks`. Its API name `ask` takes `{"text": …, "files": […]}` and the values of the four sliders,
        `choose` the place (frame, page or slice), volume, axis, window and background of another picture from the same
        file, and whether it may be one with text burned in.

    Raises:
        ImportError: if Gradio is not installed.
        ValueError: if an argument is not allowed.
    """
    gradio = import_gradio()
    own_canvas = model.resolve_generation_config(return_dict_in_generate=True).max_new_tokens
    if longest_canvas is None:
        longest_canvas = min(4 * own_canvas, model.config.get_text_config().max_position_embeddings)
    for name, value, least in (
        ("longest_canvas", longest_canvas, own_canvas), ("max_file_size", max_file_size, 1),
        ("queue_size", queue_size, 1),
    ):  # fmt: skip
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` is {value!r}; allowed are whole numbers of at least {least}.")

    class App(gradio.Blocks):
        def launch(self, **options):
            limits = {"max_file_size": max_file_size, "state_session_capacity": 4 * queue_size + _AT_ONCE}
            return super().launch(**_launch_options(gradio, limits | options))

        def close(self, verbose: bool = True) -> None:
            page.conversations.close()
            super().close(verbose)

    with App(title=title, analytics_enabled=False, delete_cache=(60, 600)) as app:
        page = _Page(gradio, model, processor, title, longest_canvas, max_file_size)
        app.load(js=_TAKE_PASTED_FILES, api_visibility="private")
        # Gradio's own button does not say whether it is open.
        for event, expanded in ((app.load, "false"), (page.options.expand, "true"), (page.options.collapse, "false")):
            js = f"() => document.querySelector('#ldm-options button').setAttribute('aria-expanded', {expanded})"
            event(js=js, api_visibility="private")
    return app.queue(max_size=queue_size, default_concurrency_limit=1, api_open=False)


__all__ = ["build_app", "import_gradio", "own_temporary_files"]
