"""The curve of a training: points are where axes say, outliers, gaps and single points included."""

import numpy as np
import pytest
from PIL import Image

from lladamedv.hub_cards.loss_curve import draw_loss_curve


BLUE, ORANGE = (0x1F, 0x5F, 0xA8), (0xC2, 0x50, 0x0A)


def coloured(path, colour):
    """Rows and columns of the pixels of a colour below the legend."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = (pixels == colour).all(axis=-1).nonzero()
    return rows[rows > 60], columns[rows > 60]


def test_points_are_where_they_belong(tmp_path):
    """A straight line is drawn straight, falling, over most of the panel; and no other file is left."""
    path = tmp_path / "curve.png"
    assert draw_loss_curve(path, [{"step": step, "loss": 3.0 - 0.1 * step} for step in range(1, 21)])
    rows, columns = coloured(path, BLUE)
    slope, start = np.polyfit(columns, rows, 1)
    assert slope > 0 and np.abs(rows - start - slope * columns).max() < 6  # the dots' radius and the line's width
    assert columns.max() - columns.min() > 400 and rows.max() - rows.min() > 180
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("history", "panels", "evaluated"),
    [
        ([{"step": 1, "loss": 0.5}], 1, False),
        ([{"step": each, "loss": 0.0} for each in (1, 2)], 1, False),
        ([{"step": each, "loss": 1e6 / each} for each in range(1, 500)], 1, False),
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 2, "eval_loss": 1.0}], 1, True),
        ([{"step": 1, "loss": 2.0}, {"step": 2, "eval_mine_loss": 1.0}], 1, True),
        ([{"step": 1, "loss": 2.0, "reward": -1.0}, {"step": 1, "eval_reward": 0.2}], 2, True),
        ([{"step": 1, "loss": 2.0, "rewards/accuracies": 1.0, "reward": 0}, {"step": 1, "eval_answer_accuracy": 1}], 4,
         False),
    ],
)  # fmt: skip
def test_what_is_logged_is_drawn(tmp_path, history, panels, evaluated):
    assert draw_loss_curve(tmp_path / "curve.png", history)
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (600 * min(panels, 2), 340 * -(-panels // 2))
    assert coloured(tmp_path / "curve.png", BLUE)[0].size
    assert bool(coloured(tmp_path / "curve.png", ORANGE)[0].size) == evaluated


@pytest.mark.parametrize("history", [[], [{"step": 1, "eval_loss": 1.0}], [{"step": 1, "loss": float("inf")}]])
def test_nothing_to_draw(tmp_path, history):
    assert not draw_loss_curve(tmp_path / "curve.png", history) and not [*tmp_path.iterdir()]
