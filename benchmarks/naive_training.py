"""A training step written plainly from LLaDA's published description: what our step is measured by.

The image of every row is encoded, every position goes through all layers and the output layer, and the cross-entropy
is taken in float32 over the whole row, and then multiplied by what is masked. Source: LLaDA (arXiv 2502.09992),
algorithm 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def loss(model, input_ids, labels, t, uniform, pixel_values) -> torch.FloatTensor:
    """The masked-diffusion loss of a batch; `t` `(batch,)` and `uniform` `(batch, sequence)` are the draws."""
    probability = ((1 - 1e-3) * t + 1e-3)[:, None].expand_as(labels)
    masked = (uniform < probability) & (labels != -100)
    noised = torch.where(masked, model.config.mask_token_id, input_ids)
    logits = model(input_ids=noised, pixel_values=pixel_values).logits.float()  # (batch, sequence, vocabulary)
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    weighted = entropy.view_as(labels) * masked / probability
    return (weighted.sum(dim=1) / (labels != -100).sum(dim=1)).mean()
