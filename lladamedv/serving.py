"""An OpenAI-compatible server around one model: routes and replies are those of `transformers serve`.

What is ours: the model's own options of decoding, one answer at a time and a short queue before it, an end to answers
that nobody waits for any more, and narrow doors. Images may be of patients, so nothing of a request is logged or kept,
and nothing is fetched for one. Errors are JSON in OpenAI's form and name the field that is wrong.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import reprlib
import time
import unicodedata
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import BytesIO
from threading import Event

import torch
from PIL import Image, ImageFile
from transformers import GenerationConfig


try:
    import anyio
    import h11
    import openai  # noqa: F401 - Transformers' handlers cannot be imported without it
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, Response
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise ImportError('The server needs libraries of its own: pip install "lladamedv[serve]".') from error
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseGenerateManager, BaseHandler, GenerationState

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationConfig
from lladamedv.modeling_lladamedv.generation_config_lladamedv import FOREIGN_OPTIONS
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.medical_images import READING_OPTIONS, MedicalImageError, read_data_url, read_medical_image

from .doors import LOOPBACK_HOSTS, check_host


logger = logging.getLogger(__name__)
_MODELS, _HEALTH = "/v1/models", "/health"  # of Transformers' routes
_CHAT, _RESPONSES = "/v1/chat/completions", "/v1/responses"
# What the pictures of a request may have, so that reading them takes less than 300 MB and two seconds.
_MAX_IMAGES = 4
_MAX_PIXELS = 2**23  # of one, while it is read
_MAX_PIXELS_TOGETHER = 2**24
_JPEG_2000 = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")  # slow, and can be decoded reduced
_JPEG_2000_PIXELS = 2**22
_LAST_FRAME = 49  # of animations, whose frames are decoded one after the other
_LONGEST_SIDE = 2**12  # pixels, of pictures that are padded to squares
_READING_SECONDS = 2  # of the processor's time
_MAX_CHARACTERS = 100_000  # of a request's texts
_MAX_VALUES = 300_000  # of a request's JSON, roughly
_MAX_STOPS = 4  # as OpenAI has it
_HEADER_SECONDS = 10
_UPLOAD_SECONDS = 60
_SLOWEST_UPLOAD = 20_000  # bytes a second, after the first seconds
_FIRST_SECONDS = 5
_STOPPING_SECONDS = 300  # that the answer under way has to come to an end when the server stops
_MAX_MESSAGE = 1_000  # characters of an error, which may quote what was given
_SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can hold them alone, and no text can
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # and their own names
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image_url", "input_image")
# Options of `generate` that are the server's affair, or whose results have no place in a reply.
_NOT_OPTIONS = {
    "abstention_threshold", "bos_token_id", "compile_config", "confidence_temperature", "eos_token_id",
    "generation_suffix", "output_cache_drift", "output_history", "pad_token_id", "return_dict_in_generate",
    "suppress_tokens", "transformers_version",
}  # fmt: skip
_OPTIONS = sorted(
    name for name in vars(LLaDAMedVGenerationConfig()) if name not in _NOT_OPTIONS and not name.startswith("_")
)
_PLAIN, _MEDIUM = {"format": {"type": "text"}}, {"verbosity": "medium"}
# Known fields that this model has no use for, with the values that ask for nothing: `...` is any value, because the
# field changes no answer, and null, [] and {} are such values of every field. All other values are refused.
_NEUTRAL = {
    "background": (False,), "best_of": (1,), "chat_template_kwargs": (), "continue_final_message": (False,),
    "echo": (False,), "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": (),
    "ignore_eos": (False,), "include": (["reasoning.encrypted_content"],), "length_penalty": (1,), "logit_bias": (),
    "logprobs": (False,), "max_tool_calls": ..., "metadata": ..., "min_p": (0,), "min_tokens": (0,),
    "modalities": (["text"],), "n": (1,), "parallel_tool_calls": ..., "presence_penalty": (0,),
    "prompt_cache_key": ..., "prompt_cache_retention": ..., "reasoning": ({"effort": "none"},),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "safety_identifier": ..., "service_tier": ..., "skip_special_tokens":
    (True,), "stop_token_ids": (), "store": ..., "text": (_PLAIN, _MEDIUM, _PLAIN | _MEDIUM), "tool_choice": ("none",
    "auto"), "tools": (), "top_k": (-1, 0), "top_logprobs": (0,), "top_p": (1,), "truncation": ("disabled",),
    "use_beam_search": (False,), "user": ..., "verbosity": ("medium",),
}  # fmt: skip
_MESSAGE_NEUTRAL = {
    "annotations": ..., "audio": (), "function_call": (), "id": ..., "name": ..., "phase": ..., "refusal": (),
    "status": ..., "tool_calls": (), "type": ("message",),
}  # fmt: skip
_TEXT_NEUTRAL = {"annotations": ..., "cache_control": ..., "logprobs": ...}
# A picture is always seen at the model's own resolution.
_IMAGE_NEUTRAL = {"cache_control": ..., "detail": ("auto", "low", "high", "original"), "file_id": (), "format": ...}
_STREAM_OPTIONS_NEUTRAL = {"include_obfuscation": ...}
_READING_FIELDS = {option.name: option for option in READING_OPTIONS}
_JSON_NAMES = {None: "null", True: "true", False: "false"}
_JSON_TYPES = {int: "whole numbers", str: "texts", bool: "true and false"}
_ERROR_TYPES = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
# Set when the reply to the request that is being handled is complete, or nobody waits for it any more.
_GONE: ContextVar[Event] = ContextVar("gone")


class _RefusedError(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, headers: dict[str, str] | None = None,
        code: str | None = None,
    ):  # fmt: skip
        message, param = (text and _SURROGATES.sub("\ufffd", text[:_MAX_MESSAGE]) for text in (message, param))
        super().__init__(message)
        self._status, self._headers = status, headers
        kind = _ERROR_TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def reply(self) -> JSONResponse:
        return JSONResponse(self.body, self._status, self._headers)


class _EnoughError(Exception):
    """Ends `generate`: the answer is complete, or nobody waits for it."""


def _refusal(error: Exception, names: Mapping[str, str]) -> _RefusedError:
    """What the client gets to know of an error. A message of a library may quote what it was given.

    Args:
        names: of the options of `generate` that the request has, the fields that they are in.
    """
    if isinstance(error, _RefusedError):
        return error
    if isinstance(error, (ValueError, ImportError)):
        message = str(error)
        for name, field in names.items():
            message = message.replace(f"`{name}`", f"`{field}`")
        fields = (field for field in names.values() if message.startswith(f"`{field}`"))
        return _RefusedError(message, next(fields, None))
    logger.error("a request could not be answered: %s", type(error).__name__)
    return _RefusedError(f"The request could not be answered ({type(error).__name__}).", status=500)


def _wrong(place: str, value: object, allowed: str) -> _RefusedError:
    shown = _JSON_NAMES[value] if value is None or isinstance(value, bool) else reprlib.repr(value)
    if isinstance(value, str) and _SURROGATES.search(value):
        shown += ", with half a character (a lone surrogate)"
    return _RefusedError(f"`{place}` is {shown}; allowed are {allowed}.", place)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _SURROGATES.search(value)


def _says_nothing(text: str) -> bool:
    return all(unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp", "Zs") for letter in text)


@dataclass(frozen=True)
class _Question:
    """What a request asks.

    Attributes:
        chat: messages; each image is still a data URL, with the options to read it by, and their places in the request.
        field: where the messages are in the request.
        options: complete options of `generate`.
        names: of those of them that the request has, the fields that they are in.
        stop: texts that end the answer wherever they occur in it.
        seed: of the noise, if the answer is to be drawn the same way again.
    """

    chat: list[dict]
    field: str
    options: LLaDAMedVGenerationConfig
    names: dict[str, str]
    stop: list[str]
    seed: int | None


def _parse(body: bytes) -> dict:
    """The JSON object that a request holds, which says everything once."""

    def unite(pairs):
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _RefusedError(f"`{twice}` is there twice in one object; allowed is once.", twice)
        return fields

    def refuse(number):
        raise ValueError(f"{number} is no number of JSON")

    # Each value takes far more memory than its text.
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise _RefusedError(f"The body holds more than {_MAX_VALUES} values; no more are allowed.", status=413)
    try:
        fields = json.loads(body, object_pairs_hook=unite, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # which quote nothing that is longer than a number
        raise _RefusedError(f"The body must be a JSON object: {error}.") from error
    if not isinstance(fields, dict):
        raise _RefusedError(f"The body must be a JSON object; it is a {type(fields).__name__}.")
    return fields


def _check_fields(given: dict, known: Collection[str], neutral: Mapping[str, object], place: str = "") -> dict:
    """The fields of an object that are not null, if those that are not `known` ask for nothing."""
    fields = {name: value for name, value in given.items() if value is not None}
    for name, value in fields.items():
        where = f"{place}.{name}" if place else name
        if name in known:
            continue
        if name not in neutral:
            raise _RefusedError(f"`{where}` is no field that is known here; allowed are {sorted(known)}.", where)
        values = neutral[name]
        if values is not ... and not any(_is_same(_without_nulls(value), each) for each in ([], {}, *values)):
            raise _wrong(where, value, " and ".join(map(json.dumps, (None, *values))))
    return fields


def _is_same(value: object, other: object) -> bool:
    """Whether two values of JSON are equal; there true is no number."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return value


def _read_message(message: object, place: str) -> dict:
    """A message of either endpoint for the chat template, checked."""
    role = message.get("role") if isinstance(message, dict) else None
    if isinstance(message, dict) and role is not None and (not isinstance(role, str) or role not in _ROLES):
        raise _wrong(f"{place}.role", role, ", ".join(map(repr, _ROLES)))
    if not isinstance(message, dict):
        raise _wrong(place, message, "messages, objects with a `role` and a `content`")
    fields = _check_fields(message, ("role", "content"), _MESSAGE_NEUTRAL, place)
    if role is None:
        raise _wrong(f"{place}.role", role, ", ".join(map(repr, _ROLES)))
    may_be_empty = role == "assistant"  # what this model said itself
    content = fields.get("content", "" if may_be_empty else None)
    content = _read_content(content, f"{place}.content", may_be_empty)
    for part in content:
        if part["type"] == "image" and role != "user":
            place = part["place"]
            raise _RefusedError(f"`{place}` is in a message of the role {role!r}; allowed is 'user' for images.", place)
    return {"role": _ROLES[role], "content": content}


def _read_content(content: object, place: str, may_be_empty: bool = False) -> list[dict]:
    if not _is_text(content) and not isinstance(content, list):
        raise _wrong(place, content, "texts and lists of parts")
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    else:
        parts = [_read_part(part, f"{place}[{number}]") for number, part in enumerate(content)]
    if not may_be_empty and all(part["type"] == "text" and _says_nothing(part["text"]) for part in parts):
        raise _RefusedError(f"`{place}` is empty; it must hold a text or an image.", place)
    return parts


def _read_part(part: object, place: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS:
        text = _check_fields(part, ("type", "text"), _TEXT_NEUTRAL, place).get("text")
        if not _is_text(text):
            raise _wrong(f"{place}.text", text, "texts")
        return {"type": "text", "text": text}
    if kind in _IMAGE_PARTS:
        return _read_image_part(part, place)
    raise _wrong(f"{place}.type", kind, ", ".join(map(repr, _TEXT_PARTS + _IMAGE_PARTS)))


def _read_image_part(part: dict, place: str) -> dict:
    """The options by which to read an image stand beside its URL, wherever that is."""
    fields = _check_fields(part, ("type", "image_url", *_READING_FIELDS), _IMAGE_NEUTRAL, place)
    url, where = fields.get("image_url"), f"{place}.image_url"
    found = [(place, fields)]
    if isinstance(url, dict):
        inner = _check_fields(url, ("url", *_READING_FIELDS), _IMAGE_NEUTRAL, where)
        found.append((where, inner))
        url, where = inner.get("url"), f"{where}.url"
    if not isinstance(url, str) or url.lstrip()[:5].lower() != "data:":
        raise _wrong(where, url, "data URLs as data:image/png;base64,…: nothing is fetched")
    options, places = {}, {"source": where}
    for name, option in _READING_FIELDS.items():
        for outer, holder in found:
            value, places[option.argument] = holder.get(name), f"{outer}.{name}"
            if value is None:
                continue
            if option.argument in options:
                raise _RefusedError(f"`{outer}.{name}` is there twice, also in `{place}`.", f"{outer}.{name}")
            if type(value) is not option.type:
                raise _wrong(f"{outer}.{name}", value, _JSON_TYPES[option.type])
            options[option.argument] = value
    return {"type": "image", "url": url, "place": where, "options": options, "places": places}


class _Timed(BytesIO):
    """A file that can be read until a thread has taken so much of the processor's time."""

    def __init__(self, content: bytes, until: float):
        super().__init__(content)
        self._until, self._jpeg = until, content.startswith(b"\xff\xd8\xff")

    def read(self, size: int | None = -1) -> bytes:
        if time.thread_time() > self._until:
            raise TimeoutError
        if self._jpeg and size == ImageFile.MAXBLOCK:  # Pillow takes less, too, and a scan has only some 20 bytes
            size = 1024
        return super().read(size)


def _read_image(part: dict, max_pixels: int, until: float) -> Image.Image:
    """The picture of a part."""
    named = []

    def name_of(argument):
        named.append(part["places"][argument])
        return f"`{named[-1]}`"

    reason: object
    try:
        content = read_data_url(part["url"])
        if part["options"].get("page", 0) > _LAST_FRAME and not content.startswith((b"II", b"MM")):
            place = part["places"]["page"]
            message = f"`{place}` is {part['options']['page']}; allowed are 0 to {_LAST_FRAME}, but for TIFF files."
            raise _RefusedError(message, place)
        if content.startswith(_JPEG_2000):
            max_pixels = min(max_pixels, _JPEG_2000_PIXELS)
        return read_medical_image(_Timed(content, until), max_pixels=max_pixels, **part["options"]).image
    except _RefusedError:
        raise
    except MedicalImageError as error:
        reason = error
    except Exception as error:  # libraries raise many kinds for broken files
        reason = error if isinstance(error, (ValueError, ImportError)) else type(error).__name__
    if time.thread_time() > until:
        reason = f"reading the images of this request takes more than {_READING_SECONDS} seconds"
    elif isinstance(reason, MedicalImageError):
        message = reason.told(name_of)  # an option in it is what can be changed
        raise _RefusedError(message, next((place for place in named if place != part["place"]), part["place"]))
    raise _RefusedError(f"`{part['place']}` cannot be read: {reason}", part["place"])


def _reduce(image: Image.Image) -> Image.Image:
    """The image, or a smaller one of the same proportions if it is too long to become a square."""
    width, height = image.size
    scale = _LONGEST_SIDE / max(width, height)
    if scale >= 1:
        return image
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)


class _Events(asyncio.Queue):
    """Of an answer in the making: the model's inputs, pieces of text, and `None`; an error is raised by `get`."""

    def get_nowait(self):
        event = super().get_nowait()
        if isinstance(event, Exception):
            raise event
        return event


class _Generation(BaseGenerateManager):
    """One answer: Transformers' handlers take it for their manager, and `generate` for its streamer.

    `run` is called in the model's thread and everything else, but for the streamer's methods, in the server's.
    """

    def __init__(
        self, model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor, question: _Question, gone: Event
    ):
        self.events = _Events()
        self._loop = asyncio.get_running_loop()
        self._model, self._processor, self._question, self._gone = model, processor, question, gone
        self._inputs = None
        self._tokens: list[int] = []
        self._sent = 0  # characters

    @property
    def total_tokens(self) -> int:
        return len(self._tokens)

    def prepare(self) -> None:
        """Read the images, in the reader's thread.

        Raises:
            _RefusedError: for one that cannot be read, or if they take too much.
        """
        parts = [part for message in self._question.chat for part in message["content"] if part["type"] == "image"]
        until, left = time.thread_time() + _READING_SECONDS, _MAX_PIXELS_TOGETHER
        for part in parts:
            if self._gone.is_set():
                return
            image = _read_image(part, max(1, min(left, _MAX_PIXELS)), until)
            left -= image.width * image.height
            padded = len(parts) > 1 or self._processor.image_processor.vision_aspect_ratio == "pad"
            part["image"] = _reduce(image) if padded else image
            del part["url"]

    def run(self) -> None:
        """Denoise the answer."""
        try:
            self._generate()
        except _EnoughError:
            pass
        except Exception as error:
            self._send(error)
        self._send(None)

    def _generate(self):
        if self._gone.is_set():
            raise _EnoughError
        processor, question = self._processor, self._question
        kept = ("type", "text", "image")
        chat = [
            {**message, "content": [{key: part[key] for key in kept if key in part} for part in message["content"]]}
            for message in question.chat
        ]
        self._inputs = processor.apply_chat_template(
            [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device)
        question.chat.clear()  # images may be large
        self._check_length()
        if question.seed is None:
            torch.seed()  # or the noise would go on where an earlier request's seed had led it
        else:
            torch.manual_seed(question.seed)
        self._model.generate(
            **self._inputs, generation_config=question.options, tokenizer=processor.tokenizer, streamer=self
        )

    def _check_length(self):
        length, options, names = self._inputs["input_ids"].shape[1], self._question.options, self._question.names
        suffix = len(self._model._prepare_suffix(options, self._processor.tokenizer))
        context = self._model.config.get_text_config().max_position_embeddings
        room = context - length - suffix
        if options.max_new_tokens > room:
            field = names.get("max_new_tokens", self._question.field)
            raise _RefusedError(
                f"`{field}` is too long: the prompt takes {length} tokens and the answer "
                f"{options.max_new_tokens + suffix}, and the model's context has {context}.",
                field,
            )

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, whereupon all arguments are known to be right; then finished blocks, 1-D."""
        if self._inputs is not None:
            self._send(self._inputs)
            self._inputs = None
            return
        self._tokens += tokens.tolist()
        self._send_text()

    def put_draft(self, tokens: torch.Tensor) -> None:
        """After every forward pass: the moment to stop, if nobody waits any more."""
        if self._gone.is_set():
            raise _EnoughError

    def end(self) -> None:
        self._send_text(last=True)

    def _send_text(self, last: bool = False):
        """Send what is certain of the text: no half character, and nothing that a stop might begin with."""
        text, stops = self._decode(self._tokens), self._question.stop
        found = [place for place in map(text.find, stops) if place >= 0]
        if found:
            text = text[: min(found)]
            whole = range(len(self._tokens), -1, -1)
            self._tokens = next(self._tokens[:n] for n in whole if len(self._decode(self._tokens[:n])) <= len(text))
        elif not last:
            text = text[: max(0, len(text) + 1 - max(map(len, stops), default=1))].rstrip("\ufffd")
        if len(text) > self._sent:
            self._send(text[self._sent :])
            self._sent = len(text)
        if found:
            raise _EnoughError

    def _decode(self, tokens: list[int]) -> str:
        return self._processor.decode(tokens, skip_special_tokens=True)

    def _send(self, event: object) -> None:
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    # What Transformers' handlers ask of a manager, and of a streamer

    def generate_streaming(self, *arguments, **options) -> tuple[_Events, _Generation]:
        return self.events, self

    async def generate_non_streaming(self, model, processor, inputs, *arguments, **options) -> tuple[str, int, list]:
        pieces = []
        while (piece := await self.events.get()) is not None:
            pieces.append(piece)
        return "".join(pieces), inputs["input_ids"].shape[1], self._tokens

    def stop(self) -> None:
        self._gone.set()

    cancel = stop


class _Desk:
    """One model that answers one question at a time; it stands where Transformers has a ModelManager."""

    def __init__(self, name: str, model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor):
        self.name, self.model, self.processor = name, model, processor
        self.seconds = 0.0  # that the last answer took
        self._since = int(time.time())
        self._preparing, self._turn = asyncio.Lock(), asyncio.Lock()
        # Always the same ones: compiled models need that, and one that reads pictures bounds the memory for that.
        self._thread, self._reader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: set[anyio.CancelScope] = set()
        self.stopping = False

    async def start(self, generation: _Generation) -> None:
        """Wait for the model and have it begin. Cancelled waiters are dropped."""
        loop = asyncio.get_running_loop()
        with self.waiting():
            async with self._preparing:  # so one that waits for the model holds pictures, and the others do not
                await loop.run_in_executor(self._reader, generation.prepare)
                await self._turn.acquire()
        started = time.monotonic()

        def leave(_):
            self.seconds = time.monotonic() - started
            self._turn.release()

        loop.run_in_executor(self._thread, generation.run).add_done_callback(leave)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For what waits, and ends with status 503 when the server stops."""
        with anyio.CancelScope() as scope:
            self._waiting.add(scope)
            try:
                if self.stopping:
                    raise _stopping()
                yield
            finally:
                self._waiting.discard(scope)
        if scope.cancelled_caught:
            raise _stopping()

    def stop(self) -> None:
        """Send away who waits; what runs may end."""
        self.stopping = True
        for scope in self._waiting:
            scope.cancel()

    def check_name(self, name: object) -> None:
        if name != self.name:
            message = f"`model` is {reprlib.repr(name)}; what is served here is {self.name!r}."
            raise _RefusedError(message, "model", 404, code="model_not_found")

    def list_models(self) -> list[dict]:
        return [{"id": self.name, "object": "model", "created": self._since, "owned_by": "lladamedv"}]

    get_gen_models = list_models  # as Transformers before 5.24 calls it

    def shutdown(self) -> None:
        for pool in (self._thread, self._reader):
            pool.shutdown(wait=False)


def _stopping() -> _RefusedError:
    return _RefusedError("The server is stopping.", status=503, headers={"Connection": "close"})


class _Handler(BaseHandler):
    """What both endpoints do with a request before and after Transformers' part."""

    model_manager: _Desk
    _renamed: dict[str, str]  # fields that are options of `generate`, and their names there
    _fields: set[str]  # all others
    _stream_options: tuple[str, ...] = ()
    _extra: dict = {}  # what else Transformers' methods take
    _end = ""  # of a stream

    async def handle_request(self, body: dict, request_id: str) -> Response:
        """Check the request, wait for the model, and reply.

        Raises:
            _RefusedError: for whatever keeps it from an answer.
        """
        desk, names = self.model_manager, {}
        try:
            question = self._read_question(body)
            names = question.names
            generation = _Generation(desk.model, desk.processor, question, _GONE.get())
            await desk.start(generation)
            inputs = await generation.events.get()
            suffix = desk.model._prepare_suffix(question.options, desk.processor.tokenizer)
            arguments = {
                "request_id": request_id, "model": desk.model, "processor": desk.processor, "model_id": desk.name,
                "inputs": inputs, "gen_manager": generation, **self._extra,
                # What is as long as that had no end.
                "gen_config": GenerationConfig(max_new_tokens=question.options.max_new_tokens + len(suffix)),
            }  # fmt: skip
            if not body.get("stream"):
                return await self._non_streaming(**arguments)
            reply = self._streaming(**arguments)
        except Exception as error:
            raise _refusal(error, names) from error
        include_usage = (body.get("stream_options") or {}).get("include_usage")
        reply.body_iterator = self._finish(reply.body_iterator, names, include_usage)
        return reply

    async def _finish(self, events: AsyncIterator[str], names: dict, include_usage: bool | None) -> AsyncIterator[str]:
        """The events of a stream; an error is the last one, because it is too late for another status."""
        try:
            async for event in events:
                if include_usage and '"usage":{' in event:  # asked for, it is an event of its own in OpenAI's API
                    chunk = json.loads(event.removeprefix("data: "))
                    usage = {"choices": [], "usage": chunk.pop("usage")}
                    yield self.chunk_to_sse(json.dumps(chunk))
                    event = self.chunk_to_sse(json.dumps(chunk | usage))
                yield event
            yield self._end
        except Exception as error:
            yield self.chunk_to_sse(json.dumps(_refusal(error, names).body))

    def _read_question(self, body: dict) -> _Question:
        known = {"model", "stream", "stream_options", "seed", "generation_config", *self._renamed, *self._fields}
        body = _check_fields(body, known, _NEUTRAL)
        name, stream, seed = body.get("model", self.model_manager.name), body.get("stream", False), body.get("seed")
        self.model_manager.check_name(name)
        if not isinstance(stream, bool):
            raise _wrong("stream", stream, "true and false")
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            raise _wrong("seed", seed, "whole numbers from 0 to 2^63 - 1")
        given = body.get("stream_options", {})
        if not isinstance(given, dict):
            raise _wrong("stream_options", given, "objects")
        for field, value in _check_fields(
            given, self._stream_options, _STREAM_OPTIONS_NEUTRAL, "stream_options"
        ).items():
            if not isinstance(value, bool):
                raise _wrong(f"stream_options.{field}", value, "true and false")
        options, names, stop = self._read_options(body)
        field, chat = self._read_chat(body)
        parts = [part for message in chat for part in message["content"]]
        for unit, count, most in (
            ("images", sum(part["type"] == "image" for part in parts), _MAX_IMAGES),
            ("characters", sum(len(part.get("text", "")) for part in parts), _MAX_CHARACTERS),
        ):
            if count > most:
                raise _RefusedError(f"`{field}` holds {count} {unit}; allowed are at most {most}.", field)
        return _Question(chat, field, options, names, stop, seed)

    def _read_options(self, body: dict) -> tuple[LLaDAMedVGenerationConfig, dict[str, str], list[str]]:
        """The model's own options and the request's over them, complete; where the request has its own; its stops."""
        given = body.get("generation_config", {})
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                pass
        if not isinstance(given, dict):
            raise _wrong("generation_config", given, "JSON objects, also as a text")
        names = {name: f"generation_config.{name}" for name in given}  # in the request
        for name in given:
            if name not in _OPTIONS and (name in _NOT_OPTIONS or name not in FOREIGN_OPTIONS):
                raise _RefusedError(f"`{names[name]}` is not known; allowed are {_OPTIONS}.", names[name])
        for field, name in self._renamed.items():
            if field in body:
                if names.get(name) in body and body[field] != given[name]:
                    raise _RefusedError(f"`{field}` and `{names[name]}` are both given, and differ.", field)
                given, names = given | {name: body[field]}, names | {name: field}
        model = self.model_manager.model
        context = model.config.get_text_config().max_position_embeddings
        for name, value in given.items():
            if isinstance(value, int) and value > context:
                raise _wrong(names[name], value, f"at most {context}, the length of the model's context")
        stop = given.get("stop_strings")
        stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or len(stop) > _MAX_STOPS or not all(map(_is_text, stop)) or "" in stop:
            raise _wrong(names["stop_strings"], stop, f"up to {_MAX_STOPS} texts that are not empty")
        try:
            options = model._prepare_generation_config(None, **given, return_dict_in_generate=True)
        except (ValueError, TypeError) as error:
            raise _refusal(ValueError(str(error)), names | {"generation_config": "generation_config"}) from error
        return options, names, stop

    def _read_chat(self, body: dict) -> tuple[str, list[dict]]:
        """The field that holds the messages, and they."""
        raise NotImplementedError


class _ChatHandler(_Handler, ChatCompletionHandler):
    _renamed = {
        "max_tokens": "max_new_tokens",
        "max_completion_tokens": "max_new_tokens",
        "repetition_penalty": "repetition_penalty",
        "temperature": "temperature",
        "stop": "stop_strings",
    }
    _fields = {"messages"}
    _stream_options = ("include_usage",)
    _end = "data: [DONE]\n\n"

    def _read_chat(self, body):
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _wrong("messages", messages, "lists of messages")
        return "messages", [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


class _ResponseHandler(_Handler, ResponseHandler):
    _renamed = {"max_output_tokens": "max_new_tokens", "temperature": "temperature"}
    _fields = {"input", "instructions"}
    _extra = {"body": {}}

    def _read_chat(self, body):
        given, instructions = body.get("input"), body.get("instructions", "")
        if not _is_text(instructions):
            raise _wrong("instructions", instructions, "texts")
        chat = []
        if instructions:
            chat.append({"role": "system", "content": _read_content(instructions, "instructions")})
        if isinstance(given, list) and any(isinstance(item, dict) and "role" in item for item in given):
            chat += [_read_message(item, f"input[{index}]") for index, item in enumerate(given)]
        else:  # a text, or parts of one message
            chat.append({"role": "user", "content": _read_content(given, "input")})
        return "input", chat


class _Gate:
    """ASGI middleware that lets in what fits, reads it, and notices when the client has left.

    Requests that wait or are answered are inside: at most one more than `max_queue`. They are read before they get in,
    so that a slow sender takes nobody's place. A request that comes from a web page, which its `Origin` tells, or calls
    the server by a foreign name never gets in.
    """

    def __init__(self, app, desk: _Desk, max_queue: int, max_upload_size: int, hosts: Sequence[str] | None):
        self._app, self._desk, self._hosts = app, desk, hosts
        self._max_queue, self._max_upload_size = max_queue, max_upload_size
        self._inside: set[object] = set()
        self._uploads: dict[anyio.CancelScope, int] = {}  # bytes that have arrived of each, the oldest first

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":  # the server starts or ends
            await self._app(scope, receive, send)
            return
        started = False

        async def note_and_send(message):
            nonlocal started
            started = True
            await send(message)

        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        if scope["method"] == "HEAD":
            scope["method"] = "GET"  # the server leaves out the body
        try:
            headers = Headers(scope=scope)
            if wrong := check_host(headers, self._hosts):
                raise _RefusedError(wrong, "Host")
            if "origin" in headers:
                raise _RefusedError("Web pages may not use this server: the request has an `Origin`.", "Origin", 403)
            if scope["method"] == "POST" and scope["path"] in (_CHAT, _RESPONSES):
                await self._admit(headers, scope, receive, note_and_send)
            else:
                await self._app(scope, receive, send)
        except _RefusedError as error:
            await error.reply()(scope, receive, send)
        except asyncio.CancelledError:
            if started or not self._desk.stopping:
                raise
            await _stopping().reply()(scope, receive, send)

    async def _admit(self, headers, scope, receive, send):
        self._check_room()  # before all of it is sent
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not re.fullmatch(r"application/([\w.-]+\+)?json", kind):
            raise _RefusedError("`Content-Type` must be application/json.", "Content-Type", 415)
        if headers.get("content-encoding", "identity") != "identity":
            raise _RefusedError("`Content-Encoding` must be identity: compressed bodies are not read.",
                                "Content-Encoding", 415)  # fmt: skip
        body = _parse(await self._read(receive))
        self._check_room()
        place = object()
        self._inside.add(place)

        async def send_and_leave(message):
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._inside.discard(place)  # before the client knows, which may ask again at once
            await send(message)

        try:
            await self._answer({**scope, "body": body}, receive, send_and_leave)
        finally:
            self._inside.discard(place)

    def _check_room(self):
        if len(self._inside) > self._max_queue:
            message = f"{len(self._inside)} requests are being answered or wait; no more are allowed at a time."
            seconds = max(1, math.ceil(self._desk.seconds))  # until a place is free
            raise _RefusedError(message, status=429, headers={"Retry-After": str(seconds)})

    async def _read(self, receive) -> bytes:
        """The body, which must not arrive too slowly. If what arrives takes too much memory, the oldest is given up."""
        chunks, more, started, leave = [], True, anyio.current_time(), {"Connection": "close"}
        with self._desk.waiting(), anyio.CancelScope() as upload:
            self._uploads[upload] = 0
            try:
                while more:
                    seconds = min(_UPLOAD_SECONDS, _FIRST_SECONDS + self._uploads[upload] / _SLOWEST_UPLOAD)
                    upload.deadline = started + seconds
                    message = await receive()
                    more = message.get("more_body", False)
                    chunks.append(message.get("body", b""))
                    self._uploads[upload] += len(chunks[-1])
                    if self._uploads[upload] > self._max_upload_size:
                        allowed = f"at most {self._max_upload_size} bytes"
                        message = f"The request has more bytes than are allowed, {allowed}."
                        raise _RefusedError(message, status=413, headers=leave)
                    if sum(self._uploads.values()) > (self._max_queue + 1) * self._max_upload_size:
                        next(iter(self._uploads)).cancel()
            finally:
                del self._uploads[upload]
        if upload.cancelled_caught:
            message = f"The request did not arrive fast enough, at {_SLOWEST_UPLOAD} bytes a second, or soon enough."
            raise _RefusedError(message, status=408, headers=leave)
        return b"".join(chunks)

    async def _answer(self, scope, receive, send):
        gone = Event()
        _GONE.set(gone)

        async def watch():
            await receive()  # there is nothing more to come but the client's leaving
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            try:
                await self._app(scope, anyio.sleep_forever, send)  # disconnection is noticed here
            finally:
                gone.set()
            tasks.cancel_scope.cancel()


def build_api(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    *,
    name: str = "lladamedv",
    max_queue: int = 16,
    max_upload_size: int = 20_000_000,
    hosts: Sequence[str] | None = LOOPBACK_HOSTS,
) -> FastAPI:
    """Build the API of a model: [`make_server`] serves it.

    `POST /v1/chat/completions` and `/v1/responses` follow the API of OpenAI (https://platform.openai.com/docs/api-reference)
    and take the options of [`LLaDAMedVGenerationConfig`] as a JSON object `generation_config` besides; the model's own
    are the defaults. `GET /v1/models`, `/v1/models/NAME` and `/health` tell what is served and that it is.

    Args:
        model: the model, on the device it is to run on.
        processor: its processor.
        name: what requests call the model.
        max_queue: how many requests may wait while one is answered; more are turned away with status 429.
        max_upload_size: largest request, in bytes.
        hosts: names in the `Host` header that the server answers to, so that no foreign name can be made to lead to it;
            `None` for any.

    Raises:
        ValueError: if an argument is not allowed.
    """
    for argument, value, least in (("max_queue", max_queue, 0), ("max_upload_size", max_upload_size, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"`{argument}` is {value!r}; allowed are whole numbers of at least {least}.")
    desk, state = _Desk(name, model, processor), GenerationState()
    api = build_server(desk, None, None, None, None, None, state)
    api.router.routes[:] = [route for route in api.router.routes if route.path in (_MODELS, _HEALTH)]
    api.state.desk = desk

    def add(path, handler):
        async def answer(request):
            return await handler.handle_request(request.scope["body"], request.state.request_id)

        api.add_route(path, answer, methods=["POST"])

    add(_CHAT, _ChatHandler(desk, state))
    add(_RESPONSES, _ResponseHandler(desk, state))

    async def describe(request):
        desk.check_name(request.path_params["name"])
        return JSONResponse(desk.list_models()[0])

    api.add_route(_MODELS + "/{name:path}", describe)

    @api.exception_handler(_RefusedError)
    async def refuse(request, error):
        return error.reply()

    @api.exception_handler(HTTPException)
    async def refuse_path(request, error):
        return _RefusedError(str(error.detail), status=error.status_code, headers=error.headers).reply()

    api.add_middleware(_Gate, desk=desk, max_queue=max_queue, max_upload_size=max_upload_size, hosts=hosts)
    return api


class _Protocol(H11Protocol):
    """HTTP whose headers must arrive in time, and whose errors are JSON."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, error) -> None:
        self._late.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before or self.conn.their_state is not h11.IDLE:
            self._late.cancel()
        elif self._late.cancelled():  # the first part of another request
            self._expect_headers()

    def _expect_headers(self):
        self._late = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

    def send_400_response(self, message: str) -> None:
        body = json.dumps(_RefusedError(message).body).encode()
        headers = [("content-type", "application/json"), ("connection", "close"), ("content-length", str(len(body)))]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class _Server(uvicorn.Server):
    async def shutdown(self, sockets=None) -> None:
        self.config.app.state.desk.stop()
        await super().shutdown(sockets)
        if self.server_state.tasks and not self.force_exit:  # which were cancelled, and reply
            await asyncio.wait(self.server_state.tasks, timeout=1)


def make_server(api: FastAPI) -> uvicorn.Server:
    """A server that logs no requests and takes nobody's word for who they are.

    Told to end (`should_exit`, SIGTERM, SIGINT), it answers those that wait with status 503 and finishes the answer
    under way, if that takes less than five minutes. `run(sockets=[…])` of it runs it on sockets that listen already.
    """
    return _Server(
        uvicorn.Config(
            api, http=_Protocol, ws="none", log_level="warning", access_log=False, proxy_headers=False,
            server_header=False, timeout_graceful_shutdown=_STOPPING_SECONDS,
        )
    )  # fmt: skip


__all__ = ["build_api", "make_server"]
