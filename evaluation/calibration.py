"""Whether a model knows when it is right: calibration, and what is gained by not answering when it is unsure.

In medicine a wrong answer that sounds sure is the dangerous one. Accuracy says nothing about that; these numbers do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def calibration_bins(confidence: Sequence[float], correct: Sequence[float], num_bins: int = 15) -> list[dict]:
    """Answers by their confidence, in `num_bins` intervals of equal width; 0 belongs to the first.

    Args:
        confidence: of each answer, in [0, 1].
        correct: how right each answer is, in [0, 1].
        num_bins: at least 1.

    Returns:
        For each interval that has answers: `low`, `high`, `count`, `mean_confidence` and `accuracy`.

    Raises:
        ValueError: for numbers that are not in [0, 1], lists that are empty or differ in length, or `num_bins` below 1.
    """
    confidence, correct = _checked(confidence, correct)
    if num_bins < 1:
        raise ValueError(f"`num_bins` is {num_bins}; allowed are whole numbers of at least 1.")
    numbers = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    bins = []
    for number in np.unique(numbers).tolist():
        chosen = numbers == number
        bins.append(
            {
                "low": number / num_bins, "high": (number + 1) / num_bins, "count": int(chosen.sum()),
                "mean_confidence": float(confidence[chosen].mean()), "accuracy": float(correct[chosen].mean()),
            }
        )  # fmt: skip
    return bins


def expected_calibration_error(bins: Sequence[dict]) -> float:
    """Distance of confidence from accuracy, averaged over answers, in [0, 1].

    Source: Guo et al., arXiv 1706.04599, equation 3.

    Args:
        bins: of [`calibration_bins`].
    """
    total = sum(each["count"] for each in bins)
    return sum(each["count"] / total * abs(each["accuracy"] - each["mean_confidence"]) for each in bins)


def risk_coverage(confidence: Sequence[float], correct: Sequence[float]) -> tuple[list[float], list[float]]:
    """The risk if only the most confident answers are given, for every share of questions that can be answered so.

    Answers of equal confidence are given together (Geifman and El-Yaniv, arXiv 1705.08500, section 2).

    Args:
        confidence, correct: see [`calibration_bins`].

    Returns:
        Shares of answered questions, rising to 1, and the mean of 1 - `correct` over those answers.

    Raises:
        ValueError: as [`calibration_bins`] does.
    """
    confidence, correct = _checked(confidence, correct)
    order = np.argsort(-confidence, kind="stable")
    given = np.arange(1, len(order) + 1)
    risk = np.cumsum(1 - correct[order]) / given
    last_of_equals = np.append(np.diff(confidence[order]) != 0, True)
    return (given[last_of_equals] / len(order)).tolist(), risk[last_of_equals].tolist()


def area_under_risk_coverage(coverage: Sequence[float], risk: Sequence[float]) -> float:
    """Mean risk over all numbers of answers given, smaller is better; answers of equal confidence share theirs."""
    return float(np.sum(np.diff([0.0, *coverage]) * np.asarray(risk)))


def _checked(confidence, correct) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.asarray(values, dtype=float) for values in (confidence, correct)]
    if len(arrays[0]) != len(arrays[1]) or not len(arrays[0]):
        raise ValueError(
            f"`confidence` holds {len(arrays[0])} values and `correct` {len(arrays[1])}; allowed are one or more of "
            "each, and equally many."
        )
    for name, values in zip(("confidence", "correct"), arrays):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"`{name}` holds values outside of [0, 1].")
    return arrays[0], arrays[1]


__all__ = ["area_under_risk_coverage", "calibration_bins", "expected_calibration_error", "risk_coverage"]
