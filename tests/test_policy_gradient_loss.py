"""The estimates of likelihood and the losses of rewards, against plain versions of their descriptions, and their mean
gradients on two tokens and five words against all answers and masks enumerated."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lladamedv.trainers.masked_diffusion_loss import IGNORE_INDEX, AnswerNoise, answer_log_probs
from lladamedv.trainers.policy_gradient_loss import (
    POLICY_LOSSES,
    group_advantages,
    masked_prompt,
    policy_estimate,
    policy_gradient_loss,
    policy_masks,
)
from lladamedv.trainers.rollouts import Group, batch_of_answers
from tests.test_preference_loss import near, pair
from tests.tiny import tiny_model


MASK = 98
ANSWERS = ([11, 12, 13], [21, 22])
ADVANTAGES = torch.tensor([0.75, -0.5])


# Plain versions


def plain_log_prob(model, batch, row, hidden, place):
    """log p of the token at a place of a row, with the places in `hidden` masked; one row, one pass."""
    ids = batch["input_ids"][row].clone()
    ids[list(hidden)] = MASK
    real = batch["attention_mask"][row] == 1
    logits = model(input_ids=ids[real][None], pixel_values=batch["pixel_values"]).logits[0]
    return logits[place].log_softmax(-1)[batch["labels"][row, place]]


def plain_estimate(name, model, batch, row, draws, advantage):
    """What the papers describe, of one answer: of `draws`, sets of masked places."""
    places = (batch["labels"][row] != IGNORE_INDEX).nonzero()[:, 0].tolist()
    length, say = len(places), lambda hidden, place: plain_log_prob(model, batch, row, hidden, place)
    if name == "diffu_grpo":  # d1, section 3: one step, all masked
        return {place: say(places, place) for place in places}
    if name == "espo":  # appendix: l of L masked weigh (L + 1) / l, the complement (L + 1) / (L - l), half each
        total = 0.0
        for hidden in draws:
            others = [place for place in places if place not in hidden]
            for each in (hidden, others):
                total += sum(say(each, place) for place in each) * (length + 1) / max(1, len(each)) / 2
        return total / len(draws) / length
    lower = sum(sum(say(hidden, place) for place in hidden) / len(hidden) for hidden in draws) / len(draws)
    if advantage > 0:
        return lower
    upper, seen = 0.0, 0
    for place in places:  # tokens that no draw masks are left out
        powers = [say(hidden, place).exp() ** 1.5 / (len(hidden) / length) for hidden in draws if place in hidden]
        if powers:
            upper, seen = upper + (sum(powers) / len(draws)).log() / 1.5, seen + 1
    return 0.5 * upper / seen + 0.5 * lower


def plain_loss(name, estimates, old, reference, lengths, beta=0.1, low=0.2, high=0.3):
    """PPO's clipped loss with the penalty of each paper, answer by answer."""
    losses = []
    for new, before, ref, length, advantage in zip(estimates, old, reference, lengths, ADVANTAGES.tolist()):
        if name == "spg":
            losses.append(-advantage * new * length)
            continue
        token = isinstance(new, dict)
        pairs = [(new[each], before[each], ref[each]) for each in new] if token else [(new, before, ref)]
        total = 0.0
        for now, then, at in pairs:
            ratio = (now - then).exp()
            total -= torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            away = at - now
            total += beta * ((away.exp() - away - 1) if token else (length * away) ** 2 / (2 * length))
        losses.append(total)
    return torch.stack(losses)


def estimate_of(name, model, batch, keys="ab", draws=2, sampling="uniform"):
    masked = policy_masks(name, AnswerNoise(0, sampling), batch["labels"], keys, draws)
    log_probs = answer_log_probs(model, batch, masked, MASK)
    return policy_estimate(name, log_probs, masked, batch["labels"] != IGNORE_INDEX, ADVANTAGES), masked


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_plain_versions(name):
    """Estimates, losses and gradients of answers of three and two tokens; old and reference are models of their own."""
    batch, learned = pair(*ANSWERS), pair(*ANSWERS)["labels"] != IGNORE_INDEX
    models = near(None), near(None, 0.05), tiny_model()
    found = [estimate_of(name, model, batch)[0] for model in models]
    found[1:] = (each.detach() for each in found[1:])
    masked = estimate_of(name, models[0], batch)[1]
    if name == "espo":
        masked = masked[:2]  # the others are complements
    plain = [
        [plain_estimate(name, model, batch, row, [own.nonzero()[:, 0].tolist() for own in masked[:, row]], advantage)
         for row, advantage in enumerate(ADVANTAGES)]
        for model in models
    ]  # fmt: skip
    old, reference = ([{k: v.detach() for k, v in e.items()} if isinstance(e, dict) else e.detach() for e in each]
                      for each in plain[1:])  # fmt: skip
    found = found if name != "spg" else [found[0], None, None]
    loss = policy_gradient_loss(name, *found, learned, ADVANTAGES, 0.1, 0.2, 0.3).loss
    expected = plain_loss(name, plain[0], old, reference, learned.sum(dim=1).tolist())
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    weights = [weight for label, weight in models[0].named_parameters() if "layers.0.self_attn" in label]
    own, other = (torch.autograd.grad(each.sum(), weights, allow_unused=True, materialize_grads=True)
                  for each in (loss, expected))  # fmt: skip
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)
    assert any(bool(each.abs().max() > 1e-4) for each in own)


# Expected gradients


class Table(nn.Module):
    """A model of two tokens of five words behind a prompt of one: logits for each place, by what all three show."""

    words, prompt, mask = 5, 2, 5

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.logits = nn.Parameter(torch.randn(6, 6, 6, 2, 5, generator=generator, dtype=torch.float64))

    def log_probs(self, prompt, first, second):
        return self.logits[prompt, first, second].log_softmax(-1)

    def forward(self, input_ids, logits_to_keep, use_cache):
        logits = self.logits[tuple(input_ids.T)]  # (rows, 2, words)
        return SimpleNamespace(logits=logits[logits_to_keep[:, 1:]])


REWARDS = torch.rand(5, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
P_MASK = 0.3


def enumerated_estimate(name, model, answer, positive):
    """The expectation over all masks of the estimate, a token, of an answer; of spg with two draws."""
    a, b, prompt, mask = *answer, model.prompt, model.mask

    def under(hidden, shown=prompt):  # log p of the two tokens
        logs = model.log_probs(shown, *(mask if place in hidden else token for place, token in enumerate(answer)))
        return logs[0, a], logs[1, b]

    if name == "diffu_grpo":
        return sum(chance * sum(under((0, 1), shown)) / 2 for chance, shown in ((P_MASK, mask), (1 - P_MASK, prompt)))
    if name == "espo":  # equation 6 of LLaDA: l uniform on 1 to 2, each of l masked weighs 2 / l
        return (sum(under((0, 1))) / 2 + (under((0,))[0] + under((1,))[1]) / 2) / 2
    draws, total = {(0,): 0.25, (1,): 0.25, (0, 1): 0.5}, 0.0
    for own in itertools.product(draws, repeat=2):
        lower = sum(sum(under(hidden)[place] for place in hidden) / len(hidden) for hidden in own) / 2
        upper, seen = 0.0, 0
        for place in (0, 1):
            powers = [under(hidden)[place].exp() ** 1.5 * 2 / len(hidden) for hidden in own if place in hidden]
            if powers:
                upper, seen = upper + (sum(powers) / 2).log() / 1.5, seen + 1
        estimate = lower if positive else 0.5 * upper / seen + 0.5 * lower
        total = total + draws[own[0]] * draws[own[1]] * estimate
    return total


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_expected_gradient(name):
    """Groups of two answers, drawn evenly: the mean of the gradients is that of the enumerated objective, within 5
    standard errors. That of diffu-GRPO is the enumerated one of its own surrogate, a single pass, which is not the
    gradient of the bound."""
    model, groups, parts = Table(), 1500, 30
    answers = torch.randint(5, (groups, 2, 2), generator=torch.Generator().manual_seed(1))
    rewards = REWARDS[answers[..., 0], answers[..., 1]]
    advantages = group_advantages(rewards, "none", rewards.flatten()).flatten()
    ids = torch.cat([torch.full((2 * groups, 1), model.prompt), answers.flatten(0, 1)], dim=1)
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    learned, keys, noise = labels != IGNORE_INDEX, range(2 * groups), AnswerNoise(0)
    masked = policy_masks(name, noise, labels, keys, 2)
    shown = ids
    if name == "diffu_grpo":
        shown = ids.masked_fill(masked_prompt(noise, ids.masked_fill(learned, IGNORE_INDEX), keys, P_MASK), model.mask)
    log_probs = answer_log_probs(model, {"input_ids": shown, "labels": labels}, masked, model.mask)
    policy = policy_estimate(name, log_probs, masked, learned, advantages)
    losses = policy_gradient_loss(name, policy, None, None, learned, advantages).loss
    per = 1 if name == "espo" else 2  # the others are divided by the number of tokens
    found = torch.stack([torch.autograd.grad(each.mean() / per, model.logits, retain_graph=True)[0].flatten()
                         for each in losses.view(parts, -1)])  # fmt: skip

    def enumerated(name):
        total = 0.0
        for one, other in itertools.product(itertools.product(range(5), repeat=2), repeat=2):
            advantage = float(REWARDS[one] - REWARDS[other]) / 2
            total = total - advantage * estimates[name, one, advantage > 0] / 625
        return torch.autograd.grad(total, model.logits, retain_graph=True)[0].flatten()

    estimates = {(each, answer, positive): enumerated_estimate(each, model, answer, positive)
                 for each in {name, "espo"} for answer in itertools.product(range(5), repeat=2)
                 for positive in (True, False)}  # fmt: skip
    error, expected = found.std(dim=0) / parts**0.5, enumerated(name)
    assert ((found.mean(dim=0) - expected).abs() <= 5 * error + 1e-12).all()
    assert torch.corrcoef(torch.stack([found.mean(dim=0), expected]))[0, 1] > 0.9
    if name == "diffu_grpo":  # along the difference, which the test would otherwise miss
        away = expected - enumerated("espo")
        found, biased = found @ away, enumerated("espo") @ away
        assert (found.mean() - biased) > 5 * found.std() / parts**0.5


# Ratios, padding, groups


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_padding_and_composition_change_nothing(name):
    """An answer's estimate with other answers beside it, and with padding behind it."""
    model = tiny_model()
    alone, _ = estimate_of(name, model, pair(*ANSWERS))
    batch = pair(*ANSWERS, padding=3, others=[([31, 32, 33, 34, 35], [41])])
    masked = policy_masks(name, AnswerNoise(0), batch["labels"], "xayb", 2)
    log_probs = answer_log_probs(model, batch, masked, MASK)
    advantages = torch.tensor([1.0, ADVANTAGES[0], 1.0, ADVANTAGES[1]])
    beside = policy_estimate(name, log_probs, masked, batch["labels"] != IGNORE_INDEX, advantages)[1::2]
    torch.testing.assert_close(beside[:, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)
    assert not beside[:, alone.shape[1] :].any()


@pytest.mark.parametrize("name", ["diffu_grpo", "espo"])
def test_the_policy_that_sampled_has_ratio_1(name):
    """Exactly: the loss is minus the advantage, and its gradient that of the estimate, whatever the clipping."""
    policy = torch.randn(2, 3 if name == "diffu_grpo" else 1, requires_grad=True)
    learned = torch.tensor([[True, True, True], [True, True, False]])
    found = policy_gradient_loss(name, policy, None, None, learned, ADVANTAGES, epsilon=1e-6)
    count = learned.sum(dim=1) if name == "diffu_grpo" else torch.ones(2)
    assert found.loss.tolist() == (-ADVANTAGES * count).tolist() and not found.clipped.any() and not found.kl.any()
    (slope,) = torch.autograd.grad(found.loss.sum(), policy)
    assert slope.tolist() == (-ADVANTAGES[:, None] * (learned if name == "diffu_grpo" else 1)).tolist()


def test_advantages():
    """As TRL computes them: without scaling, by group, by batch; NaN is no reward and gets 0."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, torch.nan], [0.1, 0.1, 0.1, 0.1], [torch.nan] * 4])
    everyone = rewards.flatten()
    plain = group_advantages(rewards, "none", everyone)
    third = 1 / 3
    torch.testing.assert_close(plain[0], torch.tensor([2 * third, -third, -third, 0.0]))
    assert not plain[1:].any()
    by_group = group_advantages(rewards, "group", everyone)
    torch.testing.assert_close(by_group[0], plain[0] / (rewards[0, :3].std() + 1e-4))
    by_batch = group_advantages(rewards, "batch", everyone)
    torch.testing.assert_close(by_batch[0], plain[0] / (everyone[~everyone.isnan()].std() + 1e-4))
    assert not by_group[1:].any() and not by_batch[1:].any()


def test_equal_answers_are_one_row():
    """Rows of what is learned from alone, and their pictures alone; one row where nothing is."""
    canvas = torch.tensor([[11, 91, MASK], [12, 91, MASK], [11, 91, MASK], [13, 13, 13]])
    group = [Group(torch.tensor([5, 6, number]), torch.tensor([number]), canvas, canvas != MASK, [], [])
             for number in range(3)]  # fmt: skip
    advantages = torch.tensor([[0.0] * 4, [0.5, -0.5, 0.25, -0.25], [0.0] * 4])
    prompts = {"row_ids": ["a", "b", "c"], "pixel_values": torch.arange(3.0)[:, None], "image_sizes": torch.ones(3, 2)}
    found = batch_of_answers(prompts, group, advantages, False, 0)
    assert found["input_ids"].tolist() == [[5, 6, 1, 11, 91, MASK], [5, 6, 1, 12, 91, MASK], [5, 6, 1, 13, 13, 13]]
    assert found["labels"].tolist() == [[-100] * 3 + row for row in ([11, 91, -100], [12, 91, -100], [13, 13, 13])]
    assert found["row_of"].tolist() == [0, 1, 0, 2] and found["advantages"].tolist() == [0.5, -0.5, 0.25, -0.25]
    assert found["places"] == [4, 5, 7] and found["row_ids"] == ["b"] * 3 and found["image_index"].tolist() == [0] * 3
    assert found["pixel_values"].tolist() == [[1.0]] and found["batch_num_images"].tolist() == [1] * 3
    assert len(batch_of_answers(prompts, group, advantages, True, 0)["row_of"]) == 12
    nothing = batch_of_answers(prompts, group, 0 * advantages, False, 0)
    assert nothing["advantages"].tolist() == [0.0] and len(nothing["input_ids"]) == 1
