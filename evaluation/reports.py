"""Parts of reports: numbers, intervals and tables as Markdown, figures as PNG files, the files of a summary.

matplotlib is optional and imported when a figure is drawn. Nothing here uses pyplot, so neither a display nor the
caller's own figures matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .medical_vqa.medical_vqa import bootstrap_intervals
from .runs import replace_file


def write_report(folder: str | Path, summary: dict, text: str) -> None:
    """Write `summary.json` and `summary.md` into a folder that is made if need be, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    replace_file(folder / "summary.md", text)


def interval_of_mean(values: Sequence[tuple[float, str]], samples: int, seed: int) -> list[float] | None:
    """The 95 % interval of a mean of `(value, image id)`; `None` for fewer than two images or no samples."""
    scores, images = np.array([[value] for value, _ in values]), [image for _, image in values]
    found = bootstrap_intervals(scores, images, samples, seed) if samples else None
    return None if found is None else found[0].tolist()


def number(value: float | None) -> str:
    """A number for readers, with three decimals at most; "–" for none."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}".rstrip("0").rstrip(".")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def document(paragraphs: Iterable[str]) -> str:
    """Paragraphs, tables and headings as one text; empty ones are left out."""
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def reliability_diagram(path: str | Path, bins: Sequence[Mapping], title: str) -> None:
    """Draw accuracy against confidence, and below it how many answers each bin of `calibration_bins` has.

    Raises:
        ImportError: without matplotlib.

    Source: the reliability diagrams of Guo et al., 2017 (arXiv 1706.04599).
    """
    figure = _figure(4.8, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    confidences = [each["mean_confidence"] for each in bins]
    upper.plot([0, 1], [0, 1], linestyle="--", color="gray", label="perfectly calibrated")
    upper.plot(confidences, [each["accuracy"] for each in bins], marker="o", label="measured")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(-0.03, 1.03), title=title)
    upper.legend()
    widths = [0.6 * (each["high"] - each["low"]) for each in bins]
    lower.bar(confidences, [each["count"] for each in bins], width=widths, color="gray")
    lower.set(xlabel="mean confidence", ylabel="answers")
    _save(figure, path)


def risk_coverage_curve(path: str | Path, coverage: Sequence[float], risk: Sequence[float], title: str) -> None:
    """Draw the error rate among the most confident answers against their share of all answers, both in [0, 1].

    Raises:
        ImportError: without matplotlib.

    Source: the risk-coverage curve of El-Yaniv and Wiener, 2010.
    """
    figure = _figure(4.8, 3.8)
    axes = figure.subplots()
    axes.plot(coverage, risk, drawstyle="steps-post")
    axes.set(xlabel="coverage", ylabel="risk", xlim=(0, 1), title=title)
    axes.set_ylim(bottom=0)
    _save(figure, path)


def line_plots(path: str | Path, panels: Mapping[str, Mapping[str, Sequence[tuple]]], x_label: str, title: str) -> None:
    """Draw panels side by side that share the legend and the x axis, which is logarithmic.

    Args:
        path: the .png file to write.
        panels: for the label of each y axis its lines; for each line's name its points `(x, y)` with x above 0. Points
            whose y is `None` are left out.
        x_label, title: of the figure.

    Raises:
        ImportError: without matplotlib.
    """
    figure = _figure(3.7 * len(panels), 3.9)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    ticks = sorted({x for panel in panels.values() for points in panel.values() for x, y in points if y is not None})
    for axes, (y_label, panel) in zip(all_axes, panels.items()):
        for (name, points), marker in zip(panel.items(), "osD^vP*Xph" * len(panel)):
            drawn = [point for point in points if point[1] is not None]
            axes.plot([x for x, _ in drawn], [y for _, y in drawn], marker=marker, label=name, alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, 1.05 * axes.get_ylim()[1]))
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 2 * len(panels)))
    figure.suptitle(title)
    _save(figure, path)


def _figure(width: float, height: float):
    """A figure of so many inches; its `savefig` needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "lladamedv[plots]".') from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure, path: str | Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


__all__ = [
    "document", "interval_of_mean", "line_plots", "markdown_table", "number", "reliability_diagram",
    "risk_coverage_curve", "write_report",
]  # fmt: skip
