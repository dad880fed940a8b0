"""Pictures and arrays of any depth, with transparency or without, into 8 bits: the only place where that is done.

A detector gives 12 or 16 bits, or Hounsfield units from −1024 to 3071; a model takes 8 bits. Which values become black
and white (the window) decides what can be seen, so each choice is a step. Pillow's own `convert("RGB")` clips 16 bits
at 255 and shows the colours that transparency hid.
"""

from __future__ import annotations

import math
from io import BytesIO
from numbers import Real
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from .medical_shared import MedicalImageError, Steps, arg, check_size


# (level, width) in Hounsfield units: the conventional windows of CT.
WINDOW_PRESETS = {
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "abdomen": (40, 400),
    "liver": (60, 160),
    "brain": (40, 80),
    "stroke": (40, 40),
    "subdural": (75, 215),
    "bone": (400, 1800),
}
WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
PERCENTILES = (0.5, 99.5)
GREY_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_UPPER_BITS = "16 bits per channel: the upper 8 are used"
_MOST_LABELS = 128  # of a mask; pictures have more different values


class Window(NamedTuple):
    """The grey values to show.

    Attributes:
        level, width: middle and extent, in the units of the values.
        preset: the name in [`WINDOW_PRESETS`] by which it was chosen, or `""`. Presets are in Hounsfield units.
    """

    level: float
    width: float
    preset: str = ""


def check_window(window) -> Window | None:
    """A window from `None`, the name of a preset, a pair of level and width, or such a pair as text, `"40/400"`."""
    if window is None:
        return None
    pair = window
    if isinstance(window, str):
        if window in WINDOW_PRESETS:
            return Window(*WINDOW_PRESETS[window], window)
        try:
            pair = [float(number) for number in window.split("/")]
        except ValueError:
            pair = ()
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(number, Real) for number in pair):
        level, width = map(float, pair)
        if math.isfinite(level) and math.isfinite(width) and width > 0:
            return Window(level, width)
    raise MedicalImageError(
        f"{arg('window')} is {window!r}; allowed are {', '.join(WINDOW_PRESETS)}, and LEVEL/WIDTH such as 40/400 with "
        "a width above 0."
    )


def show_picture(
    image: Image.Image, steps: Steps, *, window: Window | None, full_range: bool, background, deep_colour: bool = False
) -> Image.Image:
    """A picture of any mode, loaded and upright, as one that `convert("RGB")` treats well.

    Args:
        window, full_range, background: see [`read_medical_image`]; checked.
        deep_colour: whether 16 bits per channel have been reduced to 8 already.
    """
    transparent = image.has_transparency_data
    if image.mode in GREY_MODES or (image.mode in ("1", "L") and not transparent and window is not None):
        values = np.asarray(image if image.mode in GREY_MODES else image.convert("L"))
        return Image.fromarray(show_grey(values, steps, window, full_range))
    if deep_colour:
        steps.add("levels", _UPPER_BITS)
    if image.mode in ("1", "L") and not transparent:
        return image
    if window is not None or full_range:
        raise MedicalImageError(
            f"{arg('full_range' if window is None else 'window')} is given, but {arg('source')} is a picture "
            f"of mode {image.mode!r}; allowed are windows and full ranges for grey pictures without transparency."
        )
    if transparent:
        return _lay_on_background(image, background, steps)
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and profile:
        return _to_srgb(image, profile, steps)
    if profile:
        steps.add("left out", "colour profile of the file not applied")
    if image.mode != "RGB":
        steps.add("colour", f"{image.mode} to RGB")
    return image


def show_array(
    array: np.ndarray, steps: Steps, *, window: Window | None, full_range: bool, background, max_pixels: int
) -> Image.Image:
    """An array of grey values or colours as a picture; the arguments are those of [`show_picture`]."""
    if np.ma.isMaskedArray(array):
        array = array.astype(np.float64).filled(np.nan)
    if array.ndim == 3 and array.shape[-1] not in (1, 2, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    grey = array.ndim == 2 and array.dtype.kind in "buif"
    colour = array.ndim == 3 and array.shape[-1] in (2, 3, 4) and array.dtype in (np.uint8, np.uint16)
    if not grey and not colour:
        raise MedicalImageError(
            f"{arg('source')} is an array of shape {array.shape} and type {array.dtype}; allowed are (height, width) "
            "of real numbers, and (height, width, channels) or (channels, height, width) with 1 to 4 channels, "
            "in colour of uint8 or uint16."
        )
    check_size(*array.shape[:2], max_pixels)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    deep_colour = colour and array.dtype == np.uint16
    if deep_colour:
        array = (array >> 8).astype(np.uint8)  # as Pillow reads files of such pictures
    if array.dtype != np.uint8:
        return Image.fromarray(show_grey(array, steps, window, full_range))
    image = Image.fromarray(np.ascontiguousarray(array))
    return show_picture(
        image, steps, window=window, full_range=full_range, background=background, deep_colour=deep_colour
    )


def show_grey(values: np.ndarray, steps: Steps, window: Window | None, full_range: bool) -> np.ndarray:
    """Grey values of any type, `(height, width)`, as `uint8`."""
    steps.choices |= {"window": None, "full_range": None}
    if window is not None:
        if window.preset and values.dtype.kind in "bu":
            raise MedicalImageError(
                f"{arg('window')} is {window.preset!r}, a window in Hounsfield units, but {arg('source')} has no "
                "values below 0, as these have; allowed is LEVEL/WIDTH in the picture's values."
            )
        return apply_window(values, window, steps)
    if full_range:
        if values.dtype.kind not in "ui" or values.min() < 0 or values.max() > 65535:
            raise MedicalImageError(
                f"{arg('full_range')} is given, but {arg('source')} has values other than whole numbers from 0 to "
                f"65535; leave it out, or choose a window ({arg('window')})."
            )
        steps.add("levels", "full range of 16 bits: divided by 257")
        return apply_range(values, 0, 65535)
    return apply_percentiles(values, steps, PERCENTILES)


def apply_window(
    values: np.ndarray, window: Window, steps: Steps, function: str = "LINEAR_EXACT", origin: str = "", note: str = ""
) -> np.ndarray:
    """Grey values through a window.

    Args:
        values: of any shape, in the units of `window`.
        steps: the window is added to it, with `origin` and `note` in its text.
        function: one of `WINDOW_FUNCTIONS`. With `"LINEAR"`, which is made for whole numbers, the window begins at
            `level − width / 2` and ends at `level + width / 2 − 1`, and its width is at least 1.

    Returns:
        `uint8` of the same shape, 0 below the window and 255 above it.

    Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3.
    """
    level, width, preset = window
    steps.window = (level, width)
    preset = f", preset {preset}" if preset else ""
    steps.add("levels", f"window {level:g}/{width:g} (level/width{preset}){origin}, {function}{note}")
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return _round(255 / (1 + np.exp(-4 * (_as_float(values) - level) / width)))
    if function == "LINEAR":
        level, width = level - 0.5, width - 1
    return apply_range(values, level - width / 2, level + width / 2)


def apply_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Grey values as `uint8`, linear from `low` (0) to `high` (255); a step between the two if they are equal."""
    values = _as_float(values)
    if low == high:
        return np.where(values > low, 255, 0).astype(np.uint8)
    values = values - low
    values *= 255 / (high - low)
    return _round(values)


def apply_percentiles(
    values: np.ndarray,
    steps: Steps,
    percentiles: tuple[float, float],
    used: np.ndarray | None = None,
    foreground: bool = False,
) -> np.ndarray:
    """Grey values as `uint8`, linear between two percentiles.

    Percentiles would hide what is small in masks and label maps. These are shown from their least to their greatest
    value instead, and in even steps where two labels would look alike otherwise.

    Args:
        used: boolean, of the shape of `values`: which of them decide. Values that are not finite are always left out,
            and become black if they are not a number.
        foreground: take the percentiles from the values above the least one.
    """
    finite = np.isfinite(values)
    if not finite.all():
        steps.add("levels", f"{int((~finite).sum())} values are not finite")
    sample = values[finite if used is None else finite & used]
    few = _few_values(sample)
    if few is not None and len(few) == 1:  # the inside of a mask is not black as what is outside
        shade = "white" if few[0] > 0 else "black"
        steps.add("levels", f"least and greatest value (equal): {few[0]:g}, shown {shade}")
        return np.where((values >= few[0]) & (values > 0), np.uint8(255), np.uint8(0))
    if few is not None:
        extent = f"{few[0]:g} to {few[-1]:g}"
        steps.add("levels", f"least and greatest value (as of a mask, different ones: {len(few)}): {extent}")
        if len(np.unique(apply_range(few, few[0], few[-1]))) == len(few):
            steps.window = ((float(few[0]) + float(few[-1])) / 2, float(few[-1]) - float(few[0]))
            return apply_range(values, few[0], few[-1])
        steps.add("levels", "shown in even steps: two of them would look alike")
        return apply_range(np.where(finite, np.searchsorted(few, values), values), 0, len(few) - 1)
    if not sample.size:
        steps.add("levels", "no values to take percentiles from: black")
        return np.zeros(values.shape, np.uint8)
    if foreground:
        steps.add("levels", "foreground: the slice's values above its least")
        sample = sample[sample > sample.min()]
    low, high = np.percentile(sample, percentiles).tolist()
    name = "percentiles {:g}-{:g}".format(*percentiles)
    if low == high:
        low, high = float(sample.min()), float(sample.max())
        name = f"least and greatest value ({name} are equal)"
    steps.add("levels", f"{name}: {low:g} to {high:g}")
    steps.window = ((low + high) / 2, high - low) if high > low else None
    return apply_range(values, low, high)


def _few_values(values: np.ndarray) -> np.ndarray | None:
    """The different values in ascending order, if they are as few as in a mask or a map of labels, or else `None`."""
    most = max(min(_MOST_LABELS, values.size // 3), 1)
    if len(np.unique(values[:: values.size // 4096 + 1])) > most:  # most pictures need not be sorted as a whole
        return None
    few = np.unique(values)
    return few if 0 < len(few) <= most else None


def _as_float(values: np.ndarray) -> np.ndarray:
    """In the smallest floating-point type that holds the values exactly."""
    return values.astype(np.result_type(values.dtype, np.float32), copy=False)


def _round(values: np.ndarray) -> np.ndarray:
    """As `uint8`; in place until then, because pictures may be large."""
    np.nan_to_num(values, copy=False, nan=0, posinf=255, neginf=0)
    np.clip(values, 0, 255, out=values)
    return np.rint(values, out=values).astype(np.uint8)


def _lay_on_background(image: Image.Image, background, steps: Steps) -> Image.Image:
    """A picture with transparency on a colour, or without one as the released models were trained: by its colours
    alone, also where it is transparent."""
    if image.mode == "La":  # which Pillow converts to nothing but LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        steps.add("colour", "transparency left out: everything is opaque")
        return image
    steps.choices["background"] = None
    if background is None:
        hidden = "the colours that it hid are shown"
        steps.add("colour", f"transparency left out, as in the released models' training: {hidden}")
        return image
    steps.add("colour", f"transparent pixels laid on RGB {background}")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image)


def _to_srgb(image: Image.Image, profile: bytes, steps: Steps) -> Image.Image:
    try:
        source, target = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        steps.add("colour", f"{image.mode} to RGB; the colour profile of the file is unusable")
        return image
    steps.add("colour", f"{image.mode} to sRGB by the colour profile of the file")
    return converted
