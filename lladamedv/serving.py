"""An OpenAI-compatible server around one model: routes and replies are those of `transformers serve`.

What is ours: the model's own options of decoding, one answer at a time and a short queue before it, an end to answers
that nobody waits for any more, and narrow doors. Images may be of patients, so nothing of a request is logged or kept,
and nothing is fetched for one. Errors are JSON in OpenAI's form and name the field that is wrong.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import re
import reprlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from io import BytesIO
from threading import Event

import torch
from transformers import GenerationConfig


try:
    import anyio
    import openai  # noqa: F401 - Transformers' handlers cannot be imported without it
    import uvicorn
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError as error:
    raise ImportError('The server needs libraries of its own: pip install "lladamedv[serve]".') from error
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseGenerateManager, BaseHandler, GenerationState

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationConfig
from lladamedv.processing import LLaDAMedVProcessor
from lladamedv.processing.dicom import is_dicom
from lladamedv.processing.medical_images import read_medical_image
from lladamedv.processing.nifti import is_nifti


logger = logging.getLogger(__name__)
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/models", "/health")  # of Transformers' routes
_MAX_PIXELS = 2**25  # of an image: 100 MB while it is read
_MAX_IMAGES = 4  # of a request
_MAX_CHARACTERS = 100_000  # of a request's texts
_MAX_STOPS = 4  # as OpenAI has it
_UPLOAD_SECONDS = 60
_STOPPING_SECONDS = 5  # that answers have to come to an end when the server stops
_MAX_MESSAGE = 1_000  # characters of an error, which may quote what was given
_SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can hold them alone, and no text can
_ROLES = ("system", "user", "assistant")
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
# Fields of OpenAI's that change no answer …
_WITHOUT_EFFECT = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store",
    "stream_options", "user",
}  # fmt: skip
# … and those that ask for what this model has not, unless they have the one value that asks for nothing.
_NEUTRAL = {
    "background": False, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False, "modalities": ["text"], "n": 1,
    "presence_penalty": 0, "response_format": {"type": "text"}, "text": {"format": {"type": "text"}},
    "tool_choice": "none", "tools": [], "top_logprobs": 0, "top_p": 1, "truncation": "disabled",
}  # fmt: skip
_ERROR_TYPES = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
# Set when the reply to the request that is being handled is complete, or nobody waits for it any more.
_GONE: ContextVar[Event] = ContextVar("gone")


class _RefusedError(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, headers: dict[str, str] | None = None
    ):
        message, param = (text and _SURROGATES.sub("\ufffd", text[:_MAX_MESSAGE]) for text in (message, param))
        super().__init__(message)
        self._status, self._headers = status, headers
        kind = _ERROR_TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": None}}

    def reply(self) -> JSONResponse:
        return JSONResponse(self.body, self._status, self._headers)


class _EnoughError(Exception):
    """Ends `generate`: the answer is complete, or nobody waits for it."""


def _refusal(error: Exception) -> _RefusedError:
    """What the client gets to know of an error. A message of a library may quote what it was given."""
    if isinstance(error, _RefusedError):
        return error
    if isinstance(error, (ValueError, ImportError)):
        return _RefusedError(str(error), _named(str(error)))
    logger.error("a request could not be answered: %s", type(error).__name__)
    return _RefusedError(f"The request could not be answered ({type(error).__name__}).", status=500)


def _named(message: str) -> str | None:
    """The argument that an error is about; messages of this package begin with its name."""
    parts = message.split("`", 2)
    return parts[1] if len(parts) == 3 and not parts[0] else None


def _wrong(place: str, value: object, allowed: str) -> _RefusedError:
    return _RefusedError(f"`{place}` is {reprlib.repr(value)}; allowed are {allowed}.", place)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _SURROGATES.search(value)


@dataclass(frozen=True)
class _Question:
    """What a request asks.

    Attributes:
        chat: messages; their images are still data URLs, each with its place in the request.
        options: complete options of `generate`.
        stop: texts that end the answer wherever they occur in it.
        seed: of the noise, if the answer is to be drawn the same way again.
    """

    chat: list[dict]
    options: LLaDAMedVGenerationConfig
    stop: list[str]
    seed: int | None


def _read_messages(messages: object, field: str) -> list[dict]:
    """Messages of either endpoint for the chat template, checked."""
    if not isinstance(messages, list) or not messages:
        raise _wrong(field, messages, "lists of messages")
    chat = []
    for index, message in enumerate(messages):
        place = f"{field}[{index}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise _wrong(place, message, f"messages whose `role` is one of {', '.join(_ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise _wrong(f"{place}.content", content, "texts and lists of parts")
        parts = [_read_part(part, f"{place}.content[{number}]") for number, part in enumerate(content)]
        chat.append({"role": message["role"], "content": parts})
    parts = [part for message in chat for part in message["content"]]
    for unit, count, most in (
        ("images", sum(part["type"] == "image" for part in parts), _MAX_IMAGES),
        ("characters", sum(len(part.get("text", "")) for part in parts), _MAX_CHARACTERS),
    ):
        if count > most:
            raise _RefusedError(f"`{field}` holds {count} {unit}; allowed are at most {most}.", field)
    return chat


def _read_part(part: object, place: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS:
        text = part.get("text")
        if not _is_text(text):
            raise _wrong(f"{place}.text", text, "texts")
        return {"type": "text", "text": text}
    if kind in _IMAGE_PARTS:
        place, url = f"{place}.image_url", part.get("image_url")
        if isinstance(url, dict):
            place, url = f"{place}.url", url.get("url")
        if not isinstance(url, str) or not url.startswith("data:image/"):
            raise _wrong(place, url, "data URLs as data:image/png;base64,…: nothing is fetched")
        return {"type": "image", "url": url, "place": place}
    raise _wrong(f"{place}.type", kind, ", ".join(map(repr, _TEXT_PARTS + _IMAGE_PARTS)))


def _read_image(part: dict) -> dict:
    """A part with the picture that its data URL holds."""
    try:
        head, _, data = part["url"].partition(",")
        if not head.endswith(";base64"):
            raise ValueError("it is not in base64")
        content = base64.b64decode(data, validate=True)
        if is_dicom(content[:132]) or is_nifti(BytesIO(content)):
            raise ValueError("only pictures are read here, no DICOM and NIfTI files")
        return {"type": "image", "image": read_medical_image(content, max_pixels=_MAX_PIXELS).image}
    except Exception as error:  # libraries raise many kinds for broken files
        reason = error if isinstance(error, (ValueError, ImportError)) else type(error).__name__
        raise _RefusedError(f"`{part['place']}` cannot be read: {reason}", part["place"]) from error


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

    def run(self) -> None:
        """Read the images and denoise the answer."""
        try:
            self._generate()
        except _EnoughError:
            pass
        except Exception as error:
            self._send(error)
        self._send(None)

    def _generate(self):
        processor, question = self._processor, self._question
        chat = [
            {**message, "content": [_read_image(part) if "url" in part else part for part in message["content"]]}
            for message in question.chat
        ]
        self._inputs = processor.apply_chat_template(
            [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device)
        if question.seed is None:
            torch.seed()  # or the noise would go on where an earlier request's seed had led it
        else:
            torch.manual_seed(question.seed)
        self._model.generate(
            **self._inputs, generation_config=question.options, tokenizer=processor.tokenizer, streamer=self
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
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1)  # always the same one, which compiled models need

    async def start(self, generation: _Generation) -> None:
        """Wait for the model and have it begin. Who gives up waiting was never there."""
        await self._turn.acquire()
        started = time.monotonic()

        def leave(_):
            self.seconds = time.monotonic() - started
            self._turn.release()

        asyncio.get_running_loop().run_in_executor(self._thread, generation.run).add_done_callback(leave)

    def list_models(self) -> list[dict]:
        return [{"id": self.name, "object": "model", "created": self._since, "owned_by": "lladamedv"}]

    get_gen_models = list_models  # as Transformers before 5.24 calls it

    def shutdown(self) -> None:
        self._thread.shutdown(wait=False)


class _Handler(BaseHandler):
    """What both endpoints do with a request before and after Transformers' part."""

    model_manager: _Desk
    _renamed: dict[str, str]  # fields that are options of `generate`, and their names there
    _fields: set[str]  # all others
    _extra: dict = {}  # what else Transformers' methods take
    _end = ""  # of a stream

    async def handle_request(self, body: dict, request_id: str) -> Response:
        """Check the request, wait for the model, and reply.

        Raises:
            _RefusedError: for whatever keeps it from an answer.
        """
        desk = self.model_manager
        try:
            question = self._read_question({name: value for name, value in body.items() if value is not None})
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
            raise _refusal(error) from error
        reply.body_iterator = self._finish(reply.body_iterator)
        return reply

    async def _finish(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """The events of a stream; an error is the last one, because it is too late for another status."""
        try:
            async for event in events:
                yield event
            yield self._end
        except Exception as error:
            yield self.chunk_to_sse(json.dumps(_refusal(error).body))

    def _read_question(self, body: dict) -> _Question:
        known = {"model", "stream", "seed", "generation_config", *self._renamed, *self._fields}
        for name, value in body.items():
            if name in _NEUTRAL and value != _NEUTRAL[name]:
                raise _wrong(name, value, repr(_NEUTRAL[name]))
            if name not in known | _WITHOUT_EFFECT | set(_NEUTRAL):
                raise _RefusedError(f"`{name}` is no field of this endpoint; allowed are {sorted(known)}.", name)
        name, stream, seed = body.get("model", self.model_manager.name), body.get("stream", False), body.get("seed")
        if name != self.model_manager.name:
            message = f"`model` is {reprlib.repr(name)}; what is served here is {self.model_manager.name!r}."
            raise _RefusedError(message, "model", 404)
        if not isinstance(stream, bool):
            raise _wrong("stream", stream, "true and false")
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            raise _wrong("seed", seed, "whole numbers from 0 to 2^63 - 1")
        options, stop = self._read_options(body)
        return _Question(self._read_chat(body), options, stop, seed)

    def _read_options(self, body: dict) -> tuple[LLaDAMedVGenerationConfig, list[str]]:
        """The model's own options and the request's over them, complete; and the request's stops."""
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
            if name not in _OPTIONS:
                raise _RefusedError(f"`{names[name]}` is not known; allowed are {_OPTIONS}.", names[name])
        for field, name in self._renamed.items():
            if field in body:
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
            return model._prepare_generation_config(None, **given, return_dict_in_generate=True), stop
        except (ValueError, TypeError) as error:
            message = str(error)
            for name, field in names.items():
                message = message.replace(f"`{name}`", f"`{field}`")
            raise _RefusedError(message, _named(message) or "generation_config") from error

    def _read_chat(self, body: dict) -> list[dict]:
        raise NotImplementedError


class _ChatHandler(_Handler, ChatCompletionHandler):
    _renamed = {
        "max_tokens": "max_new_tokens",
        "max_completion_tokens": "max_new_tokens",
        "temperature": "temperature",
        "stop": "stop_strings",
    }
    _fields = {"messages"}
    _end = "data: [DONE]\n\n"

    def _read_chat(self, body):
        return _read_messages(body.get("messages"), "messages")


class _ResponseHandler(_Handler, ResponseHandler):
    _renamed = {"max_output_tokens": "max_new_tokens", "temperature": "temperature"}
    _fields = {"input", "instructions"}
    _extra = {"body": {}}

    def _read_chat(self, body):
        given, instructions = body.get("input"), body.get("instructions", "")
        items = given if isinstance(given, list) else [{"role": "user", "content": given}]
        if not isinstance(instructions, str):
            raise _wrong("instructions", instructions, "texts")
        if items and all(isinstance(item, dict) and "role" not in item for item in items):
            items = [{"role": "user", "content": items}]  # parts of one message
        system = [{"role": "system", "content": instructions}] if instructions else []
        return (_read_messages(system, "instructions") if system else []) + _read_messages(items, "input")


class _Gate:
    """ASGI middleware that lets in what fits, reads it, and notices when the client has left.

    Whoever is inside uploads, waits, or is being answered: at most one more than `max_queue`. A request that comes from
    a web page, which its `Origin` tells, never gets in.
    """

    def __init__(self, app, desk: _Desk, max_queue: int, max_upload_size: int):
        self._app, self._desk, self._max_queue, self._max_upload_size = app, desk, max_queue, max_upload_size
        self._inside: set[object] = set()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":  # the server starts or ends
            await self._app(scope, receive, send)
            return
        try:
            if "origin" in Headers(scope=scope):
                raise _RefusedError("Web pages may not use this server: the request has an `Origin`.", "Origin", 403)
            if scope["method"] == "POST":
                await self._admit(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except _RefusedError as error:
            await error.reply()(scope, receive, send)

    async def _admit(self, scope, receive, send):
        if len(self._inside) > self._max_queue:
            message = f"{len(self._inside)} requests are being answered or wait; no more are allowed at a time."
            seconds = max(1, math.ceil(self._desk.seconds))  # until a place is free
            raise _RefusedError(message, status=429, headers={"Retry-After": str(seconds)})
        place = object()
        self._inside.add(place)

        async def send_and_leave(message):
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._inside.discard(place)  # before the client knows, which may ask again at once
            await send(message)

        try:
            body = await self._read(receive)
            await self._answer(body, scope, receive, send_and_leave)
        finally:
            self._inside.discard(place)

    async def _read(self, receive) -> bytes:
        chunks, size, more = [], 0, True
        with anyio.move_on_after(_UPLOAD_SECONDS):
            while more:
                message = await receive()
                chunks.append(message.get("body", b""))
                more = message.get("more_body", False)
                size += len(chunks[-1])
                if size > self._max_upload_size:
                    allowed = f"at most {self._max_upload_size} bytes"
                    raise _RefusedError(f"The request has more bytes than are allowed, {allowed}.", status=413)
            return b"".join(chunks)
        raise _RefusedError(f"The request did not arrive within {_UPLOAD_SECONDS} seconds.", status=408)

    async def _answer(self, body: bytes, scope, receive, send):
        gone = Event()
        _GONE.set(gone)
        unread = [body]

        async def replay():
            if not unread:
                await anyio.sleep_forever()  # disconnection is noticed here
            return {"type": "http.request", "body": unread.pop(), "more_body": False}

        async def watch():
            await receive()  # there is nothing more to come but the client's leaving
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            try:
                await self._app(scope, replay, send)
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
    hosts: Sequence[str] | None = _LOOPBACK_HOSTS,
) -> FastAPI:
    """Build the API of a model: [`make_server`] serves it.

    `POST /v1/chat/completions` and `/v1/responses` follow the API of OpenAI (https://platform.openai.com/docs/api-reference)
    and take the options of [`LLaDAMedVGenerationConfig`] as a JSON object `generation_config` besides; the model's own
    are the defaults. `GET /v1/models` and `/health` tell what is served and that it is.

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
    api = build_server(desk, _ChatHandler(desk, state), None, _ResponseHandler(desk, state), None, None, state)
    api.router.routes[:] = [route for route in api.router.routes if route.path in _PATHS]

    @api.exception_handler(_RefusedError)
    async def refuse(request, error):
        return error.reply()

    @api.exception_handler(HTTPException)
    async def refuse_path(request, error):
        return _RefusedError(str(error.detail), status=error.status_code, headers=error.headers).reply()

    @api.exception_handler(RequestValidationError)
    async def refuse_body(request, error):
        return _RefusedError("The body must be a JSON object, and its content type application/json.").reply()

    api.add_middleware(_Gate, desk=desk, max_queue=max_queue, max_upload_size=max_upload_size)
    if hosts is not None:
        api.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return api


def make_server(api: FastAPI) -> uvicorn.Server:
    """A server that logs no requests, takes nobody's word for who they are, and ends soon when it is to end.

    `run(sockets=[…])` of it runs it on sockets that listen already.
    """
    return uvicorn.Server(
        uvicorn.Config(
            api, http="h11", ws="none", log_level="warning", access_log=False, proxy_headers=False,
            server_header=False, timeout_graceful_shutdown=_STOPPING_SECONDS,
        )
    )  # fmt: skip


__all__ = ["build_api", "make_server"]
