"""Figures of the reports, as PNG files.

matplotlib is optional and only imported when a figure is drawn. Nothing here touches pyplot, so neither a display nor
the caller's own figures matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image


_FONT_SIZE, _MONOSPACE_WIDTH, _LINE_HEIGHT = 9, 0.602, 1.45  # points; DejaVu Sans Mono; both in units of the font size
_COLUMNS, _IMAGE_LINES = 96, 12
_MARKERS = "osD^vP*Xph"


def reliability_diagram(path: str | Path, bins: Sequence[Mapping], title: str) -> None:
    """Draw accuracy against confidence, and below it how many answers each bin has.

    Args:
        path: the .png file to write.
        bins: each with `mean_confidence` and `accuracy` in [0, 1] and `count`; bins with a count of 0 are left out.
        title: of the figure.

    Raises:
        ValueError: if no bin has a count.
        ImportError: without matplotlib.

    Source: the reliability diagrams of Guo et al., 2017 (arXiv 1706.04599).
    """
    filled = [one for one in bins if one["count"]]
    if not filled:
        raise ValueError(f"`bins` is {bins!r}; at least one bin with a count above 0 is needed.")
    figure = _figure(4.8, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    confidences = [one["mean_confidence"] for one in filled]
    upper.plot([0, 1], [0, 1], linestyle="--", color="gray", label="perfectly calibrated")
    upper.plot(confidences, [one["accuracy"] for one in filled], marker="o", label="measured")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(-0.03, 1.03), title=title)
    upper.legend()
    lower.bar(confidences, [one["count"] for one in filled], width=0.6 / len(bins), color="gray")
    lower.set(xlabel="mean confidence", ylabel="answers")
    _save(figure, path, (upper, lower))


def risk_coverage_curve(path: str | Path, coverage: Sequence[float], risk: Sequence[float], title: str) -> None:
    """Draw the error rate among the most confident answers against their share of all answers.

    Args:
        path: the .png file to write.
        coverage, risk: of equal length, in [0, 1].
        title: of the figure.

    Raises:
        ValueError: if the lengths differ or are 0.
        ImportError: without matplotlib.

    Source: the risk-coverage curve of El-Yaniv and Wiener, 2010.
    """
    if len(coverage) != len(risk) or not len(coverage):
        raise ValueError(f"`coverage` has {len(coverage)} and `risk` {len(risk)} values; as many of each are needed.")
    figure = _figure(4.8, 3.8)
    axes = figure.subplots()
    axes.plot(coverage, risk, drawstyle="steps-post")
    axes.set(xlabel="coverage", ylabel="risk", xlim=(0, 1), title=title)
    axes.set_ylim(bottom=0)
    _save(figure, path, [axes])


def line_plots(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float | None]]]],
    x_label: str,
    title: str,
) -> None:
    """Draw panels side by side that share the x axis, which is logarithmic, and the legend.

    Args:
        path: the .png file to write.
        panels: for the label of each y axis its lines; for each line's name its points `(x, y)` with x above 0. Points
            whose y is `None` are left out.
        x_label, title: of the figure.

    Raises:
        ValueError: if there is no point.
        ImportError: without matplotlib.
    """
    lines = [points for panel in panels.values() for points in panel.values()]
    ticks = sorted({x for points in lines for x, y in points if y is not None})
    if not ticks:
        raise ValueError(f"`panels` is {panels!r}; at least one point is needed.")
    figure = _figure(3.7 * len(panels), 3.9)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (y_label, panel) in zip(all_axes, panels.items()):
        for (name, points), marker in zip(panel.items(), cycle(_MARKERS)):
            drawn = [point for point in points if point[1] is not None]
            axes.plot([x for x, _ in drawn], [y for _, y in drawn], marker=marker, label=name, alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, 1.05 * axes.get_ylim()[1]))
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 2 * len(panels)))
    figure.suptitle(title)
    _save(figure, path, all_axes)


def answers_figure(
    path: str | Path, question: str, answers: Mapping[str, Sequence[str]], title: str, image: Image.Image | None = None
) -> None:
    """Show answers to one question below each other; pieces that repeat the piece before them are red.

    Args:
        path: the .png file to write.
        question: what was asked.
        answers: for each answer's label its consecutive pieces (words or tokens) with the white space at their ends.
        title: of the figure.
        image: what the question is about.

    Raises:
        ValueError: if there is no answer.
        ImportError: without matplotlib.
    """
    if not answers:
        raise ValueError(f"`answers` is {answers!r}; at least one is needed.")
    indent = max(map(len, answers)) + 2
    cells, line = [], 0  # (column, line, text, color)
    for label, pieces in {"": [f"{word} " for word in question.split()], **answers}.items():
        cells.append((0, line, label, "dimgray"))
        column, previous = 0, None
        for piece in pieces:
            shown, core = " ".join(piece.split()), piece.strip().lower()
            column += bool(column) and piece[:1].isspace()
            if column and column + len(shown) > _COLUMNS:
                column, line = 0, line + 1
            repeats = bool(label) and core and core == previous
            cells.append((indent + column, line, shown, "crimson" if repeats else "black"))
            column += len(shown) + (bool(shown) and piece[-1].isspace())
            previous = core or previous
        line += 1.4
    lines = max(line, _IMAGE_LINES if image is not None else 0)
    unit, line_height = _FONT_SIZE * _MONOSPACE_WIDTH / 72, _FONT_SIZE * _LINE_HEIGHT / 72  # inches
    picture = _IMAGE_LINES * line_height if image is not None else 0
    margin, head = 0.15, 0.35
    width, height = picture + 3 * margin + (indent + _COLUMNS) * unit, lines * line_height + head + margin
    figure = _figure(width, height, layout=None)
    figure.text(margin / width, 1 - 0.1 / height, title, va="top", weight="bold", size=_FONT_SIZE + 1, parse_math=False)
    if image is not None:
        bottom = height - head - picture
        axes = figure.add_axes((margin / width, bottom / height, picture / width, picture / height))
        axes.imshow(np.asarray(image.convert("RGB")))
        axes.set_axis_off()
    for column, row, text, color in cells:
        x, y = picture + 2 * margin + column * unit, height - head - row * line_height
        figure.text(
            x / width, y / height, text, color=color, family="monospace", size=_FONT_SIZE, va="top", parse_math=False
        )
    _save(figure, path, [])


def _figure(width: float, height: float, layout: str | None = "constrained"):
    """A figure of so many inches, which no display or pyplot knows of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "lladamedv[plots]".') from error
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: str | Path, all_axes) -> None:
    for axes in all_axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


__all__ = ["answers_figure", "line_plots", "reliability_diagram", "risk_coverage_curve"]
