"""One slice of a NIfTI volume into 8-bit pixels, turned the way radiologists look at it, whatever the file's axes.

Only that slice is read, not the volume, and none of the header's free texts.
"""

from __future__ import annotations

import gzip
from typing import BinaryIO

import numpy as np

from .medical_shared import (
    MedicalImageError,
    apply_percentiles,
    apply_window,
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
        raise MedicalImageError(f"`axis` is {axis!r}; allowed are {', '.join(map(repr, AXES))}.")
    stream = _uncompressed(file)
    version = nibabel.Nifti2Image if stream.read(_HEADER_BYTES)[4:8] == b"n+2\0" else nibabel.Nifti1Image
    stream.seek(0)
    volume = version.from_stream(stream)
    shape = volume.shape
    if len(shape) not in (3, 4) or not np.issubdtype(volume.get_data_dtype(), np.number) or 0 in shape:
        raise MedicalImageError(
            f"`source` is a NIfTI array of shape {shape} and type {volume.get_data_dtype()}; allowed are volumes of "
            "real numbers with 3 dimensions, or 4 with time."
        )
    if np.issubdtype(volume.get_data_dtype(), np.complexfloating):
        raise MedicalImageError("`source` is a NIfTI volume of complex numbers; allowed are real ones.")
    times = shape[3] if len(shape) == 4 else 1
    if time_index is None and times > 1:
        raise MedicalImageError(f"`time_index` is None, but there are {times} volumes; allowed are 0 to {times - 1}.")
    time = choose_index("time_index", time_index, times, "volume", steps)

    if not volume.header["sform_code"] and not volume.header["qform_code"]:
        steps.append("no orientation in the file (sform and qform): axes taken as left, anterior, superior")
        logger.warning("the NIfTI file has no orientation (sform and qform): left and right may be exchanged")
    orientation = nibabel.io_orientation(volume.affine)  # (array axes, [canonical axis, direction])
    array_axis = int(np.flatnonzero(orientation[:, 0] == AXES[axis])[0])
    chosen = choose_index("slice_index", slice_index, shape[array_axis], f"{axis} slice", steps)
    # Counted along the canonical axis: from the patient's left, back or feet.
    stored = chosen if orientation[array_axis, 1] > 0 else shape[array_axis] - 1 - chosen
    part: list[slice] = [slice(None)] * 3 + [slice(time, time + 1)] * (len(shape) - 3)
    part[array_axis] = slice(stored, stored + 1)
    width, height = (shape[np.flatnonzero(orientation[:, 0] == other)[0]] for other in range(3) if other != AXES[axis])
    check_size(height, width, max_pixels)
    upright = nibabel.as_closest_canonical(volume.slicer[tuple(part)])
    values = upright.get_fdata(dtype=np.float32).reshape(upright.shape[:3])  # slope and intercept are applied
    steps.append("oriented to the closest right-anterior-superior axes")
    # Rows downwards and columns to the right, from superior (or anterior) and from the patient's right (or front).
    values = values.take(0, axis=AXES[axis])[::-1, ::-1].T
    columns, rows = np.delete(upright.header.get_zooms()[:3], AXES[axis]).tolist()
    if not np.isclose(rows, columns, rtol=0.01):
        steps.append(f"pixels are {rows:g} high and {columns:g} wide, and stay so: the picture is not to scale")
    if window is not None:
        level, width = check_window(window)
        steps.append(describe_window(window, level, width))
        return apply_window(values, level, width)
    steps.append("percentiles are of the slice's values above its least")
    least = np.min(values, initial=np.inf, where=np.isfinite(values))
    return apply_percentiles(values, steps, PERCENTILES, values > least)


def _uncompressed(file: BinaryIO) -> BinaryIO:
    """The same file, or its content if it is gzipped, from the beginning; nothing is held in memory."""
    magic = file.read(2)
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file
