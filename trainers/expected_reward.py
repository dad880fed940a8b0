"""Objectives for prompts whose possible answers are known: each is scored and rewarded, and none is sampled.

With bounds B(c) on log p(c) of the candidates c, the model's distribution over them is π = softmax(B / T), and that of
its reference π_ref. Two objectives have the same optimum, π* ∝ π_ref exp(R / β), that of rewards R under a penalty on
divergence (for example DPO, arXiv 2305.18290, equation 4):

- `"expected_reward"`, Σ π R - β KL(π ‖ π_ref), is what policy gradients estimate from samples, here without variance.
  Its gradient holds the factor π(c): what starts near 0 stays there.
- `"closed_form"`, the cross-entropy of π* to π, whose gradient in B / T is π - π*, learns that, too.

π only compares candidates, all of which may become unlikely together. So -log Σ exp(B) is added, on which π does not
depend, and which leaves the optimum where it is. With it, the closed form at T = 1 is -Σ π* B, the cross-entropy of π*
to the model itself.

B is a sum over the tokens of an answer and its end, as `score` returns it, and is not divided by their number: a longer
answer is one whose tokens must all be likely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lladamedv.modeling_lladamedv.scoring_lladamedv import bound_masks

from .masked_diffusion_loss import IGNORE_INDEX, select_rows


class CandidateLoss(NamedTuple):
    """What [`candidate_loss`] returns.

    Attributes:
        loss (`(prompts,)`): 0 for a prompt with a candidate that has no reward.
        probability (`(prompts, candidates)`): π, 0 where there is no candidate.
        kl (`(prompts,)`): KL(π ‖ π_ref).
    """

    loss: torch.FloatTensor
    probability: torch.FloatTensor
    kl: torch.FloatTensor


def candidate_loss(
    policy: torch.FloatTensor,
    reference: torch.FloatTensor,
    rewards: torch.FloatTensor,
    loss_type: str,
    beta: float,
    temperature: float = 1.0,
    mass_weight: float = 1.0,
) -> CandidateLoss:
    """The loss of each prompt, one of `CANDIDATE_LOSSES`.

    Args:
        policy, reference (`(prompts, candidates)`): bounds; -inf where a prompt has no such candidate.
        rewards (`(prompts, candidates)`): NaN where there is none.
        loss_type: a name in `CANDIDATE_LOSSES`.
        beta: what a nat of divergence from the reference counts; above 0 for `"closed_form"`.
        temperature: T.
        mass_weight: what -log Σ exp(B) counts.
    """
    present = policy > -torch.inf
    log_policy, log_reference = (
        (each / temperature).log_softmax(dim=1).masked_fill(~present, 0.0) for each in (policy, reference.to(policy))
    )
    probability = log_policy.exp() * present
    learned = ~(rewards.isnan() & present).any(dim=1)
    rewards = rewards.to(policy).masked_fill(~(present & learned[:, None]), 0.0)
    kl = (probability * (log_policy - log_reference)).sum(dim=1)
    if loss_type == "expected_reward":
        loss = beta * kl - (probability * rewards).sum(dim=1)
    else:
        optimum = (log_reference + rewards / beta).masked_fill(~present, -torch.inf).softmax(dim=1)
        loss = -(optimum * log_policy).sum(dim=1)
    return CandidateLoss((loss - mass_weight * policy.logsumexp(dim=1)) * learned, probability, kl)


CANDIDATE_LOSSES = ("expected_reward", "closed_form")


def candidate_bounds(
    model,
    batch: Mapping,
    prompts: torch.LongTensor,
    mask_token_id: int,
    seeds: Sequence[int],
    max_exact_tokens: int,
    num_draws: int,
) -> torch.FloatTensor:
    """Bounds on the log-likelihood of answers, exact where they are short, from one forward pass.

    It encodes each image once. Answers to the same prompt that a mask makes equal, as it makes all of one length when
    it hides every token, are one row of it.

    Args:
        model: [`LLaDAMedVForConditionalGeneration`], which may be wrapped.
        batch: what the model takes, and `labels` `(answers, sequence)`, with one answer in each row.
        prompts (`(answers,)`): the number of the prompt of each answer.
        mask_token_id: of the model's configuration.
        seeds: of the draws, one for each prompt; its answers of the same length have the same masks.
        max_exact_tokens: answers of up to so many tokens L are evaluated on all 2^L - 1 masks.
        num_draws: masks that are drawn for longer ones.

    Returns:
        In nats, `(answers,)`; 0 for a row without labels.
    """
    input_ids, labels = batch["input_ids"], batch["labels"]
    learned, device = labels != IGNORE_INDEX, labels.device

    # 1. The masks of each answer, and what the sum over a mask's places weighs.
    answers, masks, weights = [], [], []
    for number, length in enumerate(learned.sum(dim=1).tolist()):
        own, weight = torch.zeros(1, 0, dtype=torch.bool), torch.zeros(1)  # of nothing
        if length:
            own, weight = bound_masks(length, max_exact_tokens, num_draws, seeds[prompts[number]])
        answers += [number] * len(own)
        masks.append(torch.zeros(len(own), labels.shape[1], dtype=torch.bool, device=device))
        masks[-1][:, learned[number]] = own.to(device)
        weights.append(weight)
    answer, masked = torch.tensor(answers, device=device), torch.cat(masks)

    # 2. Rows that are the same to the model: of the same prompt, with the same tokens, masks and padding.
    seen = input_ids[answer].masked_fill(masked, -1)
    if "attention_mask" in batch:
        seen = seen.masked_fill(batch["attention_mask"][answer] == 0, -2)
    seen = torch.cat([prompts[answer, None], seen], dim=1)
    rows, at = seen.unique(dim=0, return_inverse=True)
    first = at.new_empty(len(rows)).scatter_(0, at, torch.arange(len(at), device=device))

    # 3. Predict what they mask.
    kept = masked[first]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "answer_ids")}
    inputs = select_rows(inputs, answer[first])
    inputs["input_ids"] = inputs["input_ids"].masked_fill(kept, mask_token_id)
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    # 4. Sum the log-probabilities of each answer's tokens over its masks.
    place = torch.zeros(kept.shape, dtype=torch.long, device=device)
    place[kept] = torch.arange(len(logits), device=device)
    row, token = masked.nonzero(as_tuple=True)
    place = place[at[row], token]
    log_probs = logits[place, labels[answer[row], token]] - logits.logsumexp(dim=-1)[place]
    weight = torch.cat(weights).to(log_probs)[row]
    return log_probs.new_zeros(len(labels)).index_add(0, answer[row], log_probs * weight)


__all__ = ["CANDIDATE_LOSSES", "CandidateLoss", "candidate_bounds", "candidate_loss"]
