"""Preference losses on the bounds of masked diffusion: DPO as VRPO computes it, and mDPO's terms about the picture.

A bound B(y) on log p(y) stands where an autoregressive model has log p(y) itself. VRPO (LLaDA 1.5, arXiv 2505.19223)
keeps its estimate's variance small: several draws, each with a time of its own and one mask, and the same draws for the
policy and its reference, so that what both have in common cancels. [`preference_noise`] makes the draws,
[`preference_loss`] the loss; the bound is [`~masked_diffusion_loss.answer_bounds`].
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .masked_diffusion_loss import AnswerNoise


class LogRatios(NamedTuple):
    """What a loss is computed from, `(pairs,)` each.

    Attributes:
        chosen, rejected: B(y) of the policy minus B(y) of the reference, means over the draws.
        conditional: the same of the chosen answer about another picture; `None` if no loss asks for it.
        bound: B of the policy of the chosen answer.
        chosen_tokens, rejected_tokens: lengths of the answers.
    """

    chosen: torch.FloatTensor
    rejected: torch.FloatTensor
    conditional: torch.FloatTensor | None
    bound: torch.FloatTensor
    chosen_tokens: torch.LongTensor
    rejected_tokens: torch.LongTensor

    @property
    def delta(self) -> torch.FloatTensor:
        return self.chosen - self.rejected


IMAGE_CONDITIONAL = "image_conditional"
# By name the loss of each pair `(pairs,)`. The first seven are TRL's; of "sft" TRL takes the mean over all tokens of a
# batch, here each pair counts alike. The last two are mDPO's (arXiv 2406.11839).
PREFERENCE_LOSSES = {
    "sigmoid": lambda ratios, beta: -F.logsigmoid(beta * ratios.delta),
    "hinge": lambda ratios, beta: torch.relu(1 - beta * ratios.delta),
    "ipo": lambda ratios, beta: (
        ratios.chosen / ratios.chosen_tokens - ratios.rejected / ratios.rejected_tokens - 1 / (2 * beta)
    ) ** 2,
    "sigmoid_norm": lambda ratios, beta: -F.logsigmoid(
        beta * (ratios.chosen / ratios.chosen_tokens - ratios.rejected / ratios.rejected_tokens)
    ),
    "apo_zero": lambda ratios, beta: 1 - torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected),
    "apo_down": lambda ratios, beta: torch.sigmoid(beta * ratios.chosen) + 1 - torch.sigmoid(beta * ratios.delta),
    "sft": lambda ratios, beta: -ratios.bound / ratios.chosen_tokens,
    IMAGE_CONDITIONAL: lambda ratios, beta: -F.logsigmoid(beta * (ratios.chosen - ratios.conditional)),
    "anchor": lambda ratios, beta: -F.logsigmoid(beta * ratios.chosen),
}  # fmt: skip


def preference_loss(
    policy: torch.FloatTensor,
    reference: torch.FloatTensor,
    lengths: torch.LongTensor,
    pairs: int,
    loss_type: Sequence[str],
    loss_weights: Sequence[float],
    beta: float,
) -> tuple[torch.FloatTensor, LogRatios]:
    """The loss of each pair.

    The means over the draws are unbiased. The loss is not linear in them, so that its own mean is above the loss of the
    exact bounds, by about half its curvature times their variance, and meets it as draws grow (VRPO bounds both).

    Args:
        policy, reference (`(draws, rows)`): bounds on the same draws, of the chosen answers, the rejected ones and, if
            a loss asks for it, the chosen ones about another picture: `pairs` rows each.
        lengths (`(rows,)`): tokens of the answers.
        pairs: how many there are.
        loss_type, loss_weights: names in `PREFERENCE_LOSSES`, and what each counts.
        beta: how much a log-ratio counts.

    Returns:
        `(pairs,)`, 0 for a pair without tokens, and the log-ratios.
    """
    chosen_tokens, rejected_tokens = lengths.clamp(min=1).split(pairs)[:2]
    means = (policy - reference).mean(dim=0).split(pairs)
    ratios = LogRatios(
        *means[:2], means[2] if len(means) > 2 else None, policy[:, :pairs].mean(dim=0), chosen_tokens, rejected_tokens
    )
    loss = sum(weight * PREFERENCE_LOSSES[name](ratios, beta) for name, weight in zip(loss_type, loss_weights))
    return loss * (lengths[:pairs] > 0), ratios


def preference_noise(
    noise: AnswerNoise, labels: torch.LongTensor, keys: Sequence[Hashable], draws: int
) -> tuple[torch.FloatTensor, torch.FloatTensor]:
    """Draws for answers, one a row, that depend on each row's key and labels alone.

    The sampling of `noise` is over the draws of an answer: `"stratified"` gives each its own part of [0, 1).

    Args:
        labels (`(rows, sequence)`): -100 where nothing is to be learned.
        keys: of the rows.
        draws: how many for each.

    Returns:
        t `(draws, rows)` and uniform draws `(draws, rows, sequence)`, as [`answer_bounds`] takes them.
    """
    t, uniform = torch.zeros(draws, len(labels)), torch.ones(draws, *labels.shape)
    for row, key in enumerate(keys):
        own = labels[row].expand(draws, -1)
        number = torch.arange(draws)[:, None].expand_as(own)
        times, uniform[:, row] = (each.cpu() for each in noise(own, number, step=key, first_row=0, num_rows=draws))
        t[:, row] = times.amax(dim=1)  # all tokens of an answer have the same time, others have 0
    return t.to(labels.device), uniform.to(labels.device)


__all__ = ["IMAGE_CONDITIONAL", "PREFERENCE_LOSSES", "LogRatios", "preference_loss", "preference_noise"]
