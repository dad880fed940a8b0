"""Rows of a data set before they are trained on: what a row must have, and several questions about an image in one row.

A row is what TRL calls conversational: `messages`, `images` (or `image`), and perhaps an `id`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from PIL import Image


logger = logging.getLogger(__name__)
IMAGE_PLACEHOLDER = "<image>"
_SHOWN = 5


@dataclass
class RowReport:
    """What became of the rows of a data set.

    Attributes:
        kept: number of rows to train on.
        left_out: for each reason, how many rows it cost.
        examples: for each reason, the ids of the first few of them.
        packed_into: number of rows after packing, if questions were packed.
    """

    kept: int = 0
    left_out: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    packed_into: int | None = None

    def add(self, reason: str, row_id: str) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, [])
        if len(self.examples[reason]) < _SHOWN:
            self.examples[reason].append(row_id)

    def summary(self) -> str:
        lines = [f"{self.kept} rows to train on"]
        for reason, count in self.left_out.items():
            lines.append(f"{count} left out, {reason}: {', '.join(self.examples[reason])}, …"[:200])
        if self.packed_into is not None:
            lines.append(f"packed into {self.packed_into} rows")
        return "; ".join(lines)


def normalize_messages(messages: list[dict], num_images: int) -> list[dict]:
    """The messages with content parts, images where their placeholders are.

    `<image>` in a user's text is a placeholder, as in LLaVA's records; the only one of a turn goes to its beginning, as
    in the authors' code. A conversation that names no image shows all it has at the beginning of its first user turn,
    as in TRL.
    """
    normalized = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        own = []
        for part in parts:
            if part["type"] != "text":
                own.append({"type": "image"})
                continue
            pieces = [part.get("text") or ""]
            if message["role"] == "user":
                pieces = pieces[0].split(IMAGE_PLACEHOLDER)
            if len(pieces) == 2:
                pieces = ["", "".join(piece.strip("\n") for piece in pieces)]
            for number, piece in enumerate(pieces):
                own += [{"type": "image"}] * (number > 0)
                own += [{"type": "text", "text": piece}] * bool(piece)
        normalized.append({"role": message["role"], "content": own})
    if not count_placeholders(normalized):
        for message in normalized:
            if message["role"] == "user":
                message["content"] = [{"type": "image"}] * num_images + message["content"]
                break
    return normalized


def count_placeholders(messages: list[dict]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def images_of(row: dict) -> list:
    """The images of a row, however it names them."""
    if row.get("image") is not None:
        return [row["image"]]
    return list(row.get("images") or [])


def problem_with(row: dict) -> str | None:
    """Why a row cannot be trained on, or `None`."""
    messages = row.get("messages")
    if not messages:
        return "no `messages`"
    images = images_of(row)
    if any(image is None for image in images):
        return "an image is missing"
    messages = normalize_messages(messages, len(images))
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(part.get("text", "").strip() for answer in answers for part in answer["content"]):
        return "no assistant turn"
    shown = count_placeholders(messages)
    if shown != len(images):
        return f"{shown} {IMAGE_PLACEHOLDER} for {len(images)} images"
    for image in images:
        path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
        if isinstance(path, (str, Path)) and "://" not in str(path) and not Path(path).is_file():
            return f"no such image file as {Path(path).name}"
    return None


def row_id(row: dict, number: int) -> str:
    return str(row.get("id") if row.get("id") is not None else f"row {number}")


def image_key(image) -> str:
    """What tells images apart without decoding them: their path, or a digest of their bytes."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Image.Image):
        image = image.tobytes() + repr((image.size, image.mode)).encode()
    return str(image) if isinstance(image, (str, Path)) else hashlib.sha256(image).hexdigest()


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """The data set with its images as paths or bytes, where it knows which columns are images."""
    for name, feature in (dataset.features or {}).items():
        if name == "image" and isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        if name == "images" and isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, type(feature)(datasets.Image(decode=False)))
    return dataset


def prepare_rows(dataset, length_of, max_length: int, invalid_rows: str, long_rows: str, name: str):
    """Look at every row before anything is trained.

    Args:
        dataset: `datasets.Dataset`; of an `IterableDataset` the rows are looked at as they come.
        length_of: function from a row with undecoded images to its number of tokens.
        max_length: longest row.
        invalid_rows, long_rows: see [`MaskedDiffusionSFTConfig`].
        name: of the data set, for messages.

    Returns:
        The data set without the rows that are left out, and a [`RowReport`].

    Raises:
        ValueError: for a bad row, if that is what the options say, or if no row is left.
    """
    report = RowReport()

    def good(row, number):
        reason, skip = problem_with(row), invalid_rows == "skip"
        if reason is None:
            length = length_of(row)
            if length > max_length:
                reason, skip = f"more than {max_length} tokens", long_rows == "drop"
                if not skip:
                    reason = f"{length} tokens, where {max_length} are allowed"
        if reason is None:
            report.kept += 1
            return True
        if not skip:
            option, value = ("long_rows", "drop") if "tokens" in reason else ("invalid_rows", "skip")
            raise ValueError(
                f"`{name}` cannot be trained on: {row_id(row, number)} has a problem: {reason}. Mend it, or leave such "
                f"rows out with {option}={value!r}."
            )
        report.add(reason, row_id(row, number))
        logger.warning("%s: %s left out, %s", name, row_id(row, number), reason)
        return False

    if isinstance(dataset, datasets.IterableDataset):
        return dataset.filter(good, with_indices=True), report
    plain = undecoded(dataset)
    keep = [number for number in range(len(plain)) if good(plain[number], number)]
    if not keep:
        raise ValueError(f"`{name}` has {len(dataset)} rows, of which none can be trained on: {report.summary()}.")
    return (dataset if len(keep) == len(dataset) else dataset.select(keep)), report


def pack_rows(dataset: datasets.Dataset, max_questions: int) -> datasets.Dataset:
    """Rows of one question each as rows of up to `max_questions` about the same image, in the order of their first.

    Raises:
        ValueError: for a row with more or less than one image or one answer, or a streamed data set.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError("`pack_questions` needs to see the whole data set, and this one is streamed.")
    plain = undecoded(dataset)
    open_groups, groups = {}, []
    for number, row in enumerate(plain):
        images = images_of(row)
        roles = [message["role"] for message in row["messages"]]
        content = normalize_messages(row["messages"], len(images))[roles.index("user")]["content"]
        if len(images) != 1 or roles.count("assistant") != 1 or content[0]["type"] != "image":
            raise ValueError(
                f"`pack_questions` is {max_questions}, but {row_id(row, number)} has {len(images)} images and "
                f"{roles.count('assistant')} answers; allowed are rows of one question that begins with its one image."
            )
        key = (image_key(images[0]), str([m["content"] for m in row["messages"] if m["role"] == "system"]))
        group = open_groups.get(key)
        if group is None or len(group) == max_questions:
            open_groups[key] = group = []
            groups.append(group)
        group.append(number)
    first = dataset.select([group[0] for group in groups])
    messages = [[message for number in group for message in plain[number]["messages"]] for group in groups]
    names = [[row_id(plain[number], number) for number in group] for group in groups]
    columns = [name for name in ("messages", "id") if name in first.column_names]
    first = first.remove_columns(columns).add_column("messages", messages)
    return first.add_column("id", [" + ".join(group) for group in names])


__all__ = ["RowReport", "normalize_messages", "pack_rows", "prepare_rows"]
