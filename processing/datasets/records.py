"""What all loaders need: files read record by record, tables opened, image files that may be missing, and a report.

LLaVA-Med's files have up to 358 MB and name images of which many can no longer be downloaded. So a file is never held
in memory as a whole, a syntax error is named by its line, and a missing image costs its own row and nothing else: it is
counted and listed, never replaced by another.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TextIO

import datasets
from datasets import Dataset, Features, IterableDataset


logger = logging.getLogger(__name__)
JSON_SUFFIXES = (".json", ".jsonl")
RECORD_SUFFIXES, PARQUET_SUFFIX = (*JSON_SUFFIXES, ".csv", ".tsv"), ".parquet"
_CHUNK = 2**20  # characters
_LONGEST = 2**26  # characters of a record: a file is not read to its end for one that does not end
_LARGEST_MEMBER = 2**28  # bytes of an image in an archive: Pillow's largest picture, at 1.5 bytes a pixel
_ROWS = 5_000  # that are Python objects at a time
_SHOWN = 5


class InvalidRecordError(ValueError):
    """A record that cannot become a row; the message says why, but not which record it is."""


class MissingImageError(InvalidRecordError):
    """A record whose image file is not there; the message is its name."""


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
        self._read, self._is_new = 0, True

    def __deepcopy__(self, memo) -> LoadReport:
        return self  # `datasets` copies what it streams from; the copy still reports here

    def begin(self, number: int) -> bool:
        """Begin with a record of the source, by its number: whether it is new, and so is to be counted."""
        self._is_new = number >= self._read
        self._read = max(self._read, number + 1)
        return self._is_new

    def leave_out(self, record_id: str, error: InvalidRecordError, where: str = "") -> None:
        """Note a record that becomes no row; `where` it is in the file.

        Raises:
            ValueError: if the record is malformed and such records are to stop everything.
        """
        missing = isinstance(error, MissingImageError)
        reason = _one_line(f"no such image file as {error}" if missing else str(error))
        if not missing and self.invalid_records == "error":
            raise ValueError(
                f"{self.source!r} has an invalid record, {_one_line(record_id)}{where}: {reason}. Mend it, or leave "
                "such records out with 'skip'."
            ) from None
        if not self._is_new:
            return
        (self.missing_images if missing else self.invalid).append((record_id, str(error)))
        if len(self.missing_images) + len(self.invalid) <= _SHOWN:
            logger.warning("%s: record %s left out, %s", self.source, _one_line(record_id), reason)

    def summary(self) -> str:
        """One line: how many rows, how many left out, why, and the first few of those."""
        parts = [f"{self.source}: {self.rows} rows"]
        for name, left_out in (("missing images", self.missing_images), ("invalid records", self.invalid)):
            if left_out:
                shown = ", ".join(f"{_one_line(record)} ({_one_line(reason)})" for record, reason in left_out[:_SHOWN])
                parts.append(f"{len(left_out)} {name}: {shown}" + (", …" if len(left_out) > _SHOWN else ""))
        return "; ".join(parts)


def _one_line(text: str) -> str:
    """What a file says, short enough for a message."""
    return f"{' '.join(text.split()):.200}"


class ImageFiles:
    """Finds the image files that records name. Each folder is listed once, which is much quicker than asking for
    hundreds of thousands of files one by one.

    Names may lead out of the folder, absolute ones and those with `..`: who reads records of others lets them name any
    picture that can be read here.

    Args:
        folder: what the names are relative to.
    """

    def __init__(self, folder: str | Path):
        self.folder = os.path.abspath(os.path.expanduser(folder))
        self._listed: dict[str, set[str]] = {}

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "_listed": {}}  # a copy in another process, or a later run, looks anew

    def find(self, name: str) -> str:
        """The full path of an image; a URL is returned as it is.

        Raises:
            MissingImageError: if there is no such file.
        """
        if "://" in name:
            return name
        path = os.path.normpath(os.path.join(self.folder, name))
        parent, file = os.path.split(path)
        if parent not in self._listed:
            try:
                self._listed[parent] = {entry.name for entry in os.scandir(parent) if entry.is_file()}
            except (OSError, ValueError):  # ValueError: a null character
                self._listed[parent] = set()
        if file not in self._listed[parent]:
            raise MissingImageError(name)
        return path


class ZippedImages:
    """Finds the image files that records name in a zip archive, of which nothing is unpacked: `datasets` reads a member
    when its row is needed.

    Args:
        path: the archive.
        prefix: folder of the archive that names may leave out.

    Raises (when a file is asked for):
        ValueError: if `path` is no zip archive.
    """

    def __init__(self, path: str | Path, prefix: str = "imgs"):
        self.path, self.prefix = os.path.abspath(os.path.expanduser(path)), prefix
        self._archive: zipfile.ZipFile | None = None
        self._names: Counter[str] = Counter()
        self._intact: dict[str, bool] = {}

    def __getstate__(self) -> dict:
        return {"path": self.path, "prefix": self.prefix, "_archive": None, "_names": Counter(), "_intact": {}}

    def find(self, name: str) -> str:
        """The address of an image, `zip://MEMBER::ARCHIVE`, which `datasets.Image` can decode.

        Raises:
            MissingImageError: if there is no such member or several, it is damaged, encrypted, a link, or unpacked of
                more than 268 MB or packed in an unusual way, or the name leads out of the archive.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "::" in name:
            raise MissingImageError(name)
        for member in (str(path), f"{self.prefix}/{path}"):
            if self._is_intact(member):
                return f"zip://{member}::{self.path}"
        raise MissingImageError(name)

    def _is_intact(self, member: str) -> bool:
        """Whether a member is there, once, is no link and no bomb, and has the checksum that the archive states."""
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (OSError, NotImplementedError, ValueError, zipfile.BadZipFile) as error:
                raise ValueError(f"{self.path!r} cannot be read as a zip archive: {error}.") from error
            self._names.update(self._archive.namelist())
        if member not in self._intact:
            try:
                info = self._archive.getinfo(member)
                self._intact[member] = self._names[member] == 1 and _is_plain(info)
                if self._intact[member]:
                    with self._archive.open(info) as file:
                        while file.read(_CHUNK):
                            pass
            except (KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
                self._intact[member] = False  # RuntimeError: encrypted
        return self._intact[member]


def _is_plain(member: zipfile.ZipInfo) -> bool:
    """Whether a member is a file, packed as usual, that memory can hold: no more is ever unpacked than is stated."""
    return (
        member.file_size <= _LARGEST_MEMBER
        and member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        and not stat.S_ISLNK(member.external_attr >> 16)
    )


def read_records(path: str | Path, keep_invalid: bool = False) -> Iterator[tuple[int, dict]]:
    """The records of a JSON list, of JSON lines, or of a table of texts, one at a time.

    Args:
        path: file of one list of objects, or of one object a line; .csv or .tsv: of one record a row, below a row of
            names. What it says there is text, also "5", "None" and "NA"; an empty cell is `None`.
        keep_invalid: yield an [`InvalidRecordError`] instead of a line that alone cannot be read, and go on.

    Yields:
        The line on which a record begins (in a table: ends), from 1, and the record.

    Raises:
        ValueError: if the file cannot be read, or is none of these, with the line where that shows; for records of
            more than 64 million characters, and texts that are no Unicode (lone surrogates).
    """
    suffix = Path(path).suffix.lower()
    form = "CSV" if suffix in (".csv", ".tsv") else "JSON"
    if not os.path.isfile(path):  # reading a pipe or a device may never end
        raise ValueError(f"{str(path)!r} cannot be read as {form}: there is no such file, or it is no regular one.")
    try:
        with open(path, "rb") as file:
            encoding = json.detect_encoding(file.read(4)).replace("utf-8", "utf-8-sig").replace("-sig-sig", "-sig")
        if form == "CSV":
            with open(path, encoding=encoding, newline="") as file:
                # Excel writes semicolons where the comma is the decimal mark, and tabs into "Unicode text".
                separator = max("\t,;" if suffix == ".tsv" else ",;\t", key=file.readline().count)
                file.seek(0)
                yield from _read_table(csv.reader(file, delimiter=separator, strict=True), path, keep_invalid)
            return
        with open(path, encoding=encoding) as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            yield from _read_list(file, path) if first == "[" else _read_lines(file, path, keep_invalid)
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not in UTF-8 ({error}); save it anew in that encoding.") from error
    except (OSError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} cannot be read as {form}: {error}") from error


def _read_table(reader, path, keep_invalid: bool) -> Iterator[tuple[int, dict]]:
    names = next(reader, [])
    if len(set(names)) < len(names):
        raise ValueError(f"{str(path)!r} has the columns {names}, of which two have one name.")
    for values in filter(None, reader):  # without empty lines
        if len(values) != len(names):
            problem = (
                f"{len(values)} cells at line {reader.line_num}, and {len(names)} columns: {names}. Texts that hold "
                "the separator need quotation marks."
            )
            if not keep_invalid:
                raise ValueError(f"{str(path)!r} has {problem}")
            yield reader.line_num, InvalidRecordError(f"it has {problem}")
            continue
        yield reader.line_num, {name: value or None for name, value in zip(names, values)}


def _read_lines(file: TextIO, path, keep_invalid: bool) -> Iterator[tuple[int, dict]]:
    number = 0
    while line := file.readline(_LONGEST + 1):
        number += 1
        if len(line) > _LONGEST:
            raise _no_json(path, number, f"more than {_LONGEST} characters")
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                form = "; allowed are a list of objects, or one object a line" if number == 1 else ""
                problem = _no_json(path, number, _reason(error) + form)
                try:  # one object over several lines
                    record = json.loads(line + file.read(_LONGEST)) if number == 1 else None
                except (ValueError, RecursionError):
                    record = None
                if record is None and number > 1 and keep_invalid:
                    yield number, InvalidRecordError(f"it is no JSON, {_reason(error)}")
                    continue
                if record is None:
                    raise problem from None
            yield number, _as_object(record, line, path, number)


def _read_list(file: TextIO, path) -> Iterator[tuple[int, dict]]:
    """The objects of a list, of which no more is in memory than the current one and what was read beyond it."""
    text, place, line, ended = "", 0, 1, False

    def skip(characters: str) -> str:
        """Move on to the next character that is none of these and return it, or "" at the end of the file."""
        nonlocal text, place, line, ended
        while True:
            while place < len(text) and text[place] in characters:
                line += text[place] == "\n"
                place += 1
            if place < len(text) or ended:
                return text[place : place + 1]
            text, place = file.read(_CHUNK), 0
            ended = not text

    skip(" \t\r\n\ufeff")
    place += 1  # the opening bracket
    decoder, separator = json.JSONDecoder(), ""
    while (character := skip(" \t\r\n")) != "]":
        if separator:
            if character != ",":
                raise _no_json(path, line, "expected ',' or ']'")
            place += 1
            skip(" \t\r\n")
        separator = ","
        while True:
            try:
                record, end = decoder.raw_decode(text, place)
                break
            except json.JSONDecodeError as error:
                if len(text) - place > _LONGEST:
                    raise _no_json(path, line, f"more than {_LONGEST} characters without an end") from None
                # Perhaps only the end of the object is not read yet. Reading as much again each time keeps this linear.
                more = file.read(max(_CHUNK, len(text) - place))
                if not more:
                    raise _no_json(path, line + text.count("\n", place, error.pos), error.msg) from None
                text, place = text[place:] + more, 0
            except (ValueError, RecursionError) as error:
                raise _no_json(path, line, _reason(error)) from None
        begins = line
        line += text.count("\n", place, end)
        source, place = text[place:end], end
        yield begins, _as_object(record, source, path, begins)
    place += 1
    if skip(" \t\r\n"):
        raise _no_json(path, line, "more follows after the list")


def _no_json(path, line: int, reason: str) -> ValueError:
    return ValueError(f"{str(path)!r} is no JSON at line {line}: {reason}.")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _as_object(record, source: str, path, line: int) -> dict:
    if not isinstance(record, dict):
        raise ValueError(
            f"{str(path)!r} has a {type(record).__name__} at line {line}; allowed are a list of objects, or one object "
            "a line."
        )
    if "\\ud" in source.lower():  # half of the escapes for a character, or for a lone surrogate
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _no_json(path, line, "a lone surrogate, which is no character") from None
    return record


def text_of(value) -> str | None:
    """A question or an answer as text: numbers as a table shows them, 5 also where a gap in the column made it 5.0.

    Returns:
        `None` for anything that is neither text nor a number.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:  # not a number: a gap
        return str(value)
    return value if isinstance(value, str) else None


def rows_of(
    path: str | Path,
    convert: Callable[[dict, str], dict],
    report: LoadReport,
    unwrap: Callable[[dict], list[dict]] = lambda record: [record],
) -> Iterator[dict]:
    """The rows that a file's records become.

    Args:
        path: see [`read_records`].
        convert: makes a row of a record and what to call it if it has no `id`.
        report: decides about records that `convert` refuses or that cannot be read, and is told what became of each.
        unwrap: the records in one object of the file, by default itself.

    Raises:
        ValueError: for a file that is no JSON, or a malformed record if that is what the report says.
    """
    keep_invalid = report.invalid_records == "skip"
    records = (
        (line, each)
        for line, record in read_records(path, keep_invalid)
        for each in (unwrap(record) if isinstance(record, dict) else [record])
    )
    for number, (line, record) in enumerate(records):
        is_new = report.begin(number)
        record_id = f"{Path(path).stem}/{number}"
        try:
            if isinstance(record, InvalidRecordError):
                raise record
            record_id = record_id if record.get("id") is None else str(record["id"])
            row = convert(record, record_id)
        except InvalidRecordError as error:
            report.leave_out(record_id, error, f" at line {line}")
            continue
        report.rows += is_new
        yield row


def from_rows(rows: Callable[[], Iterator[dict]], features: Features, streaming: bool) -> Dataset | IterableDataset:
    """What the iterators that `rows()` returns yield, as a data set: read now, or with `streaming` when needed."""
    if streaming:
        return IterableDataset.from_generator(rows, features)
    # Not `Dataset.from_generator`: that would take the rows of an earlier run from its cache, though the file or the
    # images have changed since, and leave nothing to report.
    iterator, chunks = rows(), [empty_dataset(features)]
    while chunk := list(islice(iterator, _ROWS)):
        chunks.append(Dataset.from_list(chunk, features))
    return datasets.concatenate_datasets(chunks)


def empty_dataset(features: Features) -> Dataset:
    """A data set of these columns without a row."""
    return Dataset.from_dict({name: [] for name in features}, features)


def open_table(
    path: str, split: str, name: str | None = None, revision: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """A split of a data set of the Hub or of a folder, or a table in a file, as it is.

    Args:
        path: a Hub id; a folder with data files, or one that `save_to_disk` wrote; or a .parquet file, whose `split`
            does not matter.
        split, name, revision, streaming: as for `datasets.load_dataset`.

    Raises:
        ValueError: if it cannot be opened, with the reason.
    """
    path = os.path.expanduser(path)
    options = {"split": split, "streaming": streaming}
    try:
        if os.path.isfile(path):
            if not path.lower().endswith(PARQUET_SUFFIX):
                raise ValueError(f"a file whose name ends on none of {(*RECORD_SUFFIXES, PARQUET_SUFFIX)}")
            return datasets.load_dataset("parquet", data_files=path, **{**options, "split": "train"})
        if os.path.isdir(path):
            saved = any(os.path.isfile(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json"))
            if not saved:
                return datasets.load_dataset(path, name, **options)
            dataset = datasets.load_from_disk(path)
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise ValueError(f"`split` is {split!r}; allowed are {sorted(dataset)}")
                dataset = dataset[split]
            dataset = dataset.with_format(None)  # it was saved with one, as of PyTorch or of some columns alone
            return dataset.to_iterable_dataset() if streaming else dataset
        if path.startswith(("/", ".")) or path.lower().endswith((*RECORD_SUFFIXES, PARQUET_SUFFIX)):
            raise ValueError("no such file or folder")
        return datasets.load_dataset(path, name, revision=revision, **options)
    except Exception as error:  # `datasets` and the Hub's client raise many kinds
        raise ValueError(str(error.__cause__ or error)) from error  # the cause says where a table is broken


__all__ = [
    "ImageFiles",
    "InvalidRecordError",
    "LoadReport",
    "MissingImageError",
    "ZippedImages",
    "empty_dataset",
    "from_rows",
    "open_table",
    "read_records",
    "rows_of",
    "text_of",
]
