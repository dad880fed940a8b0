"""An OpenAI-compatible server around one model, which answers requests side by side in one `ContinuousBatch`.

A few routes, a short queue before the batch, and narrow doors: slow and large uploads, web pages and foreign names are
refused, and an answer whose client has left ends. Images may be of patients, so nothing of a request is logged, kept or
fetched. What requests may hold stands in `openai_requests`.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from threading import Event, Lock

import torch


try:
    import anyio
    import h11
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from openai.types import CompletionUsage, Model
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    from openai.types.responses import Response as OpenAIResponse
    from openai.types.responses import ResponseStreamEvent
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from pydantic import BaseModel, TypeAdapter
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise ImportError('The server needs libraries of its own: pip install "lladamedv[serve]".') from error

from lladamedv.evaluation.answer_sets import distance_warning, picture_distances
from lladamedv.evaluation.answering import encode_chats
from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.continuous_batching_lladamedv import ContinuousBatch, PositionsError
from lladamedv.modeling_lladamedv.generation_options_lladamedv import GenerationOptionError
from lladamedv.processing import LLaDAMedVProcessor

from .doors import LOOPBACK_HOSTS, check_host
from .openai_requests import (
    CHAT,
    LIMITS,
    RESPONSES,
    Limits,
    Question,
    RequestError,
    check_name,
    parse_body,
    read_pictures,
    read_question,
)


logger = logging.getLogger(__name__)
_EVENT = TypeAdapter(ResponseStreamEvent)
_CLOSE = {"Connection": "close"}
_REQUEST_ID = "X-Request-ID"
_READERS = 4  # requests whose pictures are read at a time, which bounds the memory that this takes
# Of the batch's stats: what Prometheus calls them begins with `lladamedv_`; counters end with `_total`.
_METRICS = {
    "waiting": (GaugeMetricFamily, "Requests in the batch's queue"),
    "running": (GaugeMetricFamily, "Requests that are being answered"),
    "positions": (GaugeMetricFamily, "Positions of the requests that are being answered"),
    "requests": (CounterMetricFamily, "Requests whose answer has begun"),
    "finished": (CounterMetricFamily, "Requests that were answered to their end"),
    "cancelled": (CounterMetricFamily, "Requests that ended early: a stop was found, or the client left"),
    "failed": (CounterMetricFamily, "Requests that ended with an error"),
    "tokens": (CounterMetricFamily, "Tokens of finished answers"),
    "passes": (CounterMetricFamily, "Forward passes"),
    "rows": (CounterMetricFamily, "Rows in forward passes; by passes, the rows per pass"),
    "image_cache_hits": (CounterMetricFamily, "Pictures that were encoded before"),
    "image_cache_misses": (CounterMetricFamily, "Pictures that had to be encoded"),
    "image_cache_bytes": (GaugeMetricFamily, "Bytes of kept features of pictures"),
}


class _EnoughError(Exception):
    """Ends an answer that is complete: a stop is in its text."""


def _refusal(error: Exception) -> RequestError:
    """An error as the client sees it; of an unforeseen one the type alone, whose message may quote the request."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, GenerationOptionError):  # of options that do not suit the prompt
        field = f"generation_config.{error.options[0]}"
        return RequestError(f"`{field}` is not allowed: {error}", field)
    if isinstance(error, (ValueError, ImportError)):
        return RequestError(str(error))
    logger.error("a request could not be answered: %s", type(error).__name__)
    return RequestError(f"The request could not be answered ({type(error).__name__}).", status=500)


def _stopping() -> RequestError:
    return RequestError("The server is stopping.", status=503, headers=_CLOSE)


def _reply(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


# One answer


class _Answer:
    """One answer in the making, the streamer of its request.

    `submit` is called in a reader's thread, and the streamer's methods in the batch's; everything else in the server's.

    Attributes:
        place: the request's place inside, which is left as soon as the answer is complete.
        gone: set then, or when the client has left.
        num_prompt: tokens of the prompt, known once the answer has begun.
        notes: fields of the reply that OpenAI's API lacks: `warning`, if a picture is unusual, and in the end
            `image_reliance` and `evidence`, if they were asked for.
        inputs: of the processor, if they are needed for evidence.
        tokens: of the answer so far.
    """

    def __init__(self, desk: _Desk, question: Question, place: ExitStack):
        self._desk, self.question, self.place, self.gone = desk, question, place, Event()
        self._request = None
        place.callback(self._leave)
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue()
        self.num_prompt, self.tokens, self.notes, self.inputs = 0, [], {}, {}
        self._begun, self._sent = False, 0  # characters

    def submit(self) -> None:
        """Read the images, and ask the batch."""
        desk, question = self._desk, self.question
        pad = desk.processor.image_processor.vision_aspect_ratio == "pad"
        read_pictures(question, pad, desk.limits, self.gone)
        if self.gone.is_set():
            return
        with desk.preparing:
            processor = desk.own_processor
            inputs = encode_chats(desk.model, processor, [question.chat])
            question.chat.clear()  # images may be large
            self._check_length(inputs["input_ids"].shape[1], processor.tokenizer)
            if question.evidence:
                self.inputs = inputs
            try:
                self._request = desk.batch.submit(
                    **inputs, generation_config=question.options, tokenizer=processor.tokenizer, streamer=self,
                    seed=question.seed,
                )  # fmt: skip
            except PositionsError as error:
                field = question.length_field
                raise RequestError(
                    f"`{field}` is too long: the request needs {error.positions} positions (of prompt and answer, "
                    f"twice with guidance), and the server has {error.max_positions} (`--max-positions`).",
                    field,
                ) from None
        self._request.future.add_done_callback(self._end)
        if self.gone.is_set():
            self._leave()

    def _check_length(self, num_prompt: int, tokenizer) -> None:
        suffix = self.question.options.generation_suffix
        self.longest = self.question.options.max_new_tokens
        self.longest += len(tokenizer(suffix, add_special_tokens=False).input_ids) if suffix else 0
        self.num_prompt = num_prompt
        context = self._desk.model.config.get_text_config().max_position_embeddings
        if num_prompt + self.longest > context:
            field = self.question.length_field
            raise RequestError(
                f"`{field}` is too long: the prompt takes {num_prompt} tokens and the answer {self.longest}, and "
                f"the model's context has {context}.",
                field,
            )

    def _leave(self) -> None:
        """Take the request out of the batch, unless it is answered."""
        self.gone.set()
        if (request := self._request) is not None:
            self._desk.batch.cancel(request)

    def put_descriptions(self, distances: list[float]) -> None:
        """Of the pictures, before `put`."""
        if warning := distance_warning(self._desk.model, distances):
            self.notes["warning"] = warning

    def put(self, tokens: torch.Tensor) -> None:
        """First the prompt, once the request has joined the batch; then finished blocks, 1-D."""
        if self._begun:
            self.tokens += tokens.tolist()
            self._send_text()
        else:
            self._begun = True
            self._send("")

    def end(self) -> None:
        """Nothing: how it ended, the future says."""

    def _end(self, future) -> None:
        self._request = None  # which knows this answer: a cycle would stay in memory for long
        error = CancelledError() if future.cancelled() else future.exception()
        try:
            if error is None:
                self._send_text(last=True)
                reliance = future.result().image_reliance
                if reliance is not None and not reliance.isnan():
                    self.notes["image_reliance"] = float(reliance)
            elif not isinstance(error, (_EnoughError, CancelledError)):
                self._send(error)
        except _EnoughError:
            pass
        except Exception as unforeseen:
            self._send(unforeseen)
        self._send(None)

    def _send_text(self, last: bool = False):
        """Send what is certain of the text: no half character, and nothing that a stop might begin with."""
        text, stops = self._decode(self.tokens), self.question.stop
        found = [place for place in map(text.find, stops) if place >= 0]
        if found:
            text = text[: min(found)]
            whole = range(len(self.tokens), -1, -1)
            self.tokens = next(self.tokens[:n] for n in whole if len(self._decode(self.tokens[:n])) <= len(text))
        elif not last:
            text = text[: max(0, len(text) + 1 - max(map(len, stops), default=1))].rstrip("\ufffd")
        if len(text) > self._sent:
            self._send(text[self._sent :])
            self._sent = len(text)
        if found:
            raise _EnoughError

    def _decode(self, tokens: list[int]) -> str:
        return self._desk.processor.decode(tokens, skip_special_tokens=True)

    def _send(self, piece: str | Exception | None) -> None:
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece; the first one is empty and says that the answer has begun."""
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece
        self.place.close()  # before the client sees the end, and may ask again at once

    @property
    def finish_reason(self) -> str:
        return "length" if len(self.tokens) >= self.longest else "stop"

    @property
    def usage(self) -> CompletionUsage:
        count = len(self.tokens)
        return CompletionUsage(
            prompt_tokens=self.num_prompt, completion_tokens=count, total_tokens=self.num_prompt + count
        )


class _ChatReply:
    """An answer in the form of `/v1/chat/completions`."""

    endpoint = CHAT
    end = "data: [DONE]\n\n"

    def __init__(self, answer: _Answer, name: str, request_id: str):
        self._answer = answer
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": name}

    def whole(self, text: str) -> ChatCompletion:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self._answer.finish_reason}
        return self._build(ChatCompletion, [choice], usage=self._answer.usage)

    async def events(self, pieces: AsyncIterator[str]) -> AsyncIterator[ChatCompletionChunk]:
        yield self._chunk({"role": "assistant"})
        async for piece in pieces:
            yield self._chunk({"content": piece})
        answer, apart = self._answer, self._answer.question.include_usage
        yield self._chunk({}, answer.finish_reason, usage=None if apart else answer.usage)
        if apart:  # asked for, it is an event of its own in OpenAI's API
            yield self._build(ChatCompletionChunk, [], usage=answer.usage)

    def _chunk(self, delta: dict, finish_reason: str | None = None, **fields) -> ChatCompletionChunk:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._build(ChatCompletionChunk, [choice], **fields)

    def _build(self, kind: type[BaseModel], choices: list, **fields) -> BaseModel:
        name = "chat.completion" if kind is ChatCompletion else "chat.completion.chunk"
        return kind(**self._head, **self._answer.notes, object=name, choices=choices, **fields)


class _ResponseReply:
    """An answer in the form of `/v1/responses`."""

    endpoint = RESPONSES
    end = ""

    def __init__(self, answer: _Answer, name: str, request_id: str):
        self._answer, self._message_id = answer, f"msg_{request_id}"
        self._head = {
            "id": f"resp_{request_id}", "created_at": time.time(), "model": name, "object": "response", "tools": [],
            "parallel_tool_calls": False, "tool_choice": "auto",
        }  # fmt: skip

    def whole(self, text: str) -> OpenAIResponse:
        usage = self._answer.usage
        counts = {
            "input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        }  # fmt: skip
        is_cut = self._answer.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        return OpenAIResponse(
            **self._head, **self._answer.notes, status=status, output=[self._message(status, text)], usage=counts,
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
        )  # fmt: skip

    def _message(self, status: str, *texts: str) -> dict:
        content = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
        return {"id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    async def events(self, pieces: AsyncIterator[str]) -> AsyncIterator[BaseModel]:
        number, texts = -1, []
        item = {"output_index": 0}
        part = item | {"item_id": self._message_id, "content_index": 0}

        def event(kind, **fields):
            nonlocal number
            number += 1
            return _EVENT.validate_python({"type": f"response.{kind}", "sequence_number": number, **fields})

        for kind, status in (("created", "queued"), ("in_progress", "in_progress")):
            yield event(kind, response={**self._head, "status": status, "output": []})
        yield event("output_item.added", **item, item=self._message("in_progress"))
        yield event("content_part.added", **part, part={"type": "output_text", "text": "", "annotations": []})
        async for piece in pieces:
            texts.append(piece)
            yield event("output_text.delta", **part, delta=piece, logprobs=[])
        response = self.whole("".join(texts))
        message = response.output[0]
        yield event("output_text.done", **part, text=message.content[0].text, logprobs=[])
        yield event("content_part.done", **part, part=message.content[0])
        yield event("output_item.done", **item, item=message)
        yield event(response.status, response=response)


class _Stream(StreamingResponse):
    """Server-sent events; the request's place is left when they end, however that is."""

    def __init__(self, reply: _ChatReply | _ResponseReply, pieces: AsyncIterator[str], place: ExitStack, **options):
        super().__init__(self._lines(reply, pieces), media_type="text/event-stream", **options)
        self.headers["Cache-Control"] = "no-cache"
        self._place = place

    async def _lines(self, reply, pieces) -> AsyncIterator[str]:
        try:
            async for event in reply.events(pieces):
                name = f"event: {event.type}\n" if hasattr(event, "type") else ""
                yield f"{name}data: {event.model_dump_json(exclude_none=True)}\n\n"
            yield reply.end
        except Exception as error:  # it is too late for another status
            yield f"data: {json.dumps(_refusal(error).body)}\n\n"

    async def __call__(self, scope, receive, send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


# The queue


class _Desk:
    """One model, the batch that answers with it, and the requests for it.

    Those that have not begun wait: at most one more than `max_queue`. They are read before they get in, so that a slow
    sender takes no place. How many are answered at a time, the batch's `max_positions` says.
    """

    def __init__(self, name, model, processor, max_queue: int, max_upload_size: int, max_positions: int, limits):
        self._name, self.model, self.processor, self.limits = name, model, processor, limits
        self._max_queue, self._max_upload_size = max_queue, max_upload_size
        self._since, self._seconds = int(time.time()), 0.0  # that the last answer took
        self._waiting: set[ExitStack] = set()
        self._uploads: dict[anyio.CancelScope, int] = {}  # bytes that have arrived of each, the oldest first
        self.batch = ContinuousBatch(model, max_positions, describe_pictures=picture_distances(model))
        # A tokenizer must not be used by two threads: one is the batch's, for texts, and the readers share another.
        self.own_processor, self.preparing = copy.deepcopy(processor), Lock()
        self._readers, self._explainer = ThreadPoolExecutor(_READERS), ThreadPoolExecutor(1)
        self.registry = CollectorRegistry()
        self.registry.register(_Numbers(self.batch))
        self.stopping = asyncio.Event()

    def start(self) -> None:
        torch.seed()  # otherwise each start of the server would draw the same noise
        self.batch.start()

    def shutdown(self) -> None:
        self.batch.stop()
        self._readers.shutdown(wait=False)
        self._explainer.shutdown(wait=False)

    def describe(self, name: str | None = None) -> dict:
        """The model that is served, if that is its name."""
        check_name(self._name if name is None else name, self._name)
        return Model(id=self._name, object="model", created=self._since, owned_by="lladamedv").model_dump()

    async def answer(self, request: Request, kind: type[_ChatReply | _ResponseReply]) -> Response:
        """Read a request, wait for the model, and reply.

        Raises:
            RequestError: if it cannot be answered.
            ClientDisconnect: if the client leaves before.
        """
        self._check_room()  # before all of it is sent
        self._check_type(request.headers)
        body = parse_body(await self._first(self._read(request), stops=True), self.limits)
        self._check_room()
        request_id = request.headers.get(_REQUEST_ID) or str(uuid.uuid4())
        headers = {_REQUEST_ID: request_id}
        with ExitStack() as place:
            self._waiting.add(place)
            place.callback(self._waiting.discard, place)
            try:
                question = read_question(body, kind.endpoint, self._name, self.model, self.limits)
                answer = _Answer(self, question, place)
                reply, pieces = kind(answer, self._name, request_id), answer.pieces()
                await self._first(self._begin(answer, pieces), request, stops=True)
                self._waiting.discard(place)
                place.callback(self._note_seconds, time.monotonic())
                if not question.stream:
                    text = await self._first(_join(pieces), request)
                    if question.evidence and answer.tokens:
                        answer.notes["evidence"] = await self._find_evidence(answer, request)
                    return JSONResponse(reply.whole(text).model_dump(exclude_none=True), headers=headers)
            except (ClientDisconnect, RequestError):
                raise
            except Exception as error:
                raise _refusal(error) from error
            answer.place = place.pop_all()
            return _Stream(reply, pieces, answer.place, headers=headers)

    async def _find_evidence(self, answer: _Answer, request: Request) -> dict:
        """Where in the images an answer comes from; one at a time, and those that wait count as waiting requests."""
        left = Event()

        def report(done: int, total: int) -> None:
            if left.is_set():
                raise _EnoughError

        find = partial(
            self.model.explain_image, **answer.inputs, answer=answer.tokens, callback=report,
            append_eos=answer.finish_reason == "stop",
        )  # fmt: skip
        with ExitStack() as place:
            place.callback(left.set)
            self._waiting.add(place)
            place.callback(self._waiting.discard, place)
            found = await self._first(asyncio.get_running_loop().run_in_executor(self._explainer, find), request)
        return {
            "maps": [each[0].tolist() for each in found.maps],
            "whole_fall": found.whole_fall[:, 0].tolist(),
            "log_likelihood": float(found.log_likelihood[0]),
        }

    async def _begin(self, answer: _Answer, pieces: AsyncIterator[str]) -> None:
        """Ask the batch, and wait until the answer has begun."""
        await asyncio.get_running_loop().run_in_executor(self._readers, answer.submit)
        await anext(pieces)

    def _note_seconds(self, started: float) -> None:
        self._seconds = time.monotonic() - started

    async def _first(self, work: Awaitable, request: Request | None = None, stops: bool = False):
        """The result of `work`, unless the client of `request` leaves first or, if it `stops` then, the server ends."""
        ends = {asyncio.ensure_future(work): None}
        if request is not None:  # its body is read, so only a disconnection can come
            ends[asyncio.ensure_future(request.receive())] = ClientDisconnect()
        if stops:
            ends[asyncio.ensure_future(self.stopping.wait())] = _stopping()
        first = None
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            first = next(task for task in ends if task.done())
            if ends[first] is not None:
                raise ends[first]
            return first.result()
        finally:
            for task in ends:
                task.cancel()
            del ends, first, work  # an error's frames would hold the task that holds the error, for long

    def _check_room(self):
        if self.stopping.is_set():
            raise _stopping()
        if not self.batch.is_running:
            raise RequestError("The model answers no more; the server must be started again.", status=503)
        if len(self._waiting) > self._max_queue:
            message = f"{len(self._waiting)} requests wait for an answer to begin; no more are allowed at a time."
            seconds = max(1, math.ceil(self._seconds))  # until a place is free
            raise RequestError(message, status=429, headers={"Retry-After": str(seconds)})

    def _check_type(self, headers: Headers):
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not re.fullmatch(r"application/([\w.-]+\+)?json", kind):
            raise RequestError("`Content-Type` must be application/json.", "Content-Type", 415)
        if headers.get("content-encoding", "identity") != "identity":
            message = "`Content-Encoding` must be identity: compressed bodies are not read."
            raise RequestError(message, "Content-Encoding", 415)

    async def _read(self, request: Request) -> bytes:
        """The body, which must not arrive too slowly. If all bodies together take too much memory, the oldest upload
        is cancelled."""
        limits, chunks, started = self.limits, [], anyio.current_time()
        with anyio.CancelScope(deadline=started + limits.first_seconds) as upload:
            self._uploads[upload] = 0
            try:
                async for chunk in request.stream():
                    chunks.append(chunk)
                    size = self._uploads[upload] = self._uploads[upload] + len(chunk)
                    if size > self._max_upload_size:
                        message = f"The request is too large; allowed are at most {self._max_upload_size} bytes."
                        raise RequestError(message, status=413, headers=_CLOSE)
                    seconds = min(limits.upload_seconds, limits.first_seconds + size / limits.upload_speed)
                    upload.deadline = started + seconds
                    if sum(self._uploads.values()) > (self._max_queue + 1) * self._max_upload_size:
                        next(iter(self._uploads)).cancel()
            finally:
                del self._uploads[upload]
        if upload.cancelled_caught:
            message = f"The request did not arrive in time, or at {limits.upload_speed} bytes a second."
            raise RequestError(message, status=408, headers=_CLOSE)
        return b"".join(chunks)


async def _join(pieces: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in pieces])


class _Numbers:
    """A collector of Prometheus: a batch's own numbers, read when they are asked for."""

    def __init__(self, batch: ContinuousBatch):
        self._batch = batch

    def collect(self) -> Iterator[Metric]:
        stats = self._batch.stats()
        for name, (kind, text) in _METRICS.items():
            yield kind(f"lladamedv_{name}", text, value=stats[name])


# The server


class _Door:
    """ASGI middleware that refuses requests of web pages (those with an `Origin`) and under foreign host names."""

    def __init__(self, app, desk: _Desk, hosts: Sequence[str] | None):
        self._app, self._desk, self._hosts = app, desk, hosts

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":  # the server starts or ends
            await self._app(scope, receive, send)
            return
        started = False

        async def note_and_send(message):
            nonlocal started
            started = True
            await send(message)

        app, headers = self._app, Headers(scope=scope)
        if wrong := check_host(headers, self._hosts):
            app = _reply(RequestError(wrong, "Host"))
        elif "origin" in headers:
            message = "Web pages may not use this server: the request has an `Origin`."
            app = _reply(RequestError(message, "Origin", 403))
        try:
            await app({**scope, "path": scope["path"].rstrip("/") or "/"}, receive, note_and_send)
        except asyncio.CancelledError:
            if started or not self._desk.stopping.is_set():
                raise
            await _reply(_stopping())(scope, receive, send)


def build_api(
    model: LLaDAMedVForConditionalGeneration,
    processor: LLaDAMedVProcessor,
    *,
    name: str = "lladamedv",
    max_queue: int = 16,
    max_upload_size: int = 20_000_000,
    max_positions: int = 16384,
    hosts: Sequence[str] | None = LOOPBACK_HOSTS,
    limits: Limits = LIMITS,
) -> FastAPI:
    """Build the API of a model: [`make_server`] serves it.

    `POST /v1/chat/completions` and `/v1/responses` follow the API of OpenAI (https://platform.openai.com/docs/api-reference)
    and take the options of [`LLaDAMedVGenerationConfig`] as a JSON object `generation_config` besides; the model's own
    are the defaults. `GET /v1/models`, `/v1/models/NAME`, `/health` and `/metrics` describe the model and the server.

    Args:
        model: the model, on the device it is to run on.
        processor: its processor.
        name: what requests call the model.
        max_queue: how many requests may wait besides the next one to begin; more are turned away with status 429.
        max_upload_size: largest request, in bytes.
        max_positions: how many positions are answered at a time, see [`ContinuousBatch`].
        hosts: names that the `Host` header may have, which keeps out foreign names that resolve to this computer;
            `None` for any.
        limits: what one request may take.

    Raises:
        ValueError: if an argument is not allowed.
    """
    for argument, value, least in (
        ("max_queue", max_queue, 0), ("max_upload_size", max_upload_size, 1), ("max_positions", max_positions, 1),
    ):  # fmt: skip
        if type(value) is not int or value < least:
            raise ValueError(f"`{argument}` is {value!r}; allowed are whole numbers of at least {least}.")
    desk = _Desk(name, model, processor, max_queue, max_upload_size, max_positions, limits)

    @asynccontextmanager
    async def lifespan(api):
        desk.start()
        yield
        desk.shutdown()

    api = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    api.state.desk, api.state.limits = desk, limits
    _add_routes(api, desk)
    _add_errors(api)
    api.add_middleware(_Door, desk=desk, hosts=hosts)
    return api


def _add_routes(api: FastAPI, desk: _Desk) -> None:
    @api.post(CHAT.path)
    async def complete_chat(request: Request) -> Response:
        return await desk.answer(request, _ChatReply)

    @api.post(RESPONSES.path)
    async def create_response(request: Request) -> Response:
        return await desk.answer(request, _ResponseReply)

    @api.api_route("/health", methods=["GET", "HEAD"])
    async def health():
        if not desk.batch.is_running:
            return JSONResponse({"status": "the model answers no more"}, 503)
        return {"status": "ok"}

    @api.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics():
        return Response(generate_latest(desk.registry), media_type=CONTENT_TYPE_LATEST)

    @api.api_route("/v1/models", methods=["GET", "HEAD"])
    async def list_models():
        return {"object": "list", "data": [desk.describe()]}

    @api.api_route("/v1/models/{model:path}", methods=["GET", "HEAD"])
    async def describe(model: str):
        return desk.describe(model)


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestError)
    async def refuse(request, error):
        return _reply(error)

    @api.exception_handler(HTTPException)
    async def refuse_path(request, error):
        return _reply(RequestError(str(error.detail), status=error.status_code, headers=error.headers))

    @api.exception_handler(ClientDisconnect)
    async def drop(request, error):
        return Response(status_code=499)  # which does not arrive


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
        self._late = self.loop.call_later(self.config.app.state.limits.header_seconds, self.transport.close)

    def send_400_response(self, message: str) -> None:
        body = json.dumps(RequestError(message).body).encode()
        headers = [("content-type", "application/json"), ("connection", "close"), ("content-length", str(len(body)))]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class _Server(uvicorn.Server):
    async def shutdown(self, sockets=None) -> None:
        self.config.app.state.desk.stopping.set()
        await super().shutdown(sockets)
        if self.server_state.tasks and not self.force_exit:  # which were cancelled, and reply
            await asyncio.wait(self.server_state.tasks, timeout=1)


def make_server(api: FastAPI) -> uvicorn.Server:
    """A server that logs no requests and trusts no header about where a request comes from.

    When it ends (`should_exit`, SIGTERM, SIGINT), waiting requests get status 503, and answers under way are finished
    if that takes less than five minutes. `run(sockets=[…])` serves on sockets that listen already.
    """
    return _Server(
        uvicorn.Config(
            api, http=_Protocol, ws="none", log_level="warning", access_log=False, proxy_headers=False,
            server_header=False, timeout_graceful_shutdown=api.state.limits.stopping_seconds,
        )
    )  # fmt: skip


__all__ = ["build_api", "make_server"]
