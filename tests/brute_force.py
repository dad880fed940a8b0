"""The published denoising loop, written down as plainly as possible for one row, to compare the real one with.

Source: LLaDA (arXiv 2502.09992), algorithms 4 and 5, and the steps listed for the authors' implementation. Every
step runs the model on the whole row and softmaxes the whole vocabulary in float64.
"""

import math

import torch

from tests.tiny import Words


def most_probable(probabilities, quota):
    """`probabilities` holds the distribution at each place; the places to commit, best first."""
    return sorted(probabilities, key=lambda place: -max(probabilities[place]))[:quota]


def largest_margin(probabilities, quota):
    leads = {place: sorted(row)[-1] - sorted(row)[-2] for place, row in probabilities.items()}
    return sorted(leads, key=lambda place: -leads[place])[:quota]


def entropies(probabilities):
    return {place: -sum(p * math.log(p) for p in row if p > 0) for place, row in probabilities.items()}


def smallest_entropy(probabilities, quota):
    values = entropies(probabilities)
    return sorted(values, key=lambda place: values[place])[:quota]


def above_threshold(threshold):
    def choose(probabilities, quota):
        best = max(max(row) for row in probabilities.values())
        return [place for place, row in probabilities.items() if max(row) >= threshold or max(row) == best]

    return choose


def by_factor(factor):
    def choose(probabilities, quota):
        kept = []
        for rank, place in enumerate(most_probable(probabilities, len(probabilities)), start=1):
            if rank > 1 and max(probabilities[place]) < 1 - factor / (rank + 1):
                break
            kept.append(place)
        return kept

    return choose


def by_entropy_bound(bound):
    def choose(probabilities, quota):
        values = entropies(probabilities)
        kept = []
        for place in sorted(values, key=lambda place: values[place]):
            if kept and sum(values[other] for other in kept) > bound:
                break
            kept.append(place)
        return kept

    return choose


RANKINGS = {"low_confidence": most_probable, "margin": largest_margin, "entropy": smallest_entropy}
ADAPTIVE = {"confidence_threshold": above_threshold, "factor": by_factor, "entropy_bound": by_entropy_bound}


def penalized(logits, ids, penalty):
    """CTRL's repetition penalty (arXiv 1909.05858) on one place's logits."""
    for token in set(ids):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits


def would_repeat(canvas, place, token, size, mask):
    """Whether the token makes two runs of `size` committed tokens equal that were not before."""
    canvas = [*canvas[:place], token, *canvas[place + 1 :]]
    runs = [tuple(canvas[i : i + size]) for i in range(len(canvas) - size + 1)]
    runs = [(i, run) for i, run in enumerate(runs) if mask not in run]
    own = [(i, run) for i, run in runs if i <= place < i + size]
    return any(run == other and i != j for i, run in own for j, other in runs)


def median_picture(pixel_values):
    """Pictures of one tile, each in the lower median of its channels."""
    middle = pixel_values.flatten(3).sort(dim=3).values[..., (pixel_values[0, 0, 0].numel() - 1) // 2]
    return middle[..., None, None].expand_as(pixel_values).clone()


def denoise(
    model, prompt, pixel_values, length, block_length, steps, cfg_scale=0.0, suppressed=(), stops=(), suffix=(),
    choose=most_probable, adaptive=False, forward=None, initial=None, suffix_blocks=None, penalty=1.0, ngram=None,
    image_guidance=0.0, cutoff=0.1,
):  # fmt: skip
    """Answer token ids, with the (step, position) order of commits.

    `forward(row, block_start, step_in_block)`, if given, replaces the model: it returns `(row length, vocabulary)`.
    """
    mask = model.config.mask_token_id
    canvas = [mask] * length
    start, blocks = len(prompt), length // block_length
    commits, stop, number = [], length, 0
    for block in range(blocks):
        end = (block + 1) * block_length
        masks = sum(token == mask for token in canvas[block * block_length : end])
        per_step = steps // blocks
        grown = max(end, length if initial is None else initial)
        window = grown if suffix_blocks is None else min(grown, end + suffix_blocks * block_length)
        positions = [*range(start + window), *range(start + grown, start + grown + len(suffix))]
        for step in range(block_length if adaptive else per_step):
            open_places = [i for i in range(min(end, stop)) if canvas[i] == mask]
            if not open_places:
                break
            quota = masks // per_step + (1 if step < masks % per_step else 0)
            row = list(prompt) + canvas[:window] + list(suffix)
            if forward is not None:
                logits = forward(row, start + block * block_length, step).double()
            else:
                inputs = {"input_ids": torch.tensor([row]), "position_ids": torch.tensor([positions])}
                logits = model(**inputs, pixel_values=pixel_values).logits[0].double()
            if cfg_scale:
                blank = {"input_ids": torch.tensor([[mask] * start + row[start:]])}
                free = model(**blank, position_ids=torch.tensor([positions])).logits[0].double()
                logits = free + (cfg_scale + 1) * (logits - free)
            unguided = logits[start:].clone()
            if image_guidance:
                grey = model(**inputs, pixel_values=median_picture(pixel_values)).logits[0].double()
                logits = logits + image_guidance * (logits - grey)
            logits = logits[start:]
            for place in open_places:
                if penalty != 1:
                    penalized(logits[place], [*prompt, *(token for token in canvas if token != mask)], penalty)
                for token in range(logits.shape[1] if ngram else 0):
                    if would_repeat(canvas, place, token, ngram, mask):
                        logits[place, token] = -torch.inf
            logits[:, list(suppressed)] = -torch.inf
            for place in open_places if image_guidance else ():
                allowed = [token for token in range(logits.shape[1]) if logits[place, token] > -torch.inf]
                most = max(unguided[place, token].exp() for token in allowed)
                for token in allowed:
                    if unguided[place, token].exp() < cutoff * most:
                        logits[place, token] = -torch.inf
            probabilities = logits.softmax(-1)
            for place in choose({i: probabilities[i].tolist() for i in open_places}, quota):
                canvas[place] = probabilities[place].argmax().item()
                commits.append((number, place))
            number += 1
            for stop_sequence in stops:
                for place in range(length - len(stop_sequence) + 1):
                    if canvas[place : place + len(stop_sequence)] == list(stop_sequence):
                        stop = min(stop, place)
                        break
            if stop < length and mask not in canvas[:stop]:
                return canvas[:stop] + list(suffix), commits, number
    return canvas[:stop] + list(suffix), commits, number


def rule_of(options):
    """What chooses the places with these options of `generate`, and whether it does so without a schedule."""
    for name, rule in ADAPTIVE.items():
        if name in options:
            return rule(options[name]), True
    return RANKINGS[options.get("remasking", "low_confidence")], False


def stop_sequences(options):
    """What ends an answer with these options, in the order in which it is looked for."""
    eos, texts = options.get("eos_token_id") or [], options.get("stop_strings") or []
    texts = [texts] if isinstance(texts, str) else texts
    return [[token] for token in ([eos] if isinstance(eos, int) else eos)] + [Words()(text).input_ids for text in texts]


def published(model, prompt, pixel_values, options, **more):
    """[`denoise`] with options of `generate`: the answer, the sorted commits, and the number of forward passes."""
    choose, adaptive = rule_of(options)
    more = {"choose": choose, "adaptive": adaptive, **more}
    answer, commits, forwards = denoise(
        model, prompt[0].tolist(), pixel_values, options["max_new_tokens"], options["block_length"],
        options.get("steps", options["max_new_tokens"]), options.get("cfg_scale", 0.0), options["suppress_tokens"],
        stops=stop_sequences(options), suffix=Words()(options.get("generation_suffix", "")).input_ids,
        initial=options.get("initial_canvas_length"), suffix_blocks=options.get("suffix_blocks"),
        penalty=options.get("repetition_penalty", 1.0), ngram=options.get("no_repeat_ngram_size"),
        image_guidance=options.get("image_guidance_scale", 0.0), cutoff=options.get("image_guidance_cutoff", 0.1),
        **more,
    )  # fmt: skip
    return answer, sorted(commits), forwards


def generated(output, prompt):
    """The same of an output of `generate` for one prompt."""
    commits = [(int(step), place) for place, step in enumerate(output.commit_step[0]) if step >= 0]
    return output.sequences[0, prompt.shape[1] :].tolist(), sorted(commits), int(output.num_forwards)
