"""The masked-diffusion loss of LLaDA: noise the answer, predict what was masked, weigh by how much was masked.

Source: LLaDA (arXiv 2502.09992), algorithm 2 and equation 5; constants as in LLaDA-V's (arXiv 2505.16933) training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


IGNORE_INDEX = -100
EPSILON = 1e-3  # the masking probability never falls below this, so that its inverse stays bounded


@dataclass
class NoisedBatch:
    """A batch in which part of the answer tokens is masked.

    Attributes:
        input_ids (`(batch, sequence)`): the noised tokens.
        masked (`(batch, sequence)`, bool): where the mask token was put.
        probability (`(batch,)`): each row's masking probability p.
    """

    input_ids: torch.LongTensor
    masked: torch.BoolTensor
    probability: torch.FloatTensor


def sample_timesteps(
    batch_size: int, generator: torch.Generator | None = None, stratified: bool = False, device=None
) -> torch.FloatTensor:
    """Draw t in [0, 1) for every row.

    Args:
        batch_size: number of rows.
        generator: source of randomness.
        stratified: give every row its own 1/batch_size-wide part of the interval, in random order; each t is still
            uniform, but a batch's average varies less.
        device: where to draw.

    Returns:
        `(batch_size,)` float32.
    """
    t = torch.rand(batch_size, generator=generator, device=device)
    if stratified:
        t = (torch.randperm(batch_size, generator=generator, device=device) + t) / batch_size
    return t


def add_noise(
    input_ids: torch.LongTensor,
    labels: torch.LongTensor,
    t: torch.FloatTensor,
    mask_token_id: int,
    generator: torch.Generator | None = None,
    uniform: torch.FloatTensor | None = None,
) -> NoisedBatch:
    """Mask each labelled token with probability p = (1 - 1e-3) t + 1e-3.

    Args:
        input_ids, labels (`(batch, sequence)`): tokens, and the same tokens with -100 where nothing is to be learned.
        t (`(batch,)`): time of each row.
        mask_token_id: id to put in.
        generator: source of randomness for `uniform`.
        uniform (`(batch, sequence)`): the draws to use, instead of new ones.
    """
    if uniform is None:
        uniform = torch.rand(input_ids.shape, generator=generator, device=input_ids.device)
    probability = (1 - EPSILON) * t + EPSILON
    masked = (uniform < probability[:, None]) & (labels != IGNORE_INDEX)
    return NoisedBatch(input_ids.masked_fill(masked, mask_token_id), masked, probability)


def masked_diffusion_loss(
    masked_logits: torch.FloatTensor, labels: torch.LongTensor, noised: NoisedBatch
) -> torch.FloatTensor:
    """Mean over rows of the sum over masked tokens of cross-entropy / p / number of labelled tokens.

    Args:
        masked_logits (`(number of masked tokens, vocabulary)`): logits at `noised.masked`, as
            `model(..., logits_to_keep=noised.masked)` gives them.
        labels (`(batch, sequence)`): see [`add_noise`].
        noised: what [`add_noise`] returned.

    Returns:
        A scalar. A row without labels counts as 0.
    """
    row = noised.masked.nonzero()[:, 0]
    cross_entropy = F.cross_entropy(masked_logits.float(), labels[noised.masked], reduction="none")
    label_counts = (labels != IGNORE_INDEX).sum(dim=1)
    return (cross_entropy / noised.probability[row] / label_counts[row]).sum() / len(labels)
