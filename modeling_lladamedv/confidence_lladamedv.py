"""How sure an answer is: from its tokens' commit confidences, and calibrated on questions with known answers.

A probability of 0.9 should be right nine times out of ten. Temperature scaling (arXiv 1706.04599) makes it so with one
number, here on the scale of the answer's log-odds.
"""

import logging

import torch


logger = logging.getLogger(__name__)
_LOG_TEMPERATURES = (-5.0, 5.0)  # logarithms of those that are searched


def answer_confidence(commit_confidence: torch.Tensor, num_tokens: torch.LongTensor) -> torch.DoubleTensor:
    """Geometric mean of the confidences of each row's first `num_tokens` tokens.

    Args:
        commit_confidence (`(batch, canvas)`): in [0, 1]; NaN where nothing was committed, which is left out.
        num_tokens (`(batch,)`): how many places count.

    Returns:
        `(batch,)`, NaN for a row in which nothing counts.
    """
    places = torch.arange(commit_confidence.shape[1], device=commit_confidence.device)
    logs = commit_confidence.double().log().masked_fill(places >= num_tokens[:, None], float("nan"))
    return logs.nanmean(dim=1).exp()


def calibrate_confidence(confidence: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divide the log-odds of confidences by `temperature`: above 1 makes them more modest."""
    return torch.sigmoid(torch.logit(confidence.double()) / temperature)


def fit_confidence_temperature(confidence, correct) -> float:
    """The temperature at which confidences fit best how often answers are right (least negative log-likelihood).

    Save it as `model.generation_config.confidence_temperature`. If the best one lies at an end of the range that is
    searched, e^-5 to e^5 (as where all answers are right, or all wrong), a warning says so: it is no calibration then.

    Args:
        confidence: uncalibrated confidences of answers, each in [0, 1].
        correct: for each whether the answer was right (or how right it was, from 0 to 1).

    Raises:
        ValueError: if the two do not have the same length, there are fewer than two answers, or a value lies outside
            of [0, 1].
    """
    confidence, correct = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (confidence, correct))
    if len(confidence) != len(correct) or len(confidence) < 2:
        raise ValueError(
            f"`confidence` holds {len(confidence)} values and `correct` {len(correct)}; allowed are two or more of "
            "each, and equally many."
        )
    for name, values in (("confidence", confidence), ("correct", correct)):
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"`{name}` holds values outside of [0, 1].")
    # Certainty has infinite log-odds, whatever they are divided by.
    log_odds = torch.logit(confidence, eps=1e-12)

    def loss(log_temperature):
        scaled = log_odds / log_temperature.exp()
        return torch.nn.functional.binary_cross_entropy_with_logits(scaled, correct)

    # Along the logarithm of the temperature the loss has one valley; three nested grids find its floor to 1e-4.
    low, high = _LOG_TEMPERATURES
    for _ in range(3):
        grid = torch.linspace(low, high, 101, dtype=torch.float64)
        best = int(torch.stack([loss(value) for value in grid]).argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 100)])
    temperature = float(torch.tensor((low + high) / 2).exp())
    if low == _LOG_TEMPERATURES[0] or high == _LOG_TEMPERATURES[1]:
        logger.warning(
            "The confidence temperature that fits best, %.3g, is at the end of what is searched: these %d answers do "
            "not tell how sure the model should be.", temperature, len(confidence),
        )  # fmt: skip
    return temperature


__all__ = ["answer_confidence", "calibrate_confidence", "fit_confidence_temperature"]
