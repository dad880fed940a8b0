"""The medical VQA benchmarks, VQA-RAD, SLAKE, PathVQA and the built-in phantoms, as rows of one form, with a report.

Publications of one benchmark differ: in the names of columns, in whether they say which questions are closed, in
whether pictures are in the table, in a zip archive or beside it, and in how many questions there are. This is why two
published results are often not about the same questions. The report counts what was loaded and says how that differs
from what was published.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import fsspec
from datasets import Dataset, Features, Image, IterableDataset, Value
from huggingface_hub import hf_hub_download

from lladamedv.processing.phantoms import PhantomVQA, parse_phantoms

from .llava_med import IMAGE_PLACEHOLDER, SPELLINGS, record_to_row
from .records import (
    JSON_SUFFIXES,
    ImageFiles,
    InvalidRecordError,
    LoadReport,
    MissingImageError,
    ZippedImages,
    empty_dataset,
    from_rows,
    open_table,
    read_records,
)
from .vqa_sources import BENCHMARKS, COUNTED, LEAKAGE, LLAVA_MED, PHANTOMS, SOURCES, SPLITS, VQASource


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
# What the columns are called, in one publication or another; the first that a record has counts.
_COLUMNS = {
    "id": ("id", "qid", "question_id"),
    "image": ("image", "images", "img_name", "image_name"),
    "image_id": ("image_id", "image_name", "img_name", "img_id"),
    "language": ("language", "q_lang"),
    "organ": ("organ", "image_organ"),
}
_ANSWER_TYPES = {"open": "open", "other": "open", "number": "open", "closed": "closed", "yes/no": "closed"}
_POLARITY = ("yes", "no")


@dataclass
class VQAReport(LoadReport):
    """What was loaded of a benchmark. With streaming it fills while rows are read.

    Attributes:
        benchmark, split: what was asked for.
        reference: the publication whose counts these are compared with.
        licence: of that publication.
        revision: the pinned commit, `None` for the newest or for local files.
        leakage: whether images of the test split also occur in train.
        published: published numbers of `images`, `questions`, `open` and `closed`, as far as there are any.
        images: number of different pictures, by `image_id`.
        open, closed: number of questions of each answer type.
        derived_answer_types: number of questions whose record had no answer type, so that those answered by yes or no
            count as closed and all others as open.
        empty_answers: ids of questions with an empty answer; they are rows all the same.
        other_languages: number of questions left out because they are not English.
    """

    benchmark: str = ""
    split: str = ""
    reference: str = ""
    licence: str = ""
    revision: str | None = None
    leakage: str = ""
    published: dict[str, int] = field(default_factory=dict)
    images: int = 0
    open: int = 0
    closed: int = 0
    derived_answer_types: int = 0
    empty_answers: list[str] = field(default_factory=list)
    other_languages: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._image_ids: set[str] = set()

    def add(self, row: dict, derived: bool) -> None:
        """Count a row."""
        self.rows += 1
        self.open += row["answer_type"] == "open"
        self.closed += row["answer_type"] == "closed"
        self.derived_answer_types += derived
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

    def summary(self) -> str:
        """Lines of text: what was loaded, left out, is different from what was published, and to be known about it."""
        lines = [super().summary(), f"{self.benchmark} {self.split}: {_listed(self.counts)}"]
        if self.published:
            how = _listed({name: f"{number:+d}" for name, number in self.differences.items()}) or "no difference"
            lines.append(f"published for {self.reference}: {_listed(self.published)}; here: {how}")
        if self.derived_answer_types:
            lines.append(f"answer types of {self.derived_answer_types} questions derived: closed if yes or no")
        if self.other_languages:
            lines.append(f"{self.other_languages} questions in other languages left out")
        if self.empty_answers:
            lines.append(f"{len(self.empty_answers)} questions with an empty answer: {', '.join(self.empty_answers)}")
        lines.append(f"images shared with train: {self.leakage}")
        if self.source.partition("@")[0] == self.reference:
            lines.append(f"revision: {self.revision or 'not pinned, the newest'}")
        lines.append(f"licence: {self.licence}")
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """All of it as plain Python objects, for JSON."""
        return {**asdict(self), "questions": self.rows, "differences": self.differences}


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
        raise ValueError(f"`benchmark` is {benchmark!r}; allowed are {BENCHMARKS}.")
    sources = SOURCES[benchmark]
    if source is not None and source not in sources:
        raise ValueError(f"`source` is {source!r}; allowed for {benchmark} are {tuple(sources)}.")
    reference = source or next(iter(sources))
    allowed = sources[reference].splits if path is None else SPLITS
    if split not in allowed:
        raise ValueError(f"`split` is {split!r}; allowed for {reference} are {allowed}.")
    report = VQAReport("", invalid_records, benchmark=benchmark, split=split, leakage=LEAKAGE[benchmark])
    if benchmark == PHANTOMS:
        records, images = _Phantoms(_parse_phantoms(path)), _ImagePlaces([])
        report.source = f"phantoms:{records.phantoms['seed']}:{records.phantoms['length']}"
    elif path is None:
        published = sources[reference]
        if published.hub_id is None:
            raise ValueError(f"`source` is {source!r}, which is not on the Hub; `path` must name its files.")
        report.revision = revision or published.revision
        report.source = f"{published.hub_id}@{report.revision}" if report.revision else published.hub_id
        records, images = _open_hub(published, split, report.revision, streaming)
    else:
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, but `path` names local data; allowed is one of the two.")
        report.source = str(path)
        records, images = _open_local(Path(os.path.expanduser(path)), split, image_folder, streaming)
        first = next((record for _, record in records()), None)
        if first is None:
            raise ValueError(f"`path` is {str(path)!r}, which has no records.")
        if source is None and any(spelling in first for spelling in SPELLINGS):
            reference = LLAVA_MED
    report.reference, report.licence = reference, sources[reference].licence
    if benchmark != PHANTOMS or path is None:
        numbers = sources[reference].published.get(split, ())
        report.published = {name: number for name, number in zip(COUNTED, numbers) if number is not None}
    reader = _Reader(records, images, report)
    if isinstance(records, _TableRecords) and not streaming and isinstance(records.table.features.get("image"), Image):
        return _read_table(records.table, reader), report
    return from_rows(reader.rows, VQA_FEATURES, streaming), report


# Where records come from: each an object that, called, begins anew and yields where a record is and the record. They
# are objects and not closures because `datasets` copies what it streams from.


@dataclass
class _JSONRecords:
    file: Path

    def __call__(self) -> Iterator[tuple[str, dict]]:
        for line, record in read_records(self.file):
            yield f" at line {line}", record


@dataclass
class _TableRecords:
    table: Dataset | IterableDataset

    def __call__(self) -> Iterator[tuple[str, dict]]:
        for record in self.table:
            yield "", record


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
    return _JSONRecords(Path(file)), _ImagePlaces([ZippedImages(archive)])


def _open_local(path: Path, split: str, image_folder: str | Path | None, streaming: bool):
    """Records, and where their images are."""
    if not os.path.exists(path):  # unlike `Path.exists`, also for names that no file can have
        raise ValueError(f"`path` is {str(path)!r}; no such file or folder.")
    images = _image_files(path if path.is_dir() else path.parent, image_folder)
    file = _records_file(path, split)
    return _open(str(path), "path", split, streaming) if file is None else _JSONRecords(file), images


def _open(path: str, argument: str, split: str, streaming: bool, revision: str | None = None) -> _TableRecords:
    try:
        return _TableRecords(_undecoded(open_table(path, split, revision=revision, streaming=streaming)))
    except ValueError as error:
        raise ValueError(f"`{argument}` is {path!r}, of which {split} cannot be loaded: {error}.") from error


def _records_file(path: Path, split: str) -> Path | None:
    """The JSON file of `path`'s records, or `None` if they are in a table."""
    candidates = [path] if path.is_file() else [path / f"{split}{suffix}" for suffix in JSON_SUFFIXES]
    return next((file for file in candidates if file.suffix in JSON_SUFFIXES and file.is_file()), None)


def _image_files(folder: Path, image_folder: str | Path | None) -> _ImagePlaces:
    if image_folder is None:
        places = [place for place in (folder, folder / "imgs", folder / "imgs.zip") if place.exists()]
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
    known = isinstance((table.features or {}).get("image"), Image)
    return table.cast_column("image", Image(decode=False)) if known else table


# Rows from records


@dataclass
class _Reader:
    """Makes rows of records and reports what became of them."""

    records: Callable[[], Iterator[tuple[str, dict]]]
    images: _ImagePlaces
    report: VQAReport

    def rows(self) -> Iterator[dict]:
        return (row for _, row in self.numbered_rows())

    def numbered_rows(self) -> Iterator[tuple[int, dict]]:
        """Rows, each with the number of its record."""
        report, ids = self.report, set()
        for number, (where, record) in enumerate(self.records()):
            is_new = report.begin(number)
            if isinstance(record.get("meta"), dict):
                record = {**record["meta"], **record}
            language = _value(record, "language") or "en"
            if language != "en":
                report.other_languages += is_new
                continue
            name = str(_value(record, "id", f"{report.benchmark}/{report.split}/{number}"))
            try:
                rows = [self._row(each, language) for each in _questions(record, name)]
            except InvalidRecordError as error:
                report.leave_out(name, error, where)
                continue
            for row, derived in rows:
                if row["id"] in ids:
                    raise ValueError(
                        f"{report.source!r} has two questions of the id {row['id']!r:.200}; ids must differ."
                    )
                ids.add(row["id"])
                if is_new:
                    report.add(row, derived)
                yield number, row

    def _row(self, record: dict, language: str) -> tuple[dict, bool]:
        """A flat record as a row, and whether its answer type had to be derived."""
        question, answer = record.get("question"), record.get("answer")
        question = question.replace(IMAGE_PLACEHOLDER, "").strip() if isinstance(question, str) else ""
        if not question:
            raise InvalidRecordError(f"`question` is {record.get('question')!r:.200}")
        if not isinstance(answer, (str, int)):
            raise InvalidRecordError(f"`answer` is {answer!r:.200}")
        answer, answer_type = str(answer).strip(), record.get("answer_type")
        derived = answer_type is None or not str(answer_type).strip()
        if derived:
            answer_type = "closed" if answer.lower() in _POLARITY else "open"
        elif (answer_type := _ANSWER_TYPES.get(str(answer_type).strip().lower())) is None:
            raise InvalidRecordError(
                f"`answer_type` is {record['answer_type']!r:.200}, not one of {tuple(_ANSWER_TYPES)}"
            )
        image, file_name = self._image(record)
        image_id = _value(record, "image_id") or file_name or hashlib.sha256(image["bytes"]).hexdigest()
        meta = {name: _value(record, name) for name in META}
        row = {
            "id": record["id"],
            "dataset": self.report.benchmark,
            "split": self.report.split,
            "image": image,
            "image_id": str(image_id),
            "question": question,
            "answer": answer,
            "answer_type": answer_type,
            "language": language,
            "meta": {name: None if value is None else str(value).strip() for name, value in meta.items()},
        }
        return row, derived

    def _image(self, record: dict) -> tuple[dict, str | None]:
        """The image as `datasets.Image` holds it, and the name of its file unless its bytes are there."""
        given = _value(record, "image")
        if isinstance(given, list):
            if len(given) != 1:
                raise InvalidRecordError(f"it has {len(given)} images; allowed is one")
            given = given[0]
        if isinstance(given, dict):
            if isinstance(given.get("bytes"), bytes):
                return {"bytes": given["bytes"], "path": None}, None
            given = given.get("path")
        if not isinstance(given, str):
            raise MissingImageError(str(given))
        return {"bytes": None, "path": self.images.find(given)}, given


def _value(record: dict, column: str, default=None):
    """What a record says in one of the columns that are called so."""
    names = _COLUMNS.get(column, (column,))
    return next((record[name] for name in names if record.get(name) not in (None, "", [])), default)


def _questions(record: dict, name: str) -> list[dict]:
    """The flat records of a record: itself, or the questions and answers of LLaVA-Med's conversation."""
    if not any(record.get(spelling) for spelling in SPELLINGS):
        return [{**record, "id": name}]
    messages = record_to_row({**record, "image": []}, name)["messages"]
    turns = [message for message in messages if message["role"] != "system"]
    if not turns or len(turns) % 2 or [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise InvalidRecordError("its turns are not questions and answers by turns")
    texts = ["".join(part["text"] for part in turn["content"] if part["type"] == "text") for turn in turns]
    pairs = list(zip(texts[::2], texts[1::2]))
    ids = [name] if len(pairs) == 1 else [f"{name}/{number}" for number in range(len(pairs))]
    return [{**record, "id": id_, "question": pair[0], "answer": pair[1]} for id_, pair in zip(ids, pairs)]


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
            content = row["image"]["bytes"]
            if content is None:
                with fsspec.open(row["image"]["path"]) as file:
                    content = file.read()
            digests[row["image_id"]] = hashlib.sha256(content).hexdigest()
    return digests


__all__ = [
    "BENCHMARKS",
    "SOURCES",
    "VQA_FEATURES",
    "VQAReport",
    "VQASource",
    "check_image_overlap",
    "load_vqa",
    "record_to_messages",
    "training_open_answers",
]
