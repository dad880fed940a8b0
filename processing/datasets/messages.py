"""The one form of a row to train on, `{"id", "messages", "images"}`, and how records of every other form become it.

Messages are `{"role", "content"}` with contents as parts, `{"type": "text", "text": …}` and `{"type": "image", "text":
None}`: an image's place; the images themselves are beside the messages. Records may be LLaVA-Med's, chat messages, a
prompt and its completion, or a question about an image and its answer. [`ROW_FEATURES`] is the form as `datasets` knows
it.
"""

from __future__ import annotations

import fsspec
import numpy as np
from datasets import Features, Image, List, Value

from ..processing_lladamedv import IMAGE_KEYS, normalize_chat
from .columns import CONVERSATIONS, Fields, InvalidRecordError, answer_text, text_of
from .readers import ImageFiles


IMAGE_PLACEHOLDER = "<image>"
_REMOTE = ("http:", "https:", "ftp:")
# The columns of a record of each form. A question's may have other names, too (`COLUMNS`).
FORMS = (("messages",), *((name,) for name in CONVERSATIONS), ("prompt", "completion"))
PREFERENCE = ("prompt", "chosen", "rejected")
QUESTION = ("question", "answer", "image")
_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}
_CONTENT = List({"type": Value("string"), "text": Value("string")})
_MESSAGES = List({"role": Value("string"), "content": _CONTENT})
ROW_FEATURES = Features({"id": Value("string"), "messages": _MESSAGES, "images": List(Image())})
PAIR_FEATURES = Features({"id": Value("string"), **dict.fromkeys(PREFERENCE, _MESSAGES), "images": List(Image())})
PROMPT_FEATURES = Features(
    {
        "id": Value("string"), "prompt": _MESSAGES, "images": List(Image()),
        "answer": Value("string"), "candidates": List(Value("string")),
    }
)  # fmt: skip
# What may stand in messages and rows, and would change what is learned if it were read.
_NOT_READ_IN_MESSAGES = (
    "tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking", "weight", "loss", "train",
)  # fmt: skip
_NOT_READ_IN_ROWS = ("tools", "videos", "audios", "chat_template_kwargs")


# Records


def record_to_row(record: dict, record_id: str, images: ImageFiles | None = None) -> dict:
    """One record as a row.

    Args:
        record: has `messages`; or LLaVA-Med's `conversations`, `[{"from": "human" | "gpt", "value"}, …]`; or `prompt`
            and `completion`; or a question and its answer, by any of their usual names (`COLUMNS`). `image` or
            `images` may be an image, a list of images, or not there; a question has an image.
        record_id: what to call a record without an id.
        images: where the image files are; without it, names stay as they are and no file is looked for.

    Returns:
        `{"id", "messages", "images"}`.

    Raises:
        InvalidRecordError: if it cannot become one; [`MissingImageError`] if an image is not there.
    """
    fields, is_question = Fields(record), False
    if "messages" in record:
        messages = record["messages"]
    elif any(record.get(name) for name in CONVERSATIONS):
        messages = conversation_of(record)
    elif {"prompt", "completion"} <= set(record):
        messages = [*_turns("user", record["prompt"]), *_turns("assistant", record["completion"])]
    else:
        is_question = True
        for column in ("question", "answer"):
            fields.need(column)
        texts = {"question": text_of(fields.get("question")) or "", "answer": answer_text(fields.get("answer"))}
        for column, text in texts.items():
            if not text.strip():
                raise InvalidRecordError(f"`{column}` is {fields.get(column)!r:.200}; allowed are texts and numbers")
        messages = [*_turns("user", texts["question"]), *_turns("assistant", texts["answer"])]
    given = _images_of_record(record, images)
    if is_question and not given:
        fields.need("image")
        given = _images_of_record({"image": fields.get("image")}, images)
    return {"id": fields.id(record_id), "messages": normalize_messages(messages, len(given)), "images": given}


def record_to_pair(record: dict, record_id: str, images: ImageFiles | None = None) -> dict:
    """One record with `prompt`, `chosen` and `rejected` (texts or chat messages) as a pair, see [`preference_rows`].

    Other arguments and errors are those of [`record_to_row`].

    Returns:
        `{"id", "prompt", "chosen", "rejected", "images"}`.
    """
    given = _images_of_record(record, images)
    pair = {name: normalize_messages(_turns("assistant", record[name]), 0) for name in PREFERENCE[1:]}
    pair["prompt"] = normalize_messages(_turns("user", record["prompt"]), len(given))
    return {"id": Fields(record).id(record_id), **pair, "images": given}


def record_to_prompt(record: dict, record_id: str, images: ImageFiles | None = None) -> dict:
    """One record as a prompt and what rewards compare its answers with.

    Args:
        record: has `prompt`, as chat messages, and `answer`; or is one that [`record_to_row`] takes, whose last turn is
            the answer. Perhaps `candidates`, the possible answers.
        record_id, images: see there, also for errors.

    Returns:
        `{"id", "prompt", "images", "answer", "candidates"}`.
    """
    if isinstance(record.get("prompt"), list):
        answer = {"role": "assistant", "content": answer_text(Fields(record).get("answer"))}
        record = {**record, "messages": [*record["prompt"], answer]}
    return prompt_of(record_to_row(record, record_id, images), record.get("candidates"))


def prompt_of(row: dict, candidates: list[str] | None = None) -> dict:
    """What [`record_to_prompt`] returns, of a row of messages.

    Raises:
        InvalidRecordError: if its last turn is no answer.
    """
    *prompt, answer = row["messages"]
    text = "".join(part["text"] for part in answer["content"])
    if answer["role"] != "assistant" or not prompt:
        raise InvalidRecordError("its last turn is no answer")
    if not isinstance(candidates, list | None) or not all(isinstance(each, str) for each in candidates or ()):
        raise InvalidRecordError("`candidates` is no list of texts", repr(candidates))
    return {"id": row["id"], "prompt": prompt, "images": row["images"], "answer": text, "candidates": candidates}


def _images_of_record(record: dict, images: ImageFiles | None) -> list:
    given = [record[name] for name in ("image", "images") if _holds_image(record.get(name))]
    if len(given) > 1:
        raise InvalidRecordError("it has both `image` and `images`")
    given = given[0] if given and isinstance(given[0], list) else given
    return [image if images is None else images.stored(image) for image in given]


def _turns(role: str, content) -> list:
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _holds_image(image) -> bool:
    return any(image.values()) if isinstance(image, dict) else bool(image)


def conversation_of(record: dict) -> list[dict]:
    """The messages of one of LLaVA-Med's records.

    Raises:
        InvalidRecordError: if it holds no conversation.
    """
    turns, messages = next(record[name] for name in CONVERSATIONS if record.get(name)), []
    if not isinstance(turns, list):
        raise InvalidRecordError(f"`conversations` is of type {type(turns).__name__}; allowed are lists of turns")
    for number, turn in enumerate(turns):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or speaker not in _SPEAKERS or not isinstance(text, str):
            raise InvalidRecordError(
                f"turn {number} has no `value` or is from {speaker!r:.200}, not from {list(_SPEAKERS)}"
            )
        messages.append({"role": _SPEAKERS[speaker], "content": text})
    return messages


def prompt_row(row: dict) -> dict:
    """A prompt as TRL's GRPOTrainer takes it, in the one form.

    Args:
        row: with `prompt`, a text or chat messages that end with the user's, and images, see [`images_of`]; perhaps an
            `answer`.

    Returns:
        A row as [`check_row`] returns it, of the prompt and its answer, or the prompt alone.

    Raises:
        InvalidRecordError: for a row that cannot be answered.
    """
    prompt, answer = _turns("user", row.get("prompt") or []), row.get("answer")
    if not prompt or prompt[-1]["role"] != "user":
        raise InvalidRecordError("`prompt` does not end with the user's turn")
    if isinstance(answer, str) and not answer.strip():
        raise InvalidRecordError("`answer` is empty")
    given = {name: value for name, value in row.items() if name != "prompt"}
    answered = check_row({**given, "messages": [*prompt, *_turns("assistant", str(answer or "none"))]})
    return answered if answer else {**answered, "messages": answered["messages"][:-1]}


def candidate_rows(row: dict) -> list[dict]:
    """A prompt with each of its possible answers.

    Args:
        row: with `prompt`, a text or chat messages, `candidates`, two or more different texts, and images, see
            [`images_of`].

    Returns:
        Rows as [`check_row`] returns them.

    Raises:
        InvalidRecordError: for a row without such candidates, and as [`prompt_row`].
    """
    candidates = row.get("candidates")
    if not isinstance(candidates, list) or not all(isinstance(each, str) and each.strip() for each in candidates):
        raise InvalidRecordError("`candidates` is no list of texts that are not empty", f"{candidates!r:.200}")
    if len({each.strip() for each in candidates}) != len(candidates) or len(candidates) < 2:
        raise InvalidRecordError("`candidates` are not two or more different texts", f"{candidates!r:.200}")
    return [prompt_row({**row, "answer": each}) for each in candidates]


def preference_rows(row: dict) -> tuple[dict, dict]:
    """A pair as TRL's DPOTrainer takes it, as the row of its chosen answer and that of its rejected one.

    Args:
        row: with `prompt`, `chosen` and `rejected`, texts or chat messages, and images, see [`images_of`]. An answer is
            one assistant turn.

    Returns:
        Rows as [`check_row`] returns them.

    Raises:
        InvalidRecordError: for a pair that cannot be trained on.
    """
    prompt, sides = _turns("user", row.get("prompt") or []), []
    if not prompt:
        raise InvalidRecordError("no `prompt`", "a conversation without one is split by `trl.extract_prompt`")
    for name in PREFERENCE[1:]:
        answer = _turns("assistant", row.get(name) or [])
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise InvalidRecordError(f"`{name}` is not one assistant turn")
        given = {key: value for key, value in row.items() if key not in PREFERENCE}
        sides.append(check_row({**given, "messages": [*prompt, *answer]}))
    if sides[0]["messages"][-1] == sides[1]["messages"][-1]:
        raise InvalidRecordError("`chosen` and `rejected` are the same")
    return sides[0], sides[1]


# Messages


def normalize_messages(messages: list, num_images: int) -> list[dict]:
    """Messages in the one form, for the processor's `apply_chat_template`, which puts a turn's images first.

    `<image>` in a user's text is a placeholder, as in LLaVA's records, and is taken out of the text; anywhere else it
    is text. A conversation that names no image shows all it has at the beginning of its first user turn, as in TRL.
    Messages in the one form stay as they are: the collator takes rows of a loader and rows of a user's own alike.

    Args:
        messages: dicts, or objects that Transformers takes for messages (dataclasses, pydantic's), with a `role` and a
            `content`: a text, or parts `{"type": "text", "text": …}` and `{"type": "image"}`.
        num_images: of the row.

    Raises:
        InvalidRecordError: for messages of another form, and those that hold what would be ignored.
    """
    normalized = []
    try:
        messages = normalize_chat(messages, "messages")
    except ValueError as error:
        raise _unreadable(str(error)) from None
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        ignored = [key for key in _NOT_READ_IN_MESSAGES if message.get(key) not in (None, [], "", 1)]
        if ignored:
            raise _unreadable(f"message {number} has `{ignored[0]}`, which is not trained on")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        images = [part for part in parts if part["type"] != "text"]
        held = [key for image in images for key in ("image_url", *IMAGE_KEYS) if key in image]
        if held or (images and role != "user"):
            raise _unreadable(
                f"message {number}, of role {role}, has an image" + (f" with `{held[0]}`" if held else "")
                + "; allowed are texts, and in a user's turn images, which themselves are in the column `images`"
            )  # fmt: skip
        text, shown = "".join(part["text"] for part in parts if part["type"] == "text"), len(images)
        while role == "user" and IMAGE_PLACEHOLDER in text:  # until none is left, also of <ima<image>ge>
            shown += text.count(IMAGE_PLACEHOLDER)
            text = text.replace(IMAGE_PLACEHOLDER, "").strip()
        normalized.append({"role": role, "content": _places(shown) + [{"type": "text", "text": text}] * bool(text)})
    first = next((message for message in normalized if message["role"] == "user"), None)
    if first is not None and not _shown(normalized):
        first["content"] = _places(num_images) + first["content"]
    return normalized


def _unreadable(detail: str) -> InvalidRecordError:
    return InvalidRecordError("its messages cannot be read", detail)


def _places(count: int) -> list[dict]:
    return [{"type": "image", "text": None} for _ in range(count)]


def _shown(messages: list[dict]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def show_images(messages: list[dict], images: list) -> list[dict]:
    """Normalised messages with each image in its place, as `apply_chat_template` takes them."""
    shown = iter(images)

    def filled(part: dict) -> dict:
        return {"type": "image", "image": next(shown)} if part["type"] == "image" else part

    return [{**message, "content": [*map(filled, message["content"])]} for message in messages]


# Rows


def check_row(row: dict) -> dict:
    """A row in the one form, of which nothing but its images may still be wrong. They are not decoded.

    Args:
        row: with `messages`, see [`normalize_messages`], and images, see [`images_of`].

    Raises:
        InvalidRecordError: for a row that cannot be trained on.
    """
    if not row.get("messages"):
        raise InvalidRecordError("no `messages`")
    for name in _NOT_READ_IN_ROWS:
        if row.get(name):
            raise InvalidRecordError(f"it has `{name}`, which are not trained on")
    images = images_of(row)
    messages = normalize_messages(row["messages"], len(images))
    answers = [message for message in messages if message["role"] == "assistant"]
    told = [any(part["text"].strip() for part in answer["content"]) for answer in answers]
    if not any(told):
        raise InvalidRecordError("no assistant turn")
    if not all(told):
        raise InvalidRecordError("an assistant turn is empty")
    if answers[-1] is messages[0]:
        raise InvalidRecordError("no turn before the answer")
    if (shown := _shown(messages)) != len(images):
        raise InvalidRecordError(f"{shown} {IMAGE_PLACEHOLDER} for {len(images)} images")
    return {"id": row.get("id"), "messages": messages, "images": images}


def images_of(row: dict) -> list:
    """The images of a row, however it names and holds them, each as the image processor takes it.

    Args:
        row: with `images`, a list of images, or `image`. An image is a path, the bytes of a file, what
            `datasets.Image(decode=False)` makes of these, a PIL image, an array or a tensor. Lists of numbers, which
            data sets make of arrays, are arrays again: 8-bit ones if all are whole numbers from 0 to 255.

    Raises:
        InvalidRecordError: for an image that is missing or at a URL, or a row that has both `image` and `images`.
    """
    names = [name for name in ("image", "images") if not _is_nothing(row.get(name))]
    if not names:
        return []
    if len(names) > 1:
        raise InvalidRecordError("it has both `image` and `images`")
    value = row[names[0]]
    depth, last = _depth(value)
    if names == ["images"] and depth == 3 and last in (3, 4):
        raise InvalidRecordError("`images` is a single array", "put it into a list, or into `image`")
    is_list = isinstance(value, (list, tuple)) or depth > 0
    single = not is_list or depth == 2 or (depth == 3 and names == ["image"])
    images = [image_source(image) for image in ([value] if single else value)]
    for image in images:
        if image is None or (isinstance(image, (str, bytes)) and not image):
            raise InvalidRecordError("an image is missing")
        if isinstance(image, str) and image.lower().startswith(_REMOTE):
            raise InvalidRecordError("an image is a URL", f"{image}; download it, and name the file")
    return images


def _is_nothing(value) -> bool:
    return value is None or (isinstance(value, (list, tuple, str)) and not value)


def _depth(value) -> tuple[int, int]:
    """Number of dimensions and length of the last one of an array, or of nested lists of numbers; else zeros."""
    if isinstance(getattr(value, "ndim", None), int):
        return value.ndim, value.shape[-1] if value.ndim else 0
    depth, last = 0, 0
    while isinstance(value, (list, tuple)) and value:
        depth, last, value = depth + 1, len(value), value[0]
    return (depth, last) if isinstance(value, (int, float)) else (0, 0)


def image_source(image):
    """What the image processor's `fetch_images` takes of a row's image; nothing is decoded.

    Args:
        image: as an undecoded data set holds it, `{"bytes", "path"}`, of which a path may lead into a zip archive or
            another file system; a list of numbers, which becomes an array. Anything else is returned as it is.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") else image.get("path")
    if isinstance(image, str) and "://" in image and not image.lower().startswith(("data:", *_REMOTE)):
        with fsspec.open(image, "rb") as file:
            return file.read()
    if isinstance(image, (list, tuple)) and _depth(image)[0] in (2, 3):
        array = np.asarray(image)
        fits = np.issubdtype(array.dtype, np.integer) and array.min() >= 0 and array.max() <= 255
        return array.astype(np.uint8) if fits else array
    return image
