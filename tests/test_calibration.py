"""Calibration against sums written out by hand."""

import pytest

from lladamedv.evaluation.calibration import (
    area_under_risk_coverage,
    calibration_bins,
    expected_calibration_error,
    risk_coverage,
)


def test_bins_and_expected_calibration_error():
    confidence, correct = [0.0, 0.1, 0.25, 0.9, 1.0, 0.95], [0, 1, 0.5, 1, 1, 0]
    bins = calibration_bins(confidence, correct, num_bins=4)
    # 0, 0.1 and 0.25 lie in [0, 0.25], the others in (0.75, 1].
    assert [(each["low"], each["high"], each["count"]) for each in bins] == [(0, 0.25, 3), (0.75, 1, 3)]
    assert [each["mean_confidence"] for each in bins] == pytest.approx([0.35 / 3, 2.85 / 3])
    assert [each["accuracy"] for each in bins] == pytest.approx([0.5, 2 / 3])
    expected = 0.5 * (0.5 - 0.35 / 3) + 0.5 * (0.95 - 2 / 3)
    assert expected_calibration_error(bins) == pytest.approx(expected)
    assert expected_calibration_error(calibration_bins([0.3] * 10, [1] * 3 + [0] * 7)) == pytest.approx(0)


def test_risk_coverage():
    coverage, risk = risk_coverage([0.9, 0.2, 0.5, 0.5], [1, 0, 0, 1])
    # The two of 0.5 come together, in whatever order they were.
    assert coverage == [0.25, 0.75, 1.0]
    assert risk == pytest.approx([0, 1 / 3, 0.5])
    assert risk_coverage([0.5, 0.9, 0.5, 0.2], [1, 1, 0, 0]) == (coverage, risk)
    assert area_under_risk_coverage(coverage, risk) == pytest.approx(0.25 * 0 + 0.5 / 3 + 0.25 * 0.5)
    assert risk_coverage([0.5] * 4, [1, 0, 0, 0]) == ([1.0], [0.75])


@pytest.mark.parametrize(
    ("confidence", "correct", "words"),
    [
        ([], [], "`confidence` holds 0 values"),
        ([0.5], [1, 0], "`correct` 2"),
        ([1.5], [1], "`confidence` holds values outside"),
        ([float("nan")], [1], "`confidence` holds values outside"),
        ([0.5], [-1], "`correct` holds values outside"),
    ],
)
def test_bad_input(confidence, correct, words):
    for function in (calibration_bins, risk_coverage):
        with pytest.raises(ValueError, match=words):
            function(confidence, correct)
    with pytest.raises(ValueError, match="`num_bins` is 0"):
        calibration_bins([0.5], [1], num_bins=0)
