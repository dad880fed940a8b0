"""One slice of a NIfTI volume into 8-bit pixels, turned the way radiologists look at it, whatever the file's axes.

Only that slice is read, not the volume, and none of the header's free texts.
"""

from __future__ import annotations

import gzip
import math
from typing import BinaryIO

import numpy as np

from .medical_shared import (
    MedicalImageError,
    apply_percentiles,
    apply_window,
    arg,
    check_bytes,
    check_size,
    check_window,
    choose_index,
    describe_window,
    logger,
    require,
)


# Canonical axis (right, anterior, superior) that each view looks along.
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
PERCENTILES = (1, 99)
_HEADER_BYTES = 352


def is_nifti(file: BinaryIO) -> bool:
    """Whether an open file is a NIfTI-1 or NIfTI-2 volume, gzipped or not; it is left at its beginning."""
    head = _uncompressed(file).read(_HEADER_BYTES)
    file.seek(0)
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def read_nifti(
    file: BinaryIO,
    steps: list[str],
    *,
    slice_index: int | None,
    time_index: int | None,
    axis: str,
    window,
    max_pixels: int,
) -> np.ndarray:
    """One slice as 8-bit pixels.

    Args:
        file: open binary file.
        steps: what is done is added to it.
        slice_index, time_index, axis, window, max_pixels: see [`read_medical_image`].

    Returns:
        `uint8` `(height, width)`. Axial and coronal slices have the patient's right on the left, sagittal ones the
        front on the left; anterior or superior is up.

    Raises:
        MedicalImageError, ImportError: see [`read_medical_image`].
    """
    nibabel = require("nibabel")
    if axis not in AXES:
        raise MedicalImageError(f"{arg('axis')} is {axis!r}; allowed are {', '.join(AXES)}.")
    stream = _uncompressed(file)
    version = nibabel.Nifti2Image if stream.read(_HEADER_BYTES)[4:8] == b"n+2\0" else nibabel.Nifti1Image
    stream.seek(0)
    volume = version.from_stream(stream)
    shape = volume.shape
    if len(shape) not in (3, 4) or not np.issubdtype(volume.get_data_dtype(), np.number) or 0 in shape:
        raise MedicalImageError(
            f"{arg('source')} is a NIfTI array of shape {shape} and type {volume.get_data_dtype()}; allowed are "
            "volumes of real numbers with 3 dimensions, or 4 with time."
        )
    if np.issubdtype(volume.get_data_dtype(), np.complexfloating):
        raise MedicalImageError(f"{arg('source')} is a NIfTI volume of complex numbers; allowed are real ones.")
    times = shape[3] if len(shape) == 4 else 1
    time = choose_index("time_index", time_index, times, "volume", steps, required=True)

    if not volume.header["sform_code"] and not volume.header["qform_code"]:
        steps.append("no orientation in the file (sform and qform): axes taken as left, anterior, superior")
        logger.warning("the NIfTI file has no orientation (sform and qform): left and right may be exchanged")
    orientation = nibabel.io_orientation(volume.affine)  # (array axes, [canonical axis, direction])
    array_axis = int(np.flatnonzero(orientation[:, 0] == AXES[axis])[0])
    chosen = choose_index("slice_index", slice_index, shape[array_axis], f"{axis} slice", steps)
    # Counted along the canonical axis: from the patient's left, back or feet.
    stored = chosen if orientation[array_axis, 1] > 0 else shape[array_axis] - 1 - chosen
    across, up = (int(np.flatnonzero(orientation[:, 0] == other)[0]) for other in range(3) if other != AXES[axis])
    check_size(shape[up], shape[across], max_pixels)
    needed = volume.dataobj.offset + math.prod(shape) * volume.get_data_dtype().itemsize
    check_bytes(file, needed, compressed=stream is not file)
    values = _read_slice(volume, array_axis, stored, time, max_pixels)
    values = nibabel.apply_orientation(values.astype(np.float32), orientation)
    steps.append("oriented to the closest right-anterior-superior axes")
    # Rows downwards and columns to the right, from superior (or anterior) and from the patient's right (or front).
    values = values.take(0, axis=AXES[axis])[::-1, ::-1].T
    columns, rows = (float(volume.header.get_zooms()[other]) for other in (across, up))
    if not np.isclose(rows, columns, rtol=0.01):
        steps.append(f"pixels are {rows:g} high and {columns:g} wide, and stay so: the picture is not to scale")
    if window is not None:
        level, width = check_window(window)
        steps.append(describe_window(window, level, width))
        return apply_window(values, level, width)
    steps.append("percentiles are of the slice's values above its least")
    least = np.min(values, initial=np.inf, where=np.isfinite(values))
    return apply_percentiles(values, steps, PERCENTILES, values > least)


def _read_slice(volume, axis: int, place: int, time: int, max_pixels: int) -> np.ndarray:
    """One slice across an axis of the array, three-dimensional, with slope and intercept applied.

    Slices across the first two axes are taken plane by plane: nibabel would first list each run of neighbouring values
    that it is going to read, which for the sizes that a header of 352 bytes can state takes minutes and all memory.
    """
    behind = (time,) * (len(volume.shape) - 3)
    if axis == 2:
        return np.asarray(volume.dataobj[(slice(None), slice(None), slice(place, place + 1), *behind)])
    check_size(*volume.shape[:2], max_pixels)
    part = [slice(None)] * 2
    part[axis] = slice(place, place + 1)
    planes = (volume.dataobj[(slice(None), slice(None), place, *behind)] for place in range(volume.shape[2]))
    return np.stack([plane[tuple(part)].copy() for plane in planes], axis=2)


def _uncompressed(file: BinaryIO) -> BinaryIO:
    """The same file, or its content if it is gzipped, from the beginning; nothing is held in memory."""
    magic = file.read(2)
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file
