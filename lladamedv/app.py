"""The browser app: ask a model about an image, and watch the answer appear while it is denoised.

Images may be of patients, so nothing is kept: an upload is deleted as soon as it is read, pictures travel to the
browser inside the page, and neither images nor questions are logged, flagged, counted or saved in the browser.
All HTML is written here; what a person, a file or the model says is escaped into it.
"""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock

import torch

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationOutput
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.medical_images import MedicalImage, read_medical_image


logger = logging.getLogger(__name__)
_NOTICE = (
    "Research only. Not a medical device: nothing it says is a diagnosis, and no clinical decision may rest on it. "
    "Upload no image that shows who somebody is."
)
_MAX_PIXELS = 2**25  # of an image that is kept in memory while its conversation lasts: 100 MB
_MAX_QUESTION = 4_000  # characters
_SESSION_SECONDS = 3_600
_PREVIEW = (640, 640)
# Least confidence, name, and how it looks: never by its colour alone.
_LEVELS = (
    (0.9, "at least 90 %", "background: #d6ebff"),
    (0.7, "70 to 90 %", "background: #fff2c2; text-decoration: underline dotted 2px"),
    (0.5, "50 to 70 %", "background: #ffdcb8; text-decoration: underline dashed 2px"),
    (0.0, "below 50 %", "background: #ffc9c9; text-decoration: underline wavy 2px"),
)
_MASK = '<span class="ldm-mask" title="still masked" aria-hidden="true">▒▒</span>'
# Gradio sets the colour of all that is in its HTML, and its subdued texts have too little contrast.
_STYLE = (
    "<style>"
    ".ldm-note, .ldm-note *, .ldm-alert, .ldm-token { color: #111 !important; }"
    ".ldm-note { border: 2px solid #8a4b00; background: #fff6e5; padding: 8px 12px; }"
    ".ldm-alert { border: 2px solid #a40000; background: #ffecec; padding: 8px 12px; }"
    ".ldm-turn { border-top: 1px solid #767676; padding: 8px 0; }"
    ".ldm-text, .ldm-question span { white-space: pre-wrap; overflow-wrap: anywhere; }"
    ".ldm-token { border-radius: 3px; text-underline-offset: 4px; }"
    ".ldm-mask { background: #767676; color: #767676 !important; border: 1px solid #fff; border-radius: 3px; }"
    ".ldm-picture img { max-width: 100%; }"
    ".ldm-table td, .ldm-table th { padding: 0 12px 0 0; text-align: left; white-space: pre; }"
    ".gradio-container { --body-text-color-subdued: var(--body-text-color); "
    "--block-info-text-color: var(--body-text-color); --input-placeholder-color: #767676; }"
    ".dark .gradio-container, .dark.gradio-container { --input-placeholder-color: #9e9e9e; }"
    + "".join(f".ldm-level-{index} {{ {look} }}" for index, (_, _, look) in enumerate(_LEVELS))
    + "</style>"
)


@dataclass(frozen=True)
class _Turn:
    """A question, its answer, and the answer as HTML."""

    question: str
    answer: str
    shown: str


@dataclass(frozen=True)
class _Conversation:
    """What one browser tab is about; lives in memory only."""

    picture: MedicalImage | None = None
    turns: tuple[_Turn, ...] = ()

    def chat(self, question: str) -> list[dict]:
        """Messages for the chat template: the image stands in the first question."""
        messages = []
        for turn in self.turns:
            messages.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages[0]["content"].insert(0, {"type": "image", "image": self.picture.image})
        return messages


class _StoppedError(Exception):
    """Ends `generate` when nobody waits for its answer any more."""


class _CanvasStreamer:
    """A streamer for `generate` that queues the canvas, as a list of ids, at first and after every forward pass.

    `put_draft` gets what is right of the finished blocks, but a block that the same pass has finished comes with the
    `put` that follows. So a draft that does not complete the canvas waits for that; or, where the canvas became shorter
    because a stop was found, for the next pass. Then a `put` is shorter than a block, because it ends at the stop.
    """

    def __init__(self, length: int, block_length: int, mask_token_id: int):
        self.canvases: SimpleQueue[list[int] | None] = SimpleQueue()
        self.stopped = Event()
        self._length, self._block_length = length, block_length
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
        if self.stopped.is_set():
            raise _StoppedError
        self.end()
        self._draft = tokens[0].tolist()
        if len(self._finished) + len(self._draft) == self._length:
            self._show()

    def end(self) -> None:
        """Queue the draft that waits, if there is one."""
        if self._draft:
            self._show()

    def _show(self):
        canvas = self._finished + self._draft
        self._length, self._draft = len(canvas), []
        self.canvases.put(canvas)


def _denoise(
    model: LLaDAMedVForConditionalGeneration, lock: Lock, inputs: dict, options: dict
) -> Iterator[list[int] | LLaDAMedVGenerationOutput]:
    """Yield the canvas, at first and after every forward pass, and at last what `generate` returns.

    `generate` runs in a thread of its own; when the iterator is closed it ends after its current forward pass.
    """
    streamer = _CanvasStreamer(options["max_new_tokens"], options["block_length"], model.config.mask_token_id)

    def generate():
        with lock:
            return model.generate(**inputs, **options, streamer=streamer, return_dict_in_generate=True)

    pool = ThreadPoolExecutor(1)
    answer = pool.submit(generate)
    answer.add_done_callback(lambda _: streamer.canvases.put(None))
    pool.shutdown(wait=False)
    try:
        yield from iter(streamer.canvases.get, None)
    finally:
        streamer.stopped.set()
    yield answer.result()


def _read_upload(files: Sequence[str], max_file_size: int) -> MedicalImage:
    """Read the uploaded file and delete it, whatever happens."""
    try:
        if len(files) > 1:
            raise ValueError(f"{len(files)} files came with the question; allowed is one.")
        size = Path(files[0]).stat().st_size
        if size > max_file_size:
            raise ValueError(f"The file has {size / 1e6:.1f} MB; allowed are {max_file_size / 1e6:.1f} MB.")
        return read_medical_image(files[0], max_pixels=_MAX_PIXELS)
    finally:
        for file in map(Path, files):
            file.unlink(missing_ok=True)
            with suppress(OSError):  # named after the content; not empty if another file has the same
                file.parent.rmdir()


def _escape(text: str) -> str:
    """Text for HTML that means nothing to a template language either: Gradio's HTML component has two of them."""
    escaped = html.escape(text)
    return "".join(f"&#{ord(letter)};" if letter in "${}`" else letter for letter in escaped)


def _pieces(
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


def _show_draft(pieces) -> str:
    """An unfinished answer, masks and all."""
    return f'<span class="ldm-text">{"".join(_MASK if text is None else _escape(text) for text, _ in pieces)}</span>'


def _show_answer(pieces, confidence: Sequence[float], summary: str) -> str:
    """An answer whose tokens are shaded, underlined and titled by confidence, and the same as a table."""
    spans, rows = [], []
    for text, positions in pieces:
        if text is None:  # the model proposed the mask itself until the steps were used up
            spans.append(_MASK)
        elif text:
            sure, shown = min(confidence[position] for position in positions), _escape(text)
            level = next(index for index, (least, _, _) in enumerate(_LEVELS) if sure >= least)
            spans.append(f'<span class="ldm-token ldm-level-{level}" title="confidence {sure:.1%}">{shown}</span>')
            rows.append(f"<tr><td>{shown}</td><td>{sure:.1%}</td></tr>")
    return (
        f'<span class="ldm-text">{"".join(spans)}</span><p>{_escape(summary)}</p>'
        '<details><summary>Confidence of every token</summary><table class="ldm-table"><thead><tr>'
        f'<th scope="col">Token</th><th scope="col">Confidence</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</details>"
    )


def _show_conversation(turns: Sequence[_Turn], question: str | None = None, draft: str = "") -> str:
    busy = str(question is not None).lower()
    pairs = [(turn.question, turn.shown) for turn in turns] + ([] if question is None else [(question, draft)])
    shown = "".join(
        f'<article class="ldm-turn"><p class="ldm-question"><b>You: </b><span>{_escape(asked)}</span></p>'
        f'<div class="ldm-answer"><b>Model: </b>{answer}</div></article>'
        for asked, answer in pairs
    )
    shown = shown or "<p>No question yet.</p>"
    return f'<section role="log" aria-label="Conversation" aria-busy="{busy}">{shown}</section>'


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
        f'<li><span class="ldm-token ldm-level-{index}">{name}</span></li>'
        for index, (_, name, _) in enumerate(_LEVELS)
    )
    return (
        '<section aria-label="Legend"><p>Confidence: the probability of a token when it was committed. It says how '
        "sure the model was, not whether it is right. Point at a token for its own.</p>"
        f"<ul>{levels}<li>{_MASK} still masked</li></ul></section>"
    )


def _show_message(message: str | None) -> str:
    return f'<p role="alert" class="ldm-alert">{_escape(message)}</p>' if message else ""


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
        A `gradio.Blocks`. Its API name `ask` takes `{"text": …, "files": […]}` and the values of the four sliders.

    Raises:
        ImportError: if Gradio is not installed.
        ValueError: if an argument is not allowed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError('The app needs Gradio: pip install "lladamedv[app]".') from error
    prepare = partial(model._prepare_generation_config, None, return_dict_in_generate=True)
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
            return super().launch(**(private | limits | options))

    lock = Lock()
    mask_token_id = model.config.mask_token_id

    def decode(tokens):
        return processor.decode(tokens, skip_special_tokens=True)

    def answer(conversation, question, options):
        """Yield HTML of the draft after every forward pass, then the new turn."""
        inputs = processor.apply_chat_template(
            [conversation.chat(question)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        for canvas in _denoise(model, lock, inputs, options):
            if isinstance(canvas, list):
                yield _show_draft(_pieces(canvas, decode, mask_token_id))
        output = canvas
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        passes, sure = int(output.num_forwards[0]), float(output.answer_confidence[0])
        summary = f"Confidence of the answer {sure:.0%}. Tokens: {len(tokens)}. Forward passes: {passes}."
        if output.abstained is not None and bool(output.abstained[0]):
            summary += " That is below the model's threshold: take it as no answer."
        shown = _show_answer(_pieces(tokens, decode, mask_token_id), output.commit_confidence[0].tolist(), summary)
        yield _Turn(question, decode(tokens).strip(), shown)

    def ask(message, conversation, canvas_length, block_length, steps, threshold):
        question, files = (message["text"] or "").strip(), message["files"]
        try:
            if files:
                conversation = _Conversation(_read_upload(files, max_file_size))
                yield {
                    picture: _show_picture(conversation.picture),
                    log: _show_conversation(()),
                    state: conversation,
                    box: {"text": question, "files": []},
                    alert: "",
                }
                if not question:
                    return
            if conversation.picture is None:
                raise ValueError("There is no image yet; add one to the question.")
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
                text = str(error)
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
        return conversation, _show_picture(None), _show_conversation(()), "", {"text": "", "files": []}

    with App(title=title, analytics_enabled=False, delete_cache=(60, 600)) as app:
        state = gradio.State(_Conversation(), time_to_live=_SESSION_SECONDS)
        gradio.HTML(
            f'{_STYLE}<h1>{_escape(title)}</h1><p role="note" class="ldm-note"><b>{_NOTICE}</b></p>', label="Notice"
        )
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                picture = gradio.HTML(_show_picture(None), label="Image")
                gradio.HTML(_show_legend(), label="Legend")
            with gradio.Column(scale=2, min_width=320):
                log = gradio.HTML(_show_conversation(()), label="Conversation")
                alert = gradio.HTML("", label="Message")
                box = gradio.MultimodalTextbox(
                    label="Image and question",
                    show_label=True,
                    info="Attach or paste a picture, DICOM or NIfTI file, ask, and press Enter; then ask on.",
                    placeholder="Question about the image",
                    sources=["upload"],
                    file_count="single",
                    max_plain_text_length=_MAX_QUESTION,
                )
                with gradio.Row():
                    stop_button = gradio.Button("Stop")
                    clear_button = gradio.Button("New conversation")
                with gradio.Accordion("How to denoise", open=False):
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
        asked = box.submit(
            ask, [box, state, *sliders], [box, picture, log, alert, state],
            api_name="ask", show_progress="hidden", concurrency_limit=1, trigger_mode="once",
        )  # fmt: skip
        sliders[0].release(fit, sliders[0], sliders[1:3], api_name="fit", show_progress="hidden")
        stop_button.click(stop, state, [log, alert], cancels=[asked], api_visibility="private", show_progress="hidden")
        clear_button.click(
            clear, None, [state, picture, log, alert, box],
            cancels=[asked], api_name="clear", show_progress="hidden",
        )  # fmt: skip
    return app.queue(max_size=queue_size, default_concurrency_limit=1, api_open=False)


__all__ = ["build_app"]
