"""Rows of a data set before they are trained on: what a row must have, and several questions about an image in one row.

A row is what TRL calls conversational: `messages`, `images` (or `image`), and perhaps an `id`.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import datasets
import fsspec
import numpy as np
from PIL import Image
from torch.utils.data import get_worker_info

from lladamedv.processing.medical_images import READING_OPTIONS
from lladamedv.processing.processing_lladamedv import as_dict


logger = logging.getLogger(__name__)
IMAGE_PLACEHOLDER = "<image>"
_ROLES = ("system", "user", "assistant")
# What may stand in messages and rows, and would change what is learned if it were read.
_NOT_READ_IN_MESSAGES = (
    "tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking", "weight", "loss", "train",
)  # fmt: skip
_NOT_READ_IN_ROWS = ("tools", "videos", "audios", "chat_template_kwargs")
# An image's place in a message says neither which image it is nor how to read it.
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", *(option.name for option in READING_OPTIONS))
_CHUNK = 256  # rows in memory at a time
_SHOWN = 5


class RowError(ValueError):
    """A row that cannot be trained on: the kind of reason, and what it is in this row."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        super().__init__(f"{reason}: {detail:.300}" if detail else reason)


@dataclass
class RowReport:
    """What became of the rows of a data set.

    Of a streamed data set it tells what was read so far, in the longest of its passes. It counts nothing where
    dataloader workers read the stream: that happens in other processes.

    Attributes:
        kept: number of rows to train on; `None` if nothing is counted.
        left_out: for each reason, how many rows it cost.
        rows: for each reason, the names of these rows: their numbers, from 0, and their ids.
        without_images: how many of the rows to train on have no image.
        packed_into: number of rows after packing, if questions were packed.
        held_out: how these rows were held out of the training data, if they were.
    """

    kept: int | None = 0
    left_out: Counter = field(default_factory=Counter)
    rows: dict[str, list[str]] = field(default_factory=dict)
    without_images: int = 0
    packed_into: int | None = None
    held_out: dict | None = None

    def add(self, reason: str, row_name: str) -> None:
        self.left_out[reason] += 1
        self.rows.setdefault(reason, []).append(row_name)

    def summary(self) -> str:
        if self.kept is None:
            return "rows are streamed to dataloader workers and not counted; what these leave out is logged"
        lines = [f"{self.kept} rows"]
        if 0 < self.without_images < self.kept:
            lines.append(f"{self.without_images} of them without an image")
        for reason, count in self.left_out.items():
            more = ", …" * (count > _SHOWN)
            lines.append(f"{count} left out, {reason}: {', '.join(self.rows[reason][:_SHOWN])}{more}")
        if self.packed_into is not None:
            lines.append(f"packed into {self.packed_into} rows")
        if self.held_out is not None:
            lines.append("held out by image, {share} of the rows, seed {seed}, {images} images".format(**self.held_out))
        return "; ".join(lines)


def normalize_messages(messages: list, num_images: int) -> list[dict]:
    """The messages with content parts, for the processor's `apply_chat_template`, which puts a turn's images first.

    `<image>` in a user's text is a placeholder, as in LLaVA's records, and is taken out of the text; anywhere else it
    is text. A conversation that names no image shows all it has at the beginning of its first user turn, as in TRL.

    Args:
        messages: dicts, or objects that Transformers takes for messages (dataclasses, pydantic's), with a `role` and a
            `content`: a text, or parts `{"type": "text", "text": …}` and `{"type": "image"}`.
        num_images: of the row.

    Raises:
        RowError: for messages of another form, and those that hold what would be ignored.
    """
    if not isinstance(messages, (list, tuple)):
        raise _unreadable(f"they are of type {type(messages).__name__}, not a list")
    normalized = []
    for number, message in enumerate(messages):
        message = as_dict(message)
        if not isinstance(message, dict):
            raise _unreadable(f"message {number} is of type {type(message).__name__}, not a dict")
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise _unreadable(f"message {number} has the role {role!r:.50}; allowed are {', '.join(_ROLES)}")
        ignored = [key for key in _NOT_READ_IN_MESSAGES if message.get(key) not in (None, [], "", 1)]
        if ignored:
            raise _unreadable(f"message {number} has `{ignored[0]}`, which is not trained on")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        elif not isinstance(content, (list, tuple)):
            raise _unreadable(f"the content of message {number} is {content!r:.50}; allowed are texts and lists")
        parts = []
        for part in content:
            part = as_dict(part)
            if not isinstance(part, dict):
                raise _unreadable(f"a part of message {number} is of type {type(part).__name__}, not a dict")
            kind, text = part.get("type"), part.get("text")
            if kind == "text" and isinstance(text, str):
                if role == "user" and IMAGE_PLACEHOLDER in text:
                    parts += [{"type": "image"} for _ in range(text.count(IMAGE_PLACEHOLDER))]
                    text = text.replace(IMAGE_PLACEHOLDER, "").strip()
                parts += [{"type": "text", "text": text}] * bool(text)
            elif kind == "image" and role == "user" and all(part.get(key) is None for key in _IMAGE_KEYS):
                parts.append({"type": "image"})
            else:
                held = [key for key in _IMAGE_KEYS if part.get(key) is not None]
                raise _unreadable(
                    f"message {number}, of role {role}, has a part of type {kind!r:.50}"
                    + (f" with `{held[0]}`" if held else "")
                    + "; allowed are texts, and in a user's turn images, which themselves are in the column `images`"
                )
        normalized.append({"role": role, "content": parts})
    if not count_placeholders(normalized):
        for message in normalized:
            if message["role"] == "user":
                message["content"] = [{"type": "image"} for _ in range(num_images)] + message["content"]
                break
    return normalized


def _unreadable(detail: str) -> RowError:
    return RowError("its messages cannot be read", detail)


def count_placeholders(messages: list[dict]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def images_of(row: dict) -> list:
    """The images of a row, however it names and holds them, each as the image processor takes it.

    Args:
        row: with `images`, a list of images, or `image`. An image is a path, the bytes of a file, what
            `datasets.Image(decode=False)` makes of these, a PIL image, an array or a tensor. Lists of numbers, which
            data sets make of arrays, are arrays again: 8-bit ones if all are whole numbers from 0 to 255.

    Raises:
        RowError: for an image that is missing or at a URL, or a row that has both `image` and `images`.
    """
    names = [name for name in ("image", "images") if not _is_nothing(row.get(name))]
    if not names:
        return []
    if len(names) > 1:
        raise RowError("it has both `image` and `images`")
    value = row[names[0]]
    depth, last = _depth(value)
    if names == ["images"] and depth == 3 and last in (3, 4):
        raise RowError("`images` is a single array", "put it into a list, or into `image`")
    is_list = isinstance(value, (list, tuple)) or depth > 0
    single = not is_list or depth == 2 or (depth == 3 and names == ["image"])
    return [_stored(image) for image in ([value] if single else value)]


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


def _stored(image):
    """An image of a row as the image processor takes it; nothing is decoded."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") else image.get("path")
    if image is None or (isinstance(image, (str, bytes)) and not image):
        raise RowError("an image is missing")
    if isinstance(image, str) and "://" in image and not image.startswith("data:"):
        if image.lower().startswith(("http:", "https:", "ftp:")):
            raise RowError("an image is a URL", f"{image}; download it, and name the file")
        with fsspec.open(image, "rb") as file:  # a member of an archive, say
            return file.read()
    if isinstance(image, (list, tuple)) and _depth(image)[0] in (2, 3):
        array = np.asarray(image)
        fits = np.issubdtype(array.dtype, np.integer) and array.min() >= 0 and array.max() <= 255
        return array.astype(np.uint8) if fits else array
    return image


def check_row(row: dict) -> None:
    """
    Raises:
        RowError: for a row that cannot be trained on, whatever its images hold.
    """
    if not row.get("messages"):
        raise RowError("no `messages`")
    for name in _NOT_READ_IN_ROWS:
        if row.get(name):
            raise RowError(f"it has `{name}`, which are not trained on")
    images = images_of(row)
    messages = normalize_messages(row["messages"], len(images))
    answers = [message for message in messages if message["role"] == "assistant"]
    told = [any(part["text"].strip() for part in answer["content"]) for answer in answers]
    if not any(told):
        raise RowError("no assistant turn")
    if not all(told):
        raise RowError("an assistant turn is empty")
    if answers[-1] is messages[0]:
        raise RowError("no turn before the answer")
    shown = count_placeholders(messages)
    if shown != len(images):
        raise RowError(f"{shown} {IMAGE_PLACEHOLDER} for {len(images)} images")


def row_id(row: dict, number: int) -> str:
    return str(row.get("id") if row.get("id") is not None else f"row {number}")


def _row_name(row: dict, number: int) -> str:
    worker = get_worker_info()
    reader = "" if worker is None or worker.num_workers == 1 else f" of dataloader worker {worker.id}"
    return f"row {number}{reader}" + (f" ({row['id']})" if row.get("id") is not None else "")


def image_key(image) -> str:
    """What tells images apart without decoding them: their path, or a digest of their bytes."""
    if isinstance(image, (str, Path)):
        return str(image)
    if isinstance(image, Image.Image):
        image = image.tobytes() + repr((image.size, image.mode)).encode()
    elif not isinstance(image, bytes):
        array = np.asarray(image)
        image = array.tobytes() + repr((array.shape, array.dtype)).encode()
    return hashlib.sha256(image).hexdigest()


def undecoded(dataset):
    """The data set with its rows as they are stored: no format, and images as paths or bytes where it knows which
    columns are images, so that one reader opens them all. Rows that a transform makes are left to it."""
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        return dataset
    dataset = dataset.with_format(None)
    for name, feature in (dataset.features or {}).items():
        if name == "image" and isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        if name in ("image", "images") and isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, type(feature)(datasets.Image(decode=False)))
    return dataset


def pixels_of(row: dict, open_image: Callable, seen: dict[str, tuple | Exception]) -> list[tuple[str, tuple[int, int]]]:
    """A digest of the pixels, and the size, of each image of a row, all of which are decoded in full.

    Args:
        open_image: makes an RGB `PIL.Image` of an image, as the image processor's `fetch_images` does.
        seen: what became of images that other rows hold, too.

    Raises:
        RowError: for an image that cannot be read.
    """
    pixels = []
    for image in images_of(row):
        key = image_key(image)
        if key not in seen:
            try:
                picture = open_image(image)
                digest = hashlib.sha256(picture.tobytes() + repr(picture.size).encode()).hexdigest()
                seen[key] = digest, picture.size
            except Exception as error:  # libraries raise many kinds for broken files
                seen[key] = error
        if isinstance(seen[key], Exception):
            raise RowError("an image cannot be read", " ".join(str(seen[key]).split()).rstrip("."))
        pixels.append(seen[key])
    return pixels


@lru_cache(maxsize=16)
def _blank(size: tuple[int, int]) -> Image.Image:
    """Stands for an image of which nothing but the size matters."""
    return Image.new("RGB", size)


def _in_parallel(function, dataset: datasets.Dataset, title: str, disable_tqdm: bool) -> Iterator[tuple]:
    """The number of each row, the row, and what `function` makes of it in one of several threads: decoding images,
    which is what takes long, needs no interpreter."""
    bar = datasets.utils.tqdm(total=len(dataset), desc=title, unit=" rows", disable=disable_tqdm or None)
    with bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(dataset), _CHUNK):
            columns = dataset[start : start + _CHUNK]
            rows = [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]
            for number, (row, result) in enumerate(zip(rows, pool.map(function, rows)), start):
                yield number, row, result
                bar.update()


def prepare_rows(
    dataset, length_of, open_image, max_length: int, invalid_rows: str, long_rows: str, name: str,
    counted: bool = True, disable_tqdm: bool = False,
):  # fmt: skip
    """Look at every row, and decode every image once, before anything is trained.

    Args:
        dataset: `datasets.Dataset`; of an `IterableDataset` the rows are looked at as they come.
        length_of: function from a row with undecoded images to its number of tokens.
        open_image: see [`pixels_of`].
        max_length: longest row.
        invalid_rows, long_rows: see [`MaskedDiffusionSFTConfig`].
        name: of the data set, for messages.
        counted: whether the rows of a stream are read in this process, and so can be counted.
        disable_tqdm: whether to show no progress bar; otherwise there is one in terminals.

    Returns:
        The data set without the rows that are left out, its images undecoded, and a [`RowReport`].

    Raises:
        ValueError: for a bad row, if that is what the options say, or if no row is left.
    """
    dataset = undecoded(dataset)
    streamed = isinstance(dataset, datasets.IterableDataset)
    report, read, seen = RowReport(None if streamed and not counted else 0), 0, {}

    def look_at(row) -> list | Exception:
        try:
            return pixels_of(row, open_image, {} if streamed else seen)
        except Exception as error:  # a stream's rows may hold anything
            return error

    def good(row, number, pixels) -> bool:
        nonlocal read
        option, value, problem = "invalid_rows", "skip", None
        try:
            check_row(row)
            if isinstance(pixels, Exception):
                raise pixels
            length = length_of({**row, "image": None, "images": [_blank(size) for _, size in pixels]})
        except RowError as error:
            problem = error
        except Exception as error:  # whatever it is, training would end with it
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            problem = RowError("it cannot be read", kind + " ".join(str(error).split()))
        else:
            if length > max_length:
                option, value, problem = "long_rows", "drop", RowError(f"more than {max_length} tokens", str(length))
        if problem is not None and (long_rows if option == "long_rows" else invalid_rows) != value:
            raise ValueError(
                f"`{name}` cannot be trained on: {_row_name(row, number)} has a problem: {problem}. Mend it, or leave "
                f"such rows out with {option}={value!r}."
            ) from problem
        if report.kept is not None and number >= read:  # not read before, by a look at the first rows or an epoch
            read = number + 1
            if problem is None:
                report.kept += 1
                report.without_images += not images_of(row)
            else:
                report.add(problem.reason, _row_name(row, number))
        if problem is not None:
            logger.warning("%s: %s left out, %s", name, _row_name(row, number), problem)
        return problem is None

    if streamed:
        dataset = dataset.filter(lambda row, number: good(row, number, look_at(row)), with_indices=True)
        if next(iter(dataset), None) is None:
            raise ValueError(f"`{name}` is a stream of which no row can be trained on: {report.summary()}.")
        return dataset, report
    looked_at = _in_parallel(look_at, dataset, f"Checking {name}", disable_tqdm)
    keep = [number for number, row, pixels in looked_at if good(row, number, pixels)]
    if not keep:
        raise ValueError(f"`{name}` has {len(dataset)} rows, of which none can be trained on: {report.summary()}.")
    return (dataset if len(keep) == len(dataset) else dataset.select(keep)), report


def split_by_image(
    dataset: datasets.Dataset, share: float, seed: int, open_image: Callable, disable_tqdm: bool = False
) -> tuple[datasets.Dataset, datasets.Dataset, list[int]]:
    """Hold rows out for evaluation, so that no picture is on both sides.

    Rows belong together if they show the same pixels, whatever the names or formats of their files, or if they have no
    image and the same messages. Pictures of one patient that differ are not recognised.

    Args:
        dataset: rows with `messages` and images.
        share: part of the rows to hold out, between 0 and 1; as near to it as groups, drawn at random, come.
        seed: of the draw.
        open_image: see [`pixels_of`].

    Returns:
        The rows to train on and those to evaluate on, in their order, and the number of different pictures in each.

    Raises:
        ValueError: for a streamed data set, or one whose rows all belong together.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError("`eval_split` needs to see the whole data set, and this one is streamed.")
    plain, seen, texts = undecoded(dataset), {}, set()

    def content_of(row) -> list[str]:
        try:
            pixels = [digest for digest, _ in pixels_of(row, open_image, seen)]
        except Exception:  # such rows are left to the check of all rows
            return []
        if not pixels:
            texts.add(repr(row["messages"]))
        return pixels or [repr(row["messages"])]

    groups: dict[str, set[str]] = {}  # of each picture: all that some row shows together with it, directly or not
    contents = [content for _, _, content in _in_parallel(content_of, plain, "Comparing images", disable_tqdm)]
    for content in contents:
        together = set(content).union(*(groups.get(each, ()) for each in content))
        groups.update(dict.fromkeys(together, together))
    members: dict[int, list[int]] = {}
    for number, content in enumerate(contents):
        if content:
            members.setdefault(id(groups[content[0]]), []).append(number)
    if len(members) < 2:
        raise ValueError(
            f"`eval_split` is {share}, but all rows show the same images; to hold some out, at least two images that "
            "no row shows together are needed."
        )
    held_out, wanted = [], share * len(plain)
    candidates = random.Random(seed).sample(list(members.values()), len(members) - 1)  # one is left to train on
    for group in candidates:
        if abs(len(held_out) + len(group) - wanted) < abs(len(held_out) - wanted):
            held_out += group
    held_out = set(held_out or min(candidates, key=len))
    sides = [[number for number in range(len(plain)) if (number in held_out) == side] for side in (False, True)]
    pictures = [len({each for number in side for each in contents[number]} - texts) for side in sides]
    return *(dataset.select(side) for side in sides), pictures


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
        turns = normalize_messages(row["messages"], len(images))
        roles = [turn["role"] for turn in turns if turn["role"] != "system"]
        if len(images) != 1 or roles != ["user", "assistant"]:
            raise ValueError(
                f"`pack_questions` is {max_questions}, but {row_id(row, number)} has {len(images)} images and "
                f"{roles.count('assistant')} answers; allowed are rows of one question about one image, and its answer."
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
