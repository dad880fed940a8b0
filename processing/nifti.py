"""One slice of a NIfTI volume into 8-bit pixels, turned the way radiologists look at it.

Only that slice is read, not the volume, and none of the header's free texts.
"""

from __future__ import annotations

import gzip
import math
from typing import BinaryIO

import numpy as np
from PIL import Image

from .grey_levels_lladamedv import Window, apply_percentiles, apply_window
from .medical_shared import MedicalImageError, Steps, arg, check_bytes, check_size, choose_index, require, to_scale


# Canonical axis (right, anterior, superior) that each view looks along.
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
PERCENTILES = (1, 99)
_HEADER_BYTES = 352
_PAIR = (b"ni1\0", b"ni2\0")  # what headers of their own begin or end with
_ANALYZE = (b"\x5c\x01\0\0", b"\0\0\x01\x5c")  # the size of a header, 348


def is_nifti(file: BinaryIO) -> bool:
    """Whether an open file is a NIfTI-1 or NIfTI-2 volume, or such a header alone, gzipped or not.

    The file is left at its beginning.
    """
    head = _uncompressed(file).read(_HEADER_BYTES)
    file.seek(0)
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0" or _is_header(head)


def read_nifti(
    file: BinaryIO,
    steps: Steps,
    *,
    slice_index: int | None,
    time_index: int | None,
    axis: str | None,
    window: Window | None,
    max_pixels: int,
) -> tuple[Image.Image, tuple[int, int]]:
    """One slice of a volume, with square pixels."""
    nibabel = require("nibabel")
    axis = "axial" if axis is None else axis
    if axis not in AXES:
        raise MedicalImageError(f"{arg('axis')} is {axis!r}; allowed are {', '.join(AXES)}.")
    volume, header = _open_volume(file)
    shape = volume.shape
    steps.choices |= {"axis": None, "window": None}
    times = shape[3] if len(shape) > 3 else 1
    time = choose_index("time_index", time_index, times, "volume", steps, required=True)

    affine = _affine(header, steps)
    orientation = nibabel.io_orientation(affine)  # (array axes, [canonical axis, direction])
    # The array axes that run along, across and up the view.
    along, across, up = (
        int(np.flatnonzero(orientation[:, 0] == canonical)[0])
        for canonical in (AXES[axis], *(other for other in range(3) if other != AXES[axis]))
    )
    chosen = choose_index("slice_index", slice_index, shape[along], f"{axis} slice", steps)
    # Counted along the canonical axis: from the patient's left, back or feet.
    stored = chosen if orientation[along, 1] > 0 else shape[along] - 1 - chosen
    check_size(shape[up], shape[across], max_pixels)
    needed = volume.offset + math.prod(shape) * volume.dtype.itemsize
    check_bytes(file, needed, compressed=volume.file_like is not file)
    values = nibabel.apply_orientation(_read_slice(volume, along, stored, time, max_pixels), orientation)
    steps.add("geometry", "oriented to the closest right-anterior-superior axes")
    # Rows downwards and columns to the right, from superior (or anterior) and from the patient's right (or front).
    values = values.take(0, axis=AXES[axis])[::-1, ::-1].T
    if window is None:
        pixels = apply_percentiles(values, steps, PERCENTILES, foreground=True)
    else:
        pixels = apply_window(values, window, steps)
        if window.preset:
            steps.add("levels", "values taken as Hounsfield units: NIfTI does not say what they are")
    sizes = nibabel.affines.voxel_sizes(affine)
    return to_scale(pixels, (float(sizes[up]), float(sizes[across])), max_pixels, steps), pixels.shape


def _open_volume(file: BinaryIO):
    """The volume, of which nothing is read yet, and the header that describes it."""
    nibabel = require("nibabel")
    stream = _uncompressed(file)
    head = stream.read(_HEADER_BYTES)
    if _is_header(head):
        raise MedicalImageError(
            f"{arg('source')} is the header of a pair of files (.hdr and .img); allowed are NIfTI volumes in one file "
            "(.nii or .nii.gz)."
        )
    version = nibabel.Nifti2Image if head[4:8] == b"n+2\0" else nibabel.Nifti1Image
    stream.seek(0)
    header = version.header_class.from_fileobj(stream)
    volume = version.ImageArrayProxy(stream, header.copy())  # an image would need an orientation to be there
    shape = volume.shape
    # Not booleans, complex numbers or colours.
    if len(shape) < 3 or math.prod(shape[4:]) > 1 or volume.dtype.kind not in "iuf" or 0 in shape:
        raise MedicalImageError(
            f"{arg('source')} is a NIfTI array of shape {shape} and type {volume.dtype}; allowed are "
            "volumes of real numbers with 3 dimensions, or 4 with time."
        )
    return volume, header


def _affine(header, steps: Steps) -> np.ndarray:
    """From indices to millimetres, right-anterior-superior: by sform or qform, the first that the file has in order."""
    nibabel = require("nibabel")
    found = []
    for name in ("sform", "qform"):
        if not header[f"{name}_code"]:
            continue
        try:
            affine = getattr(header, f"get_{name}")()
        except (nibabel.spatialimages.HeaderDataError, ValueError):
            affine = np.zeros((4, 4))
        if np.isfinite(affine).all() and np.isfinite(nibabel.io_orientation(affine)).all():
            found.append(affine)
        else:
            steps.add("geometry", f"{name} of the file left out: it is no orientation")
    exchanged = "left and right may be exchanged"
    if len({nibabel.aff2axcodes(affine) for affine in found}) > 1:
        disagree = "sform and qform of the file disagree about its axes: sform used"
        steps.add("geometry", f"{disagree}, {exchanged}", warns=True)
    if found:
        return found[0]
    none = "no orientation in the file (sform and qform): axes taken as left, anterior, superior"
    steps.add("geometry", f"{none}, {exchanged}", warns=True)
    sizes = np.abs(header["pixdim"][1:4].astype(float))
    return np.diag([-1, 1, 1, 1] * np.append(np.where(np.isfinite(sizes) & (sizes > 0), sizes, 1), 1))


def _is_header(head: bytes) -> bool:
    """Whether these first bytes are of a header whose volume is in another file: NIfTI's, or that of Analyze."""
    return head[344:348] in _PAIR or head[4:8] in _PAIR or (len(head) == 348 and head[:4] in _ANALYZE)


def _read_slice(volume, axis: int, place: int, time: int, max_pixels: int) -> np.ndarray:
    """One slice across an axis of the array, three-dimensional, with slope and intercept applied.

    Slices across the first two axes are taken plane by plane: nibabel would first list each run of neighbouring values
    that it is going to read, which for the sizes that a header of 352 bytes can state takes minutes and all memory.
    """
    behind = (time, *[0] * (len(volume.shape) - 4))[: len(volume.shape) - 3]
    if axis == 2:
        return np.asarray(volume[(slice(None), slice(None), slice(place, place + 1), *behind)])
    check_size(*volume.shape[:2], max_pixels)
    part = [slice(None)] * 2
    part[axis] = slice(place, place + 1)
    planes = (volume[(slice(None), slice(None), place, *behind)] for place in range(volume.shape[2]))
    return np.stack([plane[tuple(part)].copy() for plane in planes], axis=2)


def _uncompressed(file: BinaryIO) -> BinaryIO:
    """The same file, or its content if it is gzipped, from the beginning; nothing is held in memory."""
    magic = file.read(2)
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file
