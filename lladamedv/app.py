"""The browser app: ask a model about an image, and watch the answer appear while it is denoised.

Images may be of patients, so nothing is kept: an upload is deleted from the disk as soon as it is read, pictures travel
to the browser inside the page, and neither images nor questions are logged, flagged, counted or saved in the browser.
What a conversation is about stays in memory as long as it lasts. All HTML is written here; what a person, a file or the
model says is escaped into it.
"""

from __future__ import annotations

import base64
import html
import io
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationOutput
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.medical_images import WINDOW_PRESETS, MedicalImage, MedicalImageError, read_medical_image
from lladamedv.processing.nifti import AXES

from .conversation import LEVELS, MASK, NOTICE, CanvasStreamer, chat_about, demo_notice, level_of, pieces
from .doors import LOOPBACK_HOSTS, OwnPageOnly


logger = logging.getLogger(__name__)
_UPLOADS = "Do not upload images that could identify a person."
_MAX_PIXELS = 2**25  # of an image that is kept in memory while its conversation lasts: 100 MB
_MAX_QUESTION = 4_000  # characters
_SESSION_SECONDS = 3_600
_PREVIEW = (640, 640)
_DEFAULT, _FULL_RANGE = "default", "full range"  # of the controls
# What the arguments of `read_medical_image` are called here.
_CONTROLS = {
    "source": "The file", "frame": "Frame", "page": "Page", "slice_index": "Slice", "time_index": "Volume",
    "axis": "Axis", "window": "Window", "full_range": f"Window ({_FULL_RANGE})", "background": "Background",
    "allow_burned_in": "Burned-in text",
}  # fmt: skip
_BURNED_IN = (
    "The file says that text is burned into its pixels, which may tell who the patient is. If you know that it does "
    "not, tick Burned-in text."
)
_MASK = f'<span class="ldm-mask" title="still masked" aria-hidden="true">{2 * MASK}</span>'
# Gradio sets the colour of all that is in its HTML, its subdued texts have too little contrast, and it does not show
# everywhere what has the keyboard's focus.
_STYLE = (
    "<style>"
    ".ldm-note, .ldm-note *, .ldm-alert, .ldm-token { color: #111 !important; }"
    ".ldm-note { border: 2px solid #8a4b00; background: #fff6e5; padding: 8px 12px; }"
    ".ldm-alert { border: 2px solid #a40000; background: #ffecec; padding: 8px 12px; }"
    ".ldm-turn { border-top: 1px solid #767676; padding: 8px 0; }"
    ".ldm-text, .ldm-question span { white-space: pre-wrap; overflow-wrap: anywhere; }"
    ".ldm-text { line-height: 1.9; }"  # so that the shading of a line leaves the underlines of the one above
    ".ldm-token { padding-bottom: 7px; text-underline-offset: 2px; }"
    ".ldm-mask { background: #767676; color: #767676 !important; border: 1px solid #fff; border-radius: 3px; "
    "margin: 0 1px; display: inline-block; height: 1.3em; overflow: hidden; vertical-align: text-bottom; }"
    ".ldm-picture img { width: 100%; max-height: 70vh; object-fit: contain; object-position: left; }"
    ".ldm-picture figcaption { margin-top: 8px; }"
    ".ldm-legend ul { display: flex; flex-wrap: wrap; gap: 4px 24px; list-style: none !important; padding: 0; }"
    ".ldm-table td, .ldm-table th { padding: 0 12px 0 0; text-align: left; white-space: pre; }"
    ".gradio-container { --body-text-color-subdued: var(--body-text-color); "
    "--block-info-text-color: var(--body-text-color); --input-placeholder-color: #767676; }"
    ".gradio-container :focus-visible { outline: 3px solid var(--body-text-color) !important; outline-offset: 2px; }"
    ".dark .gradio-container, .dark.gradio-container { --input-placeholder-color: #9e9e9e; }"
    + "".join(
        f".ldm-level-{index} {{ background: {level.color}; "
        + (f"text-decoration: underline {level.underline} 2px; }}" if level.underline else "}")
        for index, level in enumerate(LEVELS)
    )
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


@dataclass(frozen=True)
class _Turn:
    """A question, its answer, and the answer as HTML."""

    question: str
    answer: str
    shown: str


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


class _StoppedError(Exception):
    """Ends `generate` when nobody waits for its answer any more."""


def _denoise(
    model: LLaDAMedVForConditionalGeneration, lock: Lock, inputs: dict, options: dict
) -> Iterator[tuple[list[int], list[float]] | LLaDAMedVGenerationOutput]:
    """Yield the canvas and its tokens' confidence, at first and after every forward pass; at last what `generate`
    returns.

    `generate` runs in a thread of its own; when the iterator is closed it ends after its current forward pass.
    """
    canvases: SimpleQueue[tuple[list[int], list[float]] | None] = SimpleQueue()
    stopped = Event()

    def show(*canvas):
        if stopped.is_set():
            raise _StoppedError
        canvases.put(canvas)

    streamer = CanvasStreamer(options["max_new_tokens"], model.config.mask_token_id, show)

    def generate():
        with lock:
            return model.generate(**inputs, **options, streamer=streamer, return_dict_in_generate=True)

    pool = ThreadPoolExecutor(1)
    answer = pool.submit(generate)
    answer.add_done_callback(lambda _: canvases.put(None))
    pool.shutdown(wait=False)
    try:
        yield from iter(canvases.get, None)
    finally:
        stopped.set()
    yield answer.result()


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


def _explain(error: Exception) -> str:
    """An error in the names of the controls."""
    return error.told(_CONTROLS.__getitem__) if isinstance(error, MedicalImageError) else str(error)


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


def _escape(text: str) -> str:
    """Text for HTML that means nothing to a template language either: Gradio's HTML component has two of them."""
    escaped = html.escape(text)
    return "".join(f"&#{ord(letter)};" if letter in "${}`" else letter for letter in escaped)


def _shade(
    parts: Iterable[tuple[str | None, list[int]]], confidence: Sequence[float]
) -> Iterator[tuple[str, str | None, float]]:
    """Yield each token of a canvas as HTML, shaded, underlined and titled by confidence; then its text, which is `None`
    for a mask, and its confidence."""
    for text, positions in parts:
        if text is None:
            yield _MASK, None, math.nan
        elif text:
            sure, shown = min(confidence[position] for position in positions), _escape(text)
            look = f"ldm-token ldm-level-{level_of(sure)}"
            yield f'<span class="{look}" title="confidence {sure:.1%}">{shown}</span>', shown, sure


def _show_draft(parts: Iterable[tuple[str | None, list[int]]], confidence: Sequence[float]) -> str:
    """An unfinished answer, masks and all."""
    return f'<span class="ldm-text">{"".join(span for span, *_ in _shade(parts, confidence))}</span>'


def _show_answer(parts: Iterable[tuple[str | None, list[int]]], confidence: Sequence[float], summary: str) -> str:
    """An answer, shaded, and the confidence of its tokens as a table.

    It holds a mask where the model proposed the mask itself until the steps were used up.
    """
    tokens = list(_shade(parts, confidence))
    spans = "".join(span for span, *_ in tokens)
    rows = "".join(f"<tr><td>{text}</td><td>{sure:.1%}</td></tr>" for _, text, sure in tokens if text is not None)
    return (
        f'<span class="ldm-text">{spans or "(an empty answer)"}</span><p>{_escape(summary)}</p>'
        '<details><summary>Confidence of every token</summary><table class="ldm-table"><thead><tr>'
        f'<th scope="col">Token</th><th scope="col">Confidence</th></tr></thead><tbody>{rows}</tbody></table>'
        "</details>"
    )


def _show_conversation(
    turns: Sequence[_Turn], question: str | None = None, draft: str = "", nothing: str = "No question yet."
) -> str:
    busy = str(question is not None).lower()
    pairs = [(turn.question, turn.shown) for turn in turns] + ([] if question is None else [(question, draft)])
    shown = "".join(
        f'<article class="ldm-turn"><p class="ldm-question"><b>You: </b><span>{_escape(asked)}</span></p>'
        f'<div class="ldm-answer"><b>Model: </b>{answer}</div></article>'
        for asked, answer in pairs
    )
    shown = shown or f"<p>{nothing}</p>"
    return f'<section role="log" aria-live="polite" aria-label="Conversation" aria-busy="{busy}">{shown}</section>'


def _show_picture(picture: MedicalImage | None) -> str:
    """The picture as it was read, and what was done to its pixels."""
    if picture is None:
        return '<p class="ldm-picture">No image yet.</p>'
    preview, file = picture.image.copy(), io.BytesIO()
    preview.thumbnail(_PREVIEW)
    preview.save(file, "PNG")
    height, width = picture.size
    steps = "".join(f"<li>{_escape(step)}</li>" for step in picture.steps) or "<li>nothing: read as it is</li>"
    return (
        '<figure class="ldm-picture">'
        f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" '
        f'alt="The uploaded image as it was read, {width} by {height} pixels">'
        f"<figcaption>{width} by {height} pixels (width by height). What was done to them:<ol>{steps}</ol></figcaption>"
        "</figure>"
    )


def _show_legend() -> str:
    levels = "".join(
        f'<li><span class="ldm-token ldm-level-{index}">{level.name}</span></li>' for index, level in enumerate(LEVELS)
    )
    return (
        '<section aria-label="Legend" class="ldm-legend"><p>Confidence: the probability of a token when it was '
        "committed. It says how sure the model was, not whether it is right. Point at a token for its own.</p>"
        f"<ul>{levels}<li>{_MASK} still masked</li></ul></section>"
    )


def _show_message(message: str) -> str:
    return f'<p role="alert" class="ldm-alert">{_escape(message)}</p>'


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

    Questions are answered one at a time. `launch` takes what Gradio's does, but limits uploads and keeps no history,
    monitoring or footer unless told otherwise; it listens on 127.0.0.1 unless told otherwise.

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
    from starlette.middleware import Middleware  # which Gradio brings

    prepare = partial(model.resolve_generation_config, return_dict_in_generate=True)
    defaults = prepare()
    context = model.config.get_text_config().max_position_embeddings
    longest_canvas = min(4 * defaults.max_new_tokens, context) if longest_canvas is None else longest_canvas
    for name, value, least in (
        ("longest_canvas", longest_canvas, defaults.max_new_tokens),
        ("max_file_size", max_file_size, 1),
        ("queue_size", queue_size, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` is {value!r}; allowed are whole numbers of at least {least}.")

    class App(gradio.Blocks):
        def launch(self, **options):
            private = {"run_history": False, "enable_monitoring": False, "footer_links": [], "mcp_server": False}
            limits = {"max_file_size": max_file_size, "state_session_capacity": 4 * queue_size}
            # Gradio's own fonts have no bold letters.
            theme = gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
            host = options.get("server_name") or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
            if not options.get("share") and "SPACE_ID" not in os.environ:  # others have names that only they know
                own = Middleware(OwnPageOnly, hosts=LOOPBACK_HOSTS if host in LOOPBACK_HOSTS else None)
                more = options.get("app_kwargs") or {}
                options["app_kwargs"] = more | {"middleware": [own, *more.get("middleware", ())]}
            return super().launch(**(private | limits | {"theme": theme} | options))

    notice = _escape(" ".join(text for text in (NOTICE, _UPLOADS, demo_notice(model)) if text))
    lock = Lock()
    mask_token_id = model.config.mask_token_id

    def decode(tokens):
        return processor.decode(tokens, skip_special_tokens=True)

    def answer(conversation, question, options):
        """Yield HTML of the draft after every forward pass, then the new turn."""
        turns = [(turn.question, turn.answer) for turn in conversation.turns]
        inputs = processor.apply_chat_template(
            [chat_about(conversation.picture.image, turns, question)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        for output in _denoise(model, lock, inputs, options):
            if isinstance(output, tuple):  # what is shown on the way
                canvas, confidence = output
                yield _show_draft(pieces(canvas, decode, mask_token_id), confidence)
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        passes, sure = int(output.num_forwards[0]), float(output.answer_confidence[0])
        summary = f"Confidence of the answer {sure:.0%}. Tokens: {len(tokens)}. Forward passes: {passes}."
        if output.abstained is not None and bool(output.abstained[0]):
            summary += " That is below the model's threshold: take it as no answer."
        shown = _show_answer(pieces(tokens, decode, mask_token_id), output.commit_confidence[0].tolist(), summary)
        yield _Turn(question, decode(tokens).strip(), shown)

    def show_choices(conversation):
        """Show the controls for what can be chosen from the file, and hide the others."""
        chosen = conversation.chosen
        counts = {} if conversation.picture is None else conversation.picture.choices
        counts = {name: index for name, index in counts.items() if index}
        volume_count = counts.pop("time_index", None)

        def slider(counted):
            unit, index, count = counted or ("frame", 0, 2)
            return gradio.update(
                visible=counted is not None, label=f"{unit.capitalize()} (from 0)", maximum=count - 1, value=index
            )

        windows = [_DEFAULT, *([_FULL_RANGE] if "full_range" in chosen else []), *WINDOW_PRESETS]
        shown_window = _FULL_RANGE if chosen.get("full_range") else chosen.get("window") or _DEFAULT
        return {
            place: slider(next(iter(counts.values()), None)),
            volume: slider(volume_count),
            axis: gradio.update(visible="axis" in chosen, value=chosen.get("axis") or "axial"),
            window: gradio.update(visible="window" in chosen, choices=windows, value=shown_window),
            background: gradio.update(visible="background" in chosen, value=chosen.get("background") or _DEFAULT),
            burned_in: gradio.update(
                visible="allow_burned_in" in chosen, value=bool(chosen.get("allow_burned_in")),
            ),
        }  # fmt: skip

    def choose(conversation, place_index, volume_index, chosen_axis, chosen_window, chosen_background, read_burned_in):
        """Read another picture from the same file and begin the conversation anew."""
        values = [(text or _DEFAULT).strip() for text in (chosen_axis, chosen_window, chosen_background)]
        axis_name, window_name, colour = (None if value == _DEFAULT else value for value in values)
        given = {
            "time_index": volume_index, "axis": None if axis_name == "axial" else axis_name, "background": colour,
            "window": None if window_name == _FULL_RANGE else window_name,
            "full_range": window_name == _FULL_RANGE or None, "allow_burned_in": read_burned_in,
        }  # fmt: skip
        try:
            wanted = {argument: given.get(argument, place_index) for argument in conversation.chosen}
            # Controls change also when they are shown or emptied.
            if wanted == conversation.chosen or place_index is None or volume_index is None:
                return gradio.skip()
            if wanted.get("axis") != conversation.chosen.get("axis"):
                wanted.pop("slice_index", None)  # it counts along the axis
            begun = _begin(conversation.source, **wanted)
        except (ValueError, ImportError) as error:
            return {alert: _show_message(_explain(error)), **show_choices(conversation)}
        conversation.over = True
        restarted = "The image was read anew, so the conversation begins anew."
        changed = {
            state: begun,
            picture: _show_picture(begun.picture),
            log: _show_conversation((), nothing=restarted),
            alert: _show_message(begun.refusal) if begun.refusal else "",
        }
        # Controls that are right stay untouched: somebody may be moving one.
        return changed if begun.chosen == wanted else changed | show_choices(begun)

    def ask(message, conversation, canvas_length, block_length, steps, threshold):
        question, files = (message["text"] or "").strip(), message["files"]
        try:
            if files:
                conversation = _read_upload(files, max_file_size)
                yield {
                    picture: _show_picture(conversation.picture),
                    log: _show_conversation(()),
                    state: conversation,
                    box: {"text": question, "files": []},
                    alert: "",
                    **show_choices(conversation),
                }
                if not question and conversation.picture is not None:
                    return
            if conversation.picture is None:
                raise ValueError(conversation.refusal or "There is no image yet; add one to the question.")
            if not 0 < len(question) <= _MAX_QUESTION:
                raise ValueError(f"The question has {len(question)} characters; allowed are 1 to {_MAX_QUESTION}.")
            options = {
                "max_new_tokens": canvas_length,
                "block_length": block_length,
                "steps": steps,
                "confidence_threshold": threshold or None,
                "generation_suffix": None,  # it would stand behind the answer, with no confidence
                "tokenizer": processor.tokenizer,
            }
            for draft in answer(conversation, question, options):
                if conversation.over:
                    return
                if isinstance(draft, str):
                    yield {log: _show_conversation(conversation.turns, question, draft), alert: ""}
            conversation = replace(conversation, turns=(*conversation.turns, draft))
            yield {
                log: _show_conversation(conversation.turns),
                state: conversation,
                box: {"text": "", "files": []},
                alert: "",
            }
        except Exception as error:
            if isinstance(error, (ValueError, ImportError)):
                text = _explain(error)
            else:  # a message of a library may quote what it was given
                text = f"This could not be answered ({type(error).__name__})."
                logger.error("a question could not be answered: %s", type(error).__name__)
            yield {
                log: _show_conversation(conversation.turns),
                box: {"text": question, "files": []},
                alert: _show_message(text),
            }

    def fit(canvas_length):
        options = prepare(max_new_tokens=canvas_length)
        return options.block_length, min(options.steps, longest_canvas)

    def stop(conversation):
        return _show_conversation(conversation.turns), ""

    def clear():
        conversation = _Conversation()
        return {
            state: conversation,
            picture: _show_picture(None),
            log: _show_conversation(()),
            alert: "",
            box: {"text": "", "files": []},
            **show_choices(conversation),
        }

    with App(title=title, analytics_enabled=False, delete_cache=(60, 600)) as app:
        state = gradio.State(_Conversation(), time_to_live=_SESSION_SECONDS)
        gradio.HTML(
            f'{_STYLE}<h1>{_escape(title)}</h1><p role="note" class="ldm-note"><b>{notice}</b></p>',
            label="Notice",
        )
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                picture = gradio.HTML(_show_picture(None), label="Image")
                window = gradio.Dropdown(
                    [_DEFAULT, *WINDOW_PRESETS], value=_DEFAULT, allow_custom_value=True, visible=False,
                    label="Window (grey values to show)",
                    info="A preset in Hounsfield units, or LEVEL/WIDTH, such as 40/400. The default is the file's own.",
                )  # fmt: skip
                axis = gradio.Radio([*reversed(AXES)], value="axial", visible=False, label="Axis")
                background = gradio.Dropdown(
                    [_DEFAULT, "black", "white"], value=_DEFAULT, allow_custom_value=True, visible=False,
                    label="Background (of transparent pixels)",
                    info="A colour's name, or #rrggbb. The default shows the colours that transparency hid.",
                )  # fmt: skip
                burned_in = gradio.Checkbox(
                    label="Burned-in text: read the file nonetheless", visible=False,
                )  # fmt: skip
                volume, place = (
                    gradio.Slider(0, 1, 0, step=1, precision=0, visible=False, label=label, buttons=[])
                    for label in ("Volume", "Frame, page or slice")
                )
            with gradio.Column(scale=2, min_width=320):
                log = gradio.HTML(_show_conversation(()), label="Conversation")
                alert = gradio.HTML("", label="Message")
                box = gradio.MultimodalTextbox(
                    label="Image and question",
                    show_label=True,
                    info="Attach or paste a picture, DICOM or NIfTI file; press Enter to see it, or ask at once. Then "
                    "ask follow-up questions.",
                    placeholder="Question about the image",
                    sources=["upload"],
                    file_count="single",
                    max_plain_text_length=_MAX_QUESTION,
                )
                with gradio.Row(equal_height=True):
                    stop_button = gradio.Button("Stop")
                    clear_button = gradio.Button("New conversation")
                with gradio.Accordion("How to denoise", open=False, elem_id="ldm-options") as options:
                    sliders = [
                        gradio.Slider(
                            1, longest_canvas, defaults.max_new_tokens, step=1, precision=0,
                            label="Canvas length (max_new_tokens)", info="The longest answer, in tokens.",
                        ),
                        gradio.Slider(
                            1, longest_canvas, defaults.block_length, step=1, precision=0,
                            label="Block length (block_length)", info="Must divide the canvas length.",
                        ),
                        gradio.Slider(
                            1, longest_canvas, min(defaults.steps, longest_canvas), step=1, precision=0,
                            label="Steps (steps)", info="Must be a multiple of the number of blocks. Fewer are faster.",
                        ),
                        gradio.Slider(
                            0, 1, defaults.confidence_threshold or 0, step=0.01,
                            label="Confidence threshold (confidence_threshold)",
                            info="Commit all tokens that are at least this probable, instead of so many a step; 0 is "
                            "off.",
                        ),
                    ]  # fmt: skip
        gradio.HTML(_show_legend(), label="Legend")
        choices = [place, volume, axis, window, background, burned_in]
        asked = box.submit(
            ask, [box, state, *sliders], [box, picture, log, alert, state, *choices],
            api_name="ask", show_progress="hidden", concurrency_limit=1, trigger_mode="once",
        )  # fmt: skip
        gradio.on(
            [choice.change for choice in choices], choose, [state, *choices], [picture, log, alert, state, *choices],
            api_name="choose", show_progress="hidden", trigger_mode="always_last",
        )  # fmt: skip
        gradio.on(  # the arrow keys release nothing, and the button that resets is no input
            [sliders[0].input, sliders[0].release], fit, sliders[0], sliders[1:3],
            api_name="fit", show_progress="hidden", trigger_mode="always_last",
        )  # fmt: skip
        app.load(js=_TAKE_PASTED_FILES, api_visibility="private")
        # Gradio's own button does not tell whether it is open.
        for event, expanded in ((app.load, "false"), (options.expand, "true"), (options.collapse, "false")):
            js = f"() => document.querySelector('#ldm-options button').setAttribute('aria-expanded', {expanded})"
            event(js=js, api_visibility="private")
        stop_button.click(stop, state, [log, alert], cancels=[asked], api_visibility="private", show_progress="hidden")
        clear_button.click(
            clear, None, [state, picture, log, alert, box, *choices],
            cancels=[asked], api_name="clear", show_progress="hidden",
        )  # fmt: skip
    return app.queue(max_size=queue_size, default_concurrency_limit=1, api_open=False)


__all__ = ["build_app", "import_gradio"]
