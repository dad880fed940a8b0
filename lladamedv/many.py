"""Questions about many pictures: `lladamedv ask FOLDER_OR_TABLE`, and a class for `map_batches` of Ray Data.

A picture is read and encoded once for all questions about it, and questions about different pictures share forward
passes. A picture that cannot be read, or a question that cannot be asked, becomes a row that says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lladamedv.processing.medical_images import MedicalImage, MedicalImageError, fetch_url, is_url, read_medical_image
from lladamedv.processing.medical_shared import Step
from lladamedv.processing.picture_lists import common_steps, find_pictures, find_series, lay_out, spread

from .answer_table import SUFFIXES, write_table
from .paths import check_new_file


TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_CHUNK = 4  # times the batch size: questions that are made ready, and put in order of their lengths, at a time


# What is asked


class Row(NamedTuple):
    """A question about a unit.

    Attributes:
        place: of the picture, or of the table's row, among all.
        question: the text.
        id: the table's, if it has any.
    """

    place: int
    question: str
    id: str | None = None


@dataclass(frozen=True)
class Unit:
    """What is read at a time: a picture, a volume, a series or a study.

    Attributes:
        name: as the output calls it.
        rows: the questions about it.
        files: the name of each file, and where it is: a path, a URL, or a function that returns its bytes.
        frames: how many slices each file has; empty where only reading tells that.
        order: how the files were put in order, if there are several.
        stamp: changes with the files' content.
        error: why there is nothing to ask about.
    """

    name: str
    rows: tuple[Row, ...]
    files: tuple[tuple[str, Any], ...] = ()
    frames: tuple[int, ...] = ()
    order: str = ""
    stamp: str = ""
    error: str | None = None

    @property
    def key(self) -> str:
        """The same as long as the same is asked about the same files."""
        asked = [self.name, [name for name, _ in self.files], self.stamp, self.error, [row[1:] for row in self.rows]]
        asked += [row.place for row in self.rows] if self.error else []  # several may lack the same
        return f"{self.name} {hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}"


def units_in_folder(
    folder: Path, questions: Sequence[str], *, series: bool = False, studies: bool = False, without: Sequence[Path] = ()
) -> tuple[list[Unit], list[tuple[str, str]]]:
    """Questions about all pictures in a folder and the folders in it.

    Args:
        series, studies: whether the DICOM files of a series, or of a study, are a unit.
        without: files and folders that are passed over.

    Returns:
        The units in the order of their names, and path and reason of each file that is left out.
    """
    found = find_pictures(folder, without)
    skipped = found.skipped
    if series or studies:
        groups, more = find_series(folder, found, studies)
        groups = [(each.name, each.files, each.frames, each.order) for each in groups]
        skipped = skipped + more
    else:
        groups = [(path, (path,), (), "") for path in found.pictures]
    units = []
    for place, (name, files, frames, order) in enumerate(groups):
        paths = [str(folder / file) for file in files]
        stamp = " ".join(map(_stamp, paths))
        rows = tuple(Row(place, question) for question in questions)
        units.append(Unit(name, rows, tuple(zip(files, paths)), frames, order, stamp))
    return units, skipped


def units_in_table(file: Path, questions: Sequence[str]) -> list[Unit]:
    """Questions about the pictures that a table names, in the order in which the pictures first come.

    Columns are recognised by their names (`COLUMNS` in `processing/datasets/columns.py`), image files looked for beside
    the table. A row that cannot be used is a unit with an error.

    Args:
        questions: about every picture; none if the table has a column of questions.

    Raises:
        ValueError: if the table cannot be read, has no column of images, or there are questions here and there, or
            neither.
    """
    from lladamedv.processing.datasets.columns import Fields
    from lladamedv.processing.datasets.readers import open_records

    records, images, first = open_records(str(file), "all", f"The table is {str(file)!r}", keep_invalid=True)
    Fields(first).need("image")
    column = next(iter(Fields(first).names("question")), None)
    if (column is None) == (not questions):
        if column is None:
            raise ValueError(f"`questions` is empty, and {str(file)!r} has no column of questions: {list(first)}.")
        raise ValueError(
            f"`questions` is {list(questions)}, but {str(file)!r} has questions of its own in its column {column!r}: "
            "leave `questions` out, or give the column another name."
        )
    lines = (record for _, record in records()) if callable(records) else records
    return units_of_records(lines, images, questions, None if callable(records) else records)


def units_of_records(lines: Iterable[Any], images, questions: Sequence[str], table=None) -> list[Unit]:
    """The units of records, or of the errors of those that could not be read.

    Args:
        images: [`ImageFiles`] that finds what the records name.
        questions: as of [`units_in_table`].
        table: of which the records are the rows, and which is asked again for the bytes of an image.
    """
    from lladamedv.processing.datasets.columns import Fields, InvalidRecordError, text_of
    from lladamedv.processing.datasets.readers import MissingImageError

    units: dict[str, Unit] = {}
    for place, record in enumerate(lines):
        name, asked, error, given = "", questions or ("",), None, None
        try:
            if isinstance(record, InvalidRecordError):
                raise record
            fields = Fields(record)
            given = fields.get("id")
            for column in ("image", *(() if questions else ("question",))):
                fields.need(column)
            stored = _one(fields.get("image"))
            name = (stored.get("path") if isinstance(stored, dict) else stored) or ""
            name = name if isinstance(name, str) else ""
            if not questions:
                asked = ((text_of(fields.get("question")) or "").strip(),)
                if not asked[0]:
                    raise InvalidRecordError("its question is empty")
            image = images.stored(stored)
            if (content := image["bytes"]) is not None:
                stamp = hashlib.sha256(content).hexdigest()
                key, source = stamp, partial(_stored_bytes, table, place) if table is not None else lambda c=content: c
            else:
                key = source = image["path"]
                stamp = _stamp(source)
                name = f"{name[:60]}…" if name[:5].lower() == "data:" else name
        except MissingImageError as caught:
            error = f"There is no such image file as {str(caught)!r}."
        except InvalidRecordError as caught:
            error = f"The row cannot be used: {caught}."
        given = None if given is None else text_of(given) or str(given)
        rows = tuple(Row(place, question, given) for question in asked)
        if error is not None:
            units[f"error {place}"] = Unit(name, rows, error=error)
        elif (known := units.get(key)) is not None:
            units[key] = replace(known, rows=known.rows + rows)
        else:
            units[key] = Unit(name, rows, ((name, source),), stamp=stamp)
    return list(units.values())


def _one(image):
    """The image of a record that may have a list of one."""
    from lladamedv.processing.datasets.columns import InvalidRecordError

    if isinstance(image, list):
        if len(image) != 1:
            raise InvalidRecordError(f"it has {len(image)} images; allowed is one")
        return image[0]
    return image


def _stored_bytes(table, place: int) -> bytes:
    from lladamedv.processing.datasets.columns import Fields

    stored = _one(Fields(table[place]).get("image"))
    return stored["bytes"] if isinstance(stored, dict) else bytes(stored)


def _stamp(path: str) -> str:
    """Changes with a file's content, without reading it; of a URL it is the URL."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return path if "://" in path or is_url(path) else "missing"
    return f"{state.st_size}:{state.st_mtime_ns}"


# What is looked at


class View(NamedTuple):
    """A picture that is asked about.

    Attributes:
        name: of its file, or of the study.
        slice: which slice of its series, from 0; `None` where all is looked at as it is.
        picture: what is looked at; `None` for one that cannot be read.
        error: why not.
    """

    name: str
    slice: int | None
    picture: MedicalImage | None
    error: str | None = None


class Looking(NamedTuple):
    """How units are read.

    Attributes:
        options: of [`read_medical_image`].
        every: look at every so-manyth slice, from the first; `None` for the one that `options` choose.
        montage: columns and rows of a montage, which shows slices spread over the whole unit; `None` for none.
        name_of: what errors call an option.
    """

    options: dict[str, Any] = {}
    every: int | None = None
    montage: tuple[int, int] | None = None
    name_of: Callable[[str], str] = "`{}`".format

    def views(self, unit: Unit) -> list[View]:
        """The pictures of a unit, or one that says why there is none."""
        if unit.error is not None:
            return [View(unit.name, None, None, unit.error)]
        try:
            return list(self._views(unit))
        except (ImportError, OSError, ValueError) as error:
            return [View(unit.name, None, None, _told(error, unit.name, self.name_of))]

    def _views(self, unit: Unit) -> Iterator[View]:
        if self.every is None and self.montage is None:
            yield View(unit.name, None, self._read(unit.files[0][1]))
            return
        slices = []
        for number, file in enumerate(unit.files):
            argument, count = ("frame", unit.frames[number]) if unit.frames else self._indices(file[1])
            slices += [(*file, {argument: index} if count > 1 else {}) for index in range(count)]
        chosen = range(len(slices))[:: self.every or 1]
        if self.montage is None:
            for place in chosen:
                name, source, index = slices[place]
                try:
                    yield View(name, place, self._read(source, **index))
                except (OSError, ValueError) as error:  # the others may be whole
                    yield View(name, place, None, _told(error, name, self.name_of))
            return
        chosen = [chosen[place] for place in spread(len(chosen), self.montage[0] * self.montage[1])]
        pictures = [self._read(source, **index) for _, source, index in (slices[place] for place in chosen)]
        columns = min(self.montage[0], len(pictures))
        said = f"{len(pictures)} of {len(slices)} slices, {columns} a row: {', '.join(map(str, chosen))} (from 0)"
        steps = [Step("choice", said), *([Step("choice", unit.order)] if unit.order else []), *common_steps(pictures)]
        sheet = lay_out(pictures, columns)
        yield View(unit.name, None, MedicalImage(sheet, (sheet.height, sheet.width), tuple(steps), {}))

    def _read(self, source: Any, **index: int) -> MedicalImage:
        from lladamedv.processing.datasets import image_source

        if callable(source):
            source = source()
        source = fetch_url(source) if is_url(source) else image_source(source)
        return read_medical_image(source, **self.options, **index)

    def _indices(self, source: Any) -> tuple[str, int]:
        """By which argument the slices of a file are chosen, and how many there are."""
        try:
            picture = self._read(source)
        except MedicalImageError as error:
            if error.missing != "page":
                raise
            picture = self._read(source, page=0)
        names = ("frame", "slice_index", "page")
        return next(((name, picture.choices[name][2]) for name in names if picture.choices.get(name)), ("page", 1))


def _told(error: Exception, name: str, name_of: Callable[[str], str]) -> str:
    if isinstance(error, MedicalImageError):
        return error.told(lambda argument: repr(name) if argument == "source" else name_of(argument))
    return " ".join(str(error).split()) or type(error).__name__


# Answers


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
        from lladamedv.evaluation.answer_sets import calibrated_candidates, calibration_of
        from lladamedv.modeling_lladamedv.continuous_batching_lladamedv import ContinuousBatch

        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; allowed are whole numbers of at least 1.")
        in_force = model.resolve_generation_config(**options, return_dict_in_generate=True)
        self.model, self.processor, self.batch_size, self.options = model.eval(), processor, batch_size, options
        self.candidates, self.group = candidates and calibrated_candidates(model, candidates, group), group
        self._batch = ContinuousBatch(model, sys.maxsize)
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
        if (calibration := calibration_of(model)) is not None and calibration.picture_model is not None:
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
                    row["error"] = _told(error, "", str)
            if "warning" in self.columns and shown is not None:
                from lladamedv.evaluation.answer_sets import picture_warning

                warning = picture_warning(self.model, shown["pixel_values"])
                for row in answers[place]:
                    row["warning"] = None if row["error"] else warning
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
                try:
                    request = self._batch.submit(
                        **inputs, tokenizer=self.processor.tokenizer, seed=0, **self.options
                    )
                except ValueError as error:
                    row |= {**dict.fromkeys(self.columns), "error": _told(error, "", str)}
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
                    row |= {**dict.fromkeys(self.columns), "error": _told(error, "", str)}
                    continue
                output = request.future.result()
                (answer,) = read_answers(self.processor, output, length, 0.0)
                row |= {"answer": answer.text, "confidence": answer.confidence}
                row |= {"image_reliance": answer.image_reliance} if "image_reliance" in self.columns else {}
                row |= {"abstained": bool(output.abstained[0])} if "abstained" in self.columns else {}

    def _set(self, image, question: str) -> dict[str, Any]:
        """The row of a set of answers."""
        from lladamedv.evaluation.answer_sets import answer_set

        found = answer_set(self.model, self.processor, image, question, self.candidates, self.group)
        row = {"answer": str(found), "abstained": found.abstained, "notes": " ".join(found.notes) or None}
        row |= {f"probability of {text}": value for text, value in found.probabilities.items()}
        return row | ({"warning": found.warning} if "warning" in self.columns else {})


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
    model, processor, units: Sequence[Unit], output: Path, *, looking: Looking = Looking(), batch_size: int = 8,
    candidates: Sequence[str] | None = None, group: str | None = None, command: dict | None = None, **options,
) -> dict[str, Any]:  # fmt: skip
    """Answer all questions about units and write the answers as a table.

    It can be stopped at any moment: called again, it goes on, and the file becomes the same. Pictures that have come
    or changed since are asked about, those that are gone leave the table, and what failed is tried again. Under
    `accelerate launch` the processes share the work.

    Args:
        model, processor: as loaded.
        units: of [`units_in_folder`] or [`units_in_table`].
        output: the file, .csv, .jsonl or .parquet; a folder beside it, `OUTPUT.run`, keeps the state of the run.
        looking: how pictures are read.
        batch_size, candidates, group, options: as of [`ManyPictures`].
        command: JSON-able; what else must be the same when the run goes on.

    Returns:
        `rows`, `errors` (rows without an answer), `marked` (texts that got an apostrophe), and `complete`.

    Raises:
        ValueError: before anything is answered, if there is nothing to ask, if `output` cannot be written, or if
            `OUTPUT.run` is of a run with other settings.
    """
    from lladamedv.evaluation.answer_sets import calibration_of
    from lladamedv.evaluation.run_settings import run_settings
    from lladamedv.evaluation.runs import process_state, run_items

    if not units:
        raise ValueError("`units` is empty: there is no picture to ask about.")
    check_output(output)
    many = ManyPictures(model, processor, batch_size=batch_size, candidates=candidates, group=group, **options)
    calibration = calibration_of(model)
    settings = {
        "command": command or {}, "reading": looking.options, "every": looking.every, "montage": looking.montage,
        "candidates": many.candidates, "group": group, **run_settings(model, processor, options, ()),
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
            place, question, given = unit.rows[each["row"]]
            about = {"id": given, "image": each["name"], "series": unit.name, "question": question}
            rows.append(((place, view), about | each))
    rows = [row for _, row in sorted(rows, key=lambda each: each[0])]
    columns = {"id": str} if any(row["id"] is not None for row in rows) else {}
    columns |= {"image": str} | ({"series": str, "slice": int} if looking.every and not looking.montage else {})
    columns |= {"question": str, **many.columns, "image_steps": str}
    columns["error"] = columns.pop("error")  # at the end
    marked = write_table(output, columns, rows) if process_state().is_main_process else 0
    errors = sum(row["error"] is not None for row in rows)
    return {"rows": len(rows), "errors": errors, "marked": marked, "complete": not errors}


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
        from .answer_table import arrow_types

        columns = {"image_steps": str, **self._many.columns}
        if taken := [name for name in columns if name in table.column_names]:
            raise ValueError(f"The table has columns {taken}, as the answers have: give them other names.")
        units = units_of_records(table.to_pylist(), self._images, ())
        rows = [None] * len(table)
        for unit, answers in zip(units, answer_units(self._many, self._looking, units)):
            for answer in answers:
                rows[unit.rows[answer["row"]].place] = answer
        for field in arrow_types(columns):
            table = table.append_column(field, [[row[field.name] for row in rows]])
        return table


__all__ = [
    "TABLES", "Looking", "ManyPictures", "PictureAnswerer", "Row", "Unit", "View", "answer_many", "answer_units",
    "check_output", "run_folder", "units_in_folder", "units_in_table", "units_of_records",
]  # fmt: skip
