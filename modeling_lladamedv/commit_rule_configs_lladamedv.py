"""What is said of the commit rules, by name and number: read and checked without PyTorch."""

from dataclasses import dataclass


RANKINGS = ("low_confidence", "random", "margin", "entropy")


@dataclass(frozen=True)
class CountRuleConfig:
    """Commit a number of tokens that the schedule fixes beforehand (LLaDA, arXiv 2502.09992, algorithm 5).

    Args:
        ranking (`str`): which go first: `"low_confidence"` (the most probable; the name is that of what stays masked),
            `"random"`, `"margin"` (the largest lead over the second-best token; Dream's `topk_margin`) or `"entropy"`
            (the most certain distribution).
        schedule_shift (`float`, *optional*): α of LaViDa's shifted schedule (arXiv 2505.16839): after a fraction 1 − t
            of the block's steps, αt / (1 + (α − 1)t) of its masks are left. Below 1 commits more in the early steps,
            above 1 in the late ones; `None` and 1 are linear.
    """

    ranking: str = "low_confidence"
    schedule_shift: float | None = None

    def __post_init__(self):
        if self.ranking not in RANKINGS:
            raise ValueError(f"`remasking` is {self.ranking!r}; allowed are {', '.join(RANKINGS)}.")
        if self.schedule_shift is not None:
            _check_number("schedule_shift", self.schedule_shift, 0)


@dataclass(frozen=True)
class ThresholdRuleConfig:
    """Commit every token at least this probable, and always the best (Fast-dLLM, arXiv 2505.22618).

    Args:
        confidence_threshold (`float`): in (0, 1].
    """

    confidence_threshold: float

    def __post_init__(self):
        _check_number("confidence_threshold", self.confidence_threshold, 0, 1)


@dataclass(frozen=True)
class FactorRuleConfig:
    """Commit the r most probable tokens while the r-th has a probability of at least 1 − f / (r + 1) (Fast-dLLM).

    Args:
        factor (`float`): f, above 0; the larger, the more tokens a step.
    """

    factor: float

    def __post_init__(self):
        _check_number("factor", self.factor, 0)


@dataclass(frozen=True)
class EntropyBoundRuleConfig:
    """Commit the most certain tokens while the sum of their entropies without the largest stays within a bound, which
    then also bounds the error of taking them for independent (arXiv 2505.24857; DiffusionGemma's sampler).

    Args:
        entropy_bound (`float`): in nats, above 0.
    """

    entropy_bound: float

    def __post_init__(self):
        _check_number("entropy_bound", self.entropy_bound, 0)


def _check_number(name: str, value: object, above: float, at_most: float = float("inf")) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not above < value <= at_most or value == float("inf"):
        allowed = f"numbers in ({above}, {at_most}]" if at_most < float("inf") else f"finite numbers above {above}"
        raise ValueError(f"`{name}` is {value!r}; allowed are {allowed}.")


__all__ = ["CountRuleConfig", "EntropyBoundRuleConfig", "FactorRuleConfig", "ThresholdRuleConfig"]
