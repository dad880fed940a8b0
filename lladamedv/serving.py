"""A server around one model for clients of OpenAI's API: chat completions and responses, whole or streamed.

What is ours: the model's own options of decoding, one answer at a time and a short queue before it, an end to answers
whose client has left, and narrow doors. Images may be of patients, so nothing of a request is logged or kept. Replies
are the types of the package `openai`; what a request may hold is in `openai_requests.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event

import torch


try:
    import anyio
    import h11
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from openai.types import CompletionUsage, Model, chat, responses
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise ImportError('The server needs libraries of its own: pip install "lladamedv[serve]".') from error

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing import LLaDAMedVProcessor

from . import openai_requests
from .doors import LOOPBACK_HOSTS, check_host
from .openai_requests import Endpoint, Question, RequestError


logger = logging.getLogger(__name__)
_ROUTES = {"/v1/chat/completions": openai_requests.CHAT_COMPLETIONS, "/v1/responses": openai_requests.RESPONSES}
HEADER_SECONDS = 10
UPLOAD_SECONDS = 60
SLOWEST_UPLOAD = 20_000  # bytes a second, after the first seconds
FIRST_SECONDS = 5
STOPPING_SECONDS = 300  # that the answer under way has to come to an end when the server stops
# Set when the reply to the request that is being handled is complete, or its client has left.
_GONE: ContextVar[Event] = ContextVar("gone")


class _EnoughError(Exception):
    """Ends `generate`: the answer is complete, or its client has left."""


def _refusal(error: Exception, names: dict[str, str]) -> RequestError:
    """What the client gets to know of an error. A message of a library may quote what it was given."""
    known = openai_requests.refusal(error, names)
    if known is not None:
        return known
    logger.error("a request could not be answered: %s", type(error).__name__)
    return RequestError(f"The request could not be answered ({type(error).__name__}).", status=500)


def _stopping() -> RequestError:
    return RequestError("The server is stopping.", status=503, headers={"Connection": "close"})


class _Answer:
    """One answer in the making, and the streamer of its `generate`.

    `run` and the streamer's methods are called in the model's thread. What is certain of the text goes to `pieces`, a
    queue of the server's thread: texts, then `None`, or an error.
    """

    def __init__(self, model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor, question: Question):
        self.pieces: asyncio.Queue = asyncio.Queue()
        self.prompt_tokens, self.is_full = 0, False
        self._loop, self._gone = asyncio.get_running_loop(), _GONE.get()
        self._model, self._processor, self.question = model, processor, question
        self._tokens: list[int] | None = None
        self._sent = 0  # characters
        self._suffix = 0  # tokens of the fixed text behind the answer

    @property
    def num_tokens(self) -> int:
        return len(self._tokens or ())

    async def next(self) -> str | None:
        """The next piece of the text, or `None` at its end."""
        piece = await self.pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return piece

    def prepare(self) -> None:
        """Read the pictures, in the reader's thread."""
        openai_requests.read_images(self.question, self._processor.image_processor, self._gone.is_set)

    def run(self) -> None:
        """Denoise the answer."""
        last: Exception | None = None
        try:
            self._generate()
        except _EnoughError:
            pass
        except Exception as error:
            last = error
        self._send(last)

    def _generate(self):
        if self._gone.is_set():
            raise _EnoughError
        question, tokenizer = self.question, self._processor.tokenizer
        inputs = self._processor.apply_chat_template(
            [question.chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device)
        question.chat.clear()  # images may be large
        self.prompt_tokens = inputs["input_ids"].shape[1]
        self._suffix = len(tokenizer(question.options.generation_suffix or "", add_special_tokens=False).input_ids)
        self._check_length()
        if question.seed is None:
            torch.seed()  # or the noise would go on where an earlier request's seed had led it
        else:
            torch.manual_seed(question.seed)
        self._model.generate(**inputs, generation_config=question.options, tokenizer=tokenizer, streamer=self)

    def _check_length(self):
        answer, context = self.question.options.max_new_tokens, self._model.config.get_text_config()
        context = context.max_position_embeddings
        if self.prompt_tokens + answer + self._suffix > context:
            field = self.question.names.get("max_new_tokens", self.question.field)
            raise RequestError(
                f"`{field}` is too long: the prompt takes {self.prompt_tokens} tokens and the answer "
                f"{answer + self._suffix}, and the model's context has {context}.",
                field,
            )

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, whereupon all arguments are known to be right; then finished blocks, 1-D."""
        if self._tokens is None:
            self._tokens = []
            self._send("")
        else:
            self._tokens += tokens.tolist()
            self._send_text()

    def put_draft(self, tokens: torch.Tensor) -> None:
        """After every forward pass: the moment to stop, if the client has left."""
        if self._gone.is_set():
            raise _EnoughError

    def end(self) -> None:
        self._send_text(last=True)

    def _send_text(self, last: bool = False):
        """Send what is certain of the text: no half character, and nothing that a stop might begin with."""
        text, stops = self._decode(self._tokens), self.question.stop
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
        # What is as long as the canvas had no end.
        self.is_full = len(self._tokens) >= self.question.options.max_new_tokens + self._suffix
        if found:
            raise _EnoughError

    def _decode(self, tokens: list[int]) -> str:
        return self._processor.decode(tokens, skip_special_tokens=True)

    def _send(self, piece: str | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class _Desk:
    """One model that answers one question at a time."""

    def __init__(self, name: str, model: LLaDAMedVForConditionalGeneration, processor: LLaDAMedVProcessor):
        self.name, self.model, self.processor = name, model, processor
        self.seconds = 0.0  # that the last answer took
        self.description = Model(id=name, object="model", created=int(time.time()), owned_by="lladamedv")
        self._preparing, self._turn = asyncio.Lock(), asyncio.Lock()
        # Always the same ones: compiled models need that, and one that reads pictures bounds the memory for that.
        self._thread, self._reader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: set[anyio.CancelScope] = set()
        self.stopping = False

    async def start(self, answer: _Answer) -> None:
        """Wait for the model and have it begin. Cancelled waiters are dropped."""
        loop = asyncio.get_running_loop()
        with self.waiting():
            async with self._preparing:  # so one that waits for the model holds pictures, and the others do not
                await loop.run_in_executor(self._reader, answer.prepare)
                await self._turn.acquire()
        started = time.monotonic()

        def leave(_):
            self.seconds = time.monotonic() - started
            self._turn.release()

        loop.run_in_executor(self._thread, answer.run).add_done_callback(leave)

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
        """Dismiss what waits; what runs may end."""
        self.stopping = True
        for scope in self._waiting:
            scope.cancel()

    def check_name(self, name: object) -> None:
        if name != self.name:
            message = f"`model` is {repr(name)[:100]}; what is served here is {self.name!r}."
            raise RequestError(message, "model", 404, code="model_not_found")


async def _reply(body: dict, endpoint: Endpoint, desk: _Desk) -> Response:
    """Check a request, wait for the model, and reply."""
    names: dict[str, str] = {}
    try:
        question = openai_requests.read_question(body, endpoint, desk.model, desk.check_name)
        names = question.names
        answer = _Answer(desk.model, desk.processor, question)
        await desk.start(answer)
        await answer.next()  # what `generate` refuses has a status, also for a stream
        events = _chat_events if endpoint is openai_requests.CHAT_COMPLETIONS else _response_events
        if question.stream:
            stream = _with_errors(events(answer, desk.name), names)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = _whole_chat if endpoint is openai_requests.CHAT_COMPLETIONS else _whole_response
        pieces = []
        while (piece := await answer.next()) is not None:
            pieces.append(piece)
        return Response(_to_json(whole("".join(pieces), answer, desk.name)), media_type="application/json")
    except Exception as error:
        raise _refusal(error, names) from error


async def _with_errors(events: AsyncIterator[str], names: dict[str, str]) -> AsyncIterator[str]:
    """The events of a stream; an error is the last one, because it is too late for another status."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        yield f"data: {json.dumps(_refusal(error, names).body)}\n\n"


def _to_json(reply) -> str:
    return reply.model_dump_json(exclude_none=True)


def _finish_reason(answer: _Answer) -> str:
    return "length" if answer.is_full else "stop"


def _usage(answer: _Answer) -> CompletionUsage:
    prompt, count = answer.prompt_tokens, answer.num_tokens
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=count, total_tokens=prompt + count)


def _whole_chat(text: str, answer: _Answer, name: str) -> chat.ChatCompletion:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": _finish_reason(answer)}
    return chat.ChatCompletion(
        id=f"chatcmpl-{uuid.uuid4().hex}", object="chat.completion", created=int(time.time()), model=name,
        choices=[choice], usage=_usage(answer),
    )  # fmt: skip


async def _chat_events(answer: _Answer, name: str) -> AsyncIterator[str]:
    """Chunks: the role, pieces of the text, the reason of the end with the count of tokens, or that for itself."""
    fixed = {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time()),
        "model": name,
    }  # fmt: skip

    def chunk(delta: dict, finish: str | None = None, **fields) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
        return f"data: {_to_json(chat.ChatCompletionChunk(**fixed | {'choices': choices} | fields))}\n\n"

    yield chunk({"role": "assistant", "content": ""})
    while (piece := await answer.next()) is not None:
        yield chunk({"content": piece})
    if answer.question.include_usage:
        yield chunk({}, _finish_reason(answer))
        yield chunk({}, choices=[], usage=_usage(answer))
    else:
        yield chunk({}, _finish_reason(answer), usage=_usage(answer))
    yield "data: [DONE]\n\n"


def _whole_response(text: str, answer: _Answer, name: str, **fields) -> responses.Response:
    """A response with its one message, or with the `fields` of one that is under way."""
    status = "incomplete" if answer.is_full else "completed"
    usage = {
        "input_tokens": answer.prompt_tokens, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer.num_tokens, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.num_tokens,
    }  # fmt: skip
    ends = {
        "status": status, "incomplete_details": {"reason": "max_output_tokens"} if answer.is_full else None,
        "output": [_message(text, status)], "usage": usage,
    }  # fmt: skip
    return responses.Response(
        **{"id": f"resp_{uuid.uuid4().hex}", "created_at": time.time(), "object": "response", "model": name,
           "parallel_tool_calls": False, "tool_choice": "auto", "tools": []} | ends | fields
    )  # fmt: skip


def _message(text: str, status: str) -> dict:
    content = [{"type": "output_text", "text": text, "annotations": []}] if status != "in_progress" else []
    return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": status,
            "content": content}  # fmt: skip


async def _response_events(answer: _Answer, name: str) -> AsyncIterator[str]:
    """Events of OpenAI's Responses API for one message of one text part."""
    count = 0

    def event(kind: Callable, name: str, **fields) -> str:
        nonlocal count
        count += 1
        made = kind(type=f"response.{name}", sequence_number=count - 1, **fields)
        return f"event: {made.type}\ndata: {_to_json(made)}\n\n"

    begun = _whole_response("", answer, name, status="in_progress", output=[], usage=None, incomplete_details=None)
    yield event(responses.ResponseCreatedEvent, "created", response=begun)
    yield event(responses.ResponseInProgressEvent, "in_progress", response=begun)
    message, part = _message("", "in_progress"), {"type": "output_text", "text": "", "annotations": []}
    yield event(responses.ResponseOutputItemAddedEvent, "output_item.added", output_index=0, item=message)
    place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
    yield event(responses.ResponseContentPartAddedEvent, "content_part.added", part=part, **place)
    pieces = []
    while (piece := await answer.next()) is not None:
        pieces.append(piece)
        yield event(responses.ResponseTextDeltaEvent, "output_text.delta", delta=piece, logprobs=[], **place)
    text = "".join(pieces)
    yield event(responses.ResponseTextDoneEvent, "output_text.done", text=text, logprobs=[], **place)
    yield event(responses.ResponseContentPartDoneEvent, "content_part.done", part=part | {"text": text}, **place)
    whole = _whole_response(text, answer, name, id=begun.id, created_at=begun.created_at)
    whole.output[0].id = message["id"]
    yield event(responses.ResponseOutputItemDoneEvent, "output_item.done", output_index=0, item=whole.output[0])
    ended = responses.ResponseIncompleteEvent if answer.is_full else responses.ResponseCompletedEvent
    yield event(ended, whole.status, response=whole)


class _Gate:
    """ASGI middleware that admits what fits, reads it, and notices when the client has left.

    Requests that wait or are answered are inside: at most one more than `max_queue`. They are read before they get in,
    so that a slow sender takes no place. A request that comes from a web page, which its `Origin` tells, or calls the
    server by a foreign name never gets in.
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
                raise RequestError(wrong, "Host")
            if "origin" in headers:
                raise RequestError("Web pages may not use this server: the request has an `Origin`.", "Origin", 403)
            if scope["method"] == "POST" and scope["path"] in _ROUTES:
                await self._admit(headers, scope, receive, note_and_send)
            else:
                await self._app(scope, receive, send)
        except RequestError as error:
            await error.reply()(scope, receive, send)
        except asyncio.CancelledError:
            if started or not self._desk.stopping:
                raise
            await _stopping().reply()(scope, receive, send)

    async def _admit(self, headers, scope, receive, send):
        self._check_room()  # before all of it is sent
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not re.fullmatch(r"application/([\w.-]+\+)?json", kind):
            raise RequestError("`Content-Type` must be application/json.", "Content-Type", 415)
        if headers.get("content-encoding", "identity") != "identity":
            message = "`Content-Encoding` must be identity: compressed bodies are not read."
            raise RequestError(message, "Content-Encoding", 415)
        body = openai_requests.parse_body(await self._read(receive))
        self._check_room()
        place, gone = object(), Event()
        self._inside.add(place)
        _GONE.set(gone)

        async def send_and_leave(message):
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._inside.discard(place)  # before the client knows, which may ask again at once
            await send(message)

        async def watch():
            await receive()  # there is nothing more to come but the client's leaving
            tasks.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                try:  # disconnection is noticed here
                    await self._app({**scope, "body": body}, anyio.sleep_forever, send_and_leave)
                finally:
                    gone.set()
                tasks.cancel_scope.cancel()
        finally:
            self._inside.discard(place)

    def _check_room(self):
        if len(self._inside) > self._max_queue:
            message = f"{len(self._inside)} requests are being answered or wait; no more are allowed at a time."
            seconds = max(1, math.ceil(self._desk.seconds))  # until a place is free
            raise RequestError(message, status=429, headers={"Retry-After": str(seconds)})

    async def _read(self, receive) -> bytes:
        """The body, which must not arrive too slowly. If what arrives takes too much memory, the oldest is given up."""
        chunks, more, started, leave = [], True, anyio.current_time(), {"Connection": "close"}
        with self._desk.waiting(), anyio.CancelScope() as upload:
            self._uploads[upload] = 0
            try:
                while more:
                    seconds = min(UPLOAD_SECONDS, FIRST_SECONDS + self._uploads[upload] / SLOWEST_UPLOAD)
                    upload.deadline = started + seconds
                    message = await receive()
                    more = message.get("more_body", False)
                    chunks.append(message.get("body", b""))
                    self._uploads[upload] += len(chunks[-1])
                    if self._uploads[upload] > self._max_upload_size:
                        message = f"The request has more bytes than are allowed, at most {self._max_upload_size} bytes."
                        raise RequestError(message, status=413, headers=leave)
                    if sum(self._uploads.values()) > (self._max_queue + 1) * self._max_upload_size:
                        next(iter(self._uploads)).cancel()
            finally:
                del self._uploads[upload]
        if upload.cancelled_caught:
            message = f"The request did not arrive fast enough, at {SLOWEST_UPLOAD} bytes a second, or soon enough."
            raise RequestError(message, status=408, headers=leave)
        return b"".join(chunks)


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
    desk = _Desk(name, model, processor)
    api = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)
    api.state.desk = desk

    async def answer(request: Request) -> Response:
        return await _reply(request.scope["body"], _ROUTES[request.url.path], desk)

    for path in _ROUTES:
        api.add_route(path, answer, methods=["POST"])

    @api.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @api.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [desk.description.model_dump()]}

    @api.get("/v1/models/{name:path}")
    async def describe(name: str) -> dict:
        desk.check_name(name)
        return desk.description.model_dump()

    @api.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> JSONResponse:
        return error.reply()

    @api.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> JSONResponse:
        return RequestError(str(error.detail), status=error.status_code, headers=error.headers).reply()

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
        self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def send_400_response(self, message: str) -> None:
        body = json.dumps(RequestError(message).body).encode()
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
    """A server that logs no requests and believes no header about the client's address.

    Told to end (`should_exit`, SIGTERM, SIGINT), it answers those that wait with status 503 and finishes the answer
    under way, if that takes less than five minutes. `run(sockets=[…])` of it runs it on sockets that listen already.
    """
    return _Server(
        uvicorn.Config(
            api, http=_Protocol, ws="none", log_level="warning", access_log=False, proxy_headers=False,
            server_header=False, timeout_graceful_shutdown=STOPPING_SECONDS,
        )
    )  # fmt: skip


__all__ = ["build_api", "make_server"]
