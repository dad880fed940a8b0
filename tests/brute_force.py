"""The published denoising loop, written down as plainly as possible for one row, to compare the real one with.

Source: LLaDA (arXiv 2502.09992), algorithms 4 and 5, and the steps listed for the authors' implementation. Every
step runs the model on the whole row and softmaxes the whole vocabulary in float64.
"""

import torch


def denoise(
    model, prompt, pixel_values, length, block_length, steps, cfg_scale=0.0, suppressed=(), stops=(), suffix=()
):
    """Answer token ids, with the (step, position) order of commits."""
    mask = model.config.mask_token_id
    row = list(prompt) + [mask] * length + list(suffix)
    start, blocks = len(prompt), length // block_length
    commits, stop, number = [], length, 0
    for block in range(blocks):
        end = (block + 1) * block_length
        masks = sum(row[start + i] == mask for i in range(block * block_length, end))
        per_step = steps // blocks
        for step in range(per_step):
            open_places = [i for i in range(min(end, stop)) if row[start + i] == mask]
            if not open_places:
                break
            quota = masks // per_step + (1 if step < masks % per_step else 0)
            logits = model(input_ids=torch.tensor([row]), pixel_values=pixel_values).logits[0].double()
            if cfg_scale:
                blank = [mask] * start + row[start:]
                free = model(input_ids=torch.tensor([blank])).logits[0].double()
                logits = free + (cfg_scale + 1) * (logits - free)
            logits[:, list(suppressed)] = -torch.inf
            probabilities = logits.softmax(-1)
            choices = [
                (probabilities[start + i].max().item(), i, probabilities[start + i].argmax().item())
                for i in open_places
            ]
            for _, place, token in sorted(choices, reverse=True)[:quota]:
                row[start + place] = token
                commits.append((number, place))
            number += 1
            canvas = row[start : start + length]
            for stop_sequence in stops:
                for place in range(length - len(stop_sequence) + 1):
                    if canvas[place : place + len(stop_sequence)] == list(stop_sequence):
                        stop = min(stop, place)
                        break
            if stop < length and mask not in canvas[:stop]:
                return canvas[:stop] + list(suffix), commits, number
    return row[start : start + stop] + list(suffix), commits, number
