"""Medical image files into 8-bit RGB pictures: DICOM, NIfTI slices, TIFF, 16-bit PNG and common picture formats.

`Image.open(...).convert("RGB")` clips 16 bits at 255, shows what transparency hid and knows no Hounsfield units, all
silently. [`read_medical_image`] does each of these things on purpose, and its `steps` say what was done.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import re
import stat
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote_to_bytes
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageColor

from .dicom import is_dicom, read_dicom, read_dicom_series
from .grey_levels_lladamedv import WINDOW_PRESETS, check_window
from .medical_shared import MAX_IMAGE_PIXELS, MedicalImageError, Step, Steps, arg
from .nifti import is_nifti, read_nifti
from .pictures import read_decoded, read_picture


logger = logging.getLogger(__name__)
_URL_HEADERS = {"User-Agent": "lladamedv"}  # hosts refuse Python's own
_BASE64 = re.compile(r";\s*base64\s*$", re.IGNORECASE)  # at the end of what stands before a data URL's data
_URL_TIMEOUT = 60  # seconds; without a limit, a silent server blocks the process
_DICOM, _NIFTI, _PICTURE, _DECODED = "DICOM file", "NIfTI volume", "picture file", "decoded picture"
_DECODED_TYPES = (Image.Image, np.ndarray)
# Each takes the open binary file or the decoded picture, the steps, to which it adds what it does, `max_pixels` and the
# options of its kind. It returns a picture in 8 bits that `convert("RGB")` treats well, and the (height, width) it had.
_READERS = {_DICOM: read_dicom, _NIFTI: read_nifti, _PICTURE: read_picture, _DECODED: read_decoded}


class ReadingOption(NamedTuple):
    """An option of [`read_medical_image`].

    Attributes:
        argument: its name in Python.
        name: its name elsewhere: in the server's requests, and behind `--`, with dashes, in commands.
        type: `int`, `str` or, for what is either said or not, `bool`.
        kinds: the kinds of sources that it applies to.
        help: one line about it.
    """

    argument: str
    name: str
    type: type
    kinds: tuple[str, ...]
    help: str


# Not given is `None`, or `False`.
READING_OPTIONS = (
    ReadingOption("frame", "frame", int, (_DICOM,), "Frame of a DICOM file, from 0; by default the middle one."),
    ReadingOption("slice_index", "slice", int, (_NIFTI,),
                  "Slice of a NIfTI volume, from 0; by default the middle one."),
    ReadingOption("axis", "axis", str, (_NIFTI,), "How to cut a NIfTI volume: axial (the default), coronal, sagittal."),
    ReadingOption("time_index", "time", int, (_NIFTI,), "Which volume of a NIfTI file with several, from 0."),
    ReadingOption("page", "page", int, (_PICTURE,), "Page of a TIFF file or frame of an animation, from 0."),
    ReadingOption("window", "window", str, (_DICOM, _NIFTI, _PICTURE, _DECODED),
                  f"Grey values to show: LEVEL/WIDTH such as 40/400, or a window of CT: {', '.join(WINDOW_PRESETS)}."),
    ReadingOption("full_range", "full_range", bool, (_DICOM, _PICTURE, _DECODED),
                  "Show the whole range of the stored bits, from black to white."),
    ReadingOption("background", "background", str, (_PICTURE, _DECODED),
                  "Colour behind transparent pictures: a name such as white, or #rrggbb; by default transparency is "
                  "left out."),
    ReadingOption("allow_burned_in", "allow_burned_in", bool, (_DICOM,),
                  "Read DICOM files that say that text is burned into their pixels, too."),
)  # fmt: skip


@dataclass(frozen=True)
class MedicalImage:
    """A picture for the image processor, and how it came about.

    Attributes:
        image: RGB `PIL.Image`, upright, without metadata.
        size: original (height, width) in pixels, upright, before any reduction or stretching.
        steps: what was done, in order, as [`Step`]s; never anything that identifies a patient.
        choices: the arguments of [`read_medical_image`] by which another picture can be read from the same source.
            Those of an index have what is counted, the index from 0, and how many there are; the others have `None`.
        window: the level and width of the grey values that are shown, in the units of `window` of
            [`read_medical_image`]; `None` for colours, tables and full ranges.
    """

    image: Image.Image
    size: tuple[int, int]
    steps: tuple[Step, ...]
    choices: dict[str, tuple[str, int, int] | None]
    window: tuple[float, float] | None = None


def read_medical_image(
    source: str | PathLike | bytes | BinaryIO | Image.Image | np.ndarray,
    *,
    frame: int | None = None,
    slice_index: int | None = None,
    time_index: int | None = None,
    axis: str | None = None,
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
    or 1 and 99 of the foreground for NIfTI. The kind of a file is found from its content, not from its name.

    Args:
        source: path, bytes or open binary file of a DICOM, NIfTI (one file, gzipped or not) or picture file; or a PIL
            image; or an array: `(height, width)` of any real numbers, or with 2 to 4 channels (grey and alpha, RGB,
            RGBA) of uint8, or 3 of uint16.
        frame: which frame of a DICOM file, from 0. The middle one if not given, which is logged as a warning.
        slice_index: which slice of a NIfTI volume, from 0 at the patient's left, back or feet; or the middle one.
        time_index: which volume of a NIfTI file with several, from 0.
        axis: how to cut a NIfTI volume: `"axial"` (the default), `"coronal"` or `"sagittal"`, all as radiologists look
            at them (the patient's right on the left side; in sagittal slices the front).
        window: name of a preset in [`WINDOW_PRESETS`] (Hounsfield units), or level and width in the image's units: a
            pair, or a text such as `"40/400"`.
        page: which page of a TIFF or frame of an animation, from 0. There is no default where there are several.
        background: colour, a name, `"#rrggbb"` or RGB, to lay transparent pictures on. By default transparency is left
            out, as in the training of the released models, and the colours that it hid are shown.
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
    # 1. The options, as far as they can be checked without the image.
    options = {
        **{"frame": frame, "slice_index": slice_index, "axis": axis, "time_index": time_index, "page": page},
        **check_options(window=window, background=background, full_range=full_range),
        "allow_burned_in": allow_burned_in,
    }
    if not isinstance(max_pixels, int) or not 1 <= max_pixels <= MAX_IMAGE_PIXELS:
        raise MedicalImageError(
            f"{arg('max_pixels')} is {max_pixels!r}; allowed are whole numbers from 1 to {MAX_IMAGE_PIXELS}."
        )
    steps, kind = Steps(), "file"
    with _open(source) as content:
        try:
            # 2. What the source is, and whether the options suit it.
            kind = _DECODED if isinstance(content, _DECODED_TYPES) else _kind(content)
            fitting = [option.argument for option in READING_OPTIONS if kind in option.kinds]
            for name, value in options.items():
                if value is not None and value is not False and name not in fitting:
                    raise MedicalImageError(
                        f"{arg(name)} is given, but {arg('source')} is a {kind}; allowed for it are "
                        f"{', '.join(map(arg, fitting))}."
                    )
            # 3. The pixels, in 8 bits, by the reader of that kind.
            fitting = {name: options[name] for name in fitting}
            image, size = _READERS[kind](content, steps, max_pixels=max_pixels, **fitting)
            # 4. As RGB, through an array, so that no metadata comes along.
            image = Image.fromarray(np.asarray(image.convert("RGB")))
        except (MedicalImageError, ImportError, MemoryError):
            raise
        except Exception as error:  # the libraries raise many kinds; their messages may quote what is in the file
            raise MedicalImageError(
                f"{arg('source')} is a {kind} that cannot be read ({type(error).__name__}): it is broken, or of a "
                "variant that is not supported."
            ) from None
    # 5. What was done.
    for step in steps:
        if step.warns:
            logger.warning("medical image: %s", step)
    done = "; ".join(map(str, steps)) or "as it is"
    logger.info("medical image, %d by %d pixels (height by width): %s", *size, done)
    return MedicalImage(image, size, tuple(steps), steps.choices, steps.window)


def check_options(*, window=None, background=None, full_range: bool = False, **others) -> dict:
    """Check what can be known of the options of [`read_medical_image`] without the image.

    Returns:
        The three that are named here, as the readers take them.

    Raises:
        MedicalImageError: for a value that is not allowed, or two that exclude each other.
    """
    checked = {"window": check_window(window), "full_range": full_range, "background": _check_background(background)}
    if window is not None and full_range:
        raise MedicalImageError(f"{arg('window')} and {arg('full_range')} are both given; allowed is one of the two.")
    return checked


def is_url(source: object) -> bool:
    """Whether a text is a URL from which [`fetch_url`] may get an image."""
    return isinstance(source, str) and source.strip().partition(":")[0].lower() in ("http", "https", "data")


def read_data_url(url: str) -> bytes:
    """What a data URL holds, in base64 of either alphabet, with or without its padding, or percent-encoded.

    Raises:
        ValueError: for data that is none.

    Source: RFC 2397 and https://fetch.spec.whatwg.org/#data-url-processor.
    """
    head, comma, data = url.strip().partition(",")
    if not comma:
        raise ValueError("it has no comma before its data")
    content = unquote_to_bytes(data)
    if not _BASE64.search(head):
        return content
    content = b"".join(content.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)


def fetch_url(url: str) -> bytes:
    """The content of a URL: `http`, `https` or `data`.

    Raises:
        MedicalImageError: if it cannot be fetched.
    """
    try:
        if url.strip()[:5].lower() == "data:":
            return read_data_url(url)
        with urlopen(Request(url, headers=_URL_HEADERS), timeout=_URL_TIMEOUT) as answer:
            return answer.read()
    except Exception as error:  # of many kinds
        reason = f"{' '.join(str(error).split()):.300}" or type(error).__name__
        raise MedicalImageError(f"{arg('source')} is a URL that cannot be fetched ({reason}).") from None


def _open(source) -> AbstractContextManager:
    """A seekable binary file, at its beginning, or what is decoded already; files that were opened here are closed."""
    if isinstance(source, _DECODED_TYPES):
        return nullcontext(source)
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, (str, PathLike)):
        try:
            if stat.S_ISREG(os.stat(source).st_mode):
                return open(source, "rb")
            reason = "it is a folder, a pipe or a device"  # reading one of the last two may never end
        except FileNotFoundError:  # not chained: paths often hold names of patients
            reason = "there is no such file"
        except (OSError, ValueError) as error:
            reason = type(error).__name__
        raise MedicalImageError(f"{arg('source')} is a path that cannot be opened ({reason}); allowed are files.")
    if not isinstance(source, io.IOBase) or isinstance(source, io.TextIOBase):
        raise MedicalImageError(
            f"{arg('source')} is of type {type(source).__name__}; allowed are paths, bytes, binary files, PIL images "
            "and numpy arrays."
        )
    if not source.seekable():
        return io.BytesIO(source.read())
    source.seek(0)
    return nullcontext(source)


def _kind(file: BinaryIO) -> str:
    """What a file is, by its content."""
    head = file.read(132)
    file.seek(0)
    if is_dicom(head):
        return _DICOM
    return _NIFTI if is_nifti(file) else _PICTURE


def _check_background(background) -> tuple[int, int, int] | None:
    if background is None:
        return None
    colour = background
    if isinstance(background, str):
        try:
            colour = ImageColor.getrgb(background)
        except ValueError:
            colour = ()
    if isinstance(colour, (tuple, list)) and len(colour) == 3:
        if all(isinstance(level, int) and 0 <= level <= 255 for level in colour):
            return tuple(colour)
    raise MedicalImageError(
        f"{arg('background')} is {background!r}; allowed are names of colours such as black, #rrggbb, and red, green "
        "and blue from 0 to 255."
    )


__all__ = [
    "READING_OPTIONS",
    "WINDOW_PRESETS",
    "MedicalImage",
    "MedicalImageError",
    "ReadingOption",
    "Step",
    "check_options",
    "fetch_url",
    "is_url",
    "read_data_url",
    "read_dicom_series",
    "read_medical_image",
]
