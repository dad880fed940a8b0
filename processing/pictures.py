"""Pictures and arrays into 8-bit RGB on purpose: depth, transparency, colour space, pages, orientation and size.

Pillow's own `convert("RGB")` clips 16 bits at 255 and shows the colours that transparency hid.
"""

from __future__ import annotations

import ctypes
import logging
import warnings
from collections.abc import Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager, nullcontext
from io import BytesIO
from threading import Lock
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, _imaging
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from .medical_shared import (
    WINDOW_PRESETS,
    MedicalImageError,
    apply_percentiles,
    apply_range,
    apply_window,
    arg,
    check_bytes,
    check_size,
    check_window,
    choose_index,
    describe_window,
    require,
)


# Of Pillow's formats those in use for medical pictures; others run programs (EPS) or are hardly tested.
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "WEBP", "AVIF", "PPM")
PERCENTILES = (0.5, 99.5)
_GREY_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# These can leave out detail before it takes memory, so they are opened without Pillow's own limit.
_JPEG, _JPEG_2000 = (b"\xff\xd8\xff",), (b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PREMULTIPLIED, _ALPHA = 1, 2  # ExtraSamples of TIFF
_UPPER_BITS = "16 bits per channel: the upper 8 are used"
_TURNED = range(5, 9)  # EXIF orientations that exchange height and width
# libtiff's own ways of saying what is wrong. Where Pillow was built without it, or hides them, there are none.
_LIBTIFF = [
    getattr(ctypes.CDLL(_imaging.__file__), name)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler")
    if hasattr(ctypes.CDLL(_imaging.__file__), name)
]
# Tags of EXIF and TIFF.
_ORIENTATION, _BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 0x0112, 258, 259, 262, 284, 339
# (SampleFormat, bits) of TIFF that Pillow reads as they are meant; 1 is unsigned, 2 signed, 3 floating point.
_PILLOW_SAMPLES = {*((1, bits) for bits in range(1, 17)), (2, 16), (2, 32), (3, 32)}


@contextmanager
def _silence() -> Iterator[None]:
    handlers = []
    for setter in _LIBTIFF:
        setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
        handlers.append(setter(None))
    tifffile = logging.getLogger("tifffile")
    tifffile.addFilter(_nothing)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        tifffile.removeFilter(_nothing)
        for setter, handler in zip(_LIBTIFF, handlers):
            setter(handler)


class _Quiet(ContextDecorator):
    """Without what Pillow, libtiff and tifffile print about a broken file: it is refused in one sentence, or read.

    That is set for the whole process, so of readers in several threads the first one sets it and the last one ends it.
    """

    _lock, _inside, _silence = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with _Quiet._lock:
            if not _Quiet._inside:
                _Quiet._silence.enter_context(_silence())
            _Quiet._inside += 1

    def __exit__(self, *error) -> None:
        with _Quiet._lock:
            _Quiet._inside -= 1
            if not _Quiet._inside:
                _Quiet._silence.close()


def _nothing(record: logging.LogRecord) -> bool:
    return False


@_Quiet()
def read_picture(
    file: BinaryIO,
    steps: list[str],
    *,
    page: int | None,
    window,
    full_range: bool,
    background: tuple[int, int, int] | None,
    max_pixels: int,
) -> tuple[Image.Image, tuple[int, int]]:
    """An 8-bit picture of any mode that `convert("RGB")` treats well, and its original (height, width).

    Args:
        file: open binary file.
        steps: what is done is added to it.
        page, window, full_range, background, max_pixels: see [`read_medical_image`].

    Raises:
        MedicalImageError, ImportError: see [`read_medical_image`].
    """
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
            return _read_tiff(file, steps, page, window, full_range, background, max_pixels)
        raise MedicalImageError(
            f"{arg('source')} is of no known format; allowed are DICOM (with the marker DICM), NIfTI, "
            f"{', '.join(FORMATS)}."
        ) from None
    except Image.DecompressionBombError:
        raise MedicalImageError(
            f"{arg('source')} has more pixels than Pillow allows; allowed are 1 to {max_pixels}."
        ) from None
    pages = getattr(image, "n_frames", 1)
    image.seek(choose_index("page", page, pages, "page", steps, required=True))
    if image.format == "TIFF":
        if not _pillow_reads(image):
            steps.clear()
            return _read_tiff(file, steps, page, window, full_range, background, max_pixels)
    width, height = image.size
    reduced = _reduce(image, max_pixels, steps)
    if not reduced:
        check_size(height, width, max_pixels)
    turned = image.getexif().get(_ORIENTATION) in _TURNED
    converted, size = convert_picture(image, steps, window=window, full_range=full_range, background=background)
    if reduced:
        size = (width, height) if turned else (height, width)
    return converted, size


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


def convert_picture(
    image: Image.Image, steps: list[str], *, window, full_range: bool, background
) -> tuple[Image.Image, tuple[int, int]]:
    """The same for a picture that is open already."""
    if isinstance(image, TiffImageFile) and not _pillow_reads(image):
        raise MedicalImageError(
            f"{arg('source')} is an open TIFF file whose samples Pillow misreads; give its path or bytes instead."
        )
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
    original = (image.height, image.width)
    if orientation in range(2, 9):
        steps.append(f"turned upright (EXIF orientation {orientation})")
    if deep_colour and image.mode not in _GREY_MODES:
        steps.append(_UPPER_BITS)

    if image.mode in _GREY_MODES:
        grey = _convert_grey(np.asarray(image), steps, window, full_range)
        if white_is_zero:  # Pillow inverts 8 bits, but no others
            steps.append("inverted: PhotometricInterpretation WhiteIsZero")
            grey = 255 - grey
        return Image.fromarray(grey), original
    if image.mode in ("1", "L") and not image.has_transparency_data:
        if window is not None:
            return Image.fromarray(_convert_grey(np.asarray(image.convert("L")), steps, window, full_range)), original
        return image, original
    if window is not None or full_range:
        raise MedicalImageError(
            f"{arg('full_range' if window is None else 'window')} is given, but {arg('source')} is a picture "
            f"of mode {image.mode!r}; allowed are windows and full ranges for grey pictures without transparency."
        )
    if image.has_transparency_data:
        return _lay_on_background(image, background, steps), original
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and profile:
        return _to_srgb(image, profile, steps), original
    if profile:
        steps.append("colour profile of the file not applied")
    if image.mode != "RGB":
        steps.append(f"{image.mode} to RGB")
    return image, original


def convert_array(
    array: np.ndarray, steps: list[str], *, window, full_range: bool, background, max_pixels: int
) -> tuple[Image.Image, tuple[int, int]]:
    """The same for an array."""
    if np.ma.isMaskedArray(array):
        array = array.astype(np.float64).filled(np.nan)
    if array.ndim == 3 and array.shape[-1] not in (1, 2, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    channels = array.shape[2] if array.ndim == 3 else 1
    real = array.dtype == bool or np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
    colour = array.ndim == 3 and channels in (2, 3, 4) and array.dtype in (np.uint8, np.uint16)
    if not (array.ndim == 2 and real) and not colour:
        raise MedicalImageError(
            f"{arg('source')} is an array of shape {array.shape} and type {array.dtype}; allowed are (height, width) "
            "of real numbers, and (height, width, channels) or (channels, height, width) with 1 to 4 channels, "
            "in colour of uint8 or uint16."
        )
    check_size(*array.shape[:2], max_pixels)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if colour and array.dtype == np.uint16:
        steps.append(_UPPER_BITS)
        array = (array >> 8).astype(np.uint8)  # as Pillow reads files of such pictures
    if array.dtype == np.uint8:
        picture = Image.fromarray(np.ascontiguousarray(array))
        return convert_picture(picture, steps, window=window, full_range=full_range, background=background)
    return Image.fromarray(_convert_grey(array, steps, window, full_range)), array.shape[:2]


def _convert_grey(values: np.ndarray, steps: list[str], window, full_range: bool) -> np.ndarray:
    """Grey values of any type, `(height, width)`, as `uint8`."""
    steps.choices |= {"window": None, "full_range": None}
    if window is not None:
        if isinstance(window, str) and window in WINDOW_PRESETS and values.dtype.kind in "bu":
            raise MedicalImageError(
                f"{arg('window')} is {window!r}, a window in Hounsfield units, but {arg('source')} has no values below "
                "0, as these have; allowed is LEVEL/WIDTH in the picture's values."
            )
        level, width = check_window(window)
        steps.append(describe_window(window, level, width))
        return apply_window(values, level, width)
    if full_range:
        if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 65535:
            raise MedicalImageError(
                f"{arg('full_range')} is given, but {arg('source')} has values other than whole numbers from 0 to "
                f"65535; leave it out, or choose a window ({arg('window')})."
            )
        steps.append("full range of 16 bits: divided by 257")
        return apply_range(values, 0, 65535)
    return apply_percentiles(values, steps, PERCENTILES)


def _reduce(image: Image.Image, max_pixels: int, steps: list[str]) -> bool:
    """Have a large file decoded at a half, a quarter or an eighth of its size, if its format allows that.

    Returns:
        Whether it will be.
    """
    width, height = image.size
    if width * height <= max_pixels:
        return False
    factor = next((factor for factor in (2, 4, 8) if -(-width // factor) * -(-height // factor) <= max_pixels), None)
    if factor is None:
        return False
    # The decoder of progressive JPEG would hold the whole picture in memory nonetheless.
    if isinstance(image, JpegImageFile) and "progressive" not in image.info:
        image.draft(None, (max(width // factor, 1), max(height // factor, 1)))
    elif isinstance(image, Jpeg2KImageFile):
        image.reduce = factor.bit_length() - 1
    else:
        return False
    steps.append(f"reduced by {factor} while decoding, from {height} by {width} pixels (height by width)")
    return True


def _lay_on_background(image: Image.Image, background, steps: list[str]) -> Image.Image:
    """A picture with transparency on a colour, or without one as the released models were trained: by its colours
    alone, also where it is transparent."""
    if image.mode == "La":  # which Pillow converts to nothing but LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        steps.append("transparency left out: everything is opaque")
        return image
    steps.choices["background"] = None
    if background is None:
        steps.append("transparency left out, as in the released models' training: the colours that it hid are shown")
    else:
        steps.append(f"transparent pixels laid on RGB {background}")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image


def _to_srgb(image: Image.Image, profile: bytes, steps: list[str]) -> Image.Image:
    try:
        converted = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError):
        steps.append(f"{image.mode} to RGB; the colour profile of the file is unusable")
        return image
    steps.append(f"{image.mode} to sRGB by the colour profile of the file")
    return converted


def _read_tiff(
    file: BinaryIO, steps, page, window, full_range, background, max_pixels
) -> tuple[Image.Image, tuple[int, int]]:
    """TIFF of a sample type that Pillow does not read, such as 64-bit floating point."""
    tifffile = require("tifffile")
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        pages = len(tiff.pages)
        chosen = tiff.pages[choose_index("page", page, pages, "page", steps, required=True)]
        check_size(chosen.imagelength, chosen.imagewidth, max_pixels)
        check_bytes(file, chosen.nbytes, compressed=chosen.compression != tifffile.COMPRESSION.NONE)
        kind, extra = tifffile.PHOTOMETRIC(chosen.photometric), [int(sample) for sample in chosen.extrasamples]
        grey = kind in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE)
        if not (grey or kind == tifffile.PHOTOMETRIC.RGB) or _PREMULTIPLIED in extra:
            raise MedicalImageError(
                f"{arg('source')} is a TIFF file of {kind.name} samples as {chosen.dtype}; allowed are grey and RGB "
                "ones, and transparency that is not multiplied in."
            )
        array = chosen.asarray()
        if array.ndim == 3 and chosen.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            array = np.moveaxis(array, 0, -1)
        if array.ndim == 3:  # without samples that are neither colour nor transparency
            array = array[..., : (1 if grey else 3) + (extra[:1] == [_ALPHA])]
        steps.append(f"TIFF of {array.dtype}")
        image, _ = convert_array(
            array, steps, window=window, full_range=full_range, background=background, max_pixels=max_pixels
        )
        if chosen.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            steps.append("inverted: PhotometricInterpretation WhiteIsZero")
            image = ImageOps.invert(image)
        orientation = chosen.tags.valueof(_ORIENTATION)
        if orientation in range(2, 9):
            image.getexif()[_ORIENTATION] = orientation
            image = ImageOps.exif_transpose(image)
            steps.append(f"turned upright (EXIF orientation {orientation})")
    return image, (image.height, image.width)
