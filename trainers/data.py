"""The data sets that a recipe names, as rows of messages and images to train on.

A source is a Hub id, a folder, a file, a medical VQA benchmark or the built-in phantoms; its records may be
LLaVA-Med's, chat messages, or questions and answers. All become the same three columns, `id`, `messages` and `images`,
so that sources can be mixed and streamed, and images stay files or compressed bytes until a batch needs them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from lladamedv.processing.datasets.llava_med import SPELLINGS, record_to_row
from lladamedv.processing.datasets.records import (
    RECORD_SUFFIXES,
    ImageFiles,
    InvalidRecordError,
    LoadReport,
    MissingImageError,
    from_rows,
    open_table,
    read_records,
    rows_of,
    text_of,
)
from lladamedv.processing.datasets.vqa import load_vqa, record_to_messages
from lladamedv.processing.datasets.vqa_columns import Fields, answer_text, unwrapped
from lladamedv.processing.phantoms import PhantomVQA, parse_phantoms

from .rows import RowError, normalize_messages, undecoded


logger = logging.getLogger(__name__)
STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")
# What each kind of records is known by: one of these columns, or all of them under one of their names.
_KINDS = {"messages": ("messages",), "llava_med": SPELLINGS}
_VQA_COLUMNS = ("question", "answer", "image")
_PHANTOMS, _VQA = "phantoms:", "vqa:"
_CHUNK = 5_000  # rows that are Python objects at a time
_EMBEDDED = True  # stands for an image whose bytes are in the data set, where only the text is looked at
_CONTENT = List({"type": Value("string"), "text": Value("string")})
ROW_FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": _CONTENT}),
        "images": List(Image()),
    }
)


@dataclass
class DataSource:
    """One source of a mixture.

    Args:
        path: a Hub id, also as `id@revision`; a folder with data files, or one that `Dataset.save_to_disk` wrote; a
            .json, .jsonl, .parquet, .csv or .tsv file; `phantoms:SEED:COUNT`, also with kinds of questions as in
            `phantoms:7:2000:closed,open` and several questions about a picture, `phantoms:7:2000:closed,open:8`; or a
            benchmark of [`load_vqa`] as `vqa:BENCHMARK`, `vqa:BENCHMARK:SPLIT` or, with local data,
            `vqa:BENCHMARK:SPLIT:PATH`, as in `vqa:slake` and `vqa:slake:train:/data/SLAKE`.
        name: configuration of a data set on the Hub; of a benchmark, the publication, as in `OctoMed/SLAKE`.
        revision: of a data set on the Hub; the full hash of a commit pins it. Benchmarks pin their own where they can.
        split: which split of a Hub id, a folder, or a benchmark whose `path` does not say so.
        image_folder: folder that names of image files are relative to; by default where the data file lies.
        weight: share of the mixture, relative to the other weights; all sources of a mixture have one, or none.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    image_folder: str | None = None
    weight: float | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


def load_dataset_mixture(
    sources: Sequence[DataSource | dict | str],
    image_folder: str | None = None,
    streaming: bool = False,
    seed: int = 0,
    stopping_strategy: str = "first_exhausted",
    invalid_records: str = "error",
    argument: str = "sources",
) -> tuple[Dataset | IterableDataset, list[LoadReport]]:
    """Load sources and mix them.

    Args:
        sources: each a [`DataSource`], a dict of its fields, or its `path` alone.
        image_folder: for sources that have none.
        streaming: read rows as they are needed. The rows and their order are the same.
        seed: of the order in which weighted sources take turns.
        stopping_strategy: where a weighted mixture ends. `"first_exhausted"`: with the first source of which no row is
            left, so that no row comes twice; `"all_exhausted"`: when every row of every source came at least once, so
            that smaller sources are repeated; `"all_exhausted_without_replacement"`: when every row came exactly once,
            so that only the order follows the weights. Without weights sources take turns row by row, and every row
            comes exactly once.
        invalid_records: what to do with records that cannot become rows: stop (`"error"`) or leave them out and report
            how many (`"skip"`). A record whose image file is missing is always left out and reported.
        argument: how error messages call `sources`.

    Returns:
        A data set with `ROW_FEATURES`, and a report per source.

    Raises:
        ValueError: for a value that is not allowed, a source that is not there, cannot be read, has other columns, or
            has no rows.
    """
    sources = [_as_source(source, image_folder, argument) for source in sources]
    if not sources:
        raise ValueError(f"`{argument}` is empty; at least one source is needed.")
    if stopping_strategy not in STOPPING_STRATEGIES:
        raise ValueError(f"`stopping_strategy` is {stopping_strategy!r}; allowed are {STOPPING_STRATEGIES}.")
    weights = [source.weight for source in sources]
    if any(weight is not None for weight in weights):
        if not all(isinstance(weight, (int, float)) and weight > 0 for weight in weights):
            raise ValueError(
                f"`weight` of `{argument}` is {weights}; allowed are numbers above 0 for all, or for none."
            )
        weights = [weight / sum(weights) for weight in weights]
    loaded = [_load(source, streaming, invalid_records, argument) for source in sources]
    parts, reports = [dataset for dataset, _ in loaded], [report for _, report in loaded]
    if len(parts) == 1:
        return parts[0], reports
    if weights[0] is None:
        weights, stopping_strategy = None, "all_exhausted_without_replacement"
    return datasets.interleave_datasets(parts, weights, seed, stopping_strategy=stopping_strategy), reports


def _as_source(source, image_folder: str | None, argument: str) -> DataSource:
    if isinstance(source, dict):
        unknown = set(source) - set(DataSource.__dataclass_fields__)
        if unknown or "path" not in source:
            raise ValueError(
                f"`{argument}` holds {source}; allowed are `path` and, if need be, "
                f"{sorted(set(DataSource.__dataclass_fields__) - {'path'})}."
            )
        source = DataSource(**source)
    elif not isinstance(source, DataSource):
        source = DataSource(str(source))
    changes = {"image_folder": source.image_folder or image_folder}
    path, at, revision = source.path.rpartition("@")
    local = os.path.exists(source.path) or (source.path.startswith(_VQA) and source.path.count(":") > 2)
    if at and source.revision is None and not local:
        changes |= {"path": path, "revision": revision}
    return replace(source, **changes)


def _load(source: DataSource, streaming: bool, invalid_records: str, argument: str):
    """The rows of a source, and the report that they fill."""
    report = LoadReport(str(source), invalid_records)
    if source.path.startswith(_PHANTOMS):
        rows = partial(_phantom_rows, _parse_phantoms(source.path, argument), report)
        dataset = from_rows(rows, ROW_FEATURES, streaming)
    elif source.path.startswith(_VQA):
        dataset, report = _load_benchmark(source, streaming, invalid_records, argument)
    elif (path := _records_file(source)) is not None:
        records = (record for _, record in read_records(path, invalid_records == "skip") if isinstance(record, dict))
        first = next((each for record in records for each in unwrapped(record)), None)
        if first is None:
            raise ValueError(f"`{argument}` holds {str(source)!r}, which has no records.")
        images = ImageFiles(path.parent if source.image_folder is None else source.image_folder)
        convert = partial(_to_row, kind=_kind_of(first, source, argument), images=images)
        dataset = from_rows(partial(rows_of, path, convert, report, unwrapped), ROW_FEATURES, streaming)
    else:
        dataset = _from_table(_open(source, streaming, argument), source, report, argument)
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"`{argument}` holds a source without a row to train on: {report.summary()}.")
    return dataset, report


def _records_file(source: DataSource) -> Path | None:
    """The file of a source's records, itself or in a folder that of its split; `None` if they are in a table."""
    path = Path(source.path).expanduser()
    candidates = [path / f"{source.split}{suffix}" for suffix in RECORD_SUFFIXES] if path.is_dir() else [path]
    return next((file for file in candidates if file.suffix.lower() in RECORD_SUFFIXES and file.is_file()), None)


def _kind_of(columns, source: DataSource, argument: str) -> str:
    """Which kind of records has these columns."""
    for kind, alternatives in _KINDS.items():
        if any(name in columns for name in alternatives):
            return kind
    fields = Fields(dict.fromkeys(columns))
    read = {column: next(iter(fields.names(column)), None) for column in _VQA_COLUMNS}
    if None in read.values():
        raise ValueError(
            f"`{argument}` holds {str(source)!r}, which has the columns {sorted(columns)}; allowed are messages, or "
            f"{' or '.join(SPELLINGS)}, or {', '.join(_VQA_COLUMNS)}, also by other usual names."
        )
    if any(name not in (column, "images") for column, name in read.items()):
        logger.warning("%s: %s", source, ", ".join(f"{column} is read from {name!r}" for column, name in read.items()))
    return "vqa"


# Rows from records


def _to_row(record: dict, record_id: str, kind: str, images: ImageFiles) -> dict:
    """One record as a row.

    Args:
        record_id: what to call a record without an id.
        kind: one of `_KINDS`, or "vqa".
        images: where image files are.

    Raises:
        InvalidRecordError, MissingImageError: if it cannot become one.
    """
    fields = Fields(record)
    if kind == "vqa" and not {"image", "images"} & set(record):
        record = {**record, "image": fields.get("image")}
    given = [_find(image, images) for image in _given_images(record)]
    name = next((str(record[key]) for key in ("id", "qid", "question_id") if record.get(key) is not None), record_id)
    if kind == "llava_med":
        row = record_to_row({**record, "image": ["" for _ in given]}, record_id)
        return {**row, "id": name, "images": given}
    if kind == "vqa":
        if not given:
            raise MissingImageError(f"{record.get('image')}")
        turns = {"question": text_of(fields.get("question")) or "", "answer": answer_text(fields.get("answer"))}
        for column, text in turns.items():
            if not text.strip():
                raise InvalidRecordError(f"`{column}` is {fields.get(column)!r:.200}; allowed are texts and numbers")
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns.values())]
    else:
        messages = record.get("messages")
    try:
        messages = normalize_messages(messages, len(given))
    except RowError as error:
        raise InvalidRecordError(str(error)) from None
    for message in messages:
        message["content"] = [{"type": part["type"], "text": part.get("text")} for part in message["content"]]
    return {"id": name, "messages": messages, "images": given}


def _given_images(record: dict) -> list:
    """The images that a record has or names, under `image` or `images`, which may be one or a list.

    Raises:
        InvalidRecordError: if it has both.
        MissingImageError: if one of a list is missing.
    """
    given = [record[name] for name in ("image", "images") if _is_image(record.get(name))]
    if len(given) > 1:
        raise InvalidRecordError("it has both `image` and `images`")
    images = given[0] if given and isinstance(given[0], list) else given
    if not all(map(_is_image, images)):
        raise MissingImageError(f"{next(image for image in images if not _is_image(image))}")
    return images


def _is_image(image) -> bool:
    return any(image.values()) if isinstance(image, dict) else bool(image)


def _find(image, images: ImageFiles):
    """An image as the data set shall hold it: with its bytes, or with the full path of a file that is there."""
    if image is _EMBEDDED:
        return image
    if isinstance(image, dict):
        return image if image.get("bytes") is not None else images.find(image["path"])
    if not isinstance(image, str):
        raise InvalidRecordError(f"an image is a {type(image).__name__}, not the name of a file")
    return images.find(image)


# Rows from tables


def _open(source: DataSource, streaming: bool, argument: str) -> Dataset | IterableDataset:
    try:
        return open_table(source.path, source.split, source.name, source.revision, streaming)
    except ValueError as error:
        raise ValueError(
            f"`{argument}` holds {str(source)!r}, which cannot be loaded: {error}. Allowed are a Hub id, also with "
            "@revision, a folder, a .json, .jsonl, .parquet, .csv or .tsv file, phantoms:SEED:COUNT, and vqa:BENCHMARK."
        ) from error


def _from_table(table, source: DataSource, report: LoadReport, argument: str):
    """The rows of a table, with its images neither decoded nor, where that can be helped, read."""
    first = next(iter(table), None)
    if first is None:
        raise ValueError(f"`{argument}` holds {str(source)!r}, which has no records.")
    columns = list(first)
    kind = _kind_of(columns, source, argument)
    table = undecoded(table)
    folder = source.image_folder or (source.path if os.path.isdir(source.path) else os.path.dirname(source.path))
    names = f"{Path(source.path).stem}/{source.split}"
    options = {"kind": kind, "images": ImageFiles(folder), "names": names}
    if isinstance(table, IterableDataset):
        options["report"] = report
        rows = table.map(_convert_batch, batched=True, with_indices=True, remove_columns=columns, fn_kwargs=options)
        return rows.cast(ROW_FEATURES)  # `features` of `map` would leave the images undecoded
    # Two passes: the first, over the texts, finds what is left out and is made every time; the second, which writes the
    # images, is cached by `datasets`.
    keep = []
    for number, record in enumerate(_light_records(table)):
        record_id = f"{names}/{number}"
        try:
            _to_row(record, record_id, kind, options["images"])
        except InvalidRecordError as error:
            report.leave_out(record_id, error)
            continue
        keep.append(number)
    report.rows = len(keep)
    rows = table if len(keep) == len(table) else table.select(keep)
    options["keep"] = keep
    return rows.map(_convert_kept, with_indices=True, remove_columns=columns, features=ROW_FEATURES, fn_kwargs=options)


def _convert_batch(batch: dict[str, list], numbers: list[int], kind, images, names, report) -> dict:
    """A batch of a stream as rows, without the records that cannot become one."""
    rows = []
    for number, *values in zip(numbers, *batch.values()):
        record_id, is_new = f"{names}/{number}", report.begin(number)
        try:
            rows.append(_to_row(dict(zip(batch, values)), record_id, kind, images))
        except InvalidRecordError as error:
            report.leave_out(record_id, error)
        else:
            report.rows += is_new
    return {column: [row[column] for row in rows] for column in ROW_FEATURES}


def _convert_kept(record: dict, number: int, kind, images, names, keep) -> dict:
    return _to_row(record, f"{names}/{keep[number]}", kind, images)


def _light_records(table: Dataset) -> Iterator[dict]:
    """The records of a table with `_EMBEDDED` in place of images whose bytes it holds: they may be gigabytes."""
    for batch in table.with_format("arrow").iter(_CHUNK):
        columns = {
            name: _light_images(batch[name]) if name in ("image", "images") else batch[name].to_pylist()
            for name in batch.column_names
        }
        for values in zip(*columns.values()):
            yield dict(zip(columns, values))


def _light_images(column: pa.ChunkedArray) -> list:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        images = iter(_light_images(column.flatten()))
        lengths = pc.list_value_length(column).to_pylist()
        return [None if length is None else list(islice(images, length)) for length in lengths]
    if not pa.types.is_struct(column.type):
        return column.to_pylist()
    embedded = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    paths = pc.struct_field(column, "path").to_pylist()
    return [_EMBEDDED if inside else path for inside, path in zip(embedded, paths)]


# Benchmarks


def _load_benchmark(source: DataSource, streaming: bool, invalid_records: str, argument: str):
    benchmark, split, path = [*source.path.removeprefix(_VQA).split(":", 2), "", ""][:3]
    try:
        dataset, report = load_vqa(
            benchmark,
            split or source.split,
            source=source.name,
            path=path or None,
            image_folder=source.image_folder,
            revision=source.revision,
            streaming=streaming,
            invalid_records=invalid_records,
        )
    except ValueError as error:
        raise ValueError(f"`{argument}` holds {str(source)!r}, which cannot be loaded: {error}") from error
    dataset, columns = undecoded(dataset), list(dataset.features)
    if streaming:
        return dataset.map(record_to_messages, remove_columns=columns).cast(ROW_FEATURES), report
    return dataset.map(record_to_messages, remove_columns=columns, features=ROW_FEATURES), report


# Phantoms


def _parse_phantoms(path: str, argument: str) -> dict:
    try:
        return parse_phantoms(path.removeprefix(_PHANTOMS))
    except ValueError as error:
        raise ValueError(f"`{argument}` holds {path!r}; after {_PHANTOMS!r} {error}.") from None


def _phantom_rows(phantoms: dict, report: LoadReport) -> Iterator[dict]:
    for number, example in enumerate(PhantomVQA(**phantoms)):
        turns = {"user": example.question, "assistant": example.answer}
        messages = normalize_messages([{"role": role, "content": text} for role, text in turns.items()], 1)
        for message in messages:
            message["content"] = [{"type": part["type"], "text": part.get("text")} for part in message["content"]]
        report.rows += report.begin(number)
        yield {"id": f"phantoms/{phantoms['seed']}/{number}", "messages": messages, "images": [example.image]}


__all__ = ["ROW_FEATURES", "STOPPING_STRATEGIES", "DataSource", "load_dataset_mixture"]
