"""Records from files and tables, their image files, and what becomes of them: rows of a data set, and a report.

A missing image costs its own row and nothing else: it is counted and listed, never replaced by another.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, tee
from pathlib import Path, PurePosixPath
from typing import TextIO

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from datasets.fingerprint import Hasher

from .columns import Fields, InvalidRecordError, unwrapped


logger = logging.getLogger(__name__)
RECORD_SUFFIXES, PARQUET_SUFFIX = (".json", ".jsonl", ".csv", ".tsv"), ".parquet"
_LARGEST_MEMBER = 2**28  # bytes of an image in an archive: Pillow's largest picture, at 1.5 bytes a pixel
_ROWS, _IMAGE_ROWS = 5_000, 100  # that are Python objects at a time; with the bytes of their images
_SHOWN = 5
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
Records = Callable[[], Iterator[tuple[str, "dict | InvalidRecordError"]]]


class MissingImageError(InvalidRecordError):
    """A record whose image file is not there; the message is its name."""


# What became of the records


@dataclass
class LoadReport:
    """What becomes of the records of one source. With streaming it fills while rows are read, in the process that reads
    them; a record that is read again, in a later epoch, counts once.

    Args:
        source: the file, folder or Hub id.
        invalid_records: what to do with malformed records: stop (`"error"`) or leave them out (`"skip"`). A record
            whose image file is missing is always left out.

    Attributes:
        rows: how many records became rows.
        missing_images: `(id, image)` of each record that was left out because its image file is not there.
        invalid: `(id, reason)` of each record that was left out because it is malformed.

    Raises:
        ValueError: for a value of `invalid_records` that is not allowed.
    """

    source: str
    invalid_records: str = "error"
    rows: int = 0
    missing_images: list[tuple[str, str]] = field(default_factory=list)
    invalid: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self):
        if self.invalid_records not in ("error", "skip"):
            raise ValueError(f"`invalid_records` is {self.invalid_records!r}; allowed are 'error' and 'skip'.")
        self._read, self.number, self.is_new = 0, 0, True

    def __deepcopy__(self, memo) -> LoadReport:
        return self  # `datasets` copies what it streams from; the copy still reports here

    def begin(self, number: int) -> None:
        """Begin with a record, by its `number` in the source: `is_new` says whether it is to be counted."""
        self.number, self.is_new = number, number >= self._read
        self._read = max(self._read, number + 1)

    def leave_out(self, record_id: str, error: InvalidRecordError, where: str = "") -> None:
        """Note a record that becomes no row; `where` it is in the file.

        Raises:
            ValueError: if the record is malformed and such records stop everything.
        """
        missing = isinstance(error, MissingImageError)
        reason = one_line(f"no such image file as {error}" if missing else error)
        if not missing and self.invalid_records == "error":
            raise ValueError(
                f"{self.source!r} has an invalid record, {one_line(record_id)}{where}: {reason}. Correct it, or leave "
                "such records out with 'skip'."
            ) from None
        if not self.is_new:
            return
        (self.missing_images if missing else self.invalid).append((record_id, str(error)))
        if len(self.missing_images) + len(self.invalid) <= _SHOWN:
            logger.warning("%s: record %s left out, %s", self.source, one_line(record_id), reason)

    def summary(self) -> str:
        """One line: how many rows, how many left out, why, and the first few of those."""
        parts = [f"{self.source}: {self.rows} rows"]
        for name, left_out in (("missing images", self.missing_images), ("invalid records", self.invalid)):
            if left_out:
                texts = [f"{one_line(record)} ({one_line(reason)})" for record, reason in left_out]
                parts.append(f"{len(left_out)} {name}: {first_few(texts)}")
        return "; ".join(parts)


def one_line(text: object) -> str:
    """The beginning of a text, in one line."""
    return f"{' '.join(str(text).split()):.200}"


def first_few(texts: list[str]) -> str:
    return ", ".join(texts[:_SHOWN]) + ", …" * (len(texts) > _SHOWN)


# Image files


class ImageFiles:
    """Finds the image files that records name, in the first of some places that has them.

    Each folder is listed once: that is much quicker than asking for hundreds of thousands of files one by one. Names
    may lead out of a folder, but not out of an archive. Of an archive nothing is unpacked: `datasets` reads a member
    when its row is needed.

    Args:
        places: folders and zip archives that names are relative to. Names in an archive may leave out its folder imgs/.

    Raises (when a file is asked for):
        ValueError: for a file that is no zip archive.
    """

    def __init__(self, *places: str | Path):
        self.places = [os.path.abspath(os.path.expanduser(place)) for place in places]
        self._folders: dict[str, set[str]] = {}
        self._archives: dict[str, tuple[zipfile.ZipFile, Counter]] = {}
        self._intact: dict[tuple[str, str], bool] = {}

    def __reduce__(self):
        return type(self), tuple(self.places)  # a copy in another process, or a later run, looks again

    def find(self, name: str) -> str:
        """Where an image is: its full path, or `zip://MEMBER::ARCHIVE`; a URL is returned as it is.

        Raises:
            MissingImageError: if no place has it, or an archive has it damaged, encrypted, twice, as a link, packed in
                an unusual way, or with more than 268 MB.
        """
        if "://" in name:
            return name
        for place in self.places:
            if os.path.isfile(place):
                member = PurePosixPath(name)
                if member.is_absolute() or ".." in member.parts or "::" in name:
                    continue
                for path in (str(member), f"imgs/{member}"):
                    if self._is_intact(place, path):
                        return f"zip://{path}::{place}"
            elif self._is_file(path := os.path.normpath(os.path.join(place, name))):
                return path
        raise MissingImageError(name)

    def stored(self, image) -> dict:
        """An image of a record as `datasets.Image` holds it, `{"bytes", "path"}`.

        Args:
            image: the name of a file, a data URL, bytes, or a dictionary of `bytes` or `path`.

        Raises:
            InvalidRecordError: for other values; [`MissingImageError`] for an image that is not there.
        """
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, (bytes, bytearray)):
            return {"bytes": bytes(image), "path": None}
        if image is None or image == "":
            raise MissingImageError(str(image))
        if not isinstance(image, str):
            raise InvalidRecordError(f"`image` is of type {type(image).__name__}; allowed are names of files and bytes")
        return {"bytes": None, "path": image if image[:5].lower() == "data:" else self.find(image)}

    def _is_file(self, path: str) -> bool:
        folder, file = os.path.split(path)
        if folder not in self._folders:
            try:
                self._folders[folder] = {entry.name for entry in os.scandir(folder) if entry.is_file()}
            except (OSError, ValueError):  # ValueError: a null character
                self._folders[folder] = set()
        return file in self._folders[folder]

    def _is_intact(self, archive: str, member: str) -> bool:
        """Whether a member is there, once, is no link and no bomb, and has the checksum that the archive states."""
        if archive not in self._archives:
            try:
                opened = zipfile.ZipFile(archive)
            except (OSError, NotImplementedError, ValueError, zipfile.BadZipFile) as error:
                raise ValueError(f"{archive!r} cannot be read as a zip archive: {error}.") from error
            self._archives[archive] = opened, Counter(opened.namelist())
        (opened, counts), key = self._archives[archive], (archive, member)
        if key not in self._intact:
            try:
                info = opened.getinfo(member)
                self._intact[key] = (
                    info.file_size <= _LARGEST_MEMBER
                    and info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                    and not stat.S_ISLNK(info.external_attr >> 16)
                    and counts[member] == 1
                    and opened.read(info) is not None  # which checks it
                )
            except (KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
                self._intact[key] = False  # RuntimeError: encrypted
        return self._intact[key]


# Files of records


def read_records(path: str | Path, keep_invalid: bool = False) -> Iterator[tuple[str, dict]]:
    """The records of JSON lines or of a table of texts, one at a time, or of a JSON list, which is read whole.

    Args:
        path: file of one list of objects, or of one object a line; .csv or .tsv: of one record a row, below a row of
            names. What it says there is text, also "5", "None" and "NA"; an empty cell is `None`.
        keep_invalid: yield an [`InvalidRecordError`] instead of a record that alone cannot be read, and go on.

    Yields:
        Where a record is, "line 3" (in a table the one where it ends) or of a list "record 3", and the record.

    Raises:
        ValueError: if the file cannot be read, or is none of these, with the place where that shows; also for texts
            that are no Unicode (lone surrogates).
    """
    is_table = Path(path).suffix.lower() in (".csv", ".tsv")
    form = "CSV" if is_table else "JSON"
    if not os.path.isfile(path):  # reading a pipe or a device may never end
        raise ValueError(f"{str(path)!r} cannot be read as {form}: there is no such file, or it is no regular one.")
    try:
        with open(path, "rb") as file:
            encoding = json.detect_encoding(file.read(4)).replace("utf-8", "utf-8-sig").replace("-sig-sig", "-sig")
        with open(path, encoding=encoding, newline="" if is_table else None) as file:
            for place, record in _read_table(file, path) if is_table else _read_json(file):
                if isinstance(record, InvalidRecordError) and not keep_invalid:
                    raise record
                yield place, record
    except InvalidRecordError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not in UTF-8 ({error}); save it in that encoding.") from error
    except (OSError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} cannot be read as {form}: {error}") from error


def _read_table(file: TextIO, path: str | Path) -> Iterator[tuple[str, dict | InvalidRecordError]]:
    # Excel writes semicolons where the comma is the decimal mark, and tabs into "Unicode text".
    separator = max("\t,;" if str(path).lower().endswith(".tsv") else ",;\t", key=file.readline().count)
    file.seek(0)
    reader = csv.reader(file, delimiter=separator, strict=True)
    names = next(reader, [])
    if len(set(names)) < len(names):
        raise InvalidRecordError(f"it has the columns {names}, of which two have one name")
    for values in filter(None, reader):  # without empty lines
        record = {name: value or None for name, value in zip(names, values)}
        if len(values) != len(names):
            record = InvalidRecordError(
                f"it has {len(values)} cells at line {reader.line_num}, and {len(names)} columns: {names}; texts that "
                "hold the separator need quotation marks"
            )
        yield f"line {reader.line_num}", record


def _read_json(file: TextIO) -> Iterator[tuple[str, dict | InvalidRecordError]]:
    first = next((each for each in iter(lambda: file.read(1), "") if not each.isspace()), "")
    file.seek(0)
    for place, record, escaped in _read_list(file.read()) if first == "[" else _read_lines(file):
        if not isinstance(record, (dict, InvalidRecordError)):
            raise InvalidRecordError(f"it has a {type(record).__name__} at {place}; {_ALLOWED}")
        try:
            if escaped and isinstance(record, dict):
                json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can spell what no file can hold
            record = InvalidRecordError(f"it has a lone surrogate, which is no character, at {place}")
        yield place, record


def _read_list(text: str) -> Iterator[tuple[str, object, bool]]:
    """The place of each record, the record, and whether the text spells surrogates."""
    escaped = _SURROGATE.search(text) is not None
    for number, record in enumerate(_loads(text), 1):
        yield f"record {number}", record, escaped


def _read_lines(file: TextIO) -> Iterator[tuple[str, object, bool]]:
    """As [`_read_list`]."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = _loads(line, number)
        except InvalidRecordError as error:
            record = error
            if number == 1:
                line += file.read()
                try:  # one object over several lines
                    record = _loads(line)
                except InvalidRecordError:
                    raise error from None
        yield f"line {number}", record, _SURROGATE.search(line) is not None


_ALLOWED = "allowed are a list of objects, or one object a line"


def _loads(text: str, line: int = 1):
    """The JSON value of a text that begins at a line.

    Raises:
        InvalidRecordError: if it is none.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, reason = line + error.lineno - 1, error.msg
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # a number of too many digits
        reason = one_line(error)
    raise InvalidRecordError(f"it is no JSON at line {line}: {reason}; {_ALLOWED}")


def _records_in(path: Path, keep_invalid: bool, with_splits: bool) -> Iterator[tuple[str, dict]]:
    for place, record in read_records(path, keep_invalid):
        for each in [record] if isinstance(record, Exception) else unwrapped(record, with_splits):
            yield f" at {place}", each


# Sources


def open_records(
    path: str,
    split: str,
    called: str,
    *,
    image_folder: str | Path | None = None,
    streaming: bool = False,
    keep_invalid: bool = False,
    with_splits: bool = False,
    name: str | None = None,
    revision: str | None = None,
) -> tuple[Records | Dataset | IterableDataset, ImageFiles, dict]:
    """The records of a file, of a split of a folder or of a data set of the Hub, as [`load_rows`] takes them.

    Args:
        path: a file of records ([`read_records`]) or a .parquet file, whose `split` does not matter; a folder with
            such a file for the split, or with other data files, or one that `save_to_disk` wrote; or a Hub id.
        called: how errors begin, as in "`path` is 'x'".
        image_folder: folder or zip archive with the images; by default the folder of the records, and imgs/ and
            images/, or their zip archives, in it.
        keep_invalid, with_splits: see [`read_records`] and [`unwrapped`].
        split, name, revision, streaming: as for `datasets.load_dataset`.

    Returns:
        The records, where their images are looked for, and the first record that can be read.

    Raises:
        ValueError: if they cannot be opened, with the reason, or if there are none.
    """
    path = os.path.expanduser(path)
    folder, is_folder = Path(path), os.path.isdir(path)
    if image_folder is None:
        beside = folder if is_folder else folder.parent
        names = ("", "imgs", "imgs.zip", "images", "images.zip")
        # None for a data set of the Hub: names in it must not lead to the user's files.
        places = [beside / each for each in names if os.path.exists(path) and os.path.exists(beside / each)]
    elif os.path.exists(os.path.expanduser(image_folder)):
        places = [image_folder]
    else:
        raise ValueError(f"`image_folder` is {str(image_folder)!r}; no such folder or zip archive.")
    files = [folder / f"{split}{suffix}" for suffix in RECORD_SUFFIXES] if is_folder else [folder]
    file = next((each for each in files if each.suffix.lower() in RECORD_SUFFIXES and os.path.isfile(each)), None)
    if file is not None:
        records = partial(_records_in, file, keep_invalid, with_splits)
        reading, ahead = tee(records())
        first = next((record for _, record in ahead if isinstance(record, dict)), None)
        if not streaming:  # they are read once, and a list is parsed whole
            records = partial(iter, reading)
    else:
        try:
            records = undecoded(_open_table(path, split, name, revision, streaming))
        except Exception as error:  # `datasets` raises many kinds, of which the cause says where a table is broken
            raise ValueError(f"{called}, of which {split} cannot be loaded: {error.__cause__ or error}.") from error
        first = next(iter(records), None)
    if first is None:
        raise ValueError(f"{called}, which has no records.")
    return records, ImageFiles(*places), first


def _open_table(path: str, split: str, name: str | None, revision: str | None, streaming: bool):
    options = {"split": split, "streaming": streaming}
    if os.path.isfile(path):
        if not path.lower().endswith(PARQUET_SUFFIX):
            raise ValueError(f"a file whose name ends on none of {(*RECORD_SUFFIXES, PARQUET_SUFFIX)}")
        return datasets.load_dataset("parquet", data_files=path, **{**options, "split": "train"})
    if any(os.path.isfile(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json")):
        table = datasets.load_from_disk(path)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"`split` is {split!r}; allowed are {sorted(table)}")
            table = table[split]
        table = table.with_format(None)  # it was saved with one, as of PyTorch or of some columns alone
        return table.to_iterable_dataset() if streaming else table
    if os.path.isdir(path):
        return datasets.load_dataset(path, name, **options)
    if path.startswith(("/", ".")) or path.lower().endswith((*RECORD_SUFFIXES, PARQUET_SUFFIX)):
        raise ValueError(
            "no such file or folder; allowed are a Hub id, a folder, and a file, "
            f"{', '.join((*RECORD_SUFFIXES, PARQUET_SUFFIX))}"
        )
    return datasets.load_dataset(path, name, revision=revision, **options)


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The data set with its rows as they are stored: without a format, and images as bytes or paths, so that one reader
    opens them all. Rows that a transform makes are left to it."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset
    dataset = dataset.with_format(None)
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(name, type(feature)(Image(decode=False)))
    return dataset


def embedded(dataset: Dataset, cache_file: str | Path) -> Dataset:
    """The data set with the files of its images in it, kept in `cache_file`."""
    embed = datasets.table.embed_table_storage
    table = dataset.with_format("arrow").map(embed, batched=True, batch_size=100, cache_file_name=str(cache_file))
    return table.with_format(None)


def _as_meant(value, feature):
    """The name of a class where a table stores its number, or -1 for none; 5.6 where float32 stores 5.599999904…"""
    if isinstance(value, list):
        return [_as_meant(each, getattr(feature, "feature", None)) for each in value]
    if isinstance(feature, ClassLabel):
        return None if value in (None, -1) else feature.int2str(value)
    if isinstance(value, float) and getattr(feature, "dtype", None) in ("float16", "float32"):
        return float(str(np.dtype(feature.dtype).type(value)))
    return value


# Rows


@dataclass
class RowMaker:
    """Makes rows of records and reports what became of them.

    Args:
        convert: makes rows of the fields of a record and what the record is called.
        report: is kept up to date, and decides about records that cannot become rows.
        name: what records without an id are called: this and their number.
    """

    convert: Callable[[Fields, str], list[dict]]
    report: LoadReport
    name: str

    def __call__(self, number: int, record: dict | InvalidRecordError, where: str = "") -> list[dict]:
        self.report.begin(number)
        name = f"{self.name}/{number}"
        try:
            if isinstance(record, InvalidRecordError):
                raise record
            fields = Fields(record)
            name = fields.id(name)
            rows = self.convert(fields, name)
        except InvalidRecordError as error:
            self.report.leave_out(name, error, where)
            return []
        self.report.rows += self.report.is_new * len(rows)
        return rows

    def generate(self, records: Records) -> Iterator[dict]:
        for number, (where, record) in enumerate(records()):
            yield from self(number, record, where)

    def batch(self, batch: dict[str, list], numbers: list[int], features: Features, columns: Features) -> dict:
        records = (
            {name: _as_meant(value, features.get(name)) for name, value in zip(batch, values)}
            for values in zip(*batch.values())
        )
        rows = [row for number, record in zip(numbers, records) for row in self(number, record)]
        return {name: [row[name] for row in rows] for name in columns}


def load_rows(
    records: Records | Dataset | IterableDataset, maker: RowMaker, features: Features, streaming: bool
) -> Dataset | IterableDataset:
    """The rows that records become, as a data set: read now, or with `streaming` when needed. Nothing of an earlier run
    is taken from a cache: its report would be empty, and image files may be there or gone since.

    Args:
        records: a table, or a function that returns an iterator over where in a file a record is, and the record.
        features: of the rows.
    """
    if isinstance(records, (Dataset, IterableDataset)):
        options = {
            "batched": True, "batch_size": _IMAGE_ROWS, "with_indices": True,
            "remove_columns": list(records.features or next(iter(records), {})),
            "fn_kwargs": {"features": records.features or {}, "columns": features},
        }  # fmt: skip
        if isinstance(records, Dataset):
            # Not beside the table, which may be the user's, and read-only.
            file = Path(datasets.config.HF_DATASETS_CACHE, "lladamedv", f"{Hasher.hash(maker)}.arrow")
            file.parent.mkdir(parents=True, exist_ok=True)
            options |= {"load_from_cache_file": False, "cache_file_name": str(file)}
            return records.map(maker.batch, features=features, **options)
        return records.map(maker.batch, **options).cast(features)  # `features` of `map` would leave images undecoded
    rows = partial(maker.generate, records)
    if streaming:
        return IterableDataset.from_generator(rows, features)
    iterator, chunks = rows(), [Dataset.from_dict({name: [] for name in features}, features)]
    while chunk := list(islice(iterator, _ROWS)):
        chunks.append(Dataset.from_list(chunk, features))
    return datasets.concatenate_datasets(chunks)
