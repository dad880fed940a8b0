"""Figures: files that open, show what they were given, and nothing else."""

import sys

import numpy as np
import pytest
from PIL import Image

from lladamedv.evaluation.plots import answers_figure, line_plots, reliability_diagram, risk_coverage_curve


pytest.importorskip("matplotlib")
BLUE, RED = (31, 119, 180), (220, 20, 60)  # the first line's color; of repetitions


def pixels(path):
    """The picture as `(height, width, 3)`, which is not all white."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        values = np.asarray(image.convert("RGB"))
    assert (values != 255).any()
    return values


def places(values, color):
    """Rows and columns of the pixels of a color."""
    return np.nonzero((np.abs(values.astype(int) - color) <= 2).all(axis=2))


def test_reliability_diagram(tmp_path):
    bins = [
        {"mean_confidence": None, "accuracy": None, "count": 0},
        {"mean_confidence": 0.6, "accuracy": 1.0, "count": 5},
    ]
    reliability_diagram(tmp_path / "right.png", bins, "right")
    right = places(pixels(tmp_path / "right.png"), BLUE)
    bins[1]["accuracy"] = 0.0
    reliability_diagram(tmp_path / "wrong.png", bins, "wrong")
    wrong = places(pixels(tmp_path / "wrong.png"), BLUE)
    assert right[0].max() < wrong[0].max() / 2  # the upper rows are the higher accuracies
    with pytest.raises(ValueError, match="`bins`"):
        reliability_diagram(tmp_path / "none.png", bins[:1], "none")
    assert not (tmp_path / "none.png").exists()


def test_risk_coverage_curve(tmp_path):
    risk_coverage_curve(tmp_path / "rising.png", [0.1, 0.5, 1.0], [0.0, 0.0, 0.4], "rising")
    rows, columns = places(pixels(tmp_path / "rising.png"), BLUE)
    assert columns[rows == rows.min()].min() > 0.9 * columns.max()  # the risk is highest at full coverage only
    with pytest.raises(ValueError, match="`coverage` has 2 and `risk` 1"):
        risk_coverage_curve(tmp_path / "other.png", [0.5, 1.0], [0.1], "other")


def test_line_plots_leave_out_what_is_none(tmp_path):
    line_plots(tmp_path / "with.png", {"y": {"line": [(1, 0.5), (2, None), (4, 0.7)]}, "z": {"line": []}}, "x", "t")
    line_plots(tmp_path / "without.png", {"y": {"line": [(1, 0.5), (4, 0.7)]}, "z": {"line": []}}, "x", "t")
    line_plots(tmp_path / "other.png", {"y": {"line": [(1, 0.5), (4, 0.9)]}, "z": {"line": []}}, "x", "t")
    shown = pixels(tmp_path / "with.png")
    assert (shown == pixels(tmp_path / "without.png")).all()
    assert (shown != pixels(tmp_path / "other.png")).any()
    with pytest.raises(ValueError, match="`panels`"):
        line_plots(tmp_path / "none.png", {"y": {"line": [(1, None)]}}, "x", "t")


def test_answers_figure_marks_repetitions(tmp_path):
    image = Image.new("RGB", (8, 8), (0, 200, 0))
    pieces = ["The", " lung", " lung", ". $x^2$"]
    answers_figure(tmp_path / "once.png", "What?", {"Z 8": pieces[:2] + pieces[3:]}, "once", image)
    answers_figure(tmp_path / "twice.png", "What?", {"Z 8": pieces}, "twice", image)
    once, twice = pixels(tmp_path / "once.png"), pixels(tmp_path / "twice.png")
    assert not len(places(once, RED)[0]) and len(places(twice, RED)[0])
    assert len(places(once, (0, 200, 0))[0]) > 1000
    answers_figure(tmp_path / "long.png", "What?", {"Z 8": [" lung"] * 400}, "long", image)
    long = pixels(tmp_path / "long.png")
    assert len(long) > 1.5 * len(once)  # 400 words need more lines
    assert (long[:, -5:] == 255).all() and (long[-5:] == 255).all()  # and stay within the figure
    with pytest.raises(ValueError, match="`answers`"):
        answers_figure(tmp_path / "none.png", "What?", {}, "none")


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lladamedv\[plots\]"'):
        risk_coverage_curve(tmp_path / "risk.png", [1.0], [0.5], "risk")
