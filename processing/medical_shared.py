"""What the readers of medical images share: their error, the steps that they report, and checks before decoding."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from numbers import Integral
from os import SEEK_END
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image


# Pillow refuses larger files too; arrays and open images are held to the same limit.
MAX_IMAGE_PIXELS = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else 178_956_970
# How many times its size a file of Deflate or LZW can become: 1032 and 1365 (https://zlib.net/zlib_tech.html).
_MOST_EXPANSION = 1500
_MOST_STRETCHED = 100  # larger ratios of a pixel's sides are taken for mistakes
_MARKED = re.compile("\ue000(.*?)\ue001")  # characters for private use, which no other text has


class MedicalImageError(ValueError):
    """A medical image, or an option for it, that cannot be used. The message never identifies a patient.

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


def arg(name: str) -> str:
    """An argument of [`read_medical_image`] in the message of a [`MedicalImageError`]."""
    return f"\ue000{name}\ue001"


class Step(NamedTuple):
    """One thing that was done to the pixels, or that the file holds and the picture does not show.

    Attributes:
        kind: `"choice"` of a frame, slice or page; `"levels"`, how grey values became black to white; `"colour"`;
            `"geometry"`, how the picture was turned and scaled; or `"left out"`.
        text: what was done, in words; also `str(step)`. It holds nothing that identifies a patient.
        warns: whether the picture may mislead without this step being known. Such steps are logged as warnings.
    """

    kind: str
    text: str
    warns: bool = False

    def __str__(self) -> str:
        return self.text


class Steps(list[Step]):
    """What was done to the pixels, in order.

    Attributes:
        choices: the arguments by which another picture can be read from the same source. Those of an index have what is
            counted, the index from 0 and how many there are; the others have `None`.
        window: the level and width by which grey values became black to white, if they did so linearly.
    """

    def __init__(self):
        super().__init__()
        self.window: tuple[float, float] | None = None
        self.choices: dict[str, tuple[str, int, int] | None] = {}

    def add(self, kind: str, text: str, warns: bool = False) -> None:
        self.append(Step(kind, text, warns))


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
    """The index of a frame or slice: the one asked for, else the middle one, with a warning.

    Args:
        name: the argument that `value`, an index from 0 or `None`, came with.
        unit: what is counted, for the steps.
        required: whether it is an error if `value` is `None` where there are several.
    """
    if value is None and required and count > 1:
        raise MedicalImageError(
            f"{arg(name)} is not given, but there are {count} {unit}s; allowed are 0 to {count - 1}.", missing=name
        )
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= value < count):
        raise MedicalImageError(f"{arg(name)} is {value!r}; allowed are whole numbers from 0 to {count - 1}.")
    chosen = count // 2 if value is None else int(value)
    if count > 1:
        steps.choices[name] = (unit, chosen, count)
    if count > 1 or value is not None:
        by_default = ": the middle one, none was chosen" if value is None else ""
        steps.add("choice", f"{unit} {chosen} of {count} (from 0){by_default}", warns=value is None)
    return chosen


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse a picture that has no pixels or too many, before they are decoded."""
    if not 0 < height * width <= max_pixels:
        raise MedicalImageError(f"{arg('source')} is {width} by {height} pixels; allowed are 1 to {max_pixels} pixels.")


def check_bytes(file: BinaryIO, needed: int, compressed: bool) -> None:
    """Refuse a file that is too short for what its header states, before memory is taken for that."""
    position = file.tell()
    size = file.seek(0, SEEK_END)
    file.seek(position)  # gzip may be reading it, and reads on from where it is
    if needed > size * (_MOST_EXPANSION if compressed else 1):
        raise MedicalImageError(
            f"{arg('source')} has {size} bytes, too few for the {needed} bytes of pixels that its header states; "
            "allowed are whole files."
        )


def to_scale(pixels: np.ndarray, spacing: tuple[float, float] | None, max_pixels: int, steps: Steps) -> Image.Image:
    """A picture with square pixels, stretched along the side of which there are too few of them.

    Args:
        pixels: `uint8` `(height, width)` or `(height, width, 3)`.
        spacing: how high and how wide a pixel is, in any unit, if that is known.
        max_pixels: a picture that would have more stays as it is.
    """
    if pixels.min() == pixels.max():
        steps.add("levels", f"the picture has one grey value only: {pixels.min()}", warns=True)
    image = Image.fromarray(pixels)
    if spacing is None or not spacing[0] > 0 < spacing[1] or math.isclose(*spacing, rel_tol=0.01):
        return image
    ratio = spacing[0] / spacing[1]
    width, height = round(image.width * max(1 / ratio, 1)), round(image.height * max(ratio, 1))
    described = "pixels are {:g} high and {:g} wide".format(*spacing)
    if not 1 / _MOST_STRETCHED <= ratio <= _MOST_STRETCHED or width * height > max_pixels:
        steps.add("geometry", f"{described}, and stay so: the picture is not to scale", warns=True)
        return image
    steps.add("geometry", f"{described}: stretched to {height} by {width} (height by width)")
    return image.resize((width, height), Image.Resampling.BILINEAR)
