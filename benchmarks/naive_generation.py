"""The released decoding loop, written plainly from its published description: what every speed-up is measured by.

One prompt at a time; every step runs the model on the whole row, the output layer on every position of it, and a
float64 softmax over all of that. Source: LLaDA (arXiv 2502.09992), algorithm 5, and the steps of the authors' code.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def generate(
    model, input_ids, pixel_values=None, image_sizes=None, max_new_tokens=64, block_length=64, steps=64, suppressed=()
) -> tuple[torch.LongTensor, int]:
    """Denoise one answer.

    Returns:
        The answer's ids `(max_new_tokens,)` and the number of forward passes.
    """
    mask = model.config.mask_token_id
    embed = model.get_input_embeddings()
    prompt, _ = model.model.get_multimodal_embeddings(input_ids, pixel_values, image_sizes)
    start, length = prompt.shape[1], prompt.shape[1] + max_new_tokens
    row = torch.full((1, length), mask, device=prompt.device)
    row[:, :start] = input_ids
    forwards = 0
    blocks = max_new_tokens // block_length
    for block in range(blocks):
        end = start + (block + 1) * block_length
        masks = int((row[:, start:end] == mask).sum())
        for step in range(steps // blocks):
            quota = masks // (steps // blocks) + (step < masks % (steps // blocks))
            masked = row == mask
            masked[:, :start] = False
            embeds = torch.cat([prompt, embed(row[:, start:])], dim=1)
            logits = model(inputs_embeds=embeds).logits  # (1, row, vocabulary)
            forwards += 1
            logits[..., list(suppressed)] = float("-inf")
            proposal = logits.argmax(dim=-1)
            probability = logits.double().softmax(dim=-1).gather(-1, proposal[..., None])[..., 0]
            probability[:, end:] = float("-inf")
            probability = torch.where(masked, probability, float("-inf"))
            chosen = probability[0].topk(quota).indices
            row[0, chosen] = proposal[0, chosen]
    return row[0, start:], forwards
