"""Medical image files into 8-bit RGB pictures: DICOM, NIfTI slices, TIFF, 16-bit PNG and whatever else Pillow reads.

`Image.open(...).convert("RGB")` clips 16 bits at 255, shows what transparency hid and knows no Hounsfield units, all
without a word. [`read_medical_image`] does each of these things on purpose and tells in `steps` what was done.
"""

from __future__ import annotations

import io
import logging
import os
import stat
from dataclasses import dataclass
from os import PathLike
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageColor

from .dicom import is_dicom, read_dicom, read_dicom_series
from .medical_shared import MAX_IMAGE_PIXELS, WINDOW_PRESETS, MedicalImageError, check_size, check_window
from .nifti import is_nifti, read_nifti
from .pictures import convert_array, convert_picture, read_picture


logger = logging.getLogger(__name__)
_ARGUMENTS = {
    "DICOM file": ("frame", "window", "full_range"),
    "NIfTI volume": ("slice_index", "time_index", "axis", "window"),
    "picture file": ("page", "window", "full_range"),
    "decoded picture": ("window", "full_range"),
}


@dataclass(frozen=True)
class MedicalImage:
    """A picture for the image processor, and how it came about.

    Attributes:
        image: RGB `PIL.Image`, upright, without metadata.
        size: original (height, width) in pixels, upright, before any reduction.
        steps: what was done, in order; never anything that identifies a patient.
    """

    image: Image.Image
    size: tuple[int, int]
    steps: list[str]


def read_medical_image(
    source: str | PathLike | bytes | BinaryIO | Image.Image | np.ndarray,
    *,
    frame: int | None = None,
    slice_index: int | None = None,
    time_index: int | None = None,
    axis: str = "axial",
    window: str | tuple[float, float] | None = None,
    page: int | None = None,
    background: str | tuple[int, int, int] | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
    full_range: bool = False,
    allow_burned_in: bool = False,
) -> MedicalImage:
    """Read a medical image as 8-bit RGB.

    Grey values of more than 8 bits, and all of DICOM's and NIfTI's, become black to white by the first of these that
    there is: `window` or `full_range`; the file's own window or table (DICOM); percentiles, 0.5 and 99.5 of the image,
    or 1 and 99 of the foreground for NIfTI. What a file is is told by its content, not by its name.

    Args:
        source: path, bytes or open binary file of a DICOM, NIfTI (one file, gzipped or not) or picture file; or a PIL
            image; or an array: `(height, width)` of any real numbers, or with 2 to 4 channels (grey and alpha, RGB,
            RGBA) of uint8, or 3 of uint16.
        frame: which frame of a DICOM file, from 0. The middle one if not given, which is logged as a warning.
        slice_index: which slice of a NIfTI volume, from 0 at the patient's left, back or feet; or the middle one.
        time_index: which volume of a NIfTI file with several, from 0.
        axis: how to cut a NIfTI volume: `"axial"`, `"coronal"` or `"sagittal"`, all as radiologists look at them (the
            patient's right on the left side; in sagittal slices the front).
        window: name of a preset in [`WINDOW_PRESETS`] (Hounsfield units), or (level, width) in the image's units.
        page: which page of a TIFF or frame of an animation, from 0. There is no default where there are several.
        background: colour, a name or RGB, to lay transparent pictures on. By default black for grey ones, as in
            radiology, and white for colour, as in figures.
        max_pixels: larger pictures are reduced while they are decoded if the format allows that (JPEG, JPEG 2000), and
            refused otherwise. At most the default, which is Pillow's own limit.
        full_range: map the whole range of 16-bit pictures, or of a DICOM file's stored bits, to 0…255.
        allow_burned_in: read DICOM files that say that text is burned into their pixels, too.

    Returns:
        A [`MedicalImage`]. Its steps are logged at level INFO, too.

    Raises:
        MedicalImageError: a `ValueError`, for a file that cannot be read, and for arguments that are not allowed or do
            not apply to this kind of file.
        ImportError: if a library is missing that the file needs; the message says which extra to install.

    Sources: DICOM PS3.3, C.7.6.3, C.11.1 and C.11.2, and PS3.4, N.2; NIfTI-1 (https://nifti.nimh.nih.gov/nifti-1).
    """
    check_window(window)
    if window is not None and full_range:
        raise MedicalImageError(f"`full_range` is True, but `window` is {window!r}; allowed is one of the two.")
    if not isinstance(max_pixels, int) or not 1 <= max_pixels <= MAX_IMAGE_PIXELS:
        raise MedicalImageError(
            f"`max_pixels` is {max_pixels!r}; allowed are whole numbers from 1 to {MAX_IMAGE_PIXELS}."
        )
    decoded = isinstance(source, (Image.Image, np.ndarray))
    file = None if decoded else _open(source)
    shown = {"window": window, "full_range": full_range, "max_pixels": max_pixels}
    steps: list[str] = []
    kind = "file"
    try:
        kind = "decoded picture" if decoded else _kind(file)
        chosen = {"frame": frame, "slice_index": slice_index, "time_index": time_index, "page": page}
        chosen["axis"] = None if axis == "axial" else axis
        chosen["full_range"] = full_range or None
        for name, value in chosen.items():
            if value is not None and name not in _ARGUMENTS[kind]:
                raise MedicalImageError(
                    f"`{name}` is {value!r}, but `source` is a {kind}; allowed for it are "
                    f"{', '.join(f'`{argument}`' for argument in _ARGUMENTS[kind])}."
                )
        if kind == "DICOM file":
            pixels = read_dicom(file, steps, frame=frame, allow_burned_in=allow_burned_in, **shown)
            image, size = Image.fromarray(pixels), pixels.shape[:2]
        elif kind == "NIfTI volume":
            pixels = read_nifti(
                file,
                steps,
                slice_index=slice_index,
                time_index=time_index,
                axis=axis,
                window=window,
                max_pixels=max_pixels,
            )
            image, size = Image.fromarray(pixels), pixels.shape[:2]
        else:
            shown["background"] = _check_background(background)
            if kind == "picture file":
                image, size = read_picture(file, steps, page=page, **shown)
            elif isinstance(source, np.ndarray):
                image, size = convert_array(source, steps, **shown)
            else:
                check_size(source.height, source.width, shown.pop("max_pixels"))
                image, size = convert_picture(source, steps, **shown)
        # Through an array, so that no metadata comes along.
        image = Image.fromarray(np.asarray(image.convert("RGB")))
    except (MedicalImageError, ImportError, MemoryError):
        raise
    except Exception as error:  # the libraries raise many kinds; their messages may quote what is in the file
        raise MedicalImageError(
            f"`source` is a {kind} that cannot be read ({type(error).__name__}): it is broken, or of a variant that is "
            "not supported."
        ) from None
    finally:
        if isinstance(source, (str, PathLike)):
            file.close()
    logger.info("medical image, %d by %d pixels (height by width): %s", *size, "; ".join(steps) or "as it is")
    return MedicalImage(image, size, steps)


def _open(source) -> BinaryIO:
    """A seekable binary file, at its beginning."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, (str, PathLike)):
        try:
            if stat.S_ISREG(os.stat(source).st_mode):
                return open(source, "rb")
            reason = "not a regular file"  # reading a pipe or a device may never end
        except (OSError, ValueError) as error:  # not chained: paths often hold names of patients
            reason = type(error).__name__
        raise MedicalImageError(
            f"`source` is a path that cannot be opened ({reason}); allowed are paths of files. The files of a DICOM "
            "series in a folder are listed by `read_dicom_series`."
        )
    if not isinstance(source, io.IOBase) or isinstance(source, io.TextIOBase):
        raise MedicalImageError(
            f"`source` is of type {type(source).__name__}; allowed are paths, bytes, binary files, PIL images and "
            "numpy arrays."
        )
    if not source.seekable():
        return io.BytesIO(source.read())
    source.seek(0)
    return source


def _kind(file: BinaryIO) -> str:
    """What a file is, by its content."""
    head = file.read(132)
    file.seek(0)
    if is_dicom(head):
        return "DICOM file"
    return "NIfTI volume" if is_nifti(file) else "picture file"


def _check_background(background) -> tuple[int, int, int] | None:
    if background is None:
        return None
    if isinstance(background, str):
        try:
            return ImageColor.getrgb(background)[:3]
        except ValueError:
            pass
    elif isinstance(background, (tuple, list)) and len(background) == 3:
        if all(isinstance(level, int) and 0 <= level <= 255 for level in background):
            return tuple(background)
    raise MedicalImageError(
        f"`background` is {background!r}; allowed are None, names of colours such as 'black', and (red, green, blue) "
        "from 0 to 255."
    )


__all__ = ["WINDOW_PRESETS", "MedicalImage", "MedicalImageError", "read_dicom_series", "read_medical_image"]
