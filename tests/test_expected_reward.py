"""Objectives of candidates: against all masks enumerated, `score`, finite differences, and the optimum they share."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lladamedv.trainers.expected_reward import CANDIDATE_LOSSES, candidate_bounds, candidate_loss
from lladamedv.trainers.masked_diffusion_loss import IGNORE_INDEX
from tests.tiny import image_prompt, tiny_model


MASK, PAD, END = 98, 91, 91
PIXELS = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ANSWERS = [[[11, END], [12, END], [13, 14, END]], [[11, END], [21, 22, 23, END]]]  # of two prompts, ended


def batch_of(prompts, answers, padding=0):
    """Every answer behind its prompt, the first of every prompt first, as the collator does."""
    rows = [(row, own[place]) for place in range(3) for row, own in enumerate(answers) if place < len(own)]
    texts = [prompts[row] + answer for row, answer in rows]
    width = max(map(len, texts)) + padding
    ids = torch.tensor([text + [PAD] * (width - len(text)) for text in texts])
    real = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    begins = torch.tensor([[len(prompts[row])] for row, _ in rows])
    labels = ids.masked_fill((real == 0) | (torch.arange(width) < begins), IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "attention_mask": real}, torch.tensor([row for row, _ in rows])


def pictured(answers=ANSWERS, padding=0):
    prompts = [image_prompt((5, 6))[0].tolist(), image_prompt((7,))[0].tolist()][: len(answers)]
    batch, rows = batch_of(prompts, answers, padding)
    images = {"image_index": rows, "batch_num_images": torch.ones_like(rows), "pixel_values": PIXELS[: len(answers)]}
    return batch | images, rows


def bounds(model, batch, rows, seeds=(3, 4), exact=8, draws=6):
    return candidate_bounds(model, batch, rows, MASK, seeds, exact, draws)


# The bounds


@pytest.mark.parametrize("exact", [8, 1])
def test_bounds_and_gradients_are_those_of_score(exact):
    """Of all masks and of draws, for answers of unequal length, which neither padding nor neighbours change."""
    model = tiny_model()
    batch, rows = pictured(padding=2)
    passes = []
    model.model.vision_tower.register_forward_hook(lambda *a: passes.append(len(a[1][0])))
    found = bounds(model, batch, rows, exact=exact)
    assert passes == [2], "each picture is encoded once"
    # 11 and 12 share the canvases in which they are masked, but for the end, and no others are equal.
    weights = torch.tensor([1.0, 0.5, -0.7, 0.3, 0.9])
    (found * weights).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    expected = torch.zeros(len(rows), dtype=torch.float64)
    for row, (text, seed) in enumerate(zip(((5, 6), (7,)), (3, 4))):
        expected[rows == row] = model.score(
            image_prompt(text), ANSWERS[row], pixel_values=PIXELS[row : row + 1], append_eos=False, seed=seed,
            max_exact_tokens=exact, num_samples=6, requires_grad=True,
        ).log_likelihood[0]  # fmt: skip
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (expected * weights).sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-4)


def test_rows_that_are_equal_are_computed_once():
    """Of k answers of one token and its end: all masked, the end given, and k with the answer given; not 3 k."""
    model, seen = tiny_model(), []
    model.model.language_model.layers[0].register_forward_hook(lambda *a: seen.append(len(a[2])))
    for answers in ([[[token, END] for token in (11, 12, 13)]], [[[token, END] for token in (11, 12, 13)]] * 2):
        bounds(model, *pictured(answers))
    assert seen == [5, 10], "the same answers to another prompt are others"


def test_the_end_of_an_answer_counts():
    """Bounds are of whole answers: they are sums over tokens, of which an end is one, and not means."""
    model = tiny_model()
    batch, rows = pictured([[[11, END], [11, 12, END]]])
    short, long = bounds(model, batch, rows)
    log_probs = {}
    with torch.no_grad():
        for tokens in ([MASK, END], [11, MASK], [MASK, MASK]):
            ids = torch.cat([image_prompt((5, 6)), torch.tensor([tokens])], dim=1)
            log_probs[tuple(tokens)] = model(input_ids=ids, pixel_values=PIXELS[:1]).logits[0, -2:].log_softmax(-1)
    both = log_probs[MASK, MASK][0, 11] + log_probs[MASK, MASK][1, END]
    one = log_probs[MASK, END][0, 11] + log_probs[11, MASK][1, END]
    assert short.item() == pytest.approx(float(both + one) / 2, rel=1e-5) and long < short


# The objectives


class Network(nn.Module):
    """A network of seven words in float64, whose prediction of a token depends on all that stands before and behind."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = ((7, 3), (6, 3), (3, 7))
        self.words, self.places, self.out = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes
        )

    def forward(self, input_ids, logits_to_keep, attention_mask, use_cache):
        places, words = self.places[: input_ids.shape[1]], self.words[input_ids.clamp(max=6)]
        context = (words * places * attention_mask[..., None]).sum(dim=1, keepdim=True).tanh()
        return SimpleNamespace(logits=((context + places) @ self.out)[logits_to_keep])


def enumerated_objective(policy, reference, prompt, answers, rewards, loss_type, beta, temperature, mass_weight):
    """The mean reward less beta times the divergence, or the cross-entropy to its optimum, from all masks, one by one,
    and the likelihood of all answers together; in numbers, without gradients."""
    masses, together = [], []
    for network in (policy, reference):
        scores = []
        for answer in answers:
            total = 0.0
            for size in range(1, len(answer) + 1):
                for places in itertools.combinations(range(len(answer)), size):
                    canvas = [6 if place in places else token for place, token in enumerate(answer)]
                    ids = torch.tensor([prompt + canvas])
                    logits = network(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids), False).logits
                    log_probs = logits[len(prompt) :].log_softmax(-1)
                    share = 1 / (size * math.comb(len(answer), size))
                    total += share * sum(float(log_probs[place, answer[place]]) for place in places)
            scores.append(math.exp(total))
        together.append(math.log(sum(scores)))
        warm = [score ** (1 / temperature) for score in scores]
        masses.append([score / sum(warm) for score in warm])
    pi, start = masses
    kept = -mass_weight * together[0]
    if loss_type == "expected_reward":
        return kept + sum(beta * p * math.log(p / q) - p * r for p, q, r in zip(pi, start, rewards))
    tilted = [q * math.exp(r / beta) for q, r in zip(start, rewards)]
    return kept - sum(t / sum(tilted) * math.log(p) for t, p in zip(tilted, pi))


@pytest.mark.parametrize("loss_type", CANDIDATE_LOSSES)
@pytest.mark.parametrize("more", [(1.0, 0.0), (2.5, 0.7)], ids=str)
def test_gradients_are_those_of_the_enumerated_objective(loss_type, more):
    policy, reference = Network(), Network()
    with torch.no_grad():
        policy.words += 0.3
    prompt, answers, rewards, beta = [0, 1], [[2, 5], [3, 5], [2, 4, 5]], [0.2, 1.0, -0.5], 0.4
    batch, rows = batch_of([prompt], [answers])

    def loss():
        scores = [candidate_bounds(each, batch, rows, 6, [0], 8, 8)[None] for each in (policy, reference)]
        return candidate_loss(*scores, torch.tensor([rewards], dtype=torch.float64), loss_type, beta, *more).loss[0]

    def enumerated():
        with torch.no_grad():
            return enumerated_objective(policy, reference, prompt, answers, rewards, loss_type, beta, *more)

    assert loss().item() == pytest.approx(enumerated(), abs=1e-12)
    loss().backward()
    for weight in policy.parameters():
        for place in range(0, weight.numel(), 4):
            sides = []
            for step in (1e-5, -1e-5):
                weight.data.view(-1)[place] += step
                sides.append(enumerated())
                weight.data.view(-1)[place] -= step
            assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(float(weight.grad.view(-1)[place]), abs=1e-8)


@pytest.mark.parametrize("loss_type", CANDIDATE_LOSSES)
def test_both_have_the_same_optimum(loss_type):
    """Descended to the end, both end at the reference times exp(R / beta), in rows of two and of three candidates."""
    reference = torch.tensor([[-1.0, -3.0, -2.0], [-0.5, -4.0, -torch.inf]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 1.0, 0.3], [0.0, 1.0, torch.nan]], dtype=torch.float64)
    policy = reference.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([policy], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimizer.zero_grad()
        loss = candidate_loss(policy, reference, rewards, loss_type, 0.5, mass_weight=0.0).loss.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    tilted = reference.exp() * (rewards.nan_to_num(0.0) / 0.5).exp()
    found = candidate_loss(policy, reference, rewards, loss_type, 0.5).probability
    torch.testing.assert_close(found, tilted / tilted.sum(dim=1, keepdim=True), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("probability", "least", "most"), [(0.43, 0.2, 0.3), (3e-4, 0, 4e-4), (1e-9, 0, 2e-9)])
def test_what_starts_near_0_is_learned_by_one_alone(probability, least, most):
    """The gradient in the score of the right one of two: p (1 - p) of the expected reward, near 1 of the other."""
    scores = torch.tensor([[math.log(probability), math.log1p(-probability)]], dtype=torch.float64)
    found = {}
    for loss_type in CANDIDATE_LOSSES:
        policy = scores.clone().requires_grad_(True)
        candidate_loss(policy, scores, torch.tensor([[1.0, 0.0]]), loss_type, 0.02, mass_weight=0.0).loss.backward()
        found[loss_type] = -policy.grad[0, 0].item()
    assert least < found["expected_reward"] < most
    assert found["closed_form"] == pytest.approx(1 - probability, abs=1e-6)


def test_all_candidates_together_stay_likely():
    """The closed form is then the cross-entropy of its optimum to the model; without, a shift of all scores is free."""
    policy, reference = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -0.5]])
    rewards = torch.tensor([[1.0, 0.0]])
    optimum = float(((reference + rewards / 0.5).softmax(dim=1) * policy).sum())
    losses = [
        [float(candidate_loss(policy + shift, reference, rewards, "closed_form", 0.5, mass_weight=weight).loss)
         for shift in (0.0, -4.0)]
        for weight in (1.0, 0.0)
    ]  # fmt: skip
    assert losses[0] == pytest.approx([-optimum, 4 - optimum]) and losses[1][0] == pytest.approx(losses[1][1])


@pytest.mark.parametrize("loss_type", CANDIDATE_LOSSES)
def test_no_reward_no_loss(loss_type):
    policy = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]], requires_grad=True)
    rewards = torch.tensor([[1.0, torch.nan], [1.0, 0.0]])
    result = candidate_loss(policy, policy.detach(), rewards, loss_type, 0.1)
    result.loss.sum().backward()
    assert result.loss[0] == 0 and (policy.grad[0] == 0).all() and (policy.grad[1] != 0).all()
