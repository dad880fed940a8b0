"""Speed and memory of a step of preference tuning, and of candidates, against one of fine-tuning, and what draws cost.

    python benchmarks/bench_alignment.py --size cpu --repeats 3 --json results.json

Model, memory and turns are those of `bench_training.py`; all in one run. A batch is one pair, two answers about one
picture; the step of fine-tuning learns the chosen one alone. The reference is a second model, of other weights. Answers
have 32 tokens, or two, as "Yes" and its end, of which there are three masks however many are drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import torch
from bench_training import ANSWER, build_batch, main, measure, our_loss, trained_model

from lladamedv.trainers.expected_reward import candidate_bounds, candidate_loss
from lladamedv.trainers.masked_diffusion_loss import IGNORE_INDEX, AnswerNoise, answer_bounds
from lladamedv.trainers.preference_loss import preference_loss, preference_noise


PAIRS, DRAWS = 1, (1, 2, 4, 8)


def dpo_loss(model, batch: dict, *, reference, draws: int, passes: bool = False) -> torch.FloatTensor:
    """As the trainer computes it; with `passes` each draw in a forward pass of its own, with its pictures."""
    labels = batch["labels"]
    keys = [(number % PAIRS, number // PAIRS) for number in range(len(labels))]
    t, uniform = preference_noise(AnswerNoise(0, "stratified"), labels, keys, draws)
    batch = {name: value for name, value in batch.items() if name not in ("t", "uniform")}
    noises = zip(t.split(1), uniform.split(1)) if passes else [(t, uniform)]
    sides = []
    for each, (times, spread) in [(each, noise) for noise in noises for each in (model, reference)]:
        with torch.set_grad_enabled(each is model):
            sides.append(answer_bounds(each, batch, times, spread, model.config.mask_token_id))
    policy, fixed = torch.cat(sides[::2]), torch.cat(sides[1::2])
    lengths = (labels != IGNORE_INDEX).sum(dim=1)
    return preference_loss(policy, fixed, lengths, PAIRS, ["sigmoid"], [1.0], 0.1)[0].mean()


def fine_tuning(model) -> tuple[Callable, dict, int]:
    return our_loss, build_batch(model, PAIRS), PAIRS


@cache
def reference_of(model):
    other = copy.deepcopy(model).requires_grad_(False)
    other.lm_head.weight.mul_(0.9)
    return other


def preferences(model, draws: int, answer: int = ANSWER, passes: bool = False) -> tuple[Callable, dict, int]:
    batch = build_batch(model, 2 * PAIRS, pictures=PAIRS, answer=answer)
    return partial(dpo_loss, reference=reference_of(model), draws=draws, passes=passes), batch, 2 * PAIRS


def candidates_loss(model, batch: dict, *, reference) -> torch.FloatTensor:
    """The closed form on the exact scores of both answers."""
    prompts = torch.arange(len(batch["labels"]), device=batch["labels"].device) % PAIRS
    batch, sides = {name: value for name, value in batch.items() if name not in ("t", "uniform")}, []
    for each in (model, reference):
        with torch.set_grad_enabled(each is model):
            bounds = candidate_bounds(each, batch, prompts, model.config.mask_token_id, [0] * PAIRS, 4, 8)
        sides.append(bounds.view(-1, PAIRS).T)
    rewards = torch.tensor([[1.0, 0.0]]).to(sides[0]).expand_as(sides[0])
    return candidate_loss(*sides, rewards, "closed_form", 0.1).loss.mean()


def candidates(model) -> tuple[Callable, dict, int]:
    batch = build_batch(model, 2 * PAIRS, pictures=PAIRS, answer=2)
    return partial(candidates_loss, reference=reference_of(model)), batch, 2 * PAIRS


# By name what makes a method: of a model how its loss is computed, from which batch, and of how many answers.
METHODS = {
    "fine-tuning": fine_tuning,
    **{f"dpo, {draws} draws": partial(preferences, draws=draws) for draws in DRAWS},
    "dpo, 8 passes": partial(preferences, draws=8, passes=True),
    **{f"short dpo, {draws} draws": partial(preferences, draws=draws, answer=2) for draws in DRAWS},
    "closed form": candidates,
    "short dpo, 8 passes": partial(preferences, draws=8, answer=2, passes=True),
}  # fmt: skip


def prepare(size_name: str) -> tuple:
    """Model, optimizer and modes, as `bench_training.prepare`."""
    model, optimizer = trained_model(size_name)
    made = {name: method(model) for name, method in METHODS.items()}
    return model, optimizer, {name: (loss, [batch], answers, None) for name, (loss, batch, answers) in made.items()}


def benchmark(size_name: str, repeats: int, report=print) -> dict:
    found = measure(size_name, *prepare(size_name), repeats, report)
    plain = found["fine-tuning"]
    for name, mode in found.items():
        mode |= {"times_plain": mode["seconds"] / plain["seconds"], "memory": mode["peak_bytes"] / plain["peak_bytes"]}
        line = f"{name}: {mode['times_plain']:.1f} times the seconds of fine-tuning, {mode['memory']:.1f} of its memory"
        if (apart := found.get(name.replace("draws", "passes"))) is not None and apart is not mode:
            mode["gain"] = apart["seconds"] / mode["seconds"]
            line += f"; {mode['gain']:.2f} times as fast as as many passes"
        report(line)
    return {"modes": found}


if __name__ == "__main__":
    main(__doc__, prepare, benchmark)
