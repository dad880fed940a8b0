"""Open pictures of every mode, arrays and tensors of every shape and type, become tiles or an error that says why."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch
from PIL import Image

from tests.reading import read
from tests.tiny import TILE, tiny_processor

from .harness import Target, both_profiles
from .mutations import strange_value


MODES = (
    "1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "La", "PA", "RGBX", "RGBa", "I;16",
    "I;16L", "I;16B",
)  # fmt: skip
SIDES = ((1, 1), (1, 2), (2, 1), (3, 500), (500, 3), (30000, 1), (1, 30000), (33, 31), (64, 64), (200, 150))
TYPES = (
    "u1", "u1", "u1", "?", "i1", "u2", ">u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", ">f4", "f8", "g", "c8", "O",
    "U3", "S2", "M8[s]", "m8[s]", "u1,f4",
)  # fmt: skip


def picture(rng: random.Random) -> Image.Image:
    width, height = rng.choice(SIDES)
    mode = rng.choice(MODES)
    noise = np.frombuffer(rng.randbytes(4 * width * height), np.uint8)
    image = Image.fromarray(noise[: 3 * width * height].reshape(height, width, 3))
    if mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert({"La": "LA", "PA": "LA", "RGBa": "RGBA"}.get(mode, mode))
        image = image.convert(mode) if mode in ("La", "RGBa") else image
    elif mode.startswith("I;16"):
        image = Image.frombytes(mode, (width, height), noise[: 2 * width * height].tobytes())
    elif mode == "LAB":
        image = Image.frombytes(mode, (width, height), noise[: 3 * width * height].tobytes())
    else:
        image = image.convert(mode)
    if rng.random() < 0.3:
        image.info = {"transparency": rng.choice((0, 300, b"\0\1", (1, 2, 3), "red", None)), "icc_profile": b"junk"}
    if rng.random() < 0.1:
        image.getexif()[0x0112] = rng.choice((0, 6, 8, 77, "x"))
    return image


def array(rng: random.Random) -> np.ndarray:
    height, width = rng.choice(SIDES)
    shape = rng.choice(
        (
            (), (0,), (7,), (height, width), (height, width), (height, width, 1), (height, width, 2),
            (height, width, 3), (height, width, 3), (3, height, width), (height, width, 4), (1, height, width),
            (0, width), (height, 0, 3), (2, 2, 2, 2), (height, width, 0), (3, 3, 3),
        )
    )  # fmt: skip
    kind = np.dtype(rng.choice(TYPES))
    count = int(np.prod(shape))
    if kind.kind in "OU":
        values = np.full(shape, rng.choice((None, "1", 1)), kind)
    else:
        values = np.frombuffer(rng.randbytes(count * kind.itemsize), kind).reshape(shape)
    if rng.random() < 0.1 and values.ndim:
        values = values[::-1] if rng.random() < 0.5 else np.asfortranarray(values)
    if kind.kind == "f" and values.size and rng.random() < 0.5:
        values = np.where(rng.random() < 0.5, values, kind.type(rng.choice((0, np.nan, np.inf, -np.inf))))
    return values


def tensor(rng: random.Random) -> torch.Tensor:
    kind = rng.choice((torch.uint8, torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.int64))
    shape = rng.choice(((), (0,), (3, 5, 4), (1, 5, 4), (5, 4), (5, 4, 3), (2, 3, 5, 4), (4, 30000, 1)))
    value = torch.zeros(shape).to(kind)
    kinds = (lambda x: x, lambda x: x, lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: torch.nn.Buffer(x))
    return rng.choice(kinds)(value)


@cache
def processors():
    return [tiny_processor(ratio).image_processor for ratio in ("square", "pad", "anyres_max_1", "anyres_max_4")]


def images(rng: random.Random):
    """One image, a few, a few for each prompt, or something else instead."""

    def one():
        return rng.choice((picture, picture, array, tensor, strange_value))(rng)

    ways = (one, one, lambda: [one()], lambda: [one(), one()], lambda: [[one()], [one(), one()]], lambda: (one(),))
    return rng.choice(ways)(), rng.randrange(4)


def process(given) -> None:
    pictures, number = given
    output = processors()[number](pictures, return_tensors="np")
    pixels = output["pixel_values"]
    assert pixels.dtype == np.float32 and pixels.shape[-3:] == (3, TILE, TILE)
    assert np.abs(pixels).max() <= 1.0001 and len(output["image_sizes"]) == len(pixels)


def read_decoded(given) -> None:
    source, options = given
    result = read(source, max_pixels=10**6, **options)
    assert result.image.mode == "RGB" and (result.image.height, result.image.width) == result.size


def decoded(rng: random.Random):
    window = rng.choice((None, None, "brain", (0, 1), (1e300, 1e300), (-1, 0.001)))
    options = {"window": window, "full_range": window is None and rng.random() < 0.3}
    return rng.choice((picture, picture, array, array, array, tensor, strange_value))(rng), options


TARGETS = [
    Target("image processor", images, process, documented=(ValueError, TypeError), share=0.6),
    Target("decoded medical images", decoded, read_decoded, share=0.6),
]


@both_profiles(TARGETS)
def test_decoded_images(target, first, count):
    target.hunt(first, count)
