"""The medical VQA benchmarks, VQA-RAD, SLAKE, PathVQA and the built-in phantoms, as rows of one form, with a report.

Publications of one benchmark differ: in the names of columns, in whether they say which questions are closed, in
whether pictures are in the table, in a zip archive or beside it, and in how many questions there are. This is why two
published results are often not about the same questions. The report counts what was loaded and says how that differs
from what was published.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import fsspec
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from huggingface_hub import HfApi, hf_hub_download

from lladamedv.processing.phantoms import PhantomVQA, parse_phantoms

from .llava_med import IMAGE_PLACEHOLDER, SPELLINGS, record_to_row
from .records import (
    PARQUET_SUFFIX,
    RECORD_SUFFIXES,
    ImageFiles,
    InvalidRecordError,
    LoadReport,
    MissingImageError,
    ZippedImages,
    empty_dataset,
    from_rows,
    open_table,
    read_records,
    text_of,
)
from .vqa_columns import ANSWER_TYPES, COLUMNS, Fields, answer_text, derived_answer_type, squash, unwrapped
from .vqa_sources import BENCHMARKS, COUNTED, LEAKAGE, LLAVA_MED, PHANTOMS, SOURCES, SPLITS, TEST, VQASource


logger = logging.getLogger(__name__)
META = ("modality", "location", "content_type", "base_type", "organ", "phrase_type", "question_type")
VQA_FEATURES = Features(
    {
        **{name: Value("string") for name in ("id", "dataset", "split")},
        "image": Image(),
        **{name: Value("string") for name in ("image_id", "question", "answer", "answer_type", "language")},
        "meta": {name: Value("string") for name in META},
    }
)
PHANTOM_SEED, PHANTOM_COUNT = 9000, 300
OWN_DATA = "own-data"  # what is no benchmark
_ALL = "all"  # the split of data that has none


@dataclass
class VQAReport(LoadReport):
    """What was loaded of a benchmark. With streaming it fills while rows are read.

    Attributes:
        benchmark, split: what was asked for; `"own-data"` for what is no benchmark.
        local: whether it is from files of the user's and not from the Hub.
        reference: the publication whose counts these are compared with.
        licence: of that publication.
        revision: the commit on the Hub, `None` for local files, or if it is not known.
        pinned: whether the caller or this package chose the revision; otherwise it was the newest.
        leakage: whether images of the test split also occur in train.
        published: published numbers of `images`, `questions`, `open` and `closed`, as far as there are any.
        images: number of different pictures, by `image_id`.
        open, closed: number of questions of each answer type.
        derived_answer_types: number of questions whose record had no answer type, so that those answered by yes or no
            count as closed and all others as open.
        empty_answers: ids of questions with an empty answer; they are rows all the same.
        truth_values: number of answers that were true or false and are read as yes or no.
        other_languages: number of questions left out because they are not English; own data are in any language.
        other_splits: number of records left out because their column `split` names another.
        columns: the names of the columns that were read, by what they were read as, for own data.
        unused_columns: the names of the others.
    """

    benchmark: str = ""
    split: str = ""
    local: bool = False
    reference: str = ""
    licence: str = ""
    revision: str | None = None
    pinned: bool = True
    leakage: str = ""
    published: dict[str, int] = field(default_factory=dict)
    images: int = 0
    open: int = 0
    closed: int = 0
    derived_answer_types: int = 0
    empty_answers: list[str] = field(default_factory=list)
    truth_values: int = 0
    other_languages: int = 0
    other_splits: int = 0
    columns: dict[str, list[str]] = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        self._image_ids: set[str] = set()

    def add_columns(self, fields: Fields) -> None:
        """Note what the columns of a record are read as."""
        for column in (*COLUMNS, *META):
            if (name := fields.name(column)) is not None and name not in self.columns.setdefault(column, []):
                self.columns[column].append(name)
        for spelling in SPELLINGS:
            if fields.record.get(spelling):
                self.columns.setdefault("conversation", []).append(spelling)
        self.columns = {column: list(dict.fromkeys(names)) for column, names in self.columns.items() if names}
        used = {name for names in self.columns.values() for name in names}
        names = dict.fromkeys((*self.unused_columns, *map(str, fields.record)))
        self.unused_columns = [name for name in names if name not in used]

    def add(self, row: dict, derived: bool, was_truth_value: bool) -> None:
        """Count a row."""
        self.rows += 1
        self.open += row["answer_type"] == "open"
        self.closed += row["answer_type"] == "closed"
        self.derived_answer_types += derived
        self.truth_values += was_truth_value
        if not row["answer"]:
            self.empty_answers.append(row["id"])
        self._image_ids.add(row["image_id"])
        self.images = len(self._image_ids)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images, questions, open and closed questions that were loaded."""
        return dict(zip(COUNTED, (self.images, self.rows, self.open, self.closed)))

    @property
    def differences(self) -> dict[str, int]:
        """How many more than published, where the two differ."""
        counts = self.counts
        return {name: counts[name] - there for name, there in self.published.items() if counts[name] != there}

    @property
    def is_published(self) -> bool:
        """Whether these are the questions of a benchmark, as far as that can be told: they come from where it is
        published, or are as many as published."""
        if self.benchmark in (OWN_DATA, PHANTOMS):
            return self.benchmark == PHANTOMS
        return not self.local or (bool(self.published) and not self.differences)

    def summary(self) -> str:
        """Lines of text: what was loaded, left out, is different from what was published, and to be known about it."""
        lines = [super().summary(), f"{self.benchmark} {self.split}: {_listed(self.counts)}"]
        if self.columns:
            used = (f"{column} from {', '.join(map(repr, names))}" for column, names in self.columns.items())
            unused = f"; not used: {', '.join(map(repr, self.unused_columns))}" if self.unused_columns else ""
            lines.append(f"columns: {'; '.join(used)}{unused}")
        if self.published:
            how = _listed({name: f"{number:+d}" for name, number in self.differences.items()}) or "no difference"
            lines.append(f"published for {self.reference}: {_listed(self.published)}; here: {how}")
        if self.derived_answer_types:
            lines.append(f"answer types of {self.derived_answer_types} questions derived: closed if yes or no")
        if self.truth_values:
            lines.append(f"{self.truth_values} answers true or false read as yes or no")
        if self.other_languages:
            lines.append(f"{self.other_languages} questions in other languages left out")
        if self.other_splits:
            lines.append(f"{self.other_splits} records of other splits left out")
        if self.empty_answers:
            shown = ", ".join(self.empty_answers[:5]) + (", …" if len(self.empty_answers) > 5 else "")
            lines.append(f"{len(self.empty_answers)} questions with an empty answer: {shown}")
        if self.is_published:
            lines.append(f"images shared with train: {self.leakage}")
            if not self.local:
                newest = "" if self.pinned else ", the newest when it was loaded: no revision is pinned"
                lines.append(f"revision: {self.revision or 'not known'}{newest}")
            lines.append(f"licence: {self.licence}")
        elif self.benchmark != OWN_DATA:
            lines.append(
                f"these are not the published questions of {self.benchmark}: its licence, its table and what is known "
                "about shared images are not theirs"
            )
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """All of it as plain Python objects, for JSON."""
        unknown = {} if self.is_published else {"licence": "not known", "leakage": "not known"}
        return {
            **asdict(self), **unknown, "questions": self.rows, "differences": self.differences,
            "is_published": self.is_published,
        }  # fmt: skip


def _listed(counts: dict) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def load_vqa(
    benchmark: str,
    split: str = "test",
    *,
    source: str | None = None,
    path: str | Path | None = None,
    image_folder: str | Path | None = None,
    revision: str | None = None,
    streaming: bool = False,
    invalid_records: str = "error",
) -> tuple[Dataset | IterableDataset, VQAReport]:
    """Load a split of a benchmark, from the Hub or from files.

    Args:
        benchmark: one of `BENCHMARKS`.
        split: `"train"`, `"validation"` or `"test"`, of those that the source has.
        source: which publication, a key of `SOURCES[benchmark]`; by default the first. With `path` it only says what
            the counts are compared with, by default `"llava-med"` for LLaVA-Med's records.
        path: local data instead of the Hub's: a .json or .jsonl file of LLaVA-Med's records or of flat ones
            (`question`, `answer`, `image` and what else a publication has), a .parquet file, a folder that
            `save_to_disk` wrote, or a copy of a Hub repository, which for SLAKE holds {split}.json and imgs.zip or
            imgs/. A single file is taken to be the split that was asked for. For phantoms, `"SEED:COUNT"` or
            `"SEED:COUNT:KINDS"`.
        image_folder: folder, or zip archive, that names of image files in `path` are relative to; by default the folder
            of the records, the folder imgs/ in it or the archive imgs.zip.
        revision: commit on the Hub; by default the one that `SOURCES` pins, if it does.
        streaming: read rows as they are needed.
        invalid_records: what to do with malformed records: stop (`"error"`) or leave them out (`"skip"`). Records whose
            image is missing or damaged are always left out and reported.

    Returns:
        A data set with `VQA_FEATURES`, whose images nobody has decoded yet, and the report. `image_id` is the source's
        own name of the picture, or the SHA-256 of its file's bytes; `answer_type` is `"open"` or `"closed"`.

    Raises:
        ValueError: for a value that is not allowed, data that cannot be read, a malformed record if that is what the
            arguments say, or two records of one id.
    """
    if benchmark not in SOURCES:
        raise ValueError(f"`benchmark` is {benchmark!r}; allowed are {', '.join(BENCHMARKS)}.")
    sources = SOURCES[benchmark]
    if source is not None and source not in sources:
        raise ValueError(f"`source` is {source!r}; allowed for {benchmark} are {', '.join(sources)}.")
    reference = source or next(iter(sources))
    allowed = sources[reference].splits if path is None else SPLITS
    if split not in allowed:
        raise ValueError(f"`split` is {split!r}; allowed for {reference} are {', '.join(allowed)}.")
    report = VQAReport("", invalid_records, benchmark=benchmark, split=split, leakage=LEAKAGE[benchmark])
    report.local = path is not None or benchmark == PHANTOMS
    if benchmark == PHANTOMS:
        records, images = _Phantoms(_parse_phantoms(path)), _ImagePlaces([])
        report.source = f"phantoms:{records.phantoms['seed']}:{records.phantoms['length']}"
    elif path is None:
        published = sources[reference]
        if published.hub_id is None:
            raise ValueError(f"`source` is {source!r}, which is not on the Hub; `path` must name its files.")
        report.revision, report.pinned = revision or published.revision, bool(revision or published.revision)
        if not report.pinned:
            report.revision = _newest_revision(published.hub_id)
        report.source = f"{published.hub_id}@{report.revision}" if report.revision else published.hub_id
        records, images = _open_hub(published, split, report.revision, streaming)
    else:
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, but `path` names local data; allowed is one of the two.")
        report.source = str(path)
        records, images = _open_local(Path(os.path.expanduser(path)), split, image_folder, streaming)
        first = _first_record(records, f"`path` is {str(path)!r}, which has no records.")
        if source is None and any(spelling in first for spelling in SPELLINGS):
            reference = LLAVA_MED
    report.reference, report.licence = reference, sources[reference].licence
    if benchmark != PHANTOMS or path is None:
        numbers = sources[reference].published.get(split, ())
        report.published = {name: number for name, number in zip(COUNTED, numbers) if number is not None}
    return _read(_Reader(records, images, report), streaming), report


def load_own_vqa(
    data: str | Path,
    split: str | None = None,
    *,
    image_folder: str | Path | None = None,
    streaming: bool = False,
    invalid_records: str = "error",
) -> tuple[Dataset | IterableDataset, VQAReport]:
    """Load questions of one's own, that are no benchmark: nothing is said about them that is not in them.

    Columns are recognised by their names, without case, blanks and marks (`COLUMNS` in `vqa_columns`): `question`,
    `answer` and `image`, and if they are there `id`, `image_id`, `answer_type` and `split`. The report says which were
    read as what, and which were not read. LLaVA-Med's records are read, too.

    Args:
        data: a file, .json (a list of records, or an object that holds one), .jsonl, .csv, .tsv or .parquet; or a
            folder with such files, one that `save_to_disk` wrote, or any other that `datasets.load_dataset` opens.
        split: of a folder with several, or of records with a column `split`; by default all that there is, or
            `"test"` of several.
        image_folder: see [`load_vqa`]; also the folder images/ beside the records is looked into.
        streaming, invalid_records: see [`load_vqa`].

    Returns:
        As [`load_vqa`]. Answers may be texts, numbers, or truth values, which become yes and no. Records without an
        answer are asked and not scored.

    Raises:
        ValueError: as [`load_vqa`], and for a split that is not there or has to be chosen.
    """
    path = Path(os.path.expanduser(data))
    if not os.path.exists(path):
        raise ValueError(f"There is no file or folder {str(data)!r}.")
    report = VQAReport(str(data), invalid_records, benchmark=OWN_DATA, local=True)
    images = _image_files(path if path.is_dir() else path.parent, image_folder)
    file = _own_file(path, split)
    if file is None or file.suffix.lower() not in RECORD_SUFFIXES:
        split = split if file or split else _own_split(path)
        records = _open(str(file or path), "data", split or _ALL, streaming)
    else:
        records = _FileRecords(file)
    report.split = split or _ALL
    _first_record(records, f"There are no records in {str(data)!r}.")
    named = file is None or split is None or re.fullmatch(rf"{re.escape(split)}(-\d+-of-\d+)?", file.stem)
    chosen = None if named else split
    return _read(_Reader(records, images, report, chosen), streaming), report


def _first_record(records: Callable, message: str) -> dict:
    first = next((record for _, record in records()), None)
    if first is None:
        raise ValueError(message)
    return first


def _read(reader: _Reader, streaming: bool) -> Dataset | IterableDataset:
    records = reader.records
    if isinstance(records, _TableRecords) and not streaming and isinstance(records.table.features.get("image"), Image):
        return _read_table(records.table, reader)
    return from_rows(reader.rows, VQA_FEATURES, streaming)


def _own_file(path: Path, split: str | None) -> Path | None:
    """The one file of own records; `None` if `datasets` has to open the folder."""
    if path.is_file():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (*RECORD_SUFFIXES, PARQUET_SUFFIX))
    names = [file.name for file in files]
    if any(name in ("state.json", "dataset_dict.json") for name in names):
        return None
    named = [file for file in files if file.stem == (split or TEST)]
    if len(files) == 1 or len(named) == 1:
        return (named or files)[0]
    if files and any(file.suffix.lower() != PARQUET_SUFFIX for file in files):
        raise ValueError(
            f"`data` is {str(path)!r}, a folder with {names}; name one of these files, or it as the split."
        )
    return None


def _own_split(folder: Path) -> str:
    """The only split of a folder, or the one called test."""
    try:
        if (folder / "state.json").is_file():
            return _ALL
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        else:
            splits = datasets.get_dataset_split_names(str(folder))
    except Exception as error:  # `datasets` raises many kinds
        raise ValueError(f"The folder {str(folder)!r} cannot be loaded: {error}") from error
    if len(splits) == 1 or TEST in splits:
        return TEST if TEST in splits else splits[0]
    raise ValueError(f"The split has to be chosen: {str(folder)!r} has {splits}.")


def _newest_revision(hub_id: str) -> str | None:
    """The newest commit of a data set that no revision is known of, so that what was loaded can be told."""
    try:
        return HfApi().dataset_info(hub_id).sha
    except Exception as error:  # what is wrong shows when it is loaded, unless a cache has it
        logger.warning("The newest revision of %s cannot be asked for: %s", hub_id, error)
        return None


# Where records come from: each an object that, called, begins anew and yields where a record is and the record. They
# are objects and not closures because `datasets` copies what it streams from.


@dataclass
class _FileRecords:
    file: Path

    def __call__(self) -> Iterator[tuple[str, dict]]:
        for line, record in read_records(self.file):
            for each in unwrapped(record, with_splits=True):
                yield f" at line {line}", each


@dataclass
class _TableRecords:
    table: Dataset | IterableDataset

    def __call__(self) -> Iterator[tuple[str, dict]]:
        features = self.table.features or {}
        for record in self.table:
            yield "", {name: _as_meant(value, features.get(name)) for name, value in record.items()}


def _as_meant(value, feature):
    """The name of a class where a table stores its number, or -1 for none; 5.6 where float32 stores 5.599999904…"""
    if isinstance(value, list):
        return [_as_meant(each, getattr(feature, "feature", None)) for each in value]
    if isinstance(feature, ClassLabel):
        return None if value in (None, -1) else feature.int2str(value)
    if isinstance(value, float) and getattr(feature, "dtype", None) in ("float16", "float32"):
        return float(str(np.dtype(feature.dtype).type(value)))
    return value


@dataclass
class _Phantoms:
    phantoms: dict

    def __call__(self) -> Iterator[tuple[str, dict]]:
        for number, example in enumerate(PhantomVQA(**self.phantoms)):
            name, file = f"phantoms/{self.phantoms['seed']}/{number}", io.BytesIO()
            example.image.save(file, "PNG")
            record = {
                "id": name,
                "image": {"bytes": file.getvalue(), "path": None},
                "image_id": f"{name}.png",
                "question": example.question,
                "answer": example.answer,
                "answer_type": "closed" if example.kind == "closed" else "open",
                "modality": example.attributes.domain,
                "question_type": example.topic,
            }
            yield "", record


def _parse_phantoms(path) -> dict:
    if path is None:
        return {"seed": PHANTOM_SEED, "length": PHANTOM_COUNT}
    try:
        return parse_phantoms(str(path))
    except ValueError as error:
        raise ValueError(f"`path` is {path!r}; for phantoms {error}.") from None


def _open_hub(source: VQASource, split: str, revision: str | None, streaming: bool):
    """Records, and where their images are."""
    if not source.zipped:
        return _open(source.hub_id, "source", split, streaming, revision), _ImagePlaces([])
    if streaming:
        raise ValueError(
            f"`streaming` is True, but the images of {source.hub_id} are in one archive; allowed are streaming=False, "
            "`path` of a local copy, or another `source`."
        )
    try:
        file, archive = (
            hf_hub_download(source.hub_id, name, repo_type="dataset", revision=revision)
            for name in (f"{split}.json", "imgs.zip")
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`source` is {source.hub_id!r}, which cannot be downloaded: {error}. `path` can name a local copy."
        ) from error
    # Only in the archive: names in a downloaded file must not lead to files of one's own.
    return _FileRecords(Path(file)), _ImagePlaces([ZippedImages(archive)])


def _open_local(path: Path, split: str, image_folder: str | Path | None, streaming: bool):
    """Records, and where their images are."""
    if not os.path.exists(path):  # unlike `Path.exists`, also for names that no file can have
        raise ValueError(f"`path` is {str(path)!r}; no such file or folder.")
    images = _image_files(path if path.is_dir() else path.parent, image_folder)
    file = _records_file(path, split)
    return _open(str(path), "path", split, streaming) if file is None else _FileRecords(file), images


def _open(path: str, argument: str, split: str, streaming: bool, revision: str | None = None) -> _TableRecords:
    try:
        return _TableRecords(_undecoded(open_table(path, split, revision=revision, streaming=streaming)))
    except ValueError as error:
        raise ValueError(f"`{argument}` is {path!r}, of which {split} cannot be loaded: {error}.") from error


def _records_file(path: Path, split: str) -> Path | None:
    """The file of `path`'s records, or `None` if they are in a table that `datasets` opens."""
    candidates = [path] if path.is_file() else [path / f"{split}{suffix}" for suffix in RECORD_SUFFIXES]
    return next((file for file in candidates if file.suffix.lower() in RECORD_SUFFIXES and file.is_file()), None)


def _image_files(folder: Path, image_folder: str | Path | None) -> _ImagePlaces:
    if image_folder is None:
        names = ("", "imgs", "imgs.zip", "images", "images.zip")
        places = [place for place in (folder / name for name in names) if place.exists()]
    else:
        places = [Path(os.path.expanduser(image_folder))]
        if not os.path.exists(places[0]):
            raise ValueError(f"`image_folder` is {str(image_folder)!r}; no such folder or zip archive.")
    return _ImagePlaces([ZippedImages(place) if place.is_file() else ImageFiles(place) for place in places])


@dataclass
class _ImagePlaces:
    """Finds image files in the first of some places that has them."""

    places: list[ImageFiles | ZippedImages]

    def find(self, name: str) -> str:
        for place in self.places:
            try:
                return place.find(name)
            except MissingImageError:
                continue
        raise MissingImageError(name)


def _undecoded(table: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The table with its images as bytes or paths."""
    for name, feature in (table.features or {}).items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            table = table.cast_column(name, type(feature)(Image(decode=False)))
    return table


# Rows from records


@dataclass
class _Reader:
    """Makes rows of records and reports what became of them."""

    records: Callable[[], Iterator[tuple[str, dict]]]
    images: _ImagePlaces
    report: VQAReport
    split: str | None = None  # only the records whose column `split` says so

    def rows(self) -> Iterator[dict]:
        return (row for _, row in self.numbered_rows())

    def numbered_rows(self) -> Iterator[tuple[int, dict]]:
        """Rows, each with the number of its record."""
        report, ids = self.report, set()
        for number, (where, record) in enumerate(self.records()):
            is_new = report.begin(number)
            if isinstance(record.get("meta"), dict):
                record = {**record["meta"], **record}
            fields = Fields(record)
            if report.benchmark == OWN_DATA:
                report.add_columns(fields)
            if self.split is not None and not self._is_of_the_split(fields):
                report.other_splits += is_new
                continue
            language = str(fields.get("language", "en")).strip()
            if report.benchmark != OWN_DATA and squash(language)[:2] != "en":
                report.other_languages += is_new
                continue
            given = fields.get("id", f"{report.benchmark}/{report.split}/{number}")
            name = text_of(given) or str(given)
            try:
                rows = [self._row(fields, *each, language) for each in _questions(fields, name)]
            except InvalidRecordError as error:
                report.leave_out(name, error, where)
                continue
            for row, *counted in rows:
                if row["id"] in ids:
                    raise ValueError(
                        f"{report.source!r} has two questions of the id {row['id']!r:.200}; ids must differ. "
                        f"{fields.name('id')!r} is read as the id: if it is none, give the column another name."
                    )
                ids.add(row["id"])
                if is_new:
                    report.add(row, *counted)
                yield number, row

    def _is_of_the_split(self, fields: Fields) -> bool:
        if (there := fields.get("split")) is None:
            raise ValueError(
                f"The split {self.split!r} is asked for, but {self.report.source!r} has no column of that name: "
                f"{list(fields.record)}."
            )
        return squash(there) == squash(self.split)

    def _row(self, fields: Fields, name: str, question, answer, language: str) -> tuple[dict, bool, bool]:
        """A question of a record as a row; whether its answer type was derived, and its answer a truth value."""
        text = text_of(question) or ""
        if text.count(IMAGE_PLACEHOLDER) > 1:
            raise InvalidRecordError(f"its question is about {text.count(IMAGE_PLACEHOLDER)} images; allowed is one")
        text = text.replace(IMAGE_PLACEHOLDER, "").strip()
        if not text:
            raise InvalidRecordError(f"`question` is {question!r:.200}")
        was_truth_value, answer_type = isinstance(answer, bool), fields.get("answer_type")
        answer = answer_text(answer)
        derived = answer_type is None or not str(answer_type).strip()
        if derived:
            answer_type = derived_answer_type(answer)
        elif (answer_type := ANSWER_TYPES.get(squash(answer_type))) is None:
            given = f"{fields.get('answer_type')!r:.200}"
            raise InvalidRecordError(f"`answer_type` is {given}, not one of {tuple(ANSWER_TYPES)}")
        image, file_name = self._image(fields)
        image_id = fields.get("image_id") or file_name or hashlib.sha256(image["bytes"]).hexdigest()
        meta = {column: fields.get(column) for column in META}
        row = {
            "id": name,
            "dataset": self.report.benchmark,
            "split": self.report.split,
            "image": image,
            "image_id": str(image_id),
            "question": text,
            "answer": answer,
            "answer_type": answer_type,
            "language": language,
            "meta": {column: None if value is None else str(value).strip() for column, value in meta.items()},
        }
        return row, derived, was_truth_value

    def _image(self, fields: Fields) -> tuple[dict, str | None]:
        """The image as `datasets.Image` holds it, and the name of its file unless its bytes are there."""
        given = fields.get("image")
        if isinstance(given, list):
            if len(given) != 1:
                raise InvalidRecordError(f"it has {len(given)} images; allowed is one")
            given = given[0]
        if isinstance(given, dict):
            given = given["bytes"] if given.get("bytes") else given.get("path")
        if isinstance(given, (bytes, bytearray)):
            return {"bytes": bytes(given), "path": None}, None
        if given is None and not fields.names("image"):
            raise InvalidRecordError(_no_column("image", fields.record))
        if given is None:
            raise MissingImageError("None")
        if not isinstance(given, str):
            raise InvalidRecordError(f"`image` is of type {type(given).__name__}; allowed are names of files and bytes")
        if given[:5].lower() == "data:":
            return {"bytes": None, "path": given}, hashlib.sha256(given.encode()).hexdigest()
        return {"bytes": None, "path": self.images.find(given)}, given


def _questions(fields: Fields, name: str) -> list[tuple[str, object, object]]:
    """The id, question and answer of a record, or of each turn of LLaVA-Med's conversation."""
    record = fields.record
    if not any(record.get(spelling) for spelling in SPELLINGS):
        for column in ("question", "answer"):
            if fields.name(column) is None:
                raise InvalidRecordError(_no_column(column, record))
        return [(name, fields.get("question"), fields.get("answer"))]
    messages = record_to_row({**record, "image": []}, name)["messages"]
    turns = [message for message in messages if message["role"] != "system"]
    if not turns or len(turns) % 2 or [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise InvalidRecordError("its turns are not questions and answers by turns")
    shown = sum(part["type"] == "image" for turn in turns for part in turn["content"])
    if shown > 1:
        raise InvalidRecordError(f"its conversation is about {shown} images; allowed is one")
    texts = ["".join(part["text"] for part in turn["content"] if part["type"] == "text") for turn in turns]
    pairs = list(zip(texts[::2], texts[1::2]))
    ids = [name] if len(pairs) == 1 else [f"{name}/{number}" for number in range(len(pairs))]
    return [(id_, *pair) for id_, pair in zip(ids, pairs)]


def _no_column(column: str, record: dict) -> str:
    return f"none of its columns {list(record)!r:.200} is its {column}; such are called {', '.join(COLUMNS[column])}"


def _read_table(table: Dataset, reader: _Reader) -> Dataset:
    """The rows of a table, whose images stay where they are: there may be gigabytes of them."""
    numbers, texts = [], []
    for number, row in reader.numbered_rows():
        if row.pop("image")["bytes"] is None:  # a file, by a name that has to be found
            return from_rows(reader.rows, VQA_FEATURES, streaming=False)
        numbers.append(number)
        texts.append(row)
    if not texts:
        return empty_dataset(VQA_FEATURES)
    kept = table if numbers == list(range(len(table))) else table.select(numbers)
    images = kept.select_columns(["image"]).cast_column("image", Image())
    features = Features({name: feature for name, feature in VQA_FEATURES.items() if name != "image"})
    rows = datasets.concatenate_datasets([Dataset.from_list(texts, features), images], axis=1)
    return rows.select_columns(list(VQA_FEATURES))


# What can be made of rows


def record_to_messages(record: dict) -> dict:
    """A row to train on, in the form of [`record_to_row`].

    Args:
        record: with `id`, `question`, `answer` and `image`.

    Returns:
        `{"id", "messages", "images"}`: the image's part, the question's text, and the answer.
    """
    turns = [{"from": "human", "value": record["question"]}, {"from": "gpt", "value": record["answer"]}]
    row = record_to_row({"id": record["id"], "image": [""], "conversations": turns}, record["id"])
    return {**row, "images": [record["image"]]}


def training_open_answers(dataset: Dataset | IterableDataset) -> list[str]:
    """The different answers to the open questions of a training split, in lower case and in the order in which they
    first occur: the candidates among which LLaVA-Med's evaluation chooses (train_open_answers.json, which was never
    released).

    Args:
        dataset: as [`load_vqa`] returns it.
    """
    rows = dataset.select_columns(["answer", "answer_type"])
    return list(dict.fromkeys(row["answer"].lower() for row in rows if row["answer_type"] == "open" and row["answer"]))


def check_image_overlap(train: Dataset | IterableDataset, test: Dataset | IterableDataset) -> int:
    """How many pictures of the test split are also in the training split, by `image_id` or by the bytes of their files.

    Args:
        train, test: of one source, as [`load_vqa`] returns them. No image is decoded, but one file of each is read.

    Returns:
        Number of different pictures (by `image_id`) of `test` that `train` has, too.
    """
    known, asked = _digests(train), _digests(test)
    digests = set(known.values())
    return sum(image_id in known or digest in digests for image_id, digest in asked.items())


def _digests(dataset: Dataset | IterableDataset) -> dict[str, str]:
    """For each picture the SHA-256 of its file."""
    digests = {}
    for row in _undecoded(dataset.select_columns(["image_id", "image"])):
        if row["image_id"] not in digests:
            content = image_source(row["image"])
            if isinstance(content, str):
                with fsspec.open(content) as file:
                    content = file.read()
            digests[row["image_id"]] = hashlib.sha256(content).hexdigest()
    return digests


def image_source(image):
    """What the image processor's `fetch_images` takes of a row's image: bytes, or a path or URL.

    Args:
        image: as an undecoded data set holds it, `{"bytes", "path"}`, of which a path may lead into a zip archive.
            Anything else is returned as it is.
    """
    if not isinstance(image, dict):
        return image
    if image.get("bytes") is not None:
        return image["bytes"]
    if str(image["path"]).startswith("zip://"):
        with fsspec.open(image["path"]) as file:
            return file.read()
    return image["path"]


__all__ = [
    "BENCHMARKS",
    "OWN_DATA",
    "SOURCES",
    "VQA_FEATURES",
    "VQAReport",
    "VQASource",
    "check_image_overlap",
    "image_source",
    "load_own_vqa",
    "load_vqa",
    "record_to_messages",
    "training_open_answers",
]
