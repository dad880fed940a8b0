"""Figures of reports: files that open and show what they were given; numbers as readers see them."""

import sys

import numpy as np
import pytest
from PIL import Image

from lladamedv.evaluation.reports import line_plots, number, reliability_diagram, risk_coverage_curve


BLUE = (31, 119, 180)  # the first line's color


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)  # (height, width, 3)


def blue(path, alpha=1.0):
    """Rows and columns of the first line's pixels, which is drawn so opaque."""
    color = alpha * np.array(BLUE) + (1 - alpha) * 255
    return np.nonzero((np.abs(pixels(path) - color) <= 2).all(axis=2))


def test_numbers():
    shown = [number(value) for value in (None, 3, "x", 0.0, 25.0, 0.25, 52.605, 0.00123, 39.9281)]
    assert shown == ["–", "3", "x", "0", "25", "0.25", "52.605", "0.0012", "39.928"]


def test_reliability_diagram(tmp_path):
    pytest.importorskip("matplotlib")
    one = {"low": 0.5, "high": 1.0, "mean_confidence": 0.6, "count": 5}
    for name, accuracy in (("right", 1.0), ("wrong", 0.0)):
        reliability_diagram(tmp_path / name, [one | {"accuracy": accuracy}], name)
    # The upper rows are the higher accuracies.
    assert blue(tmp_path / "right")[0].max() < blue(tmp_path / "wrong")[0].max() / 2


def test_risk_coverage_curve(tmp_path):
    pytest.importorskip("matplotlib")
    risk_coverage_curve(tmp_path / "rising.png", [0.1, 0.5, 1.0], [0.0, 0.0, 0.4], "rising")
    rows, columns = blue(tmp_path / "rising.png")
    assert columns[rows == rows.min()].min() > 0.9 * columns.max()  # the risk is highest at full coverage only


def test_line_plots_leave_out_what_is_none(tmp_path):
    pytest.importorskip("matplotlib")
    points = {"with": [(1, 0.5), (2, None), (4, 0.7)], "without": [(1, 0.5), (4, 0.7)]}
    for name, line in points.items():
        line_plots(tmp_path / name, {"y": {"line": line}, "z": {"line": []}}, "x", "t")
    assert (pixels(tmp_path / "with") == pixels(tmp_path / "without")).all() and len(blue(tmp_path / "with", 0.8)[0])


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lladamedv\[plots\]"'):
        risk_coverage_curve(tmp_path / "risk.png", [1.0], [0.5], "risk")
