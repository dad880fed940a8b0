"""Conformal prediction for questions that come by picture: a threshold whose guarantee holds however bad the model is.

Only NumPy, and nothing of this package: numbers in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def conformal_threshold(scores: Sequence[float], pictures: Sequence[str], alpha: float) -> float:
    """What the score of a new question's true answer does not exceed, with a probability of at least 1 - `alpha`.

    Questions about one picture are answered well or badly together, so that pictures count and not questions: each of K
    pictures weighs 1 / (K + 1), its questions share that, and the last (K + 1)-th, the new picture's, is at infinity.
    This is hierarchical conformal prediction. With one question each it is the ceil((K + 1)(1 - alpha))-th smallest
    score, as in Sadinle, Lei and Wasserman.

    The probability is over the pictures that were calibrated on and the new one, which must be exchangeable, with a
    question of the new one's drawn at random.

    Args:
        scores: of the true answers, the higher the worse.
        pictures: what each question is about.
        alpha: in (0, 1).

    Returns:
        The threshold; infinity for fewer than [`fewest_pictures`], with which nothing can be promised.

    Source: Lee, Barber and Willett, arXiv 2306.06342; the problem is that of Dunn, Wasserman and Ramdas, arXiv
    1809.07441, whose pooled CDFs lack the weight at infinity. One level: arXiv 1609.00451.
    """
    scores = np.asarray(scores, dtype=float)
    _, picture, counts = np.unique(np.asarray(pictures), return_inverse=True, return_counts=True)
    order = np.argsort(scores, kind="stable")
    covered = np.cumsum(1 / counts[picture[order]])  # in pictures
    enough = covered >= (1 - alpha) * (len(counts) + 1) - 1e-9
    return float(scores[order][enough.argmax()]) if enough.any() else math.inf


def fewest_pictures(alpha: float) -> int:
    """With how many pictures, at least, [`conformal_threshold`] is finite."""
    return math.ceil(1 / alpha - 1 - 1e-9)


def promised(alpha: float) -> str:
    """The share that sets hold the true answer for, in words."""
    return f"{100 * (1 - alpha):.5g} %"


def wilson_interval(mean: float, count: int) -> list[float]:
    """The 95 % Wilson score interval of a mean of `count` independent values in [0, 1].

    For values of 0 and 1 it is the binomial one. Others vary less at the same mean, so that it is too wide for them
    rather than too narrow; and it has a width where all values are equal, which the bootstrap's has not.

    Source: Wilson, Journal of the American Statistical Association 22 (1927).
    """
    z = 1.959964
    center, spread = mean + z**2 / (2 * count), z * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    low, high = ((center + sign * spread) / (1 + z**2 / count) for sign in (-1, 1))
    return [max(0.0, min(low, mean)), min(1.0, max(high, mean))]  # rounding may have put an end beyond 0, 1 or the mean


__all__ = ["conformal_threshold", "fewest_pictures", "promised", "wilson_interval"]
