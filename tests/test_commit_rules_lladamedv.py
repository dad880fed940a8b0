"""Every commit rule against a plain version of its published description, on random distributions and in `generate`."""

import itertools

import pytest
import torch

from lladamedv.modeling_lladamedv.commit_rules_lladamedv import (
    CandidateScores,
    CountRule,
    EntropyBoundRule,
    FactorRule,
    ThresholdRule,
    commit_schedule,
)
from tests.brute_force import rule_of
from tests.test_generation_lladamedv import generate


RULES = [
    (CountRule(), {}),
    (CountRule("margin"), {"remasking": "margin"}),
    (CountRule("entropy"), {"remasking": "entropy"}),
    (ThresholdRule(0.2), {"confidence_threshold": 0.2}),
    (FactorRule(2.4), {"factor": 2.4}),
    (EntropyBoundRule(3.0), {"entropy_bound": 3.0}),
]


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_rules_on_random_distributions(rule, options):
    choose, _ = rule_of(options)
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(60):
        rows, canvas, vocabulary = 3, 9, 12
        sharpness = torch.rand(rows, canvas, 1, generator=generator) * 8
        probabilities = (torch.randn(rows, canvas, vocabulary, generator=generator).double() * sharpness).softmax(-1)
        candidates = torch.rand(rows, canvas, generator=generator) < 0.6
        candidates[1] = False  # a row without candidates
        quota = torch.randint(1, 5, (rows,), generator=generator)
        best = probabilities.topk(2).values
        scores = CandidateScores(
            confidence=best[..., 0],
            margin=best[..., 0] - best[..., 1],
            entropy=torch.distributions.Categorical(probs=probabilities).entropy(),
        )
        committed = rule(candidates, scores, quota)
        ends = torch.rand(rows, canvas, generator=generator) < 0.3
        with_ends = rule(candidates, scores.defer(ends), quota)
        has_end = (with_ends & ends).any(dim=1)
        assert not (candidates & ~ends & ~with_ends)[has_end].any(), "an end was committed before something else"
        assert not (committed & ~candidates).any() and not committed[1].any()
        for row in range(rows):
            open_places = {
                place: probabilities[row, place].tolist() for place in range(canvas) if candidates[row, place]
            }
            if open_places:
                expected = choose(open_places, int(quota[row]))
                assert committed[row].nonzero().flatten().tolist() == sorted(expected)
                assert committed[row].any()
                sizes.add(len(expected))
    assert len(sizes) > 2, "the sample must tell the rules apart"


def test_random_rule():
    rule = CountRule("random")
    noise = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    candidates = torch.tensor([[True, False, True, True]])
    scores = CandidateScores(confidence=torch.zeros(1, 4), noise=noise)
    assert rule(candidates, scores, torch.tensor([2])).tolist() == [[False, False, True, True]]


def test_equal_scores_go_from_left_to_right():
    scores = CandidateScores(confidence=torch.full((1, 5), 0.5), margin=torch.zeros(1, 5), entropy=torch.ones(1, 5))
    candidates = torch.tensor([[False, True, True, True, True]])
    for rule in (CountRule(), CountRule("margin"), CountRule("entropy"), FactorRule(1.6)):
        committed = rule(candidates, scores, torch.tensor([2]))
        assert committed.tolist() == [[False, True, True, False, False]]


def test_the_factor_rule_stops_at_the_first_failure():
    """A public implementation commits the first failing rank too."""
    scores = CandidateScores(confidence=torch.tensor([[0.9, 0.4, 0.39]], dtype=torch.float64))
    rule = FactorRule(1.75)  # needs 0.417 at rank 2
    assert rule(torch.ones(1, 3, dtype=torch.bool), scores, torch.ones(1)).tolist() == [[True, False, False]]


# Schedules


@pytest.mark.parametrize("shift", [None, 1, 1.0])
def test_linear_schedule(shift):
    for masks, steps in itertools.product(range(65), (1, 3, 8, 12, 64)):
        expected = [masks // steps + (step < masks % steps) for step in range(steps)]
        assert commit_schedule(64, steps, shift)[masks].tolist() == expected


@pytest.mark.parametrize("shift", [0.1, 1 / 3, 0.8, 1.5, 3, 10])
def test_shifted_schedule(shift):
    for steps in (1, 3, 8, 12, 32):
        table = commit_schedule(32, steps, shift)
        assert table.sum(dim=1).tolist() == list(range(33)), "every mask is committed"
        for masks in range(1, 33):
            counts = table[masks].tolist()
            assert all(counts[: min(steps, masks)]), "at least one a step"
            order = sorted(counts, reverse=shift < 1)
            if masks > steps:
                assert counts == order, "an early rush falls, a late one rises"
    # Many masks: close to the published curve, αt / (1 + (α - 1) t).
    steps = 8
    left = 512 - commit_schedule(512, steps, shift)[512].cumsum(0)
    for step in range(steps):
        time = 1 - (step + 1) / steps
        assert abs(left[step] / 512 - shift * time / (1 + (shift - 1) * time)) < 0.01


@torch.no_grad()
def test_a_shifted_schedule_in_generate(model):
    output = generate(model, max_new_tokens=16, block_length=16, steps=4, schedule_shift=1 / 3)
    counts = torch.bincount(output.commit_step[0])
    assert counts.tolist() == commit_schedule(16, 4, 1 / 3)[16].tolist() and counts[0] > counts[-1]
