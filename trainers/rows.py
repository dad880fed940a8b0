"""Rows before training: each is checked, some are held out by image, questions about one image are packed.

A row is what TRL calls conversational: `messages`, `images` (or `image`), and perhaps an `id`.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Sampler, get_worker_info

from lladamedv.processing.datasets import InvalidRecordError
from lladamedv.processing.datasets.messages import images_of, normalize_messages
from lladamedv.processing.datasets.readers import first_few, one_line, undecoded


logger = logging.getLogger(__name__)
_CHUNK = 256  # rows in memory at a time


@dataclass
class RowReport:
    """What became of the rows of a data set.

    Of a streamed data set it counts what was read so far, in the longest of its passes; nothing is counted where
    dataloader workers read the stream, in other processes.

    Attributes:
        kept, without_images: number of rows to train on, and of those of them without an image; `kept` is `None` if
            nothing is counted.
        left_out, rows: for each reason, how many rows it cost, and their names: their numbers, from 0, and their ids.
        packed_into: number of rows after packing, if questions were packed.
        held_out: how these rows were held out of the training data, if they were.
    """

    kept: int | None = 0
    left_out: Counter = field(default_factory=Counter)
    rows: dict[str, list[str]] = field(default_factory=dict)
    without_images: int = 0
    packed_into: int | None = None
    held_out: dict | None = None

    def summary(self) -> str:
        if self.kept is None:
            return "rows are streamed to dataloader workers and not counted; what these leave out is logged"
        lines = [f"{self.kept} rows"]
        if 0 < self.without_images < self.kept:
            lines.append(f"{self.without_images} of them without an image")
        for reason, count in self.left_out.items():
            lines.append(f"{count} left out, {reason}: {first_few(self.rows[reason])}")
        if self.packed_into is not None:
            lines.append(f"packed into {self.packed_into} rows")
        if self.held_out is not None:
            lines.append("held out by image, {share} of the rows, seed {seed}, {images} images".format(**self.held_out))
        return "; ".join(lines)


# Images


def image_key(image) -> str:
    """The same for the same image, which is not decoded: its path, or a digest of its bytes."""
    if isinstance(image, (str, Path)):
        return str(image)
    if isinstance(image, Image.Image):
        image = image.tobytes() + repr((image.size, image.mode)).encode()
    elif not isinstance(image, bytes):
        array = np.asarray(image)
        image = array.tobytes() + repr((array.shape, array.dtype)).encode()
    return hashlib.sha256(image).hexdigest()


def pixels_of(row: dict, open_image: Callable, seen: dict[str, tuple | Exception]) -> list[tuple[str, tuple[int, int]]]:
    """A digest of the pixels, and the size, of each image of a row, all of which are decoded in full.

    Args:
        open_image: makes an RGB `PIL.Image` of an image, as the image processor's `fetch_images` does.
        seen: what became of images that other rows hold, too.

    Raises:
        InvalidRecordError: for an image that cannot be read.
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
            raise InvalidRecordError("an image cannot be read", one_line(seen[key]).rstrip("."))
        pixels.append(seen[key])
    return pixels


@lru_cache(maxsize=16)
def _blank(size: tuple[int, int]) -> Image.Image:
    """A black image in place of one of which only the size matters."""
    return Image.new("RGB", size)


def _in_parallel(function, dataset: datasets.Dataset, title: str, disable_tqdm: bool) -> Iterator[tuple]:
    """The number of each row, the row, and what `function` makes of it in one of several threads: decoding images,
    which is what takes long, needs no interpreter."""
    bar = datasets.utils.tqdm(total=len(dataset), desc=title, unit=" rows", disable=disable_tqdm or None)
    with bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(dataset), _CHUNK):
            rows = list(dataset.select(range(start, min(start + _CHUNK, len(dataset)))))
            for number, (row, result) in enumerate(zip(rows, pool.map(function, rows)), start):
                yield number, row, result
                bar.update()


# Every row


def prepare_rows(dataset, name: str, collator, args):
    """Check every row, and decode every image once, before training starts.

    Args:
        dataset: `datasets.Dataset`; of an `IterableDataset` the rows are checked as they come, and counted if they
            are read in this process.
        name: of the data set, for messages.
        collator, args: of the trainer.

    Returns:
        The data set without the rows that are left out, its images undecoded, and a [`RowReport`].

    Raises:
        ValueError: for a bad row, if that is what the options say, or if no row is left.
    """
    dataset, open_image = undecoded(dataset), collator.processor.image_processor.fetch_images
    streamed, seen = isinstance(dataset, datasets.IterableDataset), {}
    report = RowReport(None if streamed and args.dataloader_num_workers else 0)
    alone = replace(collator, packed=False)  # rows are checked before they are packed
    check = _RowCheck(name, alone.row_length, collator.max_length, args, report)

    def look_at(row) -> list | Exception:
        try:
            return pixels_of(row, open_image, {} if streamed else seen)
        except Exception as error:  # a stream's rows may hold anything
            return error

    if streamed:
        dataset = dataset.filter(lambda row, number: check(row, number, look_at(row)), with_indices=True)
        if next(iter(dataset), None) is None:
            raise ValueError(f"`{name}` is a stream of which no row can be trained on: {report.summary()}.")
        return dataset, report
    looked_at = _in_parallel(look_at, dataset, f"Checking {name}", args.disable_tqdm)
    keep = [number for number, row, pixels in looked_at if check(row, number, pixels)]
    if not keep:
        raise ValueError(f"`{name}` has {len(dataset)} rows, of which none can be trained on: {report.summary()}.")
    return (dataset if len(keep) == len(dataset) else dataset.select(keep)), report


@dataclass
class _RowCheck:
    """Whether a row is trained on; the report is kept up to date."""

    name: str
    length_of: Callable
    max_length: int
    args: object
    report: RowReport
    num_read: int = 0  # a look at the first rows, or another epoch, counts nothing twice

    def __call__(self, row: dict, number: int, pixels: list | Exception) -> bool:
        problem, option, value = self._problem(row, pixels)
        named = _row_name(row, number)
        if problem is not None and getattr(self.args, option) != value:
            raise ValueError(
                f"`{self.name}` cannot be trained on: {named} has a problem: {problem}. Correct it, or leave such "
                f"rows out with {option}={value!r}."
            ) from problem
        report = self.report
        if report.kept is not None and number >= self.num_read:
            self.num_read = number + 1
            if problem is None:
                report.kept += 1
                report.without_images += not pixels
            else:
                report.left_out[problem.reason] += 1
                report.rows.setdefault(problem.reason, []).append(named)
        if problem is not None:
            logger.warning("%s: %s left out, %s", self.name, named, problem)
        return problem is None

    def _problem(self, row: dict, pixels: list | Exception) -> tuple[InvalidRecordError | None, str, str]:
        """What is wrong with a row, and the option that leaves such rows out, with its value."""
        problem = None
        try:
            if isinstance(pixels, Exception):
                raise pixels
            length = self.length_of({**row, "image": None, "images": [_blank(size) for _, size in pixels]})
            if length > self.max_length:
                return InvalidRecordError(f"more than {self.max_length} tokens", str(length)), "long_rows", "drop"
        except InvalidRecordError as error:
            problem = error
        except Exception as error:  # whatever it is, training would end with it
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            problem = InvalidRecordError("it cannot be read", kind + one_line(error))
        return problem, "invalid_rows", "skip"


def _row_name(row: dict, number: int) -> str:
    worker = get_worker_info()
    reader = "" if worker is None or worker.num_workers == 1 else f" of dataloader worker {worker.id}"
    return f"row {number}{reader}" + (f" ({row['id']})" if row.get("id") is not None else "")


# Rows together


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
        ValueError: if all rows belong together.
    """
    plain, seen = undecoded(dataset), {}

    def content_of(row) -> list[str]:
        try:
            return [digest for digest, _ in pixels_of(row, open_image, seen)] or [f"text {row['messages']!r}"]
        except Exception:  # such rows are left to the check of all rows
            return []

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
            f"--eval_split is {share}, but all rows show the same images; to hold some out, at least two images that "
            "no row shows together are needed."
        )
    held_out, wanted = [], share * len(plain)
    candidates = random.Random(seed).sample(list(members.values()), len(members) - 1)  # one is left to train on
    for group in candidates:
        if abs(len(held_out) + len(group) - wanted) < abs(len(held_out) - wanted):
            held_out += group
    held_out = set(held_out or min(candidates, key=len))
    sides = [[number for number in range(len(plain)) if (number in held_out) == side] for side in (False, True)]
    shown = ({each for number in side for each in contents[number]} for side in sides)
    pictures = [sum(not each.startswith("text ") for each in contents) for contents in shown]
    return *(dataset.select(side) for side in sides), pictures


def pack_rows(dataset: datasets.Dataset, max_questions: int) -> datasets.Dataset:
    """Rows of one question each as rows of up to `max_questions` about the same image, in the order of their first.

    Raises:
        ValueError: for a row with more or less than one image or one answer, or a streamed data set.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError("`pack_questions` needs to see the whole data set, and this one is streamed.")
    open_groups, groups = {}, []  # a row of a group: its number, name and messages
    for number, row in enumerate(undecoded(dataset)):
        images, name = images_of(row), str(row["id"] if row.get("id") is not None else f"row {number}")
        messages = normalize_messages(row["messages"], len(images))
        roles = [turn["role"] for turn in messages if turn["role"] != "system"]
        if len(images) != 1 or roles != ["user", "assistant"]:
            raise ValueError(
                f"`pack_questions` is {max_questions}, but {name} has {len(images)} images and "
                f"{roles.count('assistant')} answers; allowed are rows of one question about one image, and its answer."
            )
        key = (image_key(images[0]), str([turn["content"] for turn in messages if turn["role"] == "system"]))
        group = open_groups.get(key)
        if group is None or len(group) == max_questions:
            open_groups[key] = group = []
            groups.append(group)
        if group:  # the row shows its image once, at its beginning
            for turn in messages:
                turn["content"] = [part for part in turn["content"] if part["type"] != "image"]
        group.append((number, name, messages))
    packed = dataset.select([group[0][0] for group in groups])
    packed = packed.remove_columns([name for name in ("messages", "id") if name in packed.column_names])
    packed = packed.add_column("messages", [[turn for _, _, turns in group for turn in turns] for group in groups])
    return packed.add_column("id", [" + ".join(name for _, name, _ in group) for group in groups])


class RepeatedSampler(Sampler):
    """Numbers of rows in an order of each epoch's own; every whole batch comes several times, as in TRL's
    `RepeatSampler`, whose order does not go on in a run that is resumed. Rows that fill no whole batch are left out.

    Args:
        size, batch: numbers of rows, in all and of a whole batch.
        times: how often a batch comes.
        seed: of the order.
    """

    def __init__(self, size: int, batch: int, times: int, seed: int):
        if size < batch:
            raise ValueError(f"`train_dataset` has {size} rows, but a step of `num_iterations` needs {batch} prompts.")
        self.size, self.batch, self.times, self.seed, self.epoch = size, batch, times, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self):
        return self.size // self.batch * self.batch * self.times

    def __iter__(self):
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        for start in range(0, self.size - self.batch + 1, self.batch):
            for _ in range(self.times):
                yield from order[start : start + self.batch]


__all__ = ["RepeatedSampler", "RowReport", "pack_rows", "prepare_rows", "split_by_image"]
