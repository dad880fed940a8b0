"""Questions about many pictures: `lladamedv ask FOLDER_OR_TABLE`, and a class for `map_batches` of Ray Data.

A picture is read and encoded once for all questions about it, and questions about different pictures share forward
passes. A picture that cannot be read, or a question that cannot be asked, becomes a row that says why.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .answer_table import SUFFIXES, write_table
from .paths import check_new_file
from .units import Looking, Unit, told, units_of_records


SKIPPED_FILE = "skipped.txt"
_CHUNK = 4  # times the batch size: questions that are made ready, and put in order of their lengths, at a time


class ManyPictures:
    """Asks a model about many pictures, with `batch_size` questions in work at a time.

    The answers are those of one question at a time, whatever comes with it: see [`ContinuousBatch`].

    Args:
        model, processor: as loaded.
        batch_size: how many questions are in work at a time.
        candidates: answer with sets of these, by the model's calibration: see [`answer_set`].
        group: with candidates: the group of the questions.
        options: of `generate`.

    Attributes:
        columns: what an answer has, and its types.

    Raises:
        ValueError: as [`answer_set`] and `generate` do for their arguments, before anything is asked.
    """

    def __init__(self, model, processor, *, batch_size: int = 8, candidates=None, group=None, **options):
        from lladamedv.evaluation.answer_sets import calibrated_candidates, picture_distances
        from lladamedv.modeling_lladamedv.continuous_batching_lladamedv import ContinuousBatch

        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; allowed are whole numbers of at least 1.")
        options["return_dict_in_generate"] = True
        in_force = model.resolve_generation_config(**options)
        self.model, self.processor, self.batch_size, self.options = model.eval(), processor, batch_size, options
        self.candidates, self.group = candidates and calibrated_candidates(model, candidates, group), group
        distances = picture_distances(model)
        self._batch = ContinuousBatch(model, sys.maxsize, describe_pictures=distances)
        self.columns: dict[str, type] = {"answer": str}
        if self.candidates:
            self.columns |= {"abstained": bool, **{f"probability of {each}": float for each in self.candidates}}
            self.columns |= {"notes": str}
        else:
            self.columns |= {"confidence": float}
            if in_force.abstention_threshold is not None:
                self.columns |= {"abstained": bool}
            if in_force.output_image_reliance:
                self.columns |= {"image_reliance": float}
        if distances is not None:
            self.columns |= {"warning": str}
        self.columns |= {"error": str}

    def ask(self, pictures: Sequence[tuple[Any, Sequence[str]]]) -> list[list[dict[str, Any]]]:
        """Answers to questions about pictures.

        Args:
            pictures: each an RGB `PIL.Image`, and what is asked about it.

        Returns:
            For each question about each picture the values of `columns`; of a question that cannot be asked all are
            `None` but `error`.
        """
        answers = [[dict.fromkeys(self.columns) for _ in questions] for _, questions in pictures]
        ready = []  # (length of the prompt, place of the picture, number of the question, inputs)
        for place, (image, questions) in enumerate(pictures):
            shown = None
            for number, question in enumerate(questions):
                row = answers[place][number]
                try:
                    if self.candidates:
                        row |= self._set(image, question)
                        continue
                    inputs, shown = self._encode(image, question, shown)
                    ready.append((inputs["input_ids"].shape[1], place, number, inputs))
                except ValueError as error:
                    row["error"] = told(error)
        ready.sort(key=lambda each: each[:3])
        self._denoise(ready, answers)
        return answers

    def _encode(self, image, question: str, shown: Mapping | None) -> tuple[dict, Mapping]:
        """The model's inputs; of a picture that was `shown` before, its pixels are those."""
        from lladamedv.evaluation.answering import encode_chats, question_about

        chats = [question_about(image, question)]
        inputs = dict(encode_chats(self.model, self.processor, chats, return_pixel_values=shown is None))
        shown = inputs if shown is None else shown
        return inputs | {"pixel_values": shown["pixel_values"]}, shown

    def _denoise(self, ready: list[tuple], answers: list[list[dict]]) -> None:
        """Let questions into the batch in their order, as places become free, and write down their answers."""
        import torch

        from lladamedv.evaluation.answering import read_answers

        waiting, running = iter(ready), []
        while True:
            while len(running) < self.batch_size and (each := next(waiting, None)) is not None:
                length, place, number, inputs = each
                row = answers[place][number]
                inputs |= {"tokenizer": self.processor.tokenizer, "streamer": _Warning(self.model, row), "seed": 0}
                try:
                    request = self._batch.submit(**inputs, **self.options)
                except ValueError as error:
                    row |= {**dict.fromkeys(self.columns), "error": told(error)}
                    continue
                running.append((request, length, row))
            if not running:
                return
            self._batch.step()
            for each in [each for each in running if each[0].future.done()]:
                running.remove(each)
                request, length, row = each
                if (error := request.future.exception()) is not None:
                    if not isinstance(error, (ValueError, torch.OutOfMemoryError)):
                        raise error  # of the device, which would answer no other question either
                    row |= {**dict.fromkeys(self.columns), "error": told(error)}
                    continue
                output = request.future.result()
                (answer,) = read_answers(self.processor, output, length, 0.0)
                found = {"answer": answer.text, "confidence": answer.confidence}
                found |= {"image_reliance": answer.image_reliance}
                if "abstained" in self.columns:
                    found["abstained"] = bool(output.abstained[0])
                row |= {name: found[name] for name in self.columns if name in found}

    def _set(self, image, question: str) -> dict[str, Any]:
        """The row of a set of answers."""
        from lladamedv.evaluation.answer_sets import answer_set

        found = answer_set(self.model, self.processor, image, question, self.candidates, self.group)
        row = {"answer": str(found), "abstained": found.abstained, "notes": " ".join(found.notes) or None}
        row |= {f"probability of {text}": value for text, value in found.probabilities.items()}
        return row | ({"warning": found.warning} if "warning" in self.columns else {})


class _Warning:
    """A streamer of a request: writes into the row whether the picture is unusual, and takes no notice of the rest."""

    def __init__(self, model, row: dict):
        self._model, self._row = model, row

    def put_descriptions(self, distances: list[float]) -> None:
        from lladamedv.evaluation.answer_sets import distance_warning

        self._row["warning"] = distance_warning(self._model, distances)

    def put(self, tokens) -> None:
        """The prompt, then finished blocks."""

    def end(self) -> None:
        """The answer is whole."""


def answer_units(many: ManyPictures, looking: Looking, units: Sequence[Unit]) -> list[list[dict[str, Any]]]:
    """Rows about units: for each question of a unit and each picture of it the `columns` of [`ManyPictures`], `row`
    (the question's number), `name`, `slice` and `image_steps`."""
    with ThreadPoolExecutor() as pool:  # decoding needs no interpreter
        views = list(pool.map(looking.views, units))
    asked = [
        (view.picture.image, [row.question for row in unit.rows])
        for unit, seen in zip(units, views)
        for view in seen
        if view.picture is not None
    ]
    answers, result = iter(many.ask(asked)), []
    for unit, seen in zip(units, views):
        result.append([])
        for view in seen:
            steps = None if view.picture is None else "; ".join(map(str, view.picture.steps)) or None
            failed = [{**dict.fromkeys(many.columns), "error": view.error}] * len(unit.rows)
            for number, answer in enumerate(failed if view.picture is None else next(answers)):
                about = {"row": number, "name": view.name, "slice": view.slice, "image_steps": steps}
                result[-1].append(about | answer)
    return result


def run_folder(output: Path) -> Path:
    """Where the state of a run lies, from which the same command goes on."""
    return output.with_name(f"{output.name}.run")


def check_output(output: Path) -> None:
    """Find out whether answers can be written, or an earlier run can go on.

    Raises:
        ValueError: if not, or if something else is there that would be replaced.
    """
    check_new_file(output, SUFFIXES)
    folder = run_folder(output)
    if output.exists() and not folder.is_dir():
        raise ValueError(f"The file {str(output)!r} is there, but no {folder.name!r} of its run; choose another name.")
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"The folder {str(folder)!r}, in which the run keeps its state, cannot be written.")


def answer_many(
    model, processor, units: Sequence[Unit], output: Path, *, looking: Looking | None = None, batch_size: int = 8,
    candidates: Sequence[str] | None = None, group: str | None = None, command: dict | None = None,
    skipped: Sequence[tuple[str, str]] = (), **options,
) -> dict[str, Any]:  # fmt: skip
    """Answer all questions about units and write the answers as a table.

    It can be stopped at any moment: called again, it goes on, and the file becomes the same. Pictures that have come
    or changed since are asked about, those that are gone leave the table, and what failed is tried again. Under
    `accelerate launch` the processes share the work.

    Args:
        model, processor: as loaded.
        units: of [`units_in_folder`] or [`units_in_table`].
        output: the file, .csv, .jsonl or .parquet; a folder beside it, `OUTPUT.run`, keeps the state of the run.
        looking: how pictures are read; by default as they are.
        batch_size, candidates, group, options: as of [`ManyPictures`].
        command: JSON-able; what else must be the same when the run goes on.
        skipped: path and reason of files that are not asked about, for `skipped.txt` beside the run's state.

    Returns:
        `rows`, `errors` (rows without an answer), `marked` (texts that got an apostrophe), `skipped`, and `complete`,
        whether no row has an error.

    Raises:
        ValueError: before anything is answered, if there is nothing to ask, if `output` cannot be written, or if
            `OUTPUT.run` is of a run with other settings.
    """
    from lladamedv.evaluation.answer_sets import calibration_of
    from lladamedv.evaluation.run_settings import run_settings
    from lladamedv.evaluation.runs import process_state, replace_file, run_items

    if not units:
        raise ValueError("`units` is empty: there is no picture to ask about.")
    check_output(output)
    looking = looking or Looking()
    many = ManyPictures(model, processor, batch_size=batch_size, candidates=candidates, group=group, **options)
    calibration = calibration_of(model)
    settings = {
        "command": command or {}, "reading": looking.options, "every": looking.every, "montage": looking.montage,
        "candidates": many.candidates, "group": group, **run_settings(model, processor, many.options, ()),
        "calibration_sha256": calibration and calibration.sha256,
    }  # fmt: skip
    settings.pop("data_sha256")  # of pictures, which may come and go

    def answer(places: list[int]) -> list[dict]:
        own = [units[place] for place in places]
        found = answer_units(many, looking, own)
        return [{"id": unit.key, "rows": rows} for unit, rows in zip(own, found)]

    def failed(record: dict) -> bool:
        return any(row["error"] is not None for row in record["rows"])

    at_once = 1 if looking.every or looking.montage else _CHUNK * batch_size // max(len(unit.rows) for unit in units)
    keys = [unit.key for unit in units]
    records = run_items(keys, answer, run_folder(output), settings, max(1, at_once), "picture", failed)
    rows = []
    for unit, record in zip(units, records):
        for view, each in enumerate(record["rows"]):
            place, question, given, name = unit.rows[each["row"]]
            about = {"id": given, "image": name or each["name"], "series": name or unit.name, "question": question}
            rows.append(((place, view), about | each))
    rows = [row for _, row in sorted(rows, key=lambda each: each[0])]
    columns = {"id": str} if any(row["id"] is not None for row in rows) else {}
    columns |= {"image": str} | ({"series": str, "slice": int} if looking.every and not looking.montage else {})
    columns |= {"question": str, **many.columns, "image_steps": str}
    columns["error"] = columns.pop("error")  # at the end
    marked = 0
    if process_state().is_main_process:
        marked = write_table(output, columns, rows)
        lines = "".join(f"{name}\t{reason}\n" for name, reason in skipped)
        replace_file(run_folder(output) / SKIPPED_FILE, lines)
    errors = sum(row["error"] is not None for row in rows)
    return {
        "rows": len(rows), "errors": errors, "marked": marked, "skipped": len(skipped), "complete": not errors,
    }  # fmt: skip


class PictureAnswerer:
    """Answers the questions of a table, batch by batch: a class for `map_batches` of Ray Data, or `map` of `datasets`.

    Args:
        model, dtype, device, revision: as of [`load_model`].
        batch_size: questions in work at a time.
        image_folder: what the names of image files are relative to; a folder or a .zip.
        reading: options of [`read_medical_image`].
        candidates, group: as of [`ManyPictures`].
        options: of `generate`.

    Raises:
        ValueError: as `load_model` and [`ManyPictures`].
    """

    def __init__(
        self, model: str = "demo", *, dtype: str = "auto", device: str = "auto", revision: str | None = None,
        batch_size: int = 8, image_folder: str | Path = ".", reading: dict | None = None,
        candidates: Sequence[str] | None = None, group: str | None = None, **options,
    ):  # fmt: skip
        from lladamedv.processing.datasets.readers import ImageFiles

        from .loading import load_model

        loaded = load_model(model, dtype, device, revision)
        self._many = ManyPictures(*loaded, batch_size=batch_size, candidates=candidates, group=group, **options)
        self._looking, self._images = Looking(reading or {}), ImageFiles(image_folder)

    def __call__(self, table):
        """
        Args:
            table (`pyarrow.Table`): with columns of images (names of files, URLs, or bytes as `datasets` stores them)
                and of questions, recognised by their names.

        Returns:
            `pyarrow.Table`: the same with the columns of the answers, `image_steps` and `error` behind.

        Raises:
            ValueError: if it has no such columns, or has columns of the answers' names.
        """
        import pyarrow

        from lladamedv.processing.datasets.columns import Fields

        from .answer_table import arrow_types

        for column in ("image", "question"):
            Fields(dict.fromkeys(table.column_names)).need(column)
        columns = {"image_steps": str, **self._many.columns}
        if taken := [name for name in columns if name in table.column_names]:
            raise ValueError(f"The table has columns {taken}, as the answers have: give them other names.")
        units = units_of_records(table.to_pylist(), self._images, ())
        rows = [None] * len(table)
        for unit, answers in zip(units, answer_units(self._many, self._looking, units)):
            for answer in answers:
                rows[unit.rows[answer["row"]].place] = answer
        for field in arrow_types(columns):
            table = table.append_column(field, pyarrow.array([row[field.name] for row in rows], field.type))
        return table


__all__ = [
    "SKIPPED_FILE", "ManyPictures", "PictureAnswerer", "answer_many", "answer_units", "check_output", "run_folder",
]  # fmt: skip
