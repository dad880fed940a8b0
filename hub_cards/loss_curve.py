"""The curves of a training run as a picture, for its card and to look at while it runs.

Drawn by Pillow, which is always installed and takes a few hundredths of a second.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


_SHARE = ", share"  # its axis goes from 0 to 1
# Metrics with a panel of their own, if they are logged, and what its title says.
_PANELS = {
    "loss": "loss", "reward": "reward", "rewards/accuracies": f"preferred answer is the likelier one{_SHARE}",
    "answer_accuracy": f"sample answers that are right{_SHARE}",
}  # fmt: skip
_COLOURS = ("#1f5fa8", "#c2500a", "#2a7d3a", "#7b3fa0", "#8a6d00")
_SCALE = 2  # drawn larger, then reduced: Pillow does not smooth lines
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 600, 340, 62, 18, 62, 44  # of a panel, in pixels
_MANY = 60  # points above which a line is noise: it becomes pale, and a running mean is drawn over it
logger = logging.getLogger(__name__)


def draw_loss_curve(path: str | Path, log_history: Sequence[Mapping]) -> bool:
    """Draw losses, rewards and shares of right answers over optimizer steps, a panel for each that was logged.

    Args:
        path: the .png file, see [`write_to_look_at`].
        log_history: as of `transformers.TrainerState`. Values that are not finite are left out.

    Returns:
        Whether there was a loss to draw, and the file could be written.
    """
    panels = {title: lines for metric, title in _PANELS.items() if (lines := _lines(metric, log_history))}
    if "training" not in panels.get("loss", {}):
        return False
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    picture = Image.new("RGB", (columns * _WIDTH * _SCALE, rows * _HEIGHT * _SCALE), "white")
    steps = _range([step for lines in panels.values() for points in lines.values() for step, _ in points])
    for number, (title, lines) in enumerate(panels.items()):
        row, column = divmod(number, 2)
        picture.paste(_panel(title, lines, steps), (column * _WIDTH * _SCALE, row * _HEIGHT * _SCALE))
    written = io.BytesIO()
    picture.reduce(_SCALE).save(written, "PNG")
    return write_to_look_at(path, written.getvalue())


def write_to_look_at(path: str | Path, content: bytes) -> bool:
    """Write what a training shows of itself, whole or not at all, because people look at it meanwhile.

    A training does not end because that fails, as on a full disk or where a viewer holds the file.

    Returns:
        Whether it was written; a warning says why not.
    """
    partial = Path(f"{path}.new")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        logger.warning("%s is not up to date, the training goes on: %s", path, error)
        return False
    return True


def _lines(metric: str, log_history: Sequence[Mapping]) -> dict[str, list[tuple[int, float]]]:
    """Points `(step, value)` of training and of each evaluation set; of a step that was logged twice, the last."""
    lines: dict[str, dict[int, float]] = {}
    pattern = re.compile(rf"(eval_(?:(?P<name>.+)_)?)?{re.escape(metric)}")
    for entry in log_history:
        for key, value in entry.items():
            if (match := pattern.fullmatch(key)) and math.isfinite(value):
                name = "training" if match[1] is None else " ".join(filter(None, ("evaluation", match["name"])))
                lines.setdefault(name, {})[entry["step"]] = value
    return {name: sorted(points.items()) for name, points in lines.items()}


def _panel(title: str, lines: Mapping[str, Sequence[tuple[int, float]]], steps: tuple[float, float]) -> Image.Image:
    panel = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), "white")
    draw, large, small = ImageDraw.Draw(panel), *(ImageFont.load_default(size * _SCALE) for size in (15, 13))

    def text(x, y, words, font=small, anchor="la", fill="black"):
        draw.text((x * _SCALE, y * _SCALE), words, fill, font, anchor)

    is_share, values = title.endswith(_SHARE), [value for points in lines.values() for _, value in points]
    (x_low, x_high), (y_low, y_high) = steps, _range([0, 1] if is_share else values)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(point):
        x, y = (point[0] - x_low) / (x_high - x_low), (point[1] - y_low) / (y_high - y_low)
        return (_LEFT + x * (right - _LEFT)) * _SCALE, (bottom - y * (bottom - _TOP)) * _SCALE

    for tick in _ticks(y_low, y_high):
        y = place((x_low, tick))[1]
        draw.line((_LEFT * _SCALE, y, right * _SCALE, y), "#dddddd", _SCALE)
        text(_LEFT - 8, y / _SCALE, f"{tick:g}", anchor="rm")
    for tick in _ticks(x_low, x_high):
        if tick == int(tick):
            text(place((tick, y_low))[0] / _SCALE, bottom + 8, f"{tick:g}", anchor="ma")
    draw.line((_LEFT * _SCALE, bottom * _SCALE, right * _SCALE, bottom * _SCALE), "black", _SCALE)
    text((_LEFT + right) / 2, _HEIGHT - 4, "optimizer step", anchor="mb")
    text(_LEFT, 8, title, large)
    x = _LEFT
    for (name, points), colour in zip(lines.items(), _COLOURS * len(lines)):
        many = len(points) > _MANY
        if many:
            draw.line([place(point) for point in points], "#b5cbe4" if colour == _COLOURS[0] else "#dddddd", _SCALE)
            name, points = f"{name}, running mean", _running_mean(points)
        draw.line([place(point) for point in points], colour, 2 * _SCALE, joint="curve")
        if not many:
            for x_dot, y_dot in map(place, points):
                draw.circle((x_dot, y_dot), 3 * _SCALE, colour)
        draw.line((x * _SCALE, 40 * _SCALE, (x + 18) * _SCALE, 40 * _SCALE), colour, 3 * _SCALE)
        text(x + 24, 40, name, anchor="lm")
        x += 24 + draw.textlength(name, small) / _SCALE + 20
    return panel


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or abs(high) / 2 or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, six at most."""
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _running_mean(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each point's value becomes the mean of a twentieth of all points before and after it."""
    reach, values = len(points) // 20, [value for _, value in points]
    around = [values[max(0, place - reach) : place + reach + 1] for place in range(len(points))]
    return [(step, sum(near) / len(near)) for (step, _), near in zip(points, around)]


__all__ = ["draw_loss_curve", "write_to_look_at"]
