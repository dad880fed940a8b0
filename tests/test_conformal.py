"""Thresholds and intervals against closed forms, and their promises by simulation: many calibrations, each with one new
question, whose coverage is then binomial."""

import math

import numpy as np
import pytest

from lladamedv.evaluation.conformal import conformal_threshold, fewest_pictures, wilson_interval


TRIALS, ALPHA = 5000, 0.1
FOUR_SIGMA = 4 * math.sqrt(ALPHA * (1 - ALPHA) / TRIALS)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("count", [1, 8, 9, 18, 19, 98, 99, 100, 300])
def test_one_question_a_picture_is_split_conformal(alpha, count):
    scores = np.random.default_rng(count).random(count)
    rank = math.ceil(round((count + 1) * (1 - alpha), 9))
    expected = np.sort(scores)[rank - 1] if rank <= count else math.inf
    assert conformal_threshold(scores, np.arange(count), alpha) == expected
    assert (expected < math.inf) == (count >= fewest_pictures(alpha))


def test_pictures_weigh_the_same_however_many_questions_they_have():
    """Four pictures, of which one has three questions: by hand, in fifths and fifteenths."""
    scores, pictures = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], ["a", "b", "d", "d", "d", "c"]
    for alpha, expected in ((0.79, 0.2), (0.61, 0.2), (0.55, 0.3), (0.49, 0.4), (0.41, 0.5), (0.21, 0.6)):
        assert conformal_threshold(scores, pictures, alpha) == expected
    assert conformal_threshold(scores, pictures, 0.19) == math.inf


def coverage(draw, threshold) -> float:
    """Share of trials in which a new picture's question is within the threshold.

    `draw` gives the scores of pictures, a row each, NaN behind the last question, and the groups of the questions; the
    first question of the last picture is the new one.
    """
    rng, held = np.random.default_rng(0), 0
    for _ in range(TRIALS):
        scores, groups = draw(rng)
        there = ~np.isnan(scores[:-1])
        pictures = there.nonzero()[0]
        held += scores[-1, 0] <= threshold(scores[:-1][there], pictures, groups[:-1][there])
    return held / TRIALS


def by_picture(scores, pictures, _):
    return conformal_threshold(scores, pictures, ALPHA)


def by_question(scores, pictures, _):
    return conformal_threshold(scores, np.arange(len(scores)), ALPHA)


def within_group(scores, pictures, groups):
    return conformal_threshold(scores[groups], pictures[groups], ALPHA)


def correlated(rng):
    """15 pictures of 6 questions, which are nearly as hard as each other."""
    scores = rng.standard_normal((15, 1)) + 0.1 * rng.standard_normal((15, 6))
    return scores, scores == scores


def uneven(rng):
    """Hard pictures have one question each, easy ones ten."""
    scores, hard = rng.random((30, 10)), rng.random(30) < 0.3
    scores[hard, 0] += 1
    scores[hard, 1:] = np.nan
    return scores, scores == scores


def mixed(rng):
    """A third of the questions are of a harder group, and the new one is."""
    groups = rng.random((31, 3)) < 0.3
    groups[-1, 0] = True
    return rng.standard_normal((31, 3)) + rng.standard_normal((31, 1)) + 2 * groups, groups


def test_coverage_of_one_question_a_picture_is_known():
    """That of a rank, 18 of 20, as ties have no chance."""
    found = coverage(lambda rng: (rng.random((20, 1)), np.ones((20, 1), bool)), by_picture)
    assert abs(found - 0.9) < FOUR_SIGMA


@pytest.mark.parametrize(
    ("draw", "holds", "fails"),
    [(correlated, by_picture, by_question), (uneven, by_picture, by_question), (mixed, within_group, by_picture)],
)
def test_coverage_holds_where_simpler_ways_fail(draw, holds, fails):
    assert coverage(draw, holds) > 1 - ALPHA - FOUR_SIGMA > coverage(draw, fails)


@pytest.mark.parametrize(
    ("mean", "count"), [(0.0, 20), (0.9, 50), (0.123, 1000), *((1.0, count) for count in range(1, 30))]
)
def test_wilson_interval(mean, count):
    """Its ends are the means from which `mean` is 1.96 standard errors of theirs away."""
    low, high = wilson_interval(mean, count)
    assert 0 <= low <= mean <= high <= 1 and low < high
    for end in {low, high} - {mean}:
        assert (mean - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count)
