"""What a request to the server asks: its JSON is checked field by field, and an error names the field that is wrong.

Fields of OpenAI's API that this model has no use for pass if they ask for nothing; all others are refused. Images come
as data URLs alone, because nothing is fetched, and reading them takes a bounded time and memory.
"""

from __future__ import annotations

import json
import re
import reprlib
import time
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import BytesIO
from threading import Event

from PIL import Image, ImageFile

from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVGenerationConfig
from lladamedv.modeling_lladamedv.generation_config_lladamedv import FOREIGN_OPTIONS
from lladamedv.modeling_lladamedv.generation_options_lladamedv import OPTIONS, GenerationOptionError
from lladamedv.processing.medical_images import READING_OPTIONS, MedicalImageError, read_data_url, read_medical_image
from lladamedv.processing.processing_lladamedv import is_text


@dataclass(frozen=True)
class Limits:
    """What requests may take. Reading the pictures of one takes less than 300 MB and two seconds."""

    images: int = 4
    pixels: int = 2**23  # of one picture, while it is read
    pixels_together: int = 2**24
    jpeg_2000_pixels: int = 2**22  # slow to decode, and can be decoded reduced
    last_frame: int = 49  # of animations, whose frames are decoded one after the other
    side: int = 2**12  # pixels, of pictures that are padded to squares
    reading_seconds: float = 2  # of the processor's time
    characters: int = 100_000  # of a request's texts
    values: int = 300_000  # of a request's JSON, roughly; each takes far more memory than its text
    stops: int = 4  # as OpenAI has it
    header_seconds: float = 10
    upload_seconds: float = 60
    first_seconds: float = 5  # of an upload, in which it may be slower than …
    upload_speed: int = 20_000  # bytes a second
    stopping_seconds: int = 300  # for the answer under way to end when the server stops


LIMITS = Limits()


@dataclass(frozen=True)
class Endpoint:
    """How a request of one of OpenAI's endpoints is spelled.

    Args:
        path: of the endpoint.
        messages: the field that holds the conversation.
        options: fields that are options of `generate`, and their names there.
        others: further fields.
        stream_options: what `stream_options` may hold.
    """

    path: str
    messages: str
    options: Mapping[str, str]
    others: tuple[str, ...] = ()
    stream_options: tuple[str, ...] = ()


CHAT = Endpoint(
    "/v1/chat/completions", "messages", stream_options=("include_usage",),
    options={
        "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature",
        "repetition_penalty": "repetition_penalty", "stop": "stop_strings",
    },
)  # fmt: skip
RESPONSES = Endpoint(
    "/v1/responses", "input", {"max_output_tokens": "max_new_tokens", "temperature": "temperature"}, ("instructions",)
)
_COMMON = ("model", "stream", "stream_options", "seed", "generation_config", "evidence")
_OFFERED = {
    name: option for name, option in OPTIONS.items() if option.role == "answer" or name == "output_image_reliance"
}
_READING_FIELDS = {option.name: option for option in READING_OPTIONS}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # and their own names
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image_url", "input_image")
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
_TYPES = {int: "whole numbers", str: "texts", bool: "true and false"}
_ERROR_TYPES = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_JPEG_2000 = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
_MAX_MESSAGE = 1_000  # characters of an error, which may quote what was given
_SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can hold them alone, and no text can


class RequestError(Exception):
    """A request that is answered with an error, in OpenAI's form.

    Args:
        message: what is wrong; what is allowed.
        param: the field that is wrong.
        status: of HTTP.
        code: OpenAI's, of some errors.
        headers: of the reply.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        message, param = (text and _SURROGATES.sub("\ufffd", text[:_MAX_MESSAGE]) for text in (message, param))
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = _ERROR_TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Question:
    """What a request asks.

    Attributes:
        chat: messages; each image is still a data URL, with the options to read it by, and their places in the request.
        length_field: the field that holds the answer's length, or else the messages.
        options: complete options of `generate`.
        stop: texts that end the answer wherever they occur in it.
        seed: of the noise, if the answer is to be drawn the same way again.
        stream: whether the answer is sent as it is made.
        include_usage: whether a stream ends with an event for the numbers of tokens.
        evidence: whether the reply says where in the images the answer comes from.
    """

    chat: list[dict]
    length_field: str
    options: LLaDAMedVGenerationConfig
    stop: list[str]
    seed: int | None
    stream: bool
    include_usage: bool
    evidence: bool


def parse_body(body: bytes, limits: Limits) -> dict:
    """The JSON object of a request, without repeated names."""

    def unite(pairs):
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise RequestError(f"`{twice}` is there twice in one object; allowed is once.", twice)
        return fields

    def refuse(number):
        raise ValueError(f"{number} is no number of JSON")

    if sum(map(body.count, (b",", b"[", b"{"))) > limits.values:
        raise RequestError(f"The body holds more than {limits.values} values; no more are allowed.", status=413)
    try:
        fields = json.loads(body, object_pairs_hook=unite, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # which quote nothing that is longer than a number
        raise RequestError(f"The body must be a JSON object: {error}.") from error
    if not isinstance(fields, dict):
        raise RequestError(f"The body must be a JSON object; it is a {type(fields).__name__}.")
    return fields


def read_question(
    body: dict, endpoint: Endpoint, name: str, model: LLaDAMedVForConditionalGeneration, limits: Limits
) -> Question:
    """What a request asks the model of that name.

    Raises:
        RequestError: for a field that is not known, or a value that is not allowed.
    """
    body = _check_fields(body, (*_COMMON, *endpoint.options, *endpoint.others, endpoint.messages), _NEUTRAL)
    check_name(body.get("model", name), name)
    seed, stream, evidence = body.get("seed"), body.get("stream", False), body.get("evidence", False)
    for field, value in (("stream", stream), ("evidence", evidence)):
        if type(value) is not bool:
            raise _wrong(field, value, _TYPES[bool])
    if evidence and stream:
        raise RequestError("`evidence` is true; in streams it is not allowed.", "evidence")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise _wrong("seed", seed, "whole numbers from 0 to 2^63 - 1")
    given = body.get("stream_options", {})
    if not isinstance(given, dict):
        raise _wrong("stream_options", given, "objects")
    given = _check_fields(given, endpoint.stream_options, {"include_obfuscation": ...}, "stream_options")
    for field, value in given.items():
        if type(value) is not bool:
            raise _wrong(f"stream_options.{field}", value, _TYPES[bool])
    options, stop, length_field = _read_options(body, endpoint, model, limits)
    chat = _read_chat(body, endpoint)
    parts = [part for message in chat for part in message["content"]]
    num_images = sum(part["type"] == "image" for part in parts)
    if evidence and not num_images:
        raise RequestError("`evidence` is true; it needs an image.", "evidence")
    for unit, count, most in (
        ("images", num_images, limits.images),
        ("characters", sum(len(part.get("text", "")) for part in parts), limits.characters),
    ):
        if count > most:
            message = f"`{endpoint.messages}` holds {count} {unit}; allowed are at most {most}."
            raise RequestError(message, endpoint.messages)
    return Question(chat, length_field, options, stop, seed, stream, given.get("include_usage", False), evidence)


def check_name(given: object, name: str) -> None:
    """Refuse another model than the one that is served."""
    if given != name:
        message = f"`model` is {reprlib.repr(given)}; what is served here is {name!r}."
        raise RequestError(message, "model", 404, "model_not_found")


# Fields


def _wrong(place: str, value: object, allowed: str, verb: str = "are ") -> RequestError:
    shown = json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
    if isinstance(value, str) and _SURROGATES.search(value):
        shown += ", with half a character (a lone surrogate)"
    return RequestError(f"`{place}` is {shown}; allowed {verb}{allowed}.", place)


def _check_fields(given: dict, known: Collection[str], neutral: Mapping[str, object], place: str = "") -> dict:
    """The known fields of an object that are not null, if all others ask for nothing."""
    fields = {name: value for name, value in given.items() if value is not None}
    for name in fields:
        where = f"{place}.{name}" if place else name
        if name in known:
            continue
        if name not in neutral:
            raise RequestError(f"`{where}` is no field that is known here; allowed are {sorted(known)}.", where)
        values, plain = neutral[name], _without_nulls(fields[name])
        if values is not ... and not any(
            plain == each and isinstance(plain, bool) == isinstance(each, bool) for each in ([], {}, *values)
        ):  # where true is no number
            raise _wrong(where, fields[name], " and ".join(map(json.dumps, (None, *values))))
    return {name: value for name, value in fields.items() if name in known}


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return value


def _read_options(
    body: dict, endpoint: Endpoint, model: LLaDAMedVForConditionalGeneration, limits: Limits
) -> tuple[LLaDAMedVGenerationConfig, list[str], str]:
    """The model's own options and the request's over them, complete; its stops; the field of the answer's length."""
    given = body.get("generation_config", {})
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            pass
    if not isinstance(given, dict):
        raise _wrong("generation_config", given, "JSON objects, also as a text")
    names = {name: f"generation_config.{name}" for name in given}  # in the request
    for name, field in names.items():
        if name not in _OFFERED and name not in FOREIGN_OPTIONS:
            raise RequestError(f"`{field}` is not known; allowed are {sorted(_OFFERED)}.", field)
    for field, name in endpoint.options.items():
        if field in body:
            if names.get(name) in body and body[field] != given[name]:
                raise RequestError(f"`{field}` and `{names[name]}` are both given, and differ.", field)
            given, names = given | {name: body[field]}, names | {name: field}
    context = model.config.get_text_config().max_position_embeddings
    for name, value in given.items():
        if isinstance(value, int) and value > context:
            raise _wrong(names[name], value, f"at most {context}, the length of the model's context")
        if isinstance(value, str) and not (is_text(value) and len(value) <= limits.characters):
            raise _wrong(names[name], value, f"texts of at most {limits.characters} characters")
    stop = given.get("stop_strings")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > limits.stops or not all(map(is_text, stop)) or "" in stop:
        raise _wrong(names["stop_strings"], stop, f"up to {limits.stops} texts that are not empty")

    try:
        options = model.resolve_generation_config(**given, return_dict_in_generate=True)
    except GenerationOptionError as error:
        name = next((name for name in error.options if name in names), None)
        field, option = names.get(name, "generation_config"), _OFFERED.get(name)
        if option is not None and not option.accepts(given[name]):
            raise _wrong(field, given[name], option.allowed, verb="") from None  # the table has it: "are whole numbers"
        raise RequestError(f"`{field}` is not allowed: {error}", field) from None
    return options, stop, names.get("max_new_tokens", endpoint.messages)


# Messages


def _read_chat(body: dict, endpoint: Endpoint) -> list[dict]:
    """The conversation, for the chat template."""
    given, chat = body.get(endpoint.messages), []
    if endpoint is RESPONSES:
        instructions = body.get("instructions", "")
        if not is_text(instructions):
            raise _wrong("instructions", instructions, _TYPES[str])
        if instructions:
            chat.append({"role": "system", "content": _read_content(instructions, "instructions")})
        if not (isinstance(given, list) and any(isinstance(item, dict) and "role" in item for item in given)):
            return [*chat, {"role": "user", "content": _read_content(given, "input")}]  # a text, or parts
    elif not isinstance(given, list) or not given:
        raise _wrong("messages", given, "lists of messages")
    return chat + [_read_message(message, f"{endpoint.messages}[{index}]") for index, message in enumerate(given)]


def _read_message(message: object, place: str) -> dict:
    if not isinstance(message, dict):
        raise _wrong(place, message, "messages, objects with a `role` and a `content`")
    role, roles = message.get("role"), ", ".join(map(repr, _ROLES))
    if role is not None and (not isinstance(role, str) or role not in _ROLES):
        raise _wrong(f"{place}.role", role, roles)
    fields = _check_fields(message, ("role", "content"), _MESSAGE_NEUTRAL, place)
    if role is None:
        raise _wrong(f"{place}.role", role, roles)
    may_be_empty = role == "assistant"  # what this model said itself
    content = _read_content(fields.get("content", "" if may_be_empty else None), f"{place}.content", may_be_empty)
    for part in content:
        if part["type"] == "image" and role != "user":
            where = part["place"]
            raise RequestError(f"`{where}` is in a message of the role {role!r}; allowed is 'user' for images.", where)
    return {"role": _ROLES[role], "content": content}


def _read_content(content: object, place: str, may_be_empty: bool = False) -> list[dict]:
    if not is_text(content) and not isinstance(content, list):
        raise _wrong(place, content, "texts and lists of parts")
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    else:
        parts = [_read_part(part, f"{place}[{number}]") for number, part in enumerate(content)]
    if not may_be_empty and all(part["type"] == "text" and _says_nothing(part["text"]) for part in parts):
        raise RequestError(f"`{place}` is empty; it must hold a text or an image.", place)
    return parts


def _says_nothing(text: str) -> bool:
    return all(unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp", "Zs") for letter in text)


def _read_part(part: object, place: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _IMAGE_PARTS:
        return _read_image_part(part, place)
    if kind not in _TEXT_PARTS:
        raise _wrong(f"{place}.type", kind, ", ".join(map(repr, _TEXT_PARTS + _IMAGE_PARTS)))
    text = _check_fields(part, ("type", "text"), _TEXT_NEUTRAL, place).get("text")
    if not is_text(text):
        raise _wrong(f"{place}.text", text, _TYPES[str])
    return {"type": "text", "text": text}


def _read_image_part(part: dict, place: str) -> dict:
    """The options by which to read an image stand beside its URL, wherever that is."""
    fields = _check_fields(part, ("type", "image_url", *_READING_FIELDS), _IMAGE_NEUTRAL, place)
    url, where = fields.get("image_url"), f"{place}.image_url"
    found = [(place, fields)]
    if isinstance(url, dict):
        found.append((where, _check_fields(url, ("url", *_READING_FIELDS), _IMAGE_NEUTRAL, where)))
        url, where = found[-1][1].get("url"), f"{where}.url"
    if not isinstance(url, str) or url.lstrip()[:5].lower() != "data:":
        raise _wrong(where, url, "data URLs as data:image/png;base64,…: nothing is fetched")
    options, places = {}, {"source": where}
    for name, option in _READING_FIELDS.items():
        for outer, holder in found:
            field, value = f"{outer}.{name}", holder.get(name)
            places[option.argument] = field
            if value is None:
                continue
            if option.argument in options:
                raise RequestError(f"`{field}` is there twice, also in `{place}`.", field)
            if type(value) is not option.type:
                raise _wrong(field, value, _TYPES[option.type])
            options[option.argument] = value
    return {"type": "image", "url": url, "place": where, "options": options, "places": places}


# Pictures


def read_pictures(question: Question, pad: bool, limits: Limits, gone: Event) -> None:
    """Put pictures in place of the data URLs of a question, whose chat then is one for the chat template.

    Args:
        question: whose chat is changed.
        pad: whether one picture alone is padded to a square, too.
        limits: what reading may take.
        gone: ends it.

    Raises:
        RequestError: for a picture that cannot be read, or if reading them takes too much.
    """
    parts = [part for message in question.chat for part in message["content"] if part["type"] == "image"]
    until, left = time.thread_time() + limits.reading_seconds, limits.pixels_together
    for part in parts:
        if gone.is_set():
            return
        image = _read_picture(part, max(1, min(left, limits.pixels)), until, limits)
        left -= image.width * image.height
        scale = limits.side / max(image.size)
        if scale < 1 and (pad or len(parts) > 1):  # it would become a square of its longer side
            size = [max(1, int(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)
        part["image"] = image
        for used in ("url", "place", "options", "places"):
            del part[used]


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


def _read_picture(part: dict, max_pixels: int, until: float, limits: Limits) -> Image.Image:
    named = []

    def name_of(argument):
        named.append(part["places"][argument])
        return f"`{named[-1]}`"

    try:
        content = read_data_url(part["url"])
        page = part["options"].get("page", 0)
        if page > limits.last_frame and not content.startswith((b"II", b"MM")):
            raise _wrong(part["places"]["page"], page, f"0 to {limits.last_frame}, but for TIFF files")
        if content.startswith(_JPEG_2000):
            max_pixels = min(max_pixels, limits.jpeg_2000_pixels)
        return read_medical_image(_Timed(content, until), max_pixels=max_pixels, **part["options"]).image
    except RequestError:
        raise
    except Exception as error:  # libraries raise many kinds for broken files
        if time.thread_time() > until:
            reason = f"reading the images of this request takes more than {limits.reading_seconds} seconds"
        elif isinstance(error, MedicalImageError):
            message = error.told(name_of)  # an option in it is what can be changed
            field = next((place for place in named if place != part["place"]), part["place"])
            raise RequestError(message, field) from None
        else:
            reason = error if isinstance(error, (ValueError, ImportError)) else type(error).__name__
        raise RequestError(f"`{part['place']}` cannot be read: {reason}", part["place"]) from None


__all__ = [
    "CHAT", "LIMITS", "RESPONSES", "Endpoint", "Limits", "Question", "RequestError", "check_name", "parse_body",
    "read_pictures", "read_question",
]  # fmt: skip
