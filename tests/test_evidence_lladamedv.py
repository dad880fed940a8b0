"""Maps of evidence against painting the picture, likelihoods against all orders, gradients against differences."""

import numpy as np
import pytest
import torch
from PIL import Image

from lladamedv import LLaDAMedVGenerationConfig
from lladamedv.evidence import draw_evidence, evidence_legend
from tests.test_generation_lladamedv import PIXELS, PROMPT, SUPPRESSED
from tests.test_scoring_lladamedv import over_all_orders
from tests.tiny import Words, image_prompt, tiny_model, tiny_processor


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


def prompt_of(processor, sizes):
    """Pictures of these sizes, what the processor makes of them, and a prompt that shows them."""
    pictures = [scene(*size, seed=seed) for seed, size in enumerate(sizes)]
    counts = [processor.get_number_of_image_tokens(*size[::-1], alone=len(sizes) == 1) for size in sizes]
    return pictures, processor([pictures], return_tensors="pt"), torch.tensor([[99] * sum(counts) + [5, 6, 7]])


def box_of(row, column, shape, width, height):
    """A cell of a map of `shape` in a picture's pixels, as Pillow has boxes."""
    x, y = width // shape[1], height // shape[0]
    return column * x, row * y, (column + 1) * x, (row + 1) * y


LAYOUTS = [
    ("square", [(64, 32)], 2),
    ("pad", [(32, 64), (32, 32)], 2),
    ("anyres_max_4", [(64, 64)], 4),
    ("anyres_max_4", [(96, 64)], 3),
    ("anyres_max_4", [(64, 32), (32, 32)], 2),
]


@pytest.mark.parametrize(("aspect_ratio", "sizes", "cells"), LAYOUTS)
def test_hiding_is_painting_the_picture(nearest, aspect_ratio, sizes, cells):
    """A cell's value is the fall that painting it in the picture file makes."""
    model, processor = tiny_model(aspect_ratio), nearest(aspect_ratio)
    pictures, inputs, prompt = prompt_of(processor, sizes)
    answer = [7, 20]
    output = model.explain_image(prompt, answer, **inputs, cells=cells, append_eos=False, max_rows=400)
    whole = model.score(prompt, [answer], **inputs, append_eos=False).log_likelihood.item()
    assert output.log_likelihood.item() == pytest.approx(whole, abs=1e-6)
    def fall(number, box):
        changed = [painted(each, box) if each is pictures[number] else each for each in pictures]
        scored = model.score(prompt, [answer], **processor([changed], return_tensors="pt"), append_eos=False)
        return whole - scored.log_likelihood.item()

    for number, (width, height) in enumerate(sizes):
        (values,) = output.maps[number]
        assert values.dtype == torch.float64
        rows, columns = values.shape
        assert max(rows, columns) == cells and rows * width == columns * height
        assert values.abs().max() > 0.01
        for row in range(rows):
            for column in range(columns):
                box = box_of(row, column, (rows, columns), width, height)
                assert values[row, column].item() == pytest.approx(fall(number, box), abs=1e-5)
        assert output.whole_fall[number].item() == pytest.approx(fall(number, (0, 0, width, height)), abs=1e-5)


@pytest.mark.parametrize("singles", [64, 5])
def test_windows_of_several_sizes(model, singles):
    """Windows of 2 by 2 cells that overlap by half, then single cells, where the map is strongest if rows are few."""
    processor, picture, count = tiny_processor("square").image_processor, scene(32, 32), 8
    pixels = {"pixel_values": processor(picture, return_tensors="pt")["pixel_values"]}
    seen = []
    output = model.explain_image(
        image_prompt(PROMPT), [7], **pixels, cells=count, append_eos=False, max_rows=2 + 49 + singles,
        callback=lambda *rows: seen.append(rows),
    )  # fmt: skip

    def fall(row, column, size):
        box = (4 * column, 4 * row, 4 * (column + size), 4 * (row + size))
        changed = processor(painted(picture, box), return_tensors="pt")["pixel_values"]
        scored = model.score(image_prompt(PROMPT), [[7]], pixel_values=changed, append_eos=False)
        return (output.log_likelihood - scored.log_likelihood).item()

    pairs = np.array([[fall(row, column, 2) for column in range(count - 1)] for row in range(count - 1)])
    expected = np.array([
        [pairs[max(row - 1, 0) : row + 1, max(column - 1, 0) : column + 1].mean() for column in range(count)]
        for row in range(count)
    ])  # fmt: skip
    for cell in np.abs(expected).flatten().argsort()[::-1][:singles].tolist():
        expected[divmod(cell, count)] += fall(*divmod(cell, count), 1)
    np.testing.assert_allclose(output.maps[0][0].numpy(), expected / 2, atol=1e-5)
    assert output.num_rows == 2 + 49 + singles and seen[-1] == (output.num_rows, output.num_rows)


@torch.no_grad()
def explain(model, answer, **options):
    return model.explain_image(image_prompt(PROMPT), answer, pixel_values=PIXELS, cells=2, append_eos=False, **options)


def test_spans_with_the_rest_of_the_answer_given(model):
    """Each span's likelihood is the mean over all orders of revealing it; long ones are sampled around it."""
    answer, spans = [7, 20, 30, 5], [(0, 1), (1, 4), (0, 4)]
    expected = [over_all_orders(model, image_prompt(PROMPT), PIXELS, answer, range(*span)) for span in spans]
    output = explain(model, answer, spans=spans)
    assert output.log_likelihood[:2].tolist() == pytest.approx(expected[:2], abs=1e-4)
    assert output.maps[0].shape == (3, 2, 2)
    for number, span in enumerate(spans):  # what one span is does not change with what else is asked
        alone = explain(model, answer, spans=[span])
        torch.testing.assert_close(alone.maps[0][0], output.maps[0][number], atol=1e-5, rtol=0)
    sampled = explain(model, answer, spans=spans[2:], num_samples=1000, max_rows=10_000, batch_size=500)
    assert sampled.log_likelihood.item() == pytest.approx(expected[2], abs=2.5)
    exact = explain(model, answer, spans=spans[2:], max_exact_tokens=4)
    torch.testing.assert_close(sampled.maps[0], exact.maps[0], atol=0.4, rtol=0)


def test_the_end_is_given(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", [40, 91])
    monkeypatch.setattr(model.generation_config, "pad_token_id", 91)
    output = model.explain_image(image_prompt(PROMPT), "7 20", pixel_values=PIXELS, cells=1, tokenizer=Words())
    expected = over_all_orders(model, image_prompt(PROMPT), PIXELS, [7, 20, 40], range(2))
    assert output.log_likelihood.item() == pytest.approx(expected, abs=1e-4) and output.answer.tolist() == [7, 20]


def test_the_models_own_answer_and_padding(model, monkeypatch):
    options = {"max_new_tokens": 8, "block_length": 8, "steps": 8, "suppress_tokens": SUPPRESSED}
    monkeypatch.setattr(model, "generation_config", LLaDAMedVGenerationConfig(**options))
    prompt, images = image_prompt(PROMPT), {"pixel_values": PIXELS, "max_rows": 60, "cells": 2}
    own = model.generate(prompt, pixel_values=PIXELS)[0, prompt.shape[1] :]
    padded = torch.nn.functional.pad(prompt, (3, 0), value=91)
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (3, 0))
    given = model.explain_image(padded, own, attention_mask=mask, **images)
    found = model.explain_image(prompt, **images)
    assert found.answer.tolist() == own.tolist()
    torch.testing.assert_close(found.maps[0], given.maps[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("aspect_ratio", "sizes", "cells"), [each for each in LAYOUTS if each[2] != 3])
def test_gradients_are_how_the_likelihood_begins_to_fall(nearest, aspect_ratio, sizes, cells):
    """A cell's value is the slope of the fall as the cell fades into the colour that it is painted in; the tower may be
    frozen."""
    model, processor = tiny_model(aspect_ratio).double(), nearest(aspect_ratio)
    model.model.vision_tower.requires_grad_(False)
    pictures, inputs, prompt = prompt_of(processor, sizes)
    output = model.explain_image(prompt, [7], **inputs, method="gradient", append_eos=False, cells=cells)
    assert output.num_rows == 1 and output.whole_fall is None
    for number, (width, height) in enumerate(sizes):
        (values,) = output.maps[number]
        for row, column in ((0, 0), (values.shape[0] - 1, values.shape[1] - 1)):
            box = box_of(row, column, values.shape, width, height)
            changed = [painted(each, box) if each is pictures[number] else each for each in pictures]
            away = processor([changed], return_tensors="pt")["pixel_values"] - inputs["pixel_values"]
            slope = 0
            for step, weight in ((-0.02, -1), (-0.01, 8), (0.01, -8), (0.02, 1)):  # exact to the fourth order
                faded = {**inputs, "pixel_values": inputs["pixel_values"] + step * away}
                slope += weight / 0.12 * model.score(prompt, [[7]], **faded, append_eos=False).log_likelihood.item()
            # The norms of the language model compute in float32.
            assert values[row, column].item() == pytest.approx(slope, abs=5e-3, rel=1e-2)


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "attention"}, "`method` is 'attention'; allowed are occlusion, gradient"),
    ({"pixel_values": None}, "`pixel_values` is None"),
    ({"input_ids": torch.ones(2, 5, dtype=torch.long)}, "`input_ids` holds 2 prompts"),
    ({"answer": "7"}, "`answer` holds the text '7'; texts need `tokenizer`"),
    ({"answer": []}, r"`answer` holds \[\]; allowed are non-empty answers"),
    ({"spans": [(1, 3)]}, r"`spans` holds \(1, 3\); allowed are \(start, end\) with 0 <= start < end <= 2"),
    ({"spans": []}, "`spans` is empty"),
    ({"cells": 0}, "`cells` is 0; allowed are whole numbers of at least 1"),
    ({"max_exact_tokens": 13}, "`max_exact_tokens` is 13; allowed are whole numbers from 0 to 12"),
    ({"max_rows": 8}, "`max_rows` is 8; the 3 masks of this answer and 1 pictures need at least 9"),
])  # fmt: skip
def test_bad_input(model, monkeypatch, options, message):
    monkeypatch.setattr(model.model, "forward", None)
    arguments = {"input_ids": image_prompt(PROMPT), "answer": [7, 20], "pixel_values": PIXELS} | options
    with pytest.raises(ValueError, match=message):
        model.explain_image(**arguments)


def test_the_overlay_says_for_and_against():
    values = np.zeros((2, 4))
    values[0, 0], values[1, 3] = 2, -1
    grey = Image.new("RGB", (40, 20), (128, 128, 128))
    drawn = np.asarray(draw_evidence(grey, torch.tensor(values), legend=False), dtype=int)
    assert drawn.shape == (192, 384, 3)
    orange, blue, nothing = drawn[10, 10], drawn[180, 370], drawn[10, 370]
    assert orange[0] > 128 > orange[2] and blue[2] > 128 > blue[0] and nothing.tolist() == [128] * 3
    pale = np.asarray(draw_evidence(grey, values / 2000, legend=False), dtype=int)
    assert np.abs(pale - 128).max() <= 2, "a map of nearly nothing looks like nothing"
    said = " ".join(text for _, text in evidence_legend(values, -0.5))
    assert "by up to 2.00 nats" in said and "whole picture makes it more likely, by 0.50 nats" in said
    assert draw_evidence(grey, values, 1.5).height > 192
