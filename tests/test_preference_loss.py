"""The preference loss and the bounds that it compares, against all masks enumerated, `score`, and TRL's own losses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lladamedv.trainers.masked_diffusion_loss import IGNORE_INDEX, AnswerNoise, add_noise, answer_bounds
from lladamedv.trainers.preference_loss import PREFERENCE_LOSSES, preference_loss, preference_noise
from tests.tiny import image_prompt, tiny_model


CHOSEN, REJECTED = [11, 12, 13], [21, 22]
PIXELS = torch.randn(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pair(chosen=CHOSEN, rejected=REJECTED, padding=0, others=()):
    """A batch of the pair, and of `others` in front of it, about one picture: chosen answers first."""
    prompt = image_prompt()[0].tolist()
    answers = [*(other[0] for other in others), chosen, *(other[1] for other in others), rejected]
    width = max(map(len, answers)) + padding
    ids = torch.tensor([prompt + answer + [91] * (width - len(answer)) for answer in answers])
    real = torch.tensor([[1] * (len(prompt) + len(answer)) + [0] * (width - len(answer)) for answer in answers])
    labels = ids.masked_fill((real == 0) | (torch.arange(ids.shape[1]) < len(prompt)), IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "attention_mask": real, "pixel_values": PIXELS,
            "image_index": torch.zeros(len(ids), dtype=torch.long)}  # fmt: skip


def bounds(model, batch, draws, seed=0, sampling="uniform", keys=None):
    noise = preference_noise(AnswerNoise(seed, sampling), batch["labels"], keys or "wl", draws)
    return answer_bounds(model, batch, *noise, 98)


def exact(model, answers=(CHOSEN, REJECTED)):
    """By `score`, which enumerates all masks of short answers."""
    output = model.score(image_prompt(), list(answers), pixel_values=PIXELS, append_eos=False)
    return output.log_likelihood[0].float()


def near(model, size=0.03):
    """A policy near its reference, as in training."""
    policy, generator = tiny_model(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(size * weight.std(correction=0) * torch.randn(weight.shape, generator=generator))
    return policy


def all_orders(length):
    """Every number of masks in every order of the tokens, once: draws whose mean is the bound itself."""
    draws = itertools.product(range(length), itertools.permutations(range(length)))
    t, uniform = zip(*(((count + 0.5) / length, [rank / length for rank in order]) for count, order in draws))
    return torch.tensor(t)[:, None], torch.tensor(uniform)[:, None]


def enumerated_bound(model, answer):
    """Equation 6 of LLaDA, mask by mask, with gradients."""
    prompt, total = image_prompt()[0].tolist(), 0.0
    for size in range(1, len(answer) + 1):
        for places in itertools.combinations(range(len(answer)), size):
            hidden = [98 if place in places else token for place, token in enumerate(answer)]
            logits = model(input_ids=torch.tensor([prompt + hidden]), pixel_values=PIXELS).logits[0, len(prompt) :]
            own = sum(logits.log_softmax(-1)[place, answer[place]] for place in places)
            total = total + own / (size * math.comb(len(answer), size))
    return total


def test_policy_equal_to_reference_gives_log_2_at_every_draw():
    """To the last bit, with gradients on one side and not on the other."""
    model, batch = tiny_model(), pair()
    policy = bounds(model, batch, 16)
    with torch.no_grad():
        reference = bounds(model, batch, 16)
    for draw in range(16):
        loss, _ = preference_loss(
            policy[draw, None], reference[draw, None], torch.tensor([3, 2]), 1, ["sigmoid"], [1], 0.2
        )
        assert loss.item() == torch.tensor(2.0).log().item()


@pytest.mark.parametrize("sampling", ["uniform", "stratified", "antithetic"])
def test_log_ratios_are_unbiased_and_the_loss_is_right_in_the_limit(sampling):
    """Within 4 standard errors of 2,000 seeds (400 where two draws belong together), of exact bounds by `score`."""
    policy, reference = tiny_model(), tiny_model(seed=4)
    groups, size = (400, 2) if sampling != "uniform" else (2000, 1)
    with torch.no_grad():
        noise = AnswerNoise(0, sampling)
        t, uniform = zip(*(preference_noise(noise, pair()["labels"], [(each, 0), (each, 1)], size)
                           for each in range(groups)))  # fmt: skip
        drawn = [answer_bounds(model, pair(), torch.cat(t), torch.cat(uniform), 98) for model in (policy, reference)]
    ratios = (drawn[0] - drawn[1]).view(groups, size, 2).mean(dim=1)
    expected = exact(policy) - exact(reference)
    error = ratios.std(dim=0) / groups**0.5
    assert ((ratios.mean(dim=0) - expected).abs() < 4 * error).all() and (error > 0).all()
    loss, found = preference_loss(*drawn, torch.tensor([3, 2]), 1, ["sigmoid"], [1.0], 0.2)
    error = 0.2 * (ratios[:, 0] - ratios[:, 1]).std() / groups**0.5  # the loss's slope is at most beta
    assert (loss - -F.logsigmoid(0.2 * (expected[0] - expected[1]))).abs() < 4 * error
    torch.testing.assert_close(found.chosen, ratios.mean(dim=0)[:1])


def test_loss_and_gradient_are_those_of_the_enumerated_bound():
    policy, reference = tiny_model(), near(None)
    names, values = zip(*((name, each) for name, each in policy.named_parameters() if "vision" not in name))
    own = []
    for model in (policy, reference):
        sides = []
        for answer in (CHOSEN, REJECTED):
            batch, (t, uniform) = pair(answer, answer), all_orders(len(answer))
            batch = {name: value if name == "pixel_values" else value[:1] for name, value in batch.items()}
            spread = torch.ones(len(t), 1, batch["labels"].shape[1])
            spread[..., batch["labels"][0] != IGNORE_INDEX] = uniform
            sides.append(answer_bounds(model, batch, t, spread, 98).mean())
        own.append(torch.stack(sides)[None])
    loss, _ = preference_loss(own[0], own[1].detach(), torch.tensor([3, 2]), 1, ["sigmoid"], [1.0], 0.2)
    better, worse = (enumerated_bound(policy, answer) for answer in (CHOSEN, REJECTED))
    at_start = exact(reference)
    expected = -F.logsigmoid(0.2 * (better - at_start[0] - worse + at_start[1]))
    torch.testing.assert_close(own[0][0], exact(policy), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss[0], expected, atol=1e-5, rtol=1e-5)
    found, wanted = (torch.autograd.grad(each, values, allow_unused=True) for each in (loss[0], expected))
    assert sum(each is not None for each in wanted) > 20
    for name, one, other in zip(names, found, wanted):
        if other is not None:
            torch.testing.assert_close(one, other, atol=1e-5 * max(1, float(other.abs().max())), rtol=1e-3, msg=name)


def variances(draws=8, groups=250, length=8):
    """Of the estimated difference of two log-ratios, by how its draws are drawn; the table of docs/alignment.md."""
    reference = tiny_model()
    policy, batch = near(reference), pair(list(range(11, 11 + length)), list(range(31, 31 + length)))

    def ratios(t, uniform, other=None):
        with torch.no_grad():
            one = answer_bounds(policy, batch, t, uniform, 98)
            two = answer_bounds(reference, batch, *(other or (t, uniform)), 98)
        return (one - two).view(groups, draws, 2).mean(dim=1).diff(dim=1).var().item()

    def drawn(seed, sampling="uniform"):
        keys = [[(seed, group, side) for side in range(2)] for group in range(groups)]
        return map(torch.cat, zip(*(preference_noise(AnswerNoise(0, sampling), batch["labels"], key, draws)
                                    for key in keys)))  # fmt: skip

    t, uniform = drawn(1)
    once = t.view(groups, draws, 2)[:, :1].expand(-1, draws, -1).reshape(-1, 2)
    # The form of the supervised loss: every token by itself with probability t, and 1 / t.
    labels, ids = (batch[name].repeat(len(t), 1) for name in ("labels", "input_ids"))
    flat = add_noise(ids, labels, t.reshape(-1, 1), uniform.flatten(0, 1), 98)
    return {
        "shared": ratios(t, uniform), "independent": ratios(t, uniform, tuple(drawn(2))),
        "one time, n masks": ratios(once, uniform), "stratified": ratios(*drawn(1, "stratified")),
        "antithetic": ratios(*drawn(1, "antithetic")),
        "1 / t": ratios_of_each_token(policy, reference, batch, flat, groups, draws),
    }  # fmt: skip


def ratios_of_each_token(policy, reference, batch, noised, groups, draws):
    inputs = {"pixel_values": PIXELS, "image_index": batch["image_index"].repeat(len(noised.masked) // 2)}
    sums = []
    for model in (policy, reference):
        with torch.no_grad():
            logits = model(input_ids=noised.input_ids, logits_to_keep=noised.masked, **inputs).logits
        targets = batch["labels"].repeat(len(noised.masked) // 2, 1)[noised.masked]
        values = torch.zeros(noised.masked.shape)
        values[noised.masked] = -F.cross_entropy(logits, targets, reduction="none") / noised.probability[noised.masked]
        sums.append(values.sum(dim=1))
    return (sums[0] - sums[1]).view(groups, draws, 2).mean(dim=1).diff(dim=1).var().item()


@pytest.mark.slow
def test_what_lowers_the_variance():
    found = variances()
    assert found["shared"] < 0.5 * found["independent"] and found["shared"] < found["one time, n masks"]
    assert found["stratified"] < found["shared"] < found["1 / t"]


def test_padding_and_the_other_pairs_change_nothing():
    model, others = tiny_model(), [([5, 6, 7, 8, 9], [4]), ([40], [41, 42])]
    with torch.no_grad():
        alone = bounds(model, pair(), 4)
        padded = bounds(model, pair(padding=9), 4)
        among = bounds(model, pair(others=others), 4, keys=["a", "b", "w", "c", "d", "l"])[:, [2, 5]]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(among, alone, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_losses_token_by_token(name):
    """As their papers and TRL's trainer write them."""
    policy = torch.tensor([[-1.0, -9.0, -4.0, -6.0, -2.0, -7.0]])
    reference = torch.tensor([[-2.0, -6.0, -3.0, -8.0, -3.0, -5.0]])
    pairs = [(1.0, -1.0, 1.0, -1.0, (2, 3)), (-3.0, 2.0, -2.0, -9.0, (4, 5))]
    loss, _ = preference_loss(policy, reference, torch.tensor([2, 4, 3, 5]), 2, [name, name], [1.0, 0.5], 0.3)
    for row, (chosen, rejected, hidden, own, tokens) in enumerate(pairs):
        log_sigmoid, sigmoid = lambda x: -math.log1p(math.exp(-x)), lambda x: 1 / (1 + math.exp(-x))
        scaled = chosen / tokens[0] - rejected / tokens[1]
        expected = {
            "sigmoid": -log_sigmoid(0.3 * (chosen - rejected)), "hinge": max(0.0, 1 - 0.3 * (chosen - rejected)),
            "ipo": (scaled - 1 / 0.6) ** 2, "sigmoid_norm": -log_sigmoid(0.3 * scaled),
            "apo_zero": 1 - sigmoid(0.3 * chosen) + sigmoid(0.3 * rejected),
            "apo_down": sigmoid(0.3 * chosen) + 1 - sigmoid(0.3 * (chosen - rejected)),
            "sft": -own / tokens[0], "image_conditional": -log_sigmoid(0.3 * (chosen - hidden)),
            "anchor": -log_sigmoid(0.3 * chosen),
        }[name]  # fmt: skip
        assert loss[row].item() == pytest.approx(1.5 * expected, rel=1e-5)


def test_a_pair_without_tokens_counts_nothing():
    nothing = torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0, 0])
    loss, _ = preference_loss(*nothing, 1, ["sigmoid", "sft"], [1, 1], 1)
    assert loss.tolist() == [0.0]
