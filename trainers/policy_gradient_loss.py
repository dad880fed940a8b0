"""Policy gradients for masked diffusion: three estimates of how likely a sampled answer is, and the losses on them.

An autoregressive model knows log p(y) of what it samples; a masked-diffusion model has estimates of it. Each of these
takes the masks of [`policy_masks`] and what the model says under them:

- `"diffu_grpo"` (d1, arXiv 2504.12216): each token by itself, from one pass in which the whole answer is masked, and
  some of the prompt. One pass a step, but the estimate ignores what tokens say about each other.
- `"espo"` (ESPO, arXiv 2512.03759): the bound on the answer's likelihood, from pairs of a mask and its complement; one
  ratio an answer.
- `"spg"` (SPG, arXiv 2510.09541): a lower bound for answers that were better than their group's mean, and for worse
  ones a mixture with an upper bound, so that raising the one and lowering the other moves the likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from .masked_diffusion_loss import IGNORE_INDEX, AnswerNoise, counted_masks
from .preference_loss import preference_noise


# By name, whether its loss is an average over tokens or over answers.
POLICY_LOSSES = {"diffu_grpo": "tokens", "espo": "answers", "spg": "tokens"}


class PolicyLoss(NamedTuple):
    """What [`policy_gradient_loss`] returns, `(rows,)` each.

    Attributes:
        loss: to be added up and divided by the number of tokens or answers, as `POLICY_LOSSES` says.
        kl: the estimated divergence from the reference, a token; 0 without one.
        clipped: the share of ratios that are clipped.
    """

    loss: torch.FloatTensor
    kl: torch.FloatTensor
    clipped: torch.FloatTensor


def group_advantages(rewards: torch.FloatTensor, scale: str, everyone: torch.FloatTensor) -> torch.FloatTensor:
    """How much better each answer is than its group.

    Args:
        rewards (`(groups, answers)`): NaN for an answer without a reward, which counts in no mean and gets 0.
        scale: `"none"`, `"group"` or `"batch"`: whose standard deviation rewards are divided by, as in TRL.
        everyone (`(any,)`): the rewards of the whole batch.

    Returns:
        `(groups, answers)`; exactly 0 in a group without a difference.
    """
    advantages = rewards - rewards.nanmean(dim=1, keepdim=True)
    advantages = torch.where(advantages.nan_to_num(0).abs().amax(dim=1, keepdim=True) < 1e-6, 0.0, advantages)
    if scale != "none":
        own = everyone[None] if scale == "batch" else rewards
        count = (~own.isnan()).sum(dim=1, keepdim=True)
        squares = ((own - own.nanmean(dim=1, keepdim=True)) ** 2).nansum(dim=1, keepdim=True)
        advantages = advantages / ((squares / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    return advantages.nan_to_num(0)


def policy_masks(
    loss_type: str, noise: AnswerNoise, labels: torch.LongTensor, keys: Sequence[Hashable], num_draws: int
) -> torch.BoolTensor:
    """Which tokens of the answers are masked in each pass, `(passes, rows, sequence)`.

    Args:
        labels (`(rows, sequence)`): the answers' tokens, -100 elsewhere.
        keys: of the rows, that their noise depends on.
        num_draws: one pass each, but two for `"espo"`: masks of l of L tokens, l from 0 to L, and then those of the
            others; of `"diffu_grpo"` there is one.
    """
    learned = labels != IGNORE_INDEX
    if loss_type == "diffu_grpo":
        return learned[None]
    t, uniform = preference_noise(noise, labels, keys, num_draws)
    length = learned.sum(dim=1)
    if loss_type == "spg":
        return counted_masks(learned, torch.minimum((t * length).long() + 1, length), uniform)
    masked = counted_masks(learned, torch.minimum((t * (length + 1)).long(), length), uniform)
    return torch.cat([masked, learned & ~masked])


def masked_prompt(
    noise: AnswerNoise, tokens: torch.LongTensor, keys: Sequence[Hashable], probability: float
) -> torch.BoolTensor:
    """Which tokens of the prompts are masked, `(rows, sequence)`: each with that probability (d1's `p_mask_prompt`).

    Args:
        tokens (`(rows, sequence)`): -100 where no token may be masked.
    """
    _, uniform = preference_noise(noise, tokens, [("prompt", key) for key in keys], 1)
    return uniform[0] < probability


def policy_estimate(
    loss_type: str,
    log_probs: torch.FloatTensor,
    masked: torch.BoolTensor,
    learned: torch.BoolTensor,
    advantages: torch.FloatTensor,
    eubo_beta: float = 1.5,
    mix_weight: float = 0.5,
) -> torch.FloatTensor:
    """The estimated log-likelihood a token: of `"diffu_grpo"` of each, `(rows, sequence)`, of the others the mean over
    each answer's, `(rows, 1)`.

    Args:
        log_probs, masked (`(passes, rows, sequence)`): of the tokens that are masked, and which are.
        learned (`(rows, sequence)`): the answers' tokens.
        advantages (`(rows,)`): of which `"spg"` needs the signs.
        eubo_beta, mix_weight: of `"spg"`: the exponent of the upper bound, and its share.
    """
    if loss_type == "diffu_grpo":
        return log_probs[0]
    length, count = learned.sum(dim=-1).clamp(min=1), masked.sum(dim=-1)
    if loss_type == "espo":
        # A pass in which l of L tokens are masked, l uniform on 0 to L, weighs (L + 1) / l.
        bounds = log_probs.sum(dim=-1) * (length + 1) / count.clamp(min=1)
        return (bounds.mean(dim=0) / length)[:, None]
    lower = (log_probs.sum(dim=-1) / count.clamp(min=1)).mean(dim=0)
    # Of each token that a draw masks, 1/β log of the mean over draws of p^β / (l / L).
    powers = eubo_beta * log_probs + (length / count.clamp(min=1)).log()[..., None]
    powers = powers.masked_fill(~masked, -1e4).logsumexp(dim=0) - math.log(len(masked))
    seen = masked.any(dim=0)
    upper = (powers * seen).sum(dim=-1) / seen.sum(dim=-1).clamp(min=1) / eubo_beta
    return torch.where(advantages > 0, lower, mix_weight * upper + (1 - mix_weight) * lower)[:, None]


def policy_gradient_loss(
    loss_type: str,
    policy: torch.FloatTensor,
    old: torch.FloatTensor | None,
    reference: torch.FloatTensor | None,
    learned: torch.BoolTensor,
    advantages: torch.FloatTensor,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> PolicyLoss:
    """The loss of each answer.

    Of `"diffu_grpo"` and `"espo"` it is PPO's clipped one, with a ratio to the policy that sampled the answers of each
    token, or of each answer, and a penalty for leaving the reference: k3 of each token (d1), or k2 of the bound
    (ESPO), both per token. `"spg"` weighs the likelihood itself, and has neither.

    Args:
        policy, old, reference: what [`policy_estimate`] returns for each; without `old`, the policy is the one that
            sampled, and every ratio is exactly 1.
        learned (`(rows, sequence)`): the answers' tokens.
        advantages (`(rows,)`): see [`group_advantages`].
        beta: what a nat of the penalty counts.
        epsilon, epsilon_high: ratios are clipped to 1 - `epsilon` and 1 + `epsilon_high`, by default the same.
    """
    length = learned.sum(dim=-1)
    real = learned if loss_type == "diffu_grpo" else (length > 0)[:, None]  # (rows, ratios)
    advantages = advantages[:, None]
    if loss_type == "spg":
        loss = (-advantages * policy * real)[:, 0] * length
        return PolicyLoss(loss, torch.zeros_like(loss), torch.zeros_like(loss))
    ratio = (policy - (policy.detach() if old is None else old)).exp()
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, high) * advantages)
    clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    kl = torch.zeros_like(surrogate)
    if reference is not None:
        away = reference - policy
        kl = away.exp() - away - 1 if loss_type == "diffu_grpo" else away**2 / 2 * length[:, None]
    count = real.sum(dim=1).clamp(min=1)
    return PolicyLoss(
        ((beta * kl - surrogate) * real).sum(dim=1), (kl * real).sum(dim=1) / count, (clipped * real).sum(dim=1) / count
    )


__all__ = [
    "POLICY_LOSSES", "PolicyLoss", "group_advantages", "masked_prompt", "policy_estimate", "policy_gradient_loss",
    "policy_masks",
]  # fmt: skip
