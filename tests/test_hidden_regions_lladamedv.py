"""The neutral picture against what the processor makes of a picture of one colour."""

import numpy as np
import pytest
import torch
from PIL import Image

from lladamedv.modeling_lladamedv.hidden_regions_lladamedv import neutral_pixel_values
from tests.tiny import TILE, tiny_model, tiny_processor


def speckled(width, height, seed=0):
    """A picture whose median colour is known, and stays what it is when the picture is resized: most is of it."""
    random = np.random.default_rng(seed)
    color = random.integers(60, 200, 3, dtype=np.uint8)
    pixels = np.tile(color, (height, width, 1))
    pixels[height // 4 : height // 4 + max(1, height // 3), : width // 2] = random.integers(0, 256, 3)
    return Image.fromarray(pixels), Image.new("RGB", (width, height), tuple(color.tolist()))


@pytest.mark.parametrize("shapes", [[(40, 30)], [(30, 90)], [(96, 32)], [(32, 32)], [(300, 3)], [(40, 30), (20, 60)]])
@pytest.mark.parametrize("mode", ["square", "pad", "anyres_max_4"])
def test_it_is_the_picture_of_its_median_colour(mode, shapes):
    model, processor = tiny_model(mode).model, tiny_processor(mode).image_processor
    pictures, plain = zip(*(speckled(*shape, seed) for seed, shape in enumerate(shapes)))
    given, expected = (processor([list(each)], return_tensors="pt") for each in (pictures, plain))
    neutral = neutral_pixel_values(model, **given)
    noise = torch.rand_like(given.pixel_values)
    shown = (neutral_pixel_values(model, **{**given, "pixel_values": noise}) != noise).any(dim=2)
    # Within three pixels of where a picture meets its padding the processor blends the two.
    planes = shown.flatten(0, 1)[:, None].float()
    highest, lowest = (sign * torch.nn.functional.max_pool2d(sign * planes, 7, 1, 3) for sign in (1, -1))
    border = (highest != lowest).view_as(shown)
    off = (neutral - expected.pixel_values).abs().amax(dim=2) > 0.02  # 2.5 of 255 grey levels
    assert not off[~border].any() and shown.flatten(1).any(dim=1).all()


def test_padding_cannot_be_told_without_the_sizes():
    pixels = torch.zeros(1, 1, 3, TILE, TILE)
    with pytest.raises(ValueError, match="`image_sizes` is None, but 'pad' pads pictures"):
        neutral_pixel_values(tiny_model("pad").model, pixels)
