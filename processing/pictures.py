"""Picture files and open pictures in 8 bits: pages, orientation, size, and the samples of TIFF that Pillow misreads."""

from __future__ import annotations

import base64
import ctypes
import io
import logging
import warnings
from contextlib import ContextDecorator, ExitStack, nullcontext
from threading import Lock
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from .grey_levels_lladamedv import GREY_MODES, show_array, show_picture
from .medical_shared import MedicalImageError, Steps, arg, check_bytes, check_size, choose_index, require


# Of Pillow's formats those in use for medical pictures; others run programs (EPS) or are little tested.
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "WEBP", "AVIF", "PPM")
# These can leave out detail before it takes memory, so they are opened without Pillow's own limit.
_JPEG, _JPEG_2000 = (b"\xff\xd8\xff",), (b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PREMULTIPLIED, _ALPHA = 1, 2  # ExtraSamples of TIFF
_TURNED = range(5, 9)  # EXIF orientations that exchange height and width
_INVERTED = "inverted: PhotometricInterpretation WhiteIsZero"
# libtiff's own ways of saying what is wrong. Where Pillow was built without it, or hides them, there are none.
_LIBTIFF = ("TIFFSetErrorHandler", "TIFFSetWarningHandler")
# Tags of EXIF and TIFF.
_ORIENTATION, _BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 0x0112, 258, 259, 262, 284, 339
# (SampleFormat, bits) of TIFF that Pillow reads as they are meant; 1 is unsigned, 2 signed, 3 floating point.
_PILLOW_SAMPLES = {*((1, bits) for bits in range(1, 17)), (2, 16), (2, 32), (3, 32)}


class _Quiet(ContextDecorator):
    """Without what Pillow, libtiff and tifffile print about a broken file: it is refused in one sentence, or read.

    That is set for the whole process, so of readers in several threads the first one sets it and the last one ends it.
    """

    _lock, _inside, _undo = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with _Quiet._lock:
            _Quiet._inside += 1
            if _Quiet._inside > 1:
                return
            self._undo.enter_context(warnings.catch_warnings(action="ignore"))
            logger, library = logging.getLogger("tifffile"), ctypes.CDLL(Image.core.__file__)
            self._undo.callback(setattr, logger, "disabled", logger.disabled)
            logger.disabled = True
            for setter in (getattr(library, name) for name in _LIBTIFF if hasattr(library, name)):
                setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
                self._undo.callback(setter, setter(None))

    def __exit__(self, *error) -> None:
        with _Quiet._lock:
            _Quiet._inside -= 1
            if not _Quiet._inside:
                self._undo.close()


def is_picture(file: BinaryIO) -> bool:
    """Whether a file is of a format that [`read_picture`] reads, whole or broken; nothing is decoded."""
    head = file.read(12)
    file.seek(0)
    if head.startswith((*_JPEG, *_JPEG_2000, *_TIFF)):
        return True
    try:
        Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        return False
    except Exception:  # it is one, and reading it says what is wrong
        return True
    return True


@_Quiet()
def read_picture(
    file: BinaryIO, steps: Steps, *, page: int | None, max_pixels: int, **shown
) -> tuple[Image.Image, tuple[int, int]]:
    """A picture file, reduced while it is decoded if it is too large and its format allows that."""
    head = file.read(12)
    file.seek(0)
    try:
        if head.startswith(_JPEG):
            image = JpegImageFile(file)
        elif head.startswith(_JPEG_2000):
            image = Jpeg2KImageFile(file)
        else:
            image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        if head.startswith(_TIFF):
            return _read_tiff(file, steps, page=page, max_pixels=max_pixels, **shown)
        raise MedicalImageError(
            f"{arg('source')} is of no known format; allowed are DICOM (with the marker DICM), NIfTI, "
            f"{', '.join(FORMATS)}."
        ) from None
    except Image.DecompressionBombError:
        raise MedicalImageError(
            f"{arg('source')} has more pixels than Pillow allows; allowed are 1 to {max_pixels}."
        ) from None
    image.seek(choose_index("page", page, getattr(image, "n_frames", 1), "page", steps, required=True))
    if image.format == "TIFF" and not _pillow_reads(image):
        steps.clear()
        return _read_tiff(file, steps, page=page, max_pixels=max_pixels, **shown)
    width, height = image.size
    reduced = _reduce(image, max_pixels, steps)
    if not reduced:
        check_size(height, width, max_pixels)  # before EXIF is asked for, for which Pillow decodes PNG files
    turned = image.getexif().get(_ORIENTATION) in _TURNED
    converted, size = _convert(image, steps, **shown)
    if reduced:
        size = (width, height) if turned else (height, width)
    return converted, size


def read_decoded(
    source: Image.Image | np.ndarray, steps: Steps, *, max_pixels: int, **shown
) -> tuple[Image.Image, tuple[int, int]]:
    """An array, or a picture that is open already."""
    if isinstance(source, np.ndarray):
        image = show_array(source, steps, max_pixels=max_pixels, **shown)
        return image, (image.height, image.width)
    check_size(source.height, source.width, max_pixels)
    if isinstance(source, TiffImageFile) and not _pillow_reads(source):
        raise MedicalImageError(
            f"{arg('source')} is an open TIFF file whose samples Pillow misreads; give its path or bytes instead."
        )
    return _convert(source, steps, **shown)


def _convert(image: Image.Image, steps: Steps, **shown) -> tuple[Image.Image, tuple[int, int]]:
    """A picture upright and in 8 bits, and its upright (height, width)."""
    # What is asked now is gone once the picture is loaded and turned.
    tiles = image.tile if image.format in ("PNG", "TIFF") else []
    deep_colour = any(";16" in (tile[3] if isinstance(tile[3], str) else tile[3][0]) for tile in tiles)
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0
    orientation = image.getexif().get(_ORIENTATION, 1)
    try:
        with _Quiet() if image.format == "TIFF" else nullcontext():
            image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for truncated and broken files
        raise MedicalImageError(f"{arg('source')} is a broken picture: {error}.") from None
    _tell_turned(orientation, steps)
    converted = show_picture(image, steps, deep_colour=deep_colour, **shown)
    if white_is_zero and image.mode in GREY_MODES:  # Pillow inverts 8 bits, but no others
        steps.add("levels", _INVERTED)
        converted = ImageOps.invert(converted)
    return converted, (image.height, image.width)


def _tell_turned(orientation, steps: Steps) -> None:
    if orientation in range(2, 9):
        steps.add("geometry", f"turned upright (EXIF orientation {orientation})")


def _pillow_reads(image: TiffImageFile) -> bool:
    """Whether Pillow reads the samples of a TIFF file as they are meant; others it may misread without a word."""
    tags = image.tag_v2
    bits, form = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))[0]
    if not {(form, depth) for depth in bits} <= _PILLOW_SAMPLES:
        return False
    if tags.get(_PLANES) == 2 and len(bits) > 1:  # one plane a channel: of 16 bits it takes every other byte for one
        return len(bits) == 3 and {*bits} == {8}
    # libtiff has put these in order already, and Pillow does it again.
    return form == 1 or tags.prefix == b"II" or tags.get(_COMPRESSION, 1) == 1


def _reduce(image: Image.Image, max_pixels: int, steps: Steps) -> bool:
    """Have a large file decoded at a half, a quarter or an eighth of its size, if its format allows that.

    Returns:
        Whether it will be.
    """
    width, height = image.size
    factors = (1, 2, 4, 8)
    factor = next((each for each in factors if -(-width // each) * -(-height // each) <= max_pixels), 1)
    if factor == 1:
        return False
    # The decoder of progressive JPEG would hold the whole picture in memory nonetheless.
    if isinstance(image, JpegImageFile) and "progressive" not in image.info:
        image.draft(None, (max(width // factor, 1), max(height // factor, 1)))
    elif isinstance(image, Jpeg2KImageFile):
        image.reduce = factor.bit_length() - 1
    else:
        return False
    size = f"{height} by {width} pixels (height by width)"
    steps.add("geometry", f"reduced by {factor} while decoding, from {size}")
    return True


def _read_tiff(
    file: BinaryIO, steps: Steps, *, page: int | None, max_pixels: int, **shown
) -> tuple[Image.Image, tuple[int, int]]:
    """TIFF of a sample type that Pillow does not read, such as 64-bit floating point."""
    tifffile = require("tifffile")
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        chosen = tiff.pages[choose_index("page", page, len(tiff.pages), "page", steps, required=True)]
        check_size(chosen.imagelength, chosen.imagewidth, max_pixels)
        check_bytes(file, chosen.nbytes, compressed=chosen.compression != tifffile.COMPRESSION.NONE)
        kind, extra = tifffile.PHOTOMETRIC(chosen.photometric), [int(sample) for sample in chosen.extrasamples]
        grey = kind in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE)
        if not (grey or kind == tifffile.PHOTOMETRIC.RGB) or _PREMULTIPLIED in extra:
            raise MedicalImageError(
                f"{arg('source')} is a TIFF file of {kind.name} samples as {chosen.dtype}; allowed are grey and RGB "
                "ones, and transparency that is not multiplied in."
            )
        array, orientation = chosen.asarray(), chosen.tags.valueof(_ORIENTATION)
    if array.ndim == 3 and chosen.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3:  # without samples that are neither colour nor transparency
        array = array[..., : (1 if grey else 3) + (extra[:1] == [_ALPHA])]
    steps.add("levels", f"TIFF of {array.dtype}")
    image = show_array(array, steps, max_pixels=max_pixels, **shown)
    if kind == tifffile.PHOTOMETRIC.MINISWHITE:
        steps.add("levels", _INVERTED)
        image = ImageOps.invert(image)
    image.getexif()[_ORIENTATION] = orientation or 1
    image = ImageOps.exif_transpose(image)
    _tell_turned(orientation, steps)
    return image, (image.height, image.width)


def reduced(image: Image.Image, side: int) -> Image.Image:
    """A copy as RGB, of at most `side` pixels a side and without metadata."""
    copy = Image.fromarray(np.asarray(image.convert("RGB")))
    copy.thumbnail((side, side))
    return copy


def as_url(image: Image.Image) -> str:
    """A data URL that holds the image as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
