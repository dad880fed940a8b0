"""Which proposed tokens a denoising step keeps: one small object per published rule.

A rule sees what the step knows about its candidates, laid out as `(rows, canvas)`, and returns the positions to commit.
Every rule commits at least one candidate of every row that has any, so that no step is lost; rows are independent.
"""

import functools
import itertools
from dataclasses import dataclass

import torch

from .generation_options_lladamedv import ADAPTIVE_RULES


@dataclass
class CandidateScores:
    """What a step knows about its candidates; each is float64 `(rows, canvas)`, or `None` where no rule asks for it.

    Args:
        confidence: probability of the proposed token, without temperature.
        margin: probability of the most probable token less that of the second.
        entropy: of the distribution over the vocabulary, in nats.
        noise: uniform in [0, 1).
    """

    confidence: torch.Tensor
    margin: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    noise: torch.Tensor | None = None

    def defer(self, places: torch.BoolTensor) -> "CandidateScores":
        """The same, but with every score of `places` worse than any other place's, their own order kept."""
        worse = {"confidence": -2.0, "margin": -2.0, "noise": -2.0, "entropy": 1e3}  # all but the last lie in 0…1
        shifted = {
            name: torch.where(places, getattr(self, name) + shift, getattr(self, name))
            for name, shift in worse.items()
            if getattr(self, name) is not None
        }
        return CandidateScores(**shifted)


class CommitRule:
    """Base of the rules.

    Attributes:
        needs: names of the [`CandidateScores`] that the rule reads besides the confidence.
        adaptive: whether the scores decide how many tokens are committed, and not the schedule.
    """

    needs: tuple[str, ...] = ()
    adaptive = True

    def __call__(self, candidates: torch.BoolTensor, scores: CandidateScores, quota: torch.LongTensor):
        """Positions to commit.

        Args:
            candidates (`(rows, canvas)`): which positions may be committed.
            scores: of the candidates; what stands elsewhere is not looked at.
            quota (`(rows,)`): how many the schedule wants.

        Returns:
            `torch.BoolTensor` `(rows, canvas)`, a part of `candidates`.
        """
        raise NotImplementedError


def _rank(scores: torch.Tensor, candidates: torch.BoolTensor) -> torch.LongTensor:
    """Place of each candidate when the highest score comes first; equal scores go from left to right."""
    scores = scores.masked_fill(~candidates, float("-inf"))
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


@dataclass(frozen=True)
class CountRule(CommitRule):
    """Commit as many tokens as the schedule fixes beforehand (LLaDA, arXiv 2502.09992, algorithm 5).

    Args:
        ranking: which go first: `"low_confidence"` (the most probable; the name is that of what stays masked),
            `"random"`, `"margin"` (the largest lead over the second-best token; Dream's `topk_margin`) or `"entropy"`
            (the most certain distribution).
    """

    ranking: str = "low_confidence"
    adaptive = False

    @property
    def needs(self):
        return {"random": ("noise",), "margin": ("margin",), "entropy": ("entropy",)}.get(self.ranking, ())

    def __call__(self, candidates, scores, quota):
        value = getattr(scores, *(self.needs or ("confidence",)))
        value = -value if self.ranking == "entropy" else value
        return candidates & (_rank(value, candidates) < quota[:, None])


@dataclass(frozen=True)
class ThresholdRule(CommitRule):
    """Commit every token at least this probable, and always the best (Fast-dLLM, arXiv 2505.22618)."""

    threshold: float  # in (0, 1]

    def __call__(self, candidates, scores, quota):
        confidence = scores.confidence.masked_fill(~candidates, float("-inf"))
        best = confidence.amax(dim=1, keepdim=True)
        return candidates & (confidence >= best.clamp(max=self.threshold))


@dataclass(frozen=True)
class FactorRule(CommitRule):
    """Commit the r most probable tokens while the r-th has a probability of at least 1 − f / (r + 1) (Fast-dLLM)."""

    factor: float  # f, above 0; the larger, the more tokens a step

    def __call__(self, candidates, scores, quota):
        confidence = scores.confidence.masked_fill(~candidates, float("-inf"))
        ordered = confidence.sort(dim=1, descending=True).values
        ranks = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
        # The probabilities fall and what is asked for rises: those that pass come first.
        count = (ordered >= 1 - self.factor / (ranks + 1)).sum(dim=1, keepdim=True).clamp(min=1)
        return candidates & (_rank(confidence, candidates) < count)


@dataclass(frozen=True)
class EntropyBoundRule(CommitRule):
    """Commit the most certain tokens while the sum of their entropies without the largest stays within a bound, which
    then also bounds the error of taking them for independent (arXiv 2505.24857; DiffusionGemma's sampler)."""

    bound: float  # in nats, above 0
    needs = ("entropy",)

    def __call__(self, candidates, scores, quota):
        entropy = scores.entropy.masked_fill(~candidates, float("inf"))
        ordered = entropy.sort(dim=1).values
        # The sum of all but the last, which is the largest: no difference of sums, which would turn 0 into noise.
        before = ordered.cumsum(dim=1).roll(1, dims=1)
        before[:, 0] = 0
        count = (before <= self.bound).sum(dim=1, keepdim=True)
        return candidates & (_rank(-entropy, candidates) < count)


def build_commit_rule(options) -> CommitRule:
    """The rule that a checked [`LLaDAMedVGenerationConfig`] asks for."""
    for name, rule in zip(ADAPTIVE_RULES, (ThresholdRule, FactorRule, EntropyBoundRule), strict=True):
        if getattr(options, name) is not None:
            return rule(getattr(options, name))
    return CountRule(options.remasking)


@functools.cache
def commit_schedule(block_length: int, steps: int, shift: float | None = None) -> torch.LongTensor:
    """How many tokens each step of a block commits, `(block_length + 1, steps)`: by the block's number of masks.

    Linear: with m masks, m // steps each, one more in the first m % steps. Shifted: in proportion to the published
    curve, rounded so that the counts add up to m and equal shares differ as in the linear schedule (the larger
    remainder, then the earlier step, gets one more), with at least one token a step as long as there are masks.
    """
    remaining = [_fraction_left(1 - step / steps, shift or 1.0) for step in range(steps + 1)]
    table = torch.zeros(block_length + 1, steps, dtype=torch.long)
    for masks in range(1, block_length + 1):
        if masks <= steps:
            table[masks, :masks] = 1
            continue
        # One each first, and the rest of each share by largest remainder.
        shares = [max(masks * (before - after), 1.0) for before, after in itertools.pairwise(remaining)]
        spare = masks - steps
        weights = [share - 1 for share in shares]
        scale = spare / sum(weights)
        ideal = [weight * scale for weight in weights]
        counts = [int(value + 1e-9) for value in ideal]
        order = sorted(range(steps), key=lambda step: (-round(ideal[step] - counts[step], 9), step))
        for step in order[: spare - sum(counts)]:
            counts[step] += 1
        table[masks] = torch.tensor(counts) + 1
    return table


def _fraction_left(time: float, shift: float) -> float:
    return shift * time / (1 + (shift - 1) * time)


__all__ = [
    "CandidateScores",
    "CommitRule",
    "CountRule",
    "EntropyBoundRule",
    "FactorRule",
    "ThresholdRule",
    "build_commit_rule",
    "commit_schedule",
]
