"""What is asked about many pictures: the files of a folder or the rows of a table, and how slices become pictures.

Nothing here imports PyTorch: what there is to do is said before a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lladamedv.processing.medical_images import MedicalImage, MedicalImageError, fetch_url, is_url, read_medical_image
from lladamedv.processing.medical_shared import Step
from lladamedv.processing.picture_lists import common_steps, find_pictures, find_series, lay_out, spread


TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class Row(NamedTuple):
    """A question about a unit.

    Attributes:
        place: of the picture, or of the table's row, among all.
        question: the text.
        id: the table's, if it has any.
        name: what the table calls the picture; `None` without a table.
    """

    place: int
    question: str
    id: str | None = None
    name: str | None = None


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


def unit_of_picture(source: str, questions: Sequence[str]) -> Unit:
    """Questions about one picture, by its path or URL."""
    return Unit(source, tuple(Row(0, each) for each in questions), ((source, source),), stamp=_stamp(source))


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
        rows = tuple(Row(place, question, given, name) for question in asked)
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
        except Exception as error:  # libraries raise many kinds for broken files
            return [View(unit.name, None, None, told(error, unit.name, self.name_of))]

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
                except Exception as error:  # the others may be whole
                    yield View(name, place, None, told(error, name, self.name_of))
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
        return read_medical_image(source, **self.options | index)

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


def told(error: Exception, name: str = "", name_of: Callable[[str], str] = str) -> str:
    """What an error says about the picture of a name, in one line; `name_of` is that of [`Looking`]."""
    if isinstance(error, MedicalImageError):
        return error.told(lambda argument: repr(name) if argument == "source" else name_of(argument))
    kind = "" if isinstance(error, (ImportError, OSError, ValueError)) else f"{type(error).__name__}: "
    return kind + (" ".join(str(error).split()) or type(error).__name__)


__all__ = [
    "TABLES", "Looking", "Row", "Unit", "View", "told", "unit_of_picture", "units_in_folder", "units_in_table",
    "units_of_records",
]  # fmt: skip
