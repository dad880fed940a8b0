"""A map of evidence laid over its picture, for the command line, the app and the pages."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont


# Vermilion and blue of Okabe and Ito's palette, which people with any kind of colour blindness tell apart.
FOR, AGAINST = "#d55e00", "#0072b2"
_OPACITY, _SIDE, _LINE = 0.65, 384, 18


def evidence_legend(values: np.ndarray) -> dict[str, str]:
    """What the two colours say, by colour, for a map `(rows, columns)` of `explain_image`, in nats."""
    high, low = max(0.0, float(values.max())), max(0.0, float(-values.min()))
    return {
        FOR: f"hiding this makes the answer less likely, by up to {high:.2f} nats",
        AGAINST: f"hiding this makes the answer more likely, by up to {low:.2f} nats",
    }


def draw_evidence(image: Image.Image, values, *, least: float = 0.1, legend: bool = True) -> Image.Image:
    """Lay a map over its picture: orange where hiding a cell makes the answer less likely, blue where more likely.

    Args:
        image: the picture, at its own size; small ones are enlarged to 384 pixels on the longer side.
        values: a map `(rows, columns)` of `explain_image`, an array or tensor.
        least: of the values for which full colour may stand, so that a map of nearly nothing looks like nothing. Full
            colour is the largest value by amount, if that is more.
        legend: whether two lines below the picture say what the colours mean.

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
    lines, font = evidence_legend(values), ImageFont.load_default(12)
    width = max(size[0], *(int(font.getlength(line)) + 34 for line in lines.values()))
    sheet = Image.new("RGB", (width, size[1] + _LINE * len(lines) + 8), "white")
    sheet.paste(drawn)
    pen = ImageDraw.Draw(sheet)
    for number, (colour, line) in enumerate(lines.items()):
        y = size[1] + 6 + _LINE * number
        pen.rectangle((6, y, 20, y + 12), fill=colour)
        pen.text((28, y + 6), line, fill="#1b2430", font=font, anchor="lm")
    return sheet


__all__ = ["draw_evidence", "evidence_legend"]
