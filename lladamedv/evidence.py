"""A map of evidence laid over its picture, for the command line, the app and the pages."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from .paths import check_new_file, whole_file


# Vermilion and blue of Okabe and Ito's palette, which people with any kind of colour blindness tell apart.
FOR, AGAINST = "#d55e00", "#0072b2"
_OPACITY, _SIDE, _LINE = 0.65, 384, 18


class Evidence(NamedTuple):
    """Where in a picture an answer comes from, in nats: see [`LLaDAMedVEvidenceOutput`].

    Attributes:
        values: the map `(rows, columns)`.
        whole_fall: how much hiding all of the picture makes the answer less likely.
    """

    values: np.ndarray
    whole_fall: float


def evidence_legend(values, whole_fall: float | None = None) -> list[tuple[str | None, str]]:
    """Colours and what they say, and without a colour how much all of the picture matters.

    Args:
        values: a map `(rows, columns)` of `explain_image`, an array or tensor.
        whole_fall: that of the same picture and span, if it is known.
    """
    values = np.asarray(values)
    said = [
        (FOR, f"hiding this makes the answer less likely, by up to {max(0.0, values.max()):.2f} nats"),
        (AGAINST, f"hiding this makes the answer more likely, by up to {max(0.0, -values.min()):.2f} nats"),
    ]
    if whole_fall is not None:
        direction = "less" if whole_fall >= 0 else "more"
        said.append((None, f"hiding the whole picture makes it {direction} likely, by {abs(whole_fall):.2f} nats"))
    return said


def draw_evidence(
    image: Image.Image, values, whole_fall: float | None = None, *, least: float = 0.1, legend: bool = True
) -> Image.Image:
    """Lay a map over its picture: orange where hiding a cell makes the answer less likely, blue where more likely.

    Args:
        image: the picture, at its own size; small ones are enlarged to 384 pixels on the longer side.
        values, whole_fall: see [`evidence_legend`].
        least: of the values for which full colour may stand, so that a map of nearly nothing looks like nothing. Full
            colour is the largest value by amount, if that is more.
        legend: whether lines below the picture say what the colours mean.

    Returns:
        An RGB `PIL.Image`.
    """
    values = np.asarray(values, dtype=np.float64)
    enlarge = max(1.0, _SIDE / max(image.size))
    size = tuple(round(enlarge * edge) for edge in image.size)
    picture = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    strength = values / max(np.abs(values).max(), least)
    strength = np.asarray(Image.fromarray(strength.astype(np.float32)).resize(size, Image.Resampling.NEAREST))[
        ..., None
    ]
    colour = np.where(strength > 0, ImageColor.getrgb(FOR), ImageColor.getrgb(AGAINST))
    mixed = picture + _OPACITY * np.abs(strength) * (colour - picture)
    drawn = Image.fromarray(mixed.round().astype(np.uint8))
    if not legend:
        return drawn
    lines, font = evidence_legend(values, whole_fall), ImageFont.load_default(12)
    width = max(size[0], *(int(font.getlength(line)) + 34 for _, line in lines))
    sheet = Image.new("RGB", (width, size[1] + _LINE * len(lines) + 8), "white")
    sheet.paste(drawn)
    pen = ImageDraw.Draw(sheet)
    for number, (colour, line) in enumerate(lines):
        y = size[1] + 6 + _LINE * number
        if colour is not None:
            pen.rectangle((6, y, 20, y + 12), fill=colour)
        pen.text((28, y + 6), line, fill="#1b2430", font=font, anchor="lm")
    return sheet


def save_evidence(file: Path, image: Image.Image, evidence: Evidence) -> None:
    """Write the map over its picture, with its legend, as a PNG; a file that exists is overwritten.

    Raises:
        ValueError: if it cannot be written there.
    """
    check_new_file(file, (".png",))
    with whole_file(file) as partial:
        draw_evidence(image, *evidence).save(partial, "PNG", optimize=True)


__all__ = ["Evidence", "draw_evidence", "evidence_legend", "save_evidence"]
