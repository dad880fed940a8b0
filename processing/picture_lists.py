"""Which pictures a folder holds, and how the slices of a series become one picture: for questions about many at once.

Nothing here imports PyTorch: what a folder holds is said before a model is loaded.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .dicom import DicomFile, is_dicom, read_dicom_studies
from .medical_images import MedicalImage
from .medical_shared import MAX_IMAGE_PIXELS, Step, check_size
from .nifti import is_nifti
from .pictures import is_picture


class Found(NamedTuple):
    """What a folder holds.

    Attributes:
        pictures: paths of the files that are pictures, below the folder, in the order of their names.
        skipped: path of each other entry, and why it is left out.
    """

    pictures: list[str]
    skipped: list[tuple[str, str]]


def find_pictures(folder: str | Path, without: Iterable[Path] = ()) -> Found:
    """The pictures in a folder and all folders in it, told by the files' content; nothing is decoded.

    Args:
        without: files and folders that are passed over.

    Raises:
        OSError: if the folder itself cannot be listed.
    """
    found, own = Found([], []), {os.path.abspath(each) for each in without}
    os.listdir(folder)

    def skip(path: str, why: str) -> None:
        found.skipped.append((os.path.relpath(path, folder), why))

    for place, folders, files in os.walk(folder, onerror=lambda error: skip(error.filename, error.strerror)):
        folders[:] = sorted(each for each in folders if os.path.abspath(os.path.join(place, each)) not in own)
        for name in folders:
            if os.path.islink(path := os.path.join(place, name)):
                skip(path, "a link to a folder")
        for name in sorted(files):
            path = os.path.join(place, name)
            if os.path.abspath(path) in own:
                continue
            try:
                is_one = _is_picture(path)
            except OSError as error:
                skip(path, error.strerror or type(error).__name__)
                continue
            if is_one:
                found.pictures.append(os.path.relpath(path, folder))
            else:
                skip(path, "no picture")
    found.pictures.sort(key=lambda path: Path(path).parts)
    return found


def _is_picture(path: str) -> bool:
    """Whether a file is of a kind that [`read_medical_image`] reads, whole or broken."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe may never end
        return False
    with open(path, "rb") as file:
        head = file.read(132)
        file.seek(0)
        try:
            is_volume = is_nifti(file)
        except (OSError, EOFError):  # compressed, and broken: of what it holds nothing is known
            is_volume = head[:2] == b"\x1f\x8b" and ".nii" in path.lower()
        file.seek(0)
        return is_dicom(head) or is_volume or is_picture(file)


class Series(NamedTuple):
    """Files whose slices are looked at together.

    Attributes:
        name: what it is called, by its place in the folder.
        files: paths below the folder, in the order of their slices.
        frames: how many frames each file has; empty where only reading tells that.
        order: how the files were put in order, if there are several.
    """

    name: str
    files: tuple[str, ...]
    frames: tuple[int, ...] = ()
    order: str = ""


def find_series(folder: str | Path, found: Found, by_study: bool) -> tuple[list[Series], list[tuple[str, str]]]:
    """The series in a folder: DICOM files of one series, or with `by_study` of one study, and each other file alone.

    Args:
        found: of [`find_pictures`].

    Returns:
        The series by their first files, and more files that are left out: DICOM files without a picture.
    """
    folder, dicom, others = Path(folder), [], []
    for path in found.pictures:
        with open(folder / path, "rb") as file:
            (dicom if is_dicom(file.read(132)) else others).append(path)
    skipped, result, names = [], [Series(path, (path,)) for path in others], set(others)
    for study in read_dicom_studies(folder, dicom) if dicom else ():
        shown = [[file for file in series if file.frames] for series in study]
        empty = [file.path for series in study for file in series if not file.frames]
        skipped += [(path, "a DICOM file without a picture") for path in empty]
        for group in [[*chain.from_iterable(shown)]] if by_study else shown:
            if group:
                result.append(_series(group, names))
                names.add(result[-1].name)
    return sorted(result, key=lambda each: min(Path(file).parts for file in each.files)), skipped


def _series(files: Sequence[DicomFile], names: set[str]) -> Series:
    paths = tuple(file.path for file in files)
    name = paths[0] if len(paths) == 1 else os.path.commonpath(map(os.path.dirname, paths)) or "."
    number, base = 1, name
    while name in names:
        number += 1
        name = f"{base} ({number})"
    orders = ", ".join(dict.fromkeys(file.order for file in files))
    order = "" if len(paths) == 1 else f"slices in the order of their {orders}"
    return Series(name, paths, tuple(file.frames for file in files), order)


def parse_montage(text: str) -> tuple[int, int]:
    """Columns and rows of a montage, of a text such as "4x3".

    Raises:
        ValueError: if it is none.
    """
    if not (found := re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)):
        raise ValueError(f"{text!r}; allowed are COLUMNSxROWS, as 4x3, up to 99x99.")
    return int(found[1]), int(found[2])


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` places, from the first to the last and evenly between."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def lay_out(pictures: Sequence[MedicalImage], columns: int) -> Image.Image:
    """A montage of pictures, row by row from the top left, each in the middle of a cell as large as the largest.

    Raises:
        MedicalImageError: if it would have too many pixels.
    """
    width, height = (max(sizes) for sizes in zip(*(each.image.size for each in pictures)))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    check_size(rows * height, columns * width, MAX_IMAGE_PIXELS)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, each in enumerate(pictures):
        row, column = divmod(number, columns)
        left, top = (width - each.image.width) // 2, (height - each.image.height) // 2
        sheet.paste(each.image, (column * width + left, row * height + top))
    return sheet


def common_steps(pictures: Sequence[MedicalImage]) -> list[Step]:
    """What was done to some of several pictures, each thing once, but for which slice they show."""
    return list(dict.fromkeys(step for each in pictures for step in each.steps if step.kind != "choice"))


__all__ = ["Found", "Series", "common_steps", "find_pictures", "find_series", "lay_out", "parse_montage", "spread"]
