"""The medical VQA benchmarks, VQA-RAD, SLAKE, PathVQA and the built-in phantoms, and questions of a user's own, as rows
of one form, with a report.

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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset, Features, Image, IterableDataset, Value, get_dataset_split_names
from huggingface_hub import HfApi, hf_hub_download

from lladamedv.processing.phantoms import OPPOSITE, PhantomVQA, parse_phantoms

from ..vqa_sources import BENCHMARKS, COUNTED, LEAKAGE, LLAVA_MED, PHANTOMS, SOURCES, SPLITS, TEST, VQASource
from .columns import (
    ANSWER_TYPES,
    COLUMNS,
    CONVERSATIONS,
    Fields,
    InvalidRecordError,
    answer_text,
    derived_answer_type,
    squash,
    text_of,
)  # fmt: skip
from .messages import IMAGE_PLACEHOLDER, conversation_of, image_source, normalize_messages
from .readers import (
    PARQUET_SUFFIX,
    RECORD_SUFFIXES,
    ImageFiles,
    LoadReport,
    Records,
    RowMaker,
    first_few,
    load_rows,
    open_records,
    undecoded,
)  # fmt: skip


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
        reference, licence: the publication whose counts these are compared with, and its licence.
        revision: the commit on the Hub, `None` for local files, or if it is not known.
        pinned: whether the caller or this package chose the revision; otherwise it was the newest.
        leakage: whether images of the test split also occur in train.
        published: published numbers of `images`, `questions`, `open` and `closed`, as far as there are any.
        images, open, closed: number of different pictures, by `image_id`, and of questions of each answer type.
        derived_answer_types: number of questions whose record had no answer type, so that those answered by yes or no
            count as closed and all others as open.
        empty_answers: ids of questions with an empty answer; they are rows all the same.
        truth_values: number of answers that were true or false and are read as yes or no.
        other_languages: number of questions left out because they are not English; own data are in any language.
        other_splits: number of records left out because their column `split` names another.
        columns, unused_columns: of own data, the columns that were read, by what they were read as, and the others.
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
        used = {column: [fields.name(column)] for column in (*COLUMNS, *META)}
        used["conversation"] = [name for name in CONVERSATIONS if fields.record.get(name)]
        for column, names in used.items():
            if names := [*dict.fromkeys((*self.columns.get(column, ()), *(name for name in names if name)))]:
                self.columns[column] = names
        read = {name for names in self.columns.values() for name in names}
        seen = dict.fromkeys((*self.unused_columns, *map(str, fields.record)))
        self.unused_columns = [name for name in seen if name not in read]

    def add(self, row: dict, derived: bool, was_truth_value: bool) -> None:
        """Count a row, whose answer type was derived or not, and its answer true or false or not."""
        self.open += row["answer_type"] == "open"
        self.closed += row["answer_type"] == "closed"
        self.derived_answer_types += derived
        self.truth_values += was_truth_value
        self.empty_answers += [row["id"]] * (not row["answer"])
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
        for count, text in (
            (self.derived_answer_types, "answer types of {} questions derived: closed if yes or no"),
            (self.truth_values, "{} answers true or false read as yes or no"),
            (self.other_languages, "{} questions in other languages left out"),
            (self.other_splits, "{} records of other splits left out"),
        ):
            lines += [text.format(count)] * bool(count)
        if empty := len(self.empty_answers):
            lines.append(f"{empty} questions with an empty answer: {first_few(self.empty_answers)}")
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


# What is loaded


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
            of the records, and imgs/ and images/ or their zip archives in it.
        revision: commit on the Hub; by default the one that `SOURCES` pins, if it does.
        streaming: read rows as they are needed.
        invalid_records: what to do with malformed records: stop (`"error"`) or leave them out (`"skip"`). Records whose
            image is missing or damaged are always left out and reported.

    Returns:
        A data set with `VQA_FEATURES`, whose images are not decoded yet, and the report. `image_id` is the source's
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
        records, images = _phantoms(path, report), ImageFiles()
    elif path is None:
        records, images = _published(sources[reference], source, revision, report, streaming)
    else:
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, but `path` names local data; allowed is one of the two.")
        report.source = str(path)
        if not os.path.exists(os.path.expanduser(path)):  # unlike `Path.exists`, also for names that no file can have
            raise ValueError(f"`path` is {report.source!r}; no such file or folder.")
        options = _options(report, streaming) | {"image_folder": image_folder}
        records, images, first = open_records(report.source, split, f"`path` is {report.source!r}", **options)
        if source is None and any(name in first for name in CONVERSATIONS):
            reference = LLAVA_MED
    report.reference, report.licence = reference, sources[reference].licence
    if benchmark != PHANTOMS or path is None:
        numbers = sources[reference].published.get(split, ())
        report.published = {name: number for name, number in zip(COUNTED, numbers) if number is not None}
    return _load(records, images, report, streaming), report


def _phantoms(path: str | Path | None, report: VQAReport) -> Records:
    try:
        phantoms = parse_phantoms(f"{PHANTOM_SEED}:{PHANTOM_COUNT}" if path is None else str(path))
    except ValueError as error:
        raise ValueError(f"`path` is {path!r}; for phantoms {error}.") from None
    report.source = f"phantoms:{phantoms['seed']}:{phantoms['length']}"
    return partial(phantom_records, phantoms)


def _published(published: VQASource, source: str | None, revision: str | None, report: VQAReport, streaming: bool):
    """The records of a publication on the Hub, and their images; the report learns what was asked for."""
    if published.hub_id is None:
        raise ValueError(f"`source` is {source!r}, which is not on the Hub; `path` must name its files.")
    report.revision, report.pinned = revision or published.revision, bool(revision or published.revision)
    if not report.pinned:
        report.revision = _newest_revision(published.hub_id)
    report.source = f"{published.hub_id}@{report.revision}" if report.revision else published.hub_id
    called, options = f"`source` is {published.hub_id!r}", _options(report, streaming)
    if published.zipped:
        # Images only in the archive: names in a downloaded file must not lead to the user's files.
        file, options["image_folder"] = _download(published, report.split, report.revision, streaming)
        return open_records(file, report.split, called, **options)[:2]
    records, *_ = open_records(published.hub_id, report.split, called, revision=report.revision, **options)
    return records, ImageFiles()


def load_own_vqa(
    data: str | Path,
    split: str | None = None,
    *,
    image_folder: str | Path | None = None,
    streaming: bool = False,
    invalid_records: str = "error",
) -> tuple[Dataset | IterableDataset, VQAReport]:
    """Load questions of your own, which are no benchmark: the report says nothing about them that is not in them.

    Columns are recognised by their names, without case, blanks and marks (`COLUMNS` in `columns.py`): `question`,
    `answer` and `image`, and if they are there `id`, `image_id`, `answer_type` and `split`. The report says which were
    read as what, and which were not read. LLaVA-Med's records are read, too.

    Args:
        data: a file, .json (a list of records, or an object that holds one), .jsonl, .csv, .tsv or .parquet; or a
            folder with such files, one that `save_to_disk` wrote, or any other that `datasets.load_dataset` opens.
        split: of a folder with several, or of records with a column `split`; by default all that there is, or
            `"test"` of several.
        image_folder, streaming, invalid_records: see [`load_vqa`].

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
    place, report.split = _own_place(path, split)
    options = _options(report, streaming) | {"image_folder": image_folder}
    records, images, _ = open_records(str(place), report.split, f"`data` is {str(data)!r}", **options)
    named = place.is_dir() or split is None or re.fullmatch(rf"{re.escape(split)}(-\d+-of-\d+)?", place.stem)
    return _load(records, images, report, streaming, None if named else split), report


def _load(records, images: ImageFiles, report: VQAReport, streaming: bool, split: str | None = None):
    maker = RowMaker(_Questions(images, report, split), report, f"{report.benchmark}/{report.split}")
    return load_rows(records, maker, VQA_FEATURES, streaming)


def _options(report: VQAReport, streaming: bool) -> dict:
    return {"streaming": streaming, "keep_invalid": report.invalid_records == "skip", "with_splits": True}


def _own_place(path: Path, split: str | None) -> tuple[Path, str]:
    """The file or folder that holds own records, and its split: of a folder the only file, or the one called as the
    split or test; where `datasets` has to open the folder, its only split or test."""
    saved = path / "dataset_dict.json"
    is_table = path.is_file() or (path / "state.json").is_file()
    files = []
    if not is_table and not saved.is_file():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in (*RECORD_SUFFIXES, PARQUET_SUFFIX))
    named = [file for file in files if file.stem == (split or TEST)]
    if len(files) == 1 or len(named) == 1:
        return (named or files)[0], split or _ALL
    if any(file.suffix.lower() != PARQUET_SUFFIX for file in files):
        names = [file.name for file in files]
        raise ValueError(
            f"`data` is {str(path)!r}, a folder with {names}; name one of these files, or it as the split."
        )
    if split is not None or is_table:
        return path, split or _ALL
    try:
        splits = json.loads(saved.read_text())["splits"] if saved.is_file() else get_dataset_split_names(str(path))
    except Exception as error:  # `datasets` raises many kinds
        raise ValueError(f"The folder {str(path)!r} cannot be loaded: {error}") from error
    if len(splits) == 1 or TEST in splits:
        return path, TEST if TEST in splits else splits[0]
    raise ValueError(f"The split has to be chosen: {str(path)!r} has {splits}.")


def _newest_revision(hub_id: str) -> str | None:
    """The newest commit of a data set of which no revision is pinned, so that the report can name it."""
    try:
        return HfApi().dataset_info(hub_id).sha
    except Exception as error:  # loading shows what is wrong, unless a cache has the data
        logger.warning("The newest revision of %s cannot be asked for: %s", hub_id, error)
        return None


def _download(source: VQASource, split: str, revision: str | None, streaming: bool) -> tuple[str, str]:
    """The file of a split, and the archive of all images."""
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
    return file, archive


def phantom_records(phantoms: dict) -> Iterator[tuple[str, dict]]:
    """The records of a [`PhantomVQA`] with these arguments, as [`load_rows`] takes them."""
    examples = PhantomVQA(**phantoms)
    for number, example in enumerate(examples):
        example.image.save(file := io.BytesIO(), "PNG")
        name, picture = f"phantoms/{phantoms['seed']}", number // examples.questions_per_picture
        record = {"id": f"{name}/{number}", "image_id": f"{name}/{picture}.png"}
        record |= {"image": {"bytes": file.getvalue(), "path": None}}
        record |= {"question": example.question, "answer": example.answer}
        record |= {"answer_type": "closed" if example.answer in OPPOSITE else "open"}
        yield "", record | {"modality": example.attributes.domain, "question_type": example.topic}


# Rows from records


@dataclass
class _Questions:
    """The rows of a record, one for each of its questions. With `split`, only of records of that split."""

    images: ImageFiles
    report: VQAReport
    split: str | None
    ids: dict[str, int] = field(default_factory=dict)  # of the rows of this pass, and the numbers of their records

    def __call__(self, fields: Fields, name: str) -> list[dict]:
        report = self.report
        if report.number == 0:
            self.ids.clear()
        if isinstance(meta := fields.record.get("meta"), dict):
            fields = Fields({**meta, **fields.record})
        if report.benchmark == OWN_DATA:
            report.add_columns(fields)
        if self.split is not None:
            if (there := fields.get("split")) is None:
                raise ValueError(
                    f"The split {self.split!r} is asked for, but {report.source!r} has no column of that name: "
                    f"{list(fields.record)}."
                )
            if squash(there) != squash(self.split):
                report.other_splits += report.is_new
                return []
        language = str(fields.get("language", "en")).strip()
        if report.benchmark != OWN_DATA and squash(language)[:2] != "en":
            report.other_languages += report.is_new
            return []
        rows = [self._row(fields, *each, language) for each in _questions(fields, name)]
        for row, derived, was_truth_value in rows:
            if self.ids.setdefault(row["id"], report.number) != report.number:
                raise ValueError(
                    f"{report.source!r} has two questions of the id {row['id']!r:.200}; ids must differ. "
                    f"{fields.name('id')!r} is read as the id: if it is none, give the column another name."
                )
            if report.is_new:
                report.add(row, derived, was_truth_value)
        return [row for row, *_ in rows]

    def _row(self, fields: Fields, name: str, question, answer, language: str) -> tuple[dict, bool, bool]:
        """A question of a record as a row; whether its answer type was derived, and its answer a truth value."""
        text = text_of(question) or ""
        if (shown := text.count(IMAGE_PLACEHOLDER)) > 1:
            raise InvalidRecordError(f"its question is about {shown} images; allowed is one")
        text = text.replace(IMAGE_PLACEHOLDER, "").strip()
        if not text:
            raise InvalidRecordError(f"`question` is {question!r:.200}")
        was_truth_value, given = isinstance(answer, bool), fields.get("answer_type")
        answer = answer_text(answer)
        derived = given is None or not str(given).strip()
        answer_type = derived_answer_type(answer) if derived else ANSWER_TYPES.get(squash(given))
        if answer_type is None:
            raise InvalidRecordError(f"`answer_type` is {given!r:.200}, not one of {tuple(ANSWER_TYPES)}")
        image, image_id = self._image(fields)
        meta = {column: fields.get(column) for column in META}
        row = {
            "id": name, "dataset": self.report.benchmark, "split": self.report.split,
            "image": image, "image_id": str(fields.get("image_id") or image_id),
            "question": text, "answer": answer, "answer_type": answer_type, "language": language,
            "meta": {column: None if value is None else str(value).strip() for column, value in meta.items()},
        }  # fmt: skip
        return row, derived, was_truth_value

    def _image(self, fields: Fields) -> tuple[dict, str]:
        """The image as `datasets.Image` holds it, and the name of its file, or a digest if there is none."""
        fields.need("image")
        given = fields.get("image")
        if isinstance(given, list):
            if len(given) != 1:
                raise InvalidRecordError(f"it has {len(given)} images; allowed is one")
            given = given[0]
        image, name = self.images.stored(given), given.get("path") if isinstance(given, dict) else given
        if image["bytes"] is None and name[:5].lower() != "data:":
            return image, name
        return image, hashlib.sha256(image["bytes"] or name.encode()).hexdigest()


def _questions(fields: Fields, name: str) -> list[tuple[str, object, object]]:
    """The id, question and answer of a record, or of each turn of LLaVA-Med's conversation."""
    if not any(fields.record.get(spelling) for spelling in CONVERSATIONS):
        for column in ("question", "answer"):
            fields.need(column)
        return [(name, fields.get("question"), fields.get("answer"))]
    turns = [turn for turn in conversation_of(fields.record) if turn["role"] != "system"]
    if not turns or [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise InvalidRecordError("its turns are not questions and answers by turns")
    texts = [turn["content"] for turn in turns]
    if (shown := sum(text.count(IMAGE_PLACEHOLDER) for text in texts[::2])) > 1:
        raise InvalidRecordError(f"its conversation is about {shown} images; allowed is one")
    pairs = list(zip(texts[::2], texts[1::2]))
    ids = [name] if len(pairs) == 1 else [f"{name}/{number}" for number in range(len(pairs))]
    return [(id_, *pair) for id_, pair in zip(ids, pairs)]


# What can be made of rows


def record_to_messages(record: dict) -> dict:
    """The row to train on, `{"id", "messages", "images"}`, of a row with `id`, `question`, `answer` and `image`."""
    turns = [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]
    return {"id": record["id"], "messages": normalize_messages(turns, 1), "images": [record["image"]]}


def training_open_answers(dataset: Dataset | IterableDataset) -> list[str]:
    """The different answers to the open questions of a training split, in lower case and in the order in which they
    first occur: the candidates among which LLaVA-Med's evaluation chooses (train_open_answers.json, which was never
    released).

    Args:
        dataset: as [`load_vqa`] returns it.
    """
    rows = dataset.select_columns(["answer", "answer_type"])
    return list(dict.fromkeys(row["answer"].lower() for row in rows if row["answer_type"] == "open" and row["answer"]))


def shared_images(dataset: Dataset | IterableDataset, other: Dataset | IterableDataset) -> set[str]:
    """The pictures of a data set that another has, too, by `image_id` or by the bytes of their files: what a model was
    trained on is no test.

    Args:
        dataset, other: as [`load_vqa`] returns them. No image is decoded, but one file of each is read.

    Returns:
        Each such `image_id` of `dataset`.
    """
    known, asked = _digests(other), _digests(dataset)
    digests = set(known.values())
    return {image_id for image_id, digest in asked.items() if image_id in known or digest in digests}


def _digests(dataset: Dataset | IterableDataset) -> dict[str, str]:
    """For each picture the SHA-256 of its file."""
    digests = {}
    for row in undecoded(dataset.select_columns(["image_id", "image"])):
        if row["image_id"] not in digests:
            content = image_source(row["image"])
            content = Path(content).read_bytes() if isinstance(content, str) else content
            digests[row["image_id"]] = hashlib.sha256(content).hexdigest()
    return digests
