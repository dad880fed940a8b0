"""LLaVA-Med's training records into rows of messages and images, and back.

The published files spell `conversations` in two ways, put `<image>` before or behind the first question, and sometimes
lost it with a turn that was cleaned away. All of that ends here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .records import ImageFiles, InvalidRecordError, LoadReport, rows_of


IMAGE_PLACEHOLDER = "<image>"
SPELLINGS = ("conversations", "conversatons")  # the alignment file has the second
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_SPEAKERS = {role: speaker for speaker, role in _ROLES.items()}


def record_to_row(record: dict, record_id: str, images: ImageFiles | None = None) -> dict:
    """One record as a row.

    Args:
        record: `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, …]}`, of the alignment or of the
            instruct format. `image` may be a name, a list of names, or not there.
        record_id: what to call a record without `id`.
        images: where the image files are; without it, names stay as they are and no file is looked for.

    Returns:
        `{"id", "messages", "images"}`: chat messages whose contents are parts, the images' parts in front of their
        turn's text and `<image>` taken out of it, and the paths of the images. Where no human turn holds `<image>`, the
        first one shows the images; in other turns `<image>` is text.

    Raises:
        InvalidRecordError: if the record holds no conversation.
        MissingImageError: if an image file is not there.
    """
    turns = next((record[key] for key in SPELLINGS if record.get(key)), None)
    if not isinstance(turns, list):
        raise InvalidRecordError(f"no `conversations`, but {sorted(record)}")
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidRecordError(f"`image` is {names!r:.200}; allowed are a name and a list of names")
    messages = []
    for number, turn in enumerate(turns):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(text, str):
            raise InvalidRecordError(
                f"turn {number} has no `value` or is from {speaker!r:.200}, not from {list(_ROLES)}"
            )
        shown = text.count(IMAGE_PLACEHOLDER) if speaker == "human" else 0
        if shown:
            text = text.replace(IMAGE_PLACEHOLDER, "").strip()
        content = [{"type": "image", "text": None} for _ in range(shown)]
        content += [{"type": "text", "text": text}] if text else []
        messages.append({"role": _ROLES[speaker], "content": content})
    if not any(part["type"] == "image" for message in messages for part in message["content"]):
        for message in messages:
            if message["role"] == "user":
                message["content"] = [{"type": "image", "text": None} for _ in names] + message["content"]
                break
    found = [images.find(name) if images is not None else name for name in names]
    return {"id": record_id if record.get("id") is None else str(record["id"]), "messages": messages, "images": found}


def row_to_record(row: dict, image_folder: str | Path | None = None) -> dict:
    """One row as a record in the instruct format, with `conversations` spelt so and `<image>` in front.

    Args:
        row: as [`record_to_row`] returns it.
        image_folder: what the images' names shall be relative to; by default paths stay as they are.

    Raises:
        ValueError: if an image is not given by its path.
    """
    names = []
    for image in row["images"]:
        if not isinstance(image, (str, Path)):
            raise ValueError(f"`images` of row {row['id']!r} holds a {type(image).__name__}; allowed are paths.")
        names.append(str(image) if image_folder is None else os.path.relpath(image, image_folder))
    record = {"id": row["id"]}
    if names:
        record["image"] = names[0] if len(names) == 1 else names
    turns = []
    for message in row["messages"]:
        parts = [IMAGE_PLACEHOLDER if part["type"] == "image" else part["text"] for part in message["content"]]
        turns.append({"from": _SPEAKERS[message["role"]], "value": "\n".join(parts)})
    return record | {"conversations": turns}


def llava_med_rows(
    path: str | Path, image_folder: str | Path | None = None, report: LoadReport | None = None
) -> Iterator[dict]:
    """The rows of a LLaVA-Med file, one at a time.

    Args:
        path: JSON list or JSON lines.
        image_folder: folder that the images' names are relative to; by default the folder of `path`.
        report: is told what became of each record, and decides about malformed ones; by default they are errors.

    Returns:
        An iterator over rows as [`record_to_row`] makes them.

    Raises (when iterated over):
        ValueError: for a file that is no JSON, or a malformed record if that is what the report says.
    """
    images = ImageFiles(Path(path).parent if image_folder is None else image_folder)
    return rows_of(path, partial(record_to_row, images=images), report or LoadReport(str(path)))


__all__ = ["llava_med_rows", "record_to_row", "row_to_record"]
