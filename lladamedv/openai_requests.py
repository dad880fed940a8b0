"""What a request to the server asks: JSON in the form of OpenAI's API, checked field by field, becomes a [`Question`].

Nothing is fetched for a request, and what would change an answer and cannot is refused. Pictures are read later, by
[`read_images`], within bounds of memory and of the processor's time.
"""

from __future__ import annotations

import json
import re
import reprlib
import time
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from io import BytesIO

from fastapi.responses import JSONResponse
from PIL import Image, ImageFile

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationConfig
from lladamedv.modeling_lladamedv.generation_config_lladamedv import FOREIGN_OPTIONS
from lladamedv.processing import LLaDAMedVImageProcessor
from lladamedv.processing.medical_images import READING_OPTIONS, MedicalImageError, read_data_url, read_medical_image


# What a request may have, so that reading its pictures takes less than 300 MB and two seconds.
MAX_IMAGES = 4
MAX_PIXELS = 2**23  # of one picture, while it is read
MAX_PIXELS_TOGETHER = 2**24
MAX_JPEG_2000_PIXELS = 2**22  # slow, and can be decoded reduced
MAX_SIDE = 2**12  # of pictures that are padded to squares
LAST_FRAME = 49  # of animations, whose frames are decoded one after the other
READING_SECONDS = 2  # of the processor's time
MAX_CHARACTERS = 100_000  # of the texts
MAX_VALUES = 300_000  # of the JSON, roughly: each takes far more memory than its text
MAX_STOPS = 4  # as OpenAI has it
MAX_MESSAGE = 1_000  # characters of an error, which may quote what was given

_SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can hold them alone, and no text can
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # and their own names
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image_url", "input_image")
_JPEG_2000 = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
_READING = {option.name: option for option in READING_OPTIONS}
_ERROR_TYPES = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
# Known fields that this model has no use for, with the values that ask for nothing: `...` is any value, because the
# field changes no answer, and null, [] and {} are such values of every field. All other values are refused.
_PLAIN, _MEDIUM = {"format": {"type": "text"}}, {"verbosity": "medium"}
_NEUTRAL = {
    "background": (False,), "best_of": (1,), "chat_template_kwargs": (), "continue_final_message": (False,),
    "echo": (False,), "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": (),
    "ignore_eos": (False,), "include": (["reasoning.encrypted_content"],), "length_penalty": (1,), "logit_bias": (),
    "logprobs": (False,), "max_tool_calls": ..., "metadata": ..., "min_p": (0,), "min_tokens": (0,),
    "modalities": (["text"],), "n": (1,), "parallel_tool_calls": ..., "presence_penalty": (0,),
    "prompt_cache_key": ..., "prompt_cache_retention": ..., "reasoning": ({"effort": "none"},),
    "reasoning_effort": ("none",), "response_format": ({"type": "text"},), "safety_identifier": ...,
    "service_tier": ..., "skip_special_tokens": (True,), "stop_token_ids": (), "store": ...,
    "text": (_PLAIN, _MEDIUM, _PLAIN | _MEDIUM), "tool_choice": ("none", "auto"), "tools": (), "top_k": (-1, 0),
    "top_logprobs": (0,), "top_p": (1,), "truncation": ("disabled",), "use_beam_search": (False,), "user": ...,
    "verbosity": ("medium",),
}  # fmt: skip
_MESSAGE_NEUTRAL = {
    "annotations": ..., "audio": (), "function_call": (), "id": ..., "name": ..., "phase": ..., "refusal": (),
    "status": ..., "tool_calls": (), "type": ("message",),
}  # fmt: skip
_TEXT_NEUTRAL = {"annotations": ..., "cache_control": ..., "logprobs": ...}
# A picture is always seen at the model's own resolution.
_IMAGE_NEUTRAL = {"cache_control": ..., "detail": ("auto", "low", "high", "original"), "file_id": (), "format": ...}
# Options of `generate` that are the server's affair, or whose results have no place in a reply.
_NOT_OPTIONS = {
    "abstention_threshold", "bos_token_id", "compile_config", "confidence_temperature", "eos_token_id",
    "generation_suffix", "output_cache_drift", "output_history", "pad_token_id", "return_dict_in_generate",
    "suppress_tokens", "transformers_version",
}  # fmt: skip
OPTIONS = sorted(
    name for name in vars(LLaDAMedVGenerationConfig()) if name not in _NOT_OPTIONS and not name.startswith("_")
)


class RequestError(Exception):
    """A request that gets an error in OpenAI's form for an answer.

    Args:
        message: what is wrong.
        param: the field or header that is wrong.
        status: of HTTP.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ):  # fmt: skip
        message, param = (text and _SURROGATES.sub("\ufffd", text[:MAX_MESSAGE]) for text in (message, param))
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = _ERROR_TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def reply(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


@dataclass(frozen=True)
class Endpoint:
    """How a route calls things.

    Args:
        chat: the field that holds the conversation.
        renamed: fields that are options of `generate`, and their names there.
        fields: all other fields, beside those that both routes have.
        stream_options: that are known.
    """

    chat: str
    renamed: Mapping[str, str]
    fields: tuple[str, ...]
    stream_options: tuple[str, ...] = ()


CHAT_COMPLETIONS = Endpoint(
    chat="messages",
    renamed={
        "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature",
        "repetition_penalty": "repetition_penalty", "stop": "stop_strings",
    },
    fields=("messages",),
    stream_options=("include_usage",),
)  # fmt: skip
RESPONSES = Endpoint(
    chat="input",
    renamed={"max_output_tokens": "max_new_tokens", "temperature": "temperature"},
    fields=("input", "instructions"),
)


@dataclass(frozen=True)
class Question:
    """What a request asks.

    Attributes:
        chat: messages for the chat template; in place of an image stands the image part that [`read_images`] reads.
        field: where the messages are in the request.
        options: complete options of `generate`.
        names: of those of them that the request has, the fields that they are in.
        stop: texts that end the answer wherever they occur in it.
        seed: of the noise, if the answer is to be drawn the same way again.
        stream: whether the answer comes in pieces.
        include_usage: whether a stream ends with an event that counts tokens.
    """

    chat: list[dict]
    field: str
    options: LLaDAMedVGenerationConfig
    names: dict[str, str]
    stop: list[str]
    seed: int | None
    stream: bool
    include_usage: bool


def refusal(error: Exception, names: Mapping[str, str]) -> RequestError | None:
    """The error that a client gets for wrong input, or `None` where it is not to know the reason.

    Args:
        names: of the options of `generate` that the request has, the fields that they are in.
    """
    if isinstance(error, RequestError):
        return error
    if not isinstance(error, (ValueError, TypeError, ImportError)):
        return None
    message, fields = str(error), []
    for name, field in names.items():
        if f"`{name}`" in message:
            fields.append((message.index(f"`{name}`"), field))
            message = message.replace(f"`{name}`", f"`{field}`")
    return RequestError(message, min(fields)[1] if fields else None)


def parse_body(body: bytes) -> dict:
    """The JSON object that a request holds, which says everything once."""

    def unite(pairs):
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise RequestError(f"`{twice}` is there twice in one object; allowed is once.", twice)
        return fields

    def refuse(number):
        raise ValueError(f"{number} is no number of JSON")

    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise RequestError(f"The body holds more than {MAX_VALUES} values; no more are allowed.", status=413)
    try:
        fields = json.loads(body, object_pairs_hook=unite, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # which quote nothing that is longer than a number
        raise RequestError(f"The body must be a JSON object: {error}.") from error
    if not isinstance(fields, dict):
        raise RequestError(f"The body must be a JSON object; it is a {type(fields).__name__}.")
    return fields


def read_question(
    body: dict, endpoint: Endpoint, model: LLaDAMedVForConditionalGeneration, check_name: Callable[[object], None]
) -> Question:
    """Check a request.

    Raises:
        RequestError: for whatever keeps it from an answer, with the field that is wrong.
    """
    known = ("model", "stream", "stream_options", "seed", "generation_config", *endpoint.renamed, *endpoint.fields)
    body = _fields_of(body, known, _NEUTRAL)
    if "model" in body:
        check_name(body["model"])
    stream, seed, given = body.get("stream", False), body.get("seed"), body.get("stream_options", {})
    _check(isinstance(stream, bool), "stream", stream, "true and false")
    _check(seed is None or (type(seed) is int and 0 <= seed < 2**63), "seed", seed, "whole numbers from 0 to 2^63 - 1")
    _check(isinstance(given, dict), "stream_options", given, "objects")
    given = _fields_of(given, endpoint.stream_options, {"include_obfuscation": ...}, "stream_options")
    for name, value in given.items():
        _check(isinstance(value, bool), f"stream_options.{name}", value, "true and false")
    options, names, stop = _read_options(body, endpoint, model)
    chat = _read_messages(body) if endpoint is CHAT_COMPLETIONS else _read_input(body)
    parts = [part for message in chat for part in message["content"]]
    for unit, count, most in (
        ("images", sum(part["type"] == "image" for part in parts), MAX_IMAGES),
        ("characters", sum(len(part.get("text", "")) for part in parts), MAX_CHARACTERS),
    ):
        if count > most:
            message = f"`{endpoint.chat}` holds {count} {unit}; allowed are at most {most}."
            raise RequestError(message, endpoint.chat)
    return Question(chat, endpoint.chat, options, names, stop, seed, stream, given.get("include_usage", False))


def _read_options(body: dict, endpoint: Endpoint, model) -> tuple[LLaDAMedVGenerationConfig, dict, list[str]]:
    """The model's own options and the request's over them, complete; where the request has its own; its stops."""
    given = body.get("generation_config", {})
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            pass
    _check(isinstance(given, dict), "generation_config", given, "JSON objects, also as a text")
    names = {name: f"generation_config.{name}" for name in given}  # in the request
    for name in given:
        if name not in OPTIONS and (name in _NOT_OPTIONS or name not in FOREIGN_OPTIONS):
            raise RequestError(f"`{names[name]}` is not known; allowed are {OPTIONS}.", names[name])
    for field, name in endpoint.renamed.items():
        if field in body:
            if names.get(name) in body and body[field] != given[name]:
                raise RequestError(f"`{field}` and `{names[name]}` are both given, and differ.", field)
            given, names = given | {name: body[field]}, names | {name: field}
    context = model.config.get_text_config().max_position_embeddings
    for name, value in given.items():
        too_long = isinstance(value, int) and value > context
        _check(not too_long, names[name], value, f"at most {context}, the length of the model's context")
    stop = given.get("stop_strings")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    fits = isinstance(stop, list) and len(stop) <= MAX_STOPS and all(map(_is_text, stop)) and "" not in stop
    _check(fits, names.get("stop_strings"), stop, f"up to {MAX_STOPS} texts that are not empty")
    try:
        options = model.resolve_generation_config(**given, return_dict_in_generate=True)
    except (ValueError, TypeError) as error:
        raise refusal(error, names) from error
    return options, names, stop


def _read_messages(body: dict) -> list[dict]:
    messages = body.get("messages")
    _check(isinstance(messages, list) and messages, "messages", messages, "lists of messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _read_input(body: dict) -> list[dict]:
    given, instructions, chat = body.get("input"), body.get("instructions", ""), []
    _check(_is_text(instructions), "instructions", instructions, "texts")
    if instructions:
        chat.append({"role": "system", "content": _read_content(instructions, "instructions")})
    if isinstance(given, list) and any(isinstance(item, dict) and "role" in item for item in given):
        return chat + [_read_message(item, f"input[{index}]") for index, item in enumerate(given)]
    return [*chat, {"role": "user", "content": _read_content(given, "input")}]  # a text, or parts of one message


def _read_message(message: object, place: str) -> dict:
    """A message of either endpoint for the chat template."""
    _check(isinstance(message, dict), place, message, "messages, objects with a `role` and a `content`")
    role = message.get("role")
    known_role = isinstance(role, str) and role in _ROLES
    if role is None and message.get("type", "message") != "message":
        raise _wrong(f"{place}.type", message["type"], "'message'")
    _check(known_role, f"{place}.role", role, ", ".join(map(repr, _ROLES)))
    fields = _fields_of(message, ("role", "content"), _MESSAGE_NEUTRAL, place)
    answered = role == "assistant"  # what this model said itself may be empty
    content = _read_content(fields.get("content", "" if answered else None), f"{place}.content", answered)
    for part in content:
        if part["type"] == "image" and role != "user":
            where = part["place"]
            raise RequestError(f"`{where}` is in a message of the role {role!r}; allowed is 'user' for images.", where)
    return {"role": _ROLES[role], "content": content}


def _read_content(content: object, place: str, may_be_empty: bool = False) -> list[dict]:
    _check(_is_text(content) or isinstance(content, list), place, content, "texts and lists of parts")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = [_read_part(part, f"{place}[{number}]") for number, part in enumerate(parts)]
    if not may_be_empty and all(part["type"] == "text" and _says_nothing(part["text"]) for part in parts):
        raise RequestError(f"`{place}` is empty; it must hold a text or an image.", place)
    return parts


def _read_part(part: object, place: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _IMAGE_PARTS:
        return _read_image_part(part, place)
    _check(kind in _TEXT_PARTS, f"{place}.type", kind, ", ".join(map(repr, _TEXT_PARTS + _IMAGE_PARTS)))
    text = _fields_of(part, ("type", "text"), _TEXT_NEUTRAL, place).get("text")
    _check(_is_text(text), f"{place}.text", text, "texts")
    return {"type": "text", "text": text}


def _read_image_part(part: dict, place: str) -> dict:
    """The options by which to read an image stand beside its URL, wherever that is."""
    fields = _fields_of(part, ("type", "image_url", *_READING), _IMAGE_NEUTRAL, place)
    url, where = fields.get("image_url"), f"{place}.image_url"
    found = [(place, fields)]
    if isinstance(url, dict):
        inner = _fields_of(url, ("url", *_READING), _IMAGE_NEUTRAL, where)
        found.append((where, inner))
        url, where = inner.get("url"), f"{where}.url"
    is_data = isinstance(url, str) and url.lstrip()[:5].lower() == "data:"
    _check(is_data, where, url, "data URLs as data:image/png;base64,…: nothing is fetched")
    options, places = {}, {"source": where}
    types = {int: "whole numbers", str: "texts", bool: "true and false"}
    for name, option in _READING.items():
        places[option.argument] = f"{found[-1][0]}.{name}"
        for outer, holder in found:
            if (value := holder.get(name)) is None:
                continue
            field = f"{outer}.{name}"
            if option.argument in options:
                raise RequestError(f"`{field}` is there twice, also in `{place}`.", field)
            _check(type(value) is option.type, field, value, types[option.type])
            options[option.argument], places[option.argument] = value, field
    return {"type": "image", "url": url, "place": where, "options": options, "places": places}


def read_images(question: Question, image_processor: LLaDAMedVImageProcessor, gone: Callable[[], bool]) -> None:
    """Put the pictures of a question into its messages, unless the client leaves before.

    Raises:
        RequestError: for a picture that cannot be read, or if they take too much.
    """
    contents = [message["content"] for message in question.chat]
    several = sum(part["type"] == "image" for content in contents for part in content) > 1
    padded = several or image_processor.vision_aspect_ratio == "pad"
    until, left = time.thread_time() + READING_SECONDS, MAX_PIXELS_TOGETHER
    for content in contents:
        for number, part in enumerate(content):
            if part["type"] == "image" and not gone():
                image = _read_image(part, max(1, min(left, MAX_PIXELS)), until)
                left -= image.width * image.height
                content[number] = {"type": "image", "image": _reduce(image) if padded else image}


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
    named = []

    def name_of(argument):
        named.append(part["places"][argument])
        return f"`{named[-1]}`"

    reason: object
    try:
        content = read_data_url(part["url"])
        page = part["options"].get("page", 0)
        if page > LAST_FRAME and not content.startswith((b"II", b"MM")):
            place = part["places"]["page"]
            raise RequestError(f"`{place}` is {page}; allowed are 0 to {LAST_FRAME}, but for TIFF files.", place)
        if content.startswith(_JPEG_2000):
            max_pixels = min(max_pixels, MAX_JPEG_2000_PIXELS)
        return read_medical_image(_Timed(content, until), max_pixels=max_pixels, **part["options"]).image
    except RequestError:
        raise
    except MedicalImageError as error:
        reason = error
    except Exception as error:  # libraries raise many kinds for broken files
        reason = error if isinstance(error, (ValueError, ImportError)) else type(error).__name__
    if time.thread_time() > until:
        reason = f"reading the images of this request takes more than {READING_SECONDS} seconds"
    elif isinstance(reason, MedicalImageError):
        message = reason.told(name_of)  # an option in it is what can be changed
        raise RequestError(message, next((place for place in named if place != part["place"]), part["place"]))
    raise RequestError(f"`{part['place']}` cannot be read: {reason}", part["place"])


def _reduce(image: Image.Image) -> Image.Image:
    """The image, or a smaller one of the same proportions if it is too long to become a square."""
    width, height = image.size
    scale = MAX_SIDE / max(width, height)
    if scale >= 1:
        return image
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)


def _fields_of(given: dict, known: Collection[str], neutral: Mapping[str, object], place: str = "") -> dict:
    """The fields of an object that are not null, if those that are not `known` ask for nothing."""
    fields = {name: value for name, value in given.items() if value is not None}
    for name, value in fields.items():
        where = f"{place}.{name}" if place else name
        if name not in known and name not in neutral:
            raise RequestError(f"`{where}` is no field that is known here; allowed are {sorted(known)}.", where)
        values = neutral.get(name, ...) if name not in known else ...
        if values is not ... and not any(_is_same(_without_nulls(value), each) for each in ([], {}, *values)):
            raise _wrong(where, value, " and ".join(map(json.dumps, (None, *values))))
    return fields


def _check(fits: object, place: str | None, value: object, allowed: str) -> None:
    if not fits:
        raise _wrong(place, value, allowed)


def _wrong(place: str | None, value: object, allowed: str) -> RequestError:
    shown = json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
    if isinstance(value, str) and _SURROGATES.search(value):
        shown += ", with half a character (a lone surrogate)"
    return RequestError(f"`{place}` is {shown}; allowed are {allowed}.", place)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _SURROGATES.search(value)


def _says_nothing(text: str) -> bool:
    return all(unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp", "Zs") for letter in text)


def _is_same(value: object, other: object) -> bool:
    """Whether two values of JSON are equal; there true is no number."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return value


__all__ = [
    "CHAT_COMPLETIONS", "OPTIONS", "RESPONSES", "Endpoint", "Question", "RequestError", "parse_body", "read_images",
    "read_question", "refusal",
]  # fmt: skip
