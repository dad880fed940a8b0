"""What the readers of medical image files share: their error, optional libraries, and grey values into 8 bits.

A detector gives 12 or 16 bits, or Hounsfield units from −1024 to 3071; a model takes 8 bits. Which values become black
and white (the window) decides what can be seen, so each choice is listed in the steps.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Callable
from numbers import Integral, Real
from os import SEEK_END
from typing import BinaryIO

import numpy as np
from PIL import Image


logger = logging.getLogger(__name__)

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
# Pillow refuses larger files too; arrays and open images are held to the same limit.
MAX_IMAGE_PIXELS = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else 178_956_970
# How many times its size a file of Deflate or LZW can become: 1032 and 1365 (https://zlib.net/zlib_tech.html).
MOST_EXPANSION = 1500
_MARKED = re.compile("\ue000(.*?)\ue001")  # characters for private use, which no other text has
_MOST_LABELS = 128  # of a mask; pictures have more different values
WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


class MedicalImageError(ValueError):
    """A medical image, or an option for it, that cannot be used. The message never says who the patient is.

    Args:
        message: names arguments by [`arg`].
        missing: the argument that must be given because there is no default.

    Attributes:
        missing: see above; `None` for all other errors.
    """

    def __init__(self, message: str, missing: str | None = None):
        self.message, self.missing = message, missing
        super().__init__(self.told(lambda argument: f"`{argument}`"))

    def told(self, name_of: Callable[[str], str]) -> str:
        """The message in the names of an interface.

        Args:
            name_of: gives the interface's name of an argument of [`read_medical_image`]: `source`, or one of
                `READING_OPTIONS`.
        """
        return _MARKED.sub(lambda match: name_of(match[1]), self.message)


class Steps(list):
    """What was done to the pixels, in order.

    Attributes:
        choices: the arguments by which another picture can be read from the same source. Those of an index have what is
            counted, the index from 0 and how many there are; the others have `None`.
    """

    def __init__(self):
        super().__init__()
        self.choices: dict[str, tuple[str, int, int] | None] = {}


def arg(name: str) -> str:
    """An argument of [`read_medical_image`] in the message of a [`MedicalImageError`]."""
    return f"\ue000{name}\ue001"


def require(library: str):
    """Import a library of the extra `medical`.

    Raises:
        ImportError: if it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f'This image file needs {library}: pip install "lladamedv[medical]"') from error


def choose_index(name: str, value: int | None, count: int, unit: str, steps: Steps, required: bool = False) -> int:
    """The index of a frame or slice: the one asked for, else the middle one, which is a step and a warning in the log.

    Args:
        name: the argument that `value` came with, for messages.
        value: index from 0, or `None`.
        count: how many there are.
        unit: what is counted, for the steps.
        required: whether it is an error if `value` is `None` where there are several.
    """
    if value is None and required and count > 1:
        raise MedicalImageError(
            f"{arg(name)} is not given, but there are {count} {unit}s; allowed are 0 to {count - 1}.", missing=name
        )
    if value is None:
        value = count // 2
        if count > 1:
            steps.choices[name] = (unit, value, count)
            steps.append(f"{unit} {value} of {count} (from 0): the middle one, none was chosen")
            logger.warning("no %s is chosen: the middle one of %d is shown", unit, count)
        return value
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= value < count:
        raise MedicalImageError(f"{arg(name)} is {value!r}; allowed are whole numbers from 0 to {count - 1}.")
    if count > 1:
        steps.choices[name] = (unit, int(value), count)
    steps.append(f"{unit} {value} of {count} (from 0)")
    return int(value)


def check_window(window) -> tuple[float, float] | None:
    """`(level, width)` of a window: `None`, the name of a preset, such a pair, or one as text, `"40/400"`."""
    if window is None:
        return None
    pair = window
    if isinstance(window, str):
        if window in WINDOW_PRESETS:
            return WINDOW_PRESETS[window]
        try:
            pair = [float(number) for number in window.split("/")]
        except ValueError:
            pair = ()
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(number, Real) for number in pair):
        level, width = map(float, pair)
        if math.isfinite(level) and math.isfinite(width) and width > 0:
            return level, width
    raise MedicalImageError(
        f"{arg('window')} is {window!r}; allowed are {', '.join(WINDOW_PRESETS)}, and LEVEL/WIDTH such as 40/400 with "
        "a width above 0."
    )


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse a picture that has no pixels or too many, before they are decoded."""
    if not 0 < height * width <= max_pixels:
        raise MedicalImageError(f"{arg('source')} is {width} by {height} pixels; allowed are 1 to {max_pixels} pixels.")


def check_bytes(file: BinaryIO, needed: int, compressed: bool) -> None:
    """Refuse a file that is too short for what its header states, before memory is taken for that."""
    position = file.tell()
    size = file.seek(0, SEEK_END)
    file.seek(position)  # gzip may be reading it, and reads on from where it is
    if needed > size * (MOST_EXPANSION if compressed else 1):
        raise MedicalImageError(
            f"{arg('source')} has {size} bytes, too few for the {needed} bytes of pixels that its header states; "
            "allowed are whole files."
        )


def describe_window(window, level: float, width: float, function: str = "LINEAR_EXACT") -> str:
    """The step that tells of a window that the caller asked for."""
    preset = f", preset {window}" if isinstance(window, str) and window in WINDOW_PRESETS else ""
    return f"window {level:g}/{width:g} (level/width{preset}), {function}"


def apply_window(values: np.ndarray, level: float, width: float, function: str = "LINEAR_EXACT") -> np.ndarray:
    """Grey values through a window.

    Args:
        values: numbers of any shape.
        level, width: the window in the units of `values`; `width` is above 0.
        function: one of `WINDOW_FUNCTIONS`. With `"LINEAR"`, which is made for whole numbers, the window begins at
            `level − width / 2` and ends at `level + width / 2 − 1`, and `width` is at least 1.

    Returns:
        `uint8` of the same shape, 0 below the window and 255 above it.

    Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3.
    """
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
    steps: list[str],
    percentiles: tuple[float, float],
    used: np.ndarray | None = None,
    foreground: bool = False,
) -> np.ndarray:
    """Grey values as `uint8`, linear between two percentiles.

    Percentiles would hide what is small in masks and label maps. These are shown from their least to their greatest
    value instead, and in even steps where two labels would look alike otherwise.

    Args:
        values: numbers of any shape.
        percentiles: the percentages, such as `(0.5, 99.5)`.
        used: boolean, of the same shape: which values decide. Values that are not finite are always left out, and
            become black if they are not a number.
        foreground: take the percentiles from the values above the least one.
    """
    finite = np.isfinite(values)
    if not finite.all():
        steps.append(f"{int((~finite).sum())} values are not finite")
    sample = values[finite if used is None else finite & used]
    few = _few_values(sample)
    if few is not None and len(few) == 1:  # the inside of a mask is not black as what is outside
        steps.append(f"least and greatest value (equal): {few[0]:g}, shown {'white' if few[0] > 0 else 'black'}")
        return np.where((values >= few[0]) & (values > 0), np.uint8(255), np.uint8(0))
    if few is not None:
        steps.append(f"least and greatest value (as of a mask, different ones: {len(few)}): {few[0]:g} to {few[-1]:g}")
        if len(np.unique(apply_range(few, few[0], few[-1]))) == len(few):
            return apply_range(values, few[0], few[-1])
        steps.append("shown in even steps: two of them would look alike")
        ranks = np.where(finite, np.searchsorted(few, values), values)
        return apply_range(ranks, 0, len(few) - 1)
    if not sample.size:
        steps.append("no values to take percentiles from: black")
        return np.zeros(values.shape, np.uint8)
    if foreground:
        steps.append("foreground: the slice's values above its least")
        sample = sample[sample > sample.min()]
    low, high = np.percentile(sample, percentiles).tolist()
    name = "percentiles {:g}-{:g}".format(*percentiles)
    if low == high:
        low, high = float(sample.min()), float(sample.max())
        name = f"least and greatest value ({name} are equal)"
    steps.append(f"{name}: {low:g} to {high:g}")
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
