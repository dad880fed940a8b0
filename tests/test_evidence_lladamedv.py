"""Maps of evidence against painting the picture, likelihoods against all orders, gradients against differences."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_model, tiny_processor


COLOUR = (90, 140, 200)  # of more than half of each picture, so that its median is known


def scene(width, height, seed=0):
    """A picture of blocks of 8 by 8 pixels, most of one colour."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    blocks[rng.random(blocks.shape[:2]) < 0.6] = COLOUR
    return Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1))


def painted(image, box):
    copy = image.copy()
    copy.paste(COLOUR, box)
    return copy


@pytest.fixture
def nearest():
    """Processors that resize without mixing pixels, so that painting before and hiding after are the same."""

    def make(aspect_ratio):
        processor = tiny_processor(aspect_ratio).image_processor
        processor.resample = Image.Resampling.NEAREST
        return processor

    return make


@pytest.mark.parametrize(("aspect_ratio", "sizes", "cells"), [
    ("square", [(64, 32)], 2),
    ("pad", [(32, 64), (32, 32)], 2),
    ("anyres_max_4", [(64, 64)], 4),
    ("anyres_max_4", [(96, 64)], 3),
    ("anyres_max_4", [(64, 32), (32, 32)], 2),
])  # fmt: skip
def test_hiding_is_painting_the_picture(nearest, aspect_ratio, sizes, cells):
    """A cell's value is the fall that painting it in the picture file makes."""
    model, processor = tiny_model(aspect_ratio), nearest(aspect_ratio)
    pictures = [scene(*size, seed=seed) for seed, size in enumerate(sizes)]
    inputs = processor([pictures], return_tensors="pt")
    counts = [processor.get_number_of_image_tokens(*size[::-1], alone=len(sizes) == 1) for size in sizes]
    prompt, answer = torch.tensor([[99] * sum(counts) + [5, 6, 7]]), [7, 20]
    output = model.explain_image(prompt, answer, **inputs, cells=cells, append_eos=False, max_rows=400)
    whole = model.score(prompt, [answer], **inputs, append_eos=False).log_likelihood.item()
    assert output.log_likelihood.item() == pytest.approx(whole, abs=1e-6)
    for number, (width, height) in enumerate(sizes):
        (values,) = output.maps[number]
        assert values.dtype == torch.float64
        rows, columns = values.shape
        assert max(rows, columns) == cells and rows * width == columns * height
        assert values.abs().max() > 0.01
        for row in range(rows):
            for column in range(columns):
                corner = (column * width // columns, row * height // rows)
                box = (*corner, corner[0] + width // columns, corner[1] + height // rows)
                changed = [painted(each, box) if each is pictures[number] else each for each in pictures]
                scored = model.score(prompt, [answer], **processor([changed], return_tensors="pt"), append_eos=False)
                fall = whole - scored.log_likelihood.item()
                assert values[row, column].item() == pytest.approx(fall, abs=1e-5)
