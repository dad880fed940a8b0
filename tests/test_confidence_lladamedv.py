"""Answer confidence, its calibration against answers drawn at a known temperature, and abstention."""

import math

import pytest
import torch

from lladamedv.modeling_lladamedv.confidence_lladamedv import (
    answer_confidence,
    calibrate_confidence,
    fit_confidence_temperature,
)
from tests.test_generation_lladamedv import generate


def test_geometric_mean():
    values = torch.tensor([[0.5, 0.8, 0.1], [0.9, math.nan, 0.4], [math.nan] * 3], dtype=torch.float64)
    result = answer_confidence(values, torch.tensor([2, 3, 3]))
    assert result[0].item() == pytest.approx(math.sqrt(0.4))
    assert result[1].item() == pytest.approx(math.sqrt(0.36))
    assert result[2].isnan()


@torch.no_grad()
def test_of_an_answer(model):
    options = {"max_new_tokens": 12, "block_length": 12, "steps": 12}
    free = generate(model, **options)
    assert free.answer_confidence.item() == pytest.approx(free.commit_confidence[0].log().mean().exp().item())
    end = free.sequences[0, -12:].tolist()[4]
    stopped = generate(model, **options, eos_token_id=end)
    length = stopped.sequences.shape[1] - free.sequences.shape[1] + 12
    decided = stopped.commit_confidence[0, : length + 1]  # the token that ends it was decided on, too
    assert stopped.answer_confidence.item() == pytest.approx(decided.log().mean().exp().item())


@torch.no_grad()
def test_calibration_and_abstention(model):
    plain = generate(model, max_new_tokens=8).answer_confidence.item()
    calibrated = generate(model, max_new_tokens=8, confidence_temperature=2.0, abstention_threshold=0.99)
    odds = math.sqrt(plain / (1 - plain))
    assert calibrated.answer_confidence.item() == pytest.approx(odds / (1 + odds))
    assert calibrated.abstained.tolist() == [True]
    assert generate(model, max_new_tokens=8, abstention_threshold=1e-6).abstained.tolist() == [False]
    assert generate(model, max_new_tokens=8).abstained is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    """Answers that are right as often as the confidences say once these are divided by a known temperature."""
    generator = torch.Generator().manual_seed(0)
    stated = torch.rand(40_000, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    true = torch.sigmoid(torch.logit(stated) / temperature)
    correct = torch.rand(40_000, generator=generator, dtype=torch.float64) < true
    found = fit_confidence_temperature(stated, correct)
    assert found == pytest.approx(temperature, rel=0.05)
    fixed = calibrate_confidence(stated, found)
    for low in (0.5, 0.6, 0.7, 0.8):
        bin_ = (fixed >= low) & (fixed < low + 0.1)
        assert correct[bin_].double().mean().item() == pytest.approx(fixed[bin_].mean().item(), abs=0.03)


def test_certain_and_right_or_wrong():
    assert math.isfinite(fit_confidence_temperature([1.0, 1.0, 0.5], [1, 0, 1]))
    assert calibrate_confidence(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5], [1], "holds 1 values and `correct` 1"),
        ([0.5, 0.6], [1], "holds 2 values and `correct` 1"),
        ([0.5, 1.2], [1, 0], "`confidence` holds values outside"),
        ([0.5, 0.2], [1, 2], "`correct` holds values outside"),
        ([0.5, math.nan], [1, 0], "`confidence` holds values outside"),
    ],
)
def test_bad_input(confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        fit_confidence_temperature(confidence, correct)


@pytest.mark.parametrize(
    ("confidence", "correct", "warned"),
    [([0.9, 0.8, 0.7], [1, 1, 1], True), ([0.9, 0.8], [0, 0], True), ([0.9, 0.9, 0.9, 0.9], [1, 1, 1, 0], False)],
)
def test_a_temperature_at_the_end_of_the_range_is_no_calibration(caplog, confidence, correct, warned):
    """If all answers are right, the likelihood rises until the temperature is 0; if all are wrong, infinity."""
    temperature = fit_confidence_temperature(confidence, correct)
    assert ("at the end of what is searched" in caplog.text) == warned
    if not warned:  # three of four right, of which each is 0.9 sure: log 9 / T = log 3
        assert temperature == pytest.approx(2, abs=1e-3)
