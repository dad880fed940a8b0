"""The data sets that a recipe names, as rows to train on, and their mixtures.

A source is a Hub id, a folder, a file, a medical VQA benchmark or the built-in phantoms; its records may have any form
that `processing.datasets.messages` knows. All become the same three columns, so that sources can be mixed and streamed,
and images stay files or compressed bytes until a batch needs them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset

from lladamedv.processing.datasets.columns import Fields
from lladamedv.processing.datasets.messages import (
    FORMS,
    PAIR_FEATURES,
    PREFERENCE,
    PROMPT_FEATURES,
    QUESTION,
    ROW_FEATURES,
    prompt_of,
    record_to_pair,
    record_to_prompt,
    record_to_row,
)
from lladamedv.processing.datasets.readers import ImageFiles, LoadReport, RowMaker, load_rows, open_records, undecoded
from lladamedv.processing.datasets.vqa import load_vqa, phantom_records, record_to_messages
from lladamedv.processing.phantoms import OPPOSITE, candidates_of, parse_phantoms


logger = logging.getLogger(__name__)
STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")
_PHANTOMS, _VQA = "phantoms:", "vqa:"
# What records can become: how they are read, and what rows have.
ROW_FORMS = {
    "answers": (record_to_row, ROW_FEATURES),
    "pairs": (record_to_pair, PAIR_FEATURES),
    "prompts": (record_to_prompt, PROMPT_FEATURES),
}


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
        split: of a Hub id, a folder, or a benchmark whose `path` names no split.
        image_folder: folder, or zip archive, that names of image files are relative to; by default where the data file
            lies, and imgs/ and images/ or their zip archives beside it.
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
    argument: str = "`sources`",
    form: str = "answers",
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
        argument: what error messages call `sources`.
        form: what rows are: `"answers"`, conversations to learn from; `"pairs"`, preferences, with `prompt`, `chosen`
            and `rejected`, as [`trl.DPOTrainer`] takes them, of phantoms closed questions with their right and their
            wrong answer; or `"prompts"`, with `prompt`, `answer` and `candidates`, for rewards.

    Returns:
        A data set with the features of its form in `ROW_FORMS`, and a report per source.

    Raises:
        ValueError: for a value that is not allowed, a source that is not there, cannot be read, has other columns, or
            has no rows.
    """
    sources = [_as_source(source, image_folder, argument) for source in sources]
    if not sources:
        raise ValueError(f"{argument} is empty; at least one source is needed.")
    if stopping_strategy not in STOPPING_STRATEGIES:
        raise ValueError(f"`stopping_strategy` is {stopping_strategy!r}; allowed are {STOPPING_STRATEGIES}.")
    weights = [source.weight for source in sources]
    if weighted := any(weight is not None for weight in weights):
        if not all(isinstance(weight, (int, float)) and weight > 0 for weight in weights):
            raise ValueError(
                f"`weight` of {argument} is {weights}; allowed are numbers above 0 for all, or for none."
            )
        weights = [weight / sum(weights) for weight in weights]
    parts, reports = zip(*(_load(source, streaming, invalid_records, argument, form) for source in sources))
    if len(parts) == 1:
        return parts[0], list(reports)
    strategy = stopping_strategy if weighted else "all_exhausted_without_replacement"
    weights = weights if weighted else None
    return datasets.interleave_datasets(list(parts), weights, seed, stopping_strategy=strategy), list(reports)


def _as_source(source, image_folder: str | None, argument: str) -> DataSource:
    if isinstance(source, dict):
        known = set(DataSource.__dataclass_fields__)
        if set(source) - known or "path" not in source:
            raise ValueError(
                f"{argument} holds {source}; allowed are `path` and, if need be, {sorted(known - {'path'})}."
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


def _load(source: DataSource, streaming: bool, invalid_records: str, argument: str, form: str):
    """The rows of a source, and the report that they fill."""
    report, called = LoadReport(str(source), invalid_records), f"{argument} holds {str(source)!r}"
    name, images = Path(source.path).stem, ImageFiles()
    if source.path.startswith((_VQA, _PHANTOMS)):
        try:
            if source.path.startswith(_VQA) and form == "pairs":
                raise ValueError("a benchmark has questions and answers, and no pairs")
            if source.path.startswith(_VQA):
                return _load_benchmark(source, streaming, invalid_records, form)
            phantoms = parse_phantoms(source.path.removeprefix(_PHANTOMS))
            records = partial(_PHANTOMS_AS.get(form, phantom_records), phantoms)
            next(iter(records()), None)
        except ValueError as error:
            raise ValueError(f"{called}, which cannot be loaded: {error}") from error
    else:
        records, images, first = open_records(
            source.path, source.split, called, image_folder=source.image_folder, streaming=streaming,
            keep_invalid=invalid_records == "skip", name=source.name, revision=source.revision,
        )  # fmt: skip
        if not callable(records):  # a table
            name = f"{name}/{source.split}"
        elif os.path.isdir(os.path.expanduser(source.path)):
            name = source.split  # of its file
        _check_columns(first, source, called, form)
    read, features = ROW_FORMS[form]
    maker = RowMaker(partial(_rows, read=read, images=images), report, name)
    dataset = load_rows(records, maker, features, streaming)
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"{argument} holds a source without a row to train on: {report.summary()}.")
    return dataset, report


def _rows(fields: Fields, name: str, read: Callable, images: ImageFiles) -> list[dict]:
    return [read(fields.record, name, images)]


def _phantom_pairs(phantoms: dict) -> Iterator[tuple[str, dict]]:
    for name, record in phantom_records(phantoms):
        if record["answer"] not in OPPOSITE:
            raise ValueError(f"{record['question']!r} has no one wrong answer; allowed are closed kinds and topics")
        pair = {"prompt": record["question"], "chosen": record["answer"], "rejected": OPPOSITE[record["answer"]]}
        yield name, {"id": record["id"], "image": record["image"], **pair}


def _phantom_prompts(phantoms: dict) -> Iterator[tuple[str, dict]]:
    for name, record in phantom_records(phantoms):
        yield name, record | {"candidates": candidates_of(record["question_type"])}


_PHANTOMS_AS = {"pairs": _phantom_pairs, "prompts": _phantom_prompts}


def _check_columns(record: dict, source: DataSource, called: str, form: str) -> None:
    """
    Raises:
        ValueError: if the first record of a source has no form that is known.
    """
    if form == "pairs" and not set(PREFERENCE) <= set(record):
        raise ValueError(f"{called}, which has the columns {sorted(record)}; pairs have {', '.join(PREFERENCE)}.")
    if form == "pairs" or any(set(columns) <= set(record) for columns in FORMS):
        return
    fields = Fields(record)
    read = {column: next(iter(fields.names(column)), None) for column in QUESTION}
    if None in read.values():
        raise ValueError(
            f"{called}, which has the columns {sorted(record)}; allowed are "
            f"{', or '.join(map(' and '.join, FORMS))}, or {', '.join(QUESTION)}, also by other usual "
            "names."
        )
    if any(name not in (column, "images") for column, name in read.items()):
        logger.warning("%s: %s", source, ", ".join(f"{column} is read from {name!r}" for column, name in read.items()))


def _load_benchmark(source: DataSource, streaming: bool, invalid_records: str, form: str):
    benchmark, split, path = [*source.path.removeprefix(_VQA).split(":", 2), "", ""][:3]
    dataset, report = load_vqa(
        benchmark, split or source.split, source=source.name, path=path or None, image_folder=source.image_folder,
        revision=source.revision, streaming=streaming, invalid_records=invalid_records,
    )  # fmt: skip
    dataset, features = undecoded(dataset), ROW_FORMS[form][1]
    read = record_to_messages if form == "answers" else lambda record: prompt_of(record_to_messages(record))
    rows = partial(dataset.map, read, remove_columns=list(dataset.features))
    return rows().cast(features) if streaming else rows(features=features), report


__all__ = ["STOPPING_STRATEGIES", "DataSource", "load_dataset_mixture"]
