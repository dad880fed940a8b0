"""What holds of the masked-diffusion loss, whatever the model, the answers and the noise: tried on random ones."""

import copy
import itertools
import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from trl.trainer.utils import add_fused_lm_head

from lladamedv.trainers.masked_diffusion_loss import (
    EPSILON,
    LOSS_NORMALIZATIONS,
    LOSS_WEIGHTINGS,
    TIME_SAMPLINGS,
    AnswerNoise,
    LossArguments,
    add_noise,
    complement,
    loss_weights,
    masked_diffusion_loss,
)
from tests.properties.cases import (
    MASK,
    ModelSpec,
    Padding,
    build_model,
    paddings,
    training_batch,
    training_cases,
    training_rows,
)
from tests.test_masked_diffusion_sft_trainer import make_trainer, rows


seeds = st.integers(0, 2**32 - 1)
variants = st.builds(
    lambda weighting, normalization: LossArguments(weighting, 4.0 if weighting == "clipped" else 10.0, normalization),
    st.sampled_from(LOSS_WEIGHTINGS), st.sampled_from(LOSS_NORMALIZATIONS),
)  # fmt: skip
samplings = st.sampled_from(TIME_SAMPLINGS)


# An unbiased estimate of a bound


class TableModel:
    """Every conditional distribution over a vocabulary of a few ids, the last of which is the mask, in a table.

    Args:
        size: of the vocabulary, without the mask.
        length: of the sequences.
        seed: of the logits.
    """

    def __init__(self, size: int, length: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.size, self.length, self.mask = size, length, size
        self.logits = 2 * torch.randn((size + 1) ** length, length, size, generator=generator)
        self.place_values = (size + 1) ** torch.arange(length)
        self.surprise = -self.logits.double().log_softmax(dim=-1)

    def __call__(self, input_ids, logits_to_keep, **kwargs):
        return SimpleNamespace(logits=self.logits[(input_ids * self.place_values).sum(dim=1)][logits_to_keep])

    def negative_log_likelihood(self, sequence, masked, place):
        """Of the token at `place`, the tokens at `masked` being hidden."""
        seen = [self.mask if hidden in masked else token for hidden, token in enumerate(sequence)]
        return float(self.surprise[int((torch.tensor(seen) * self.place_values).sum()), place, sequence[place]])

    def hidden(self, sequence):
        """For each set of masked places the sum of what the masked tokens cost."""
        sets = itertools.chain(*(itertools.combinations(range(self.length), k) for k in range(1, self.length + 1)))
        return {own: sum(self.negative_log_likelihood(sequence, own, place) for place in own) for own in sets}

    def bound(self, sequence):
        """The mean over all orders of the negative log-likelihood of revealing the tokens in that order."""
        orders = list(itertools.permutations(range(self.length)))
        return sum(
            self.negative_log_likelihood(sequence, order[step:], order[step])
            for order in orders
            for step in range(self.length)
        ) / len(orders)


tables = st.builds(TableModel, st.integers(2, 3), st.integers(1, 3), st.integers(0, 10**6))


BOUND = LossArguments(loss_normalization="batch")


def answer_of_each_row(ids):
    return torch.arange(len(ids))[:, None].expand_as(ids)


def expected_loss(model, sequence, complementary):
    """Every pattern of masks at enough times for an exact integral over the masking probability, from 1e-3 to 1."""
    nodes, shares = np.polynomial.legendre.leggauss(model.length)
    patterns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=model.length)))  # uniform draws; 0 is masked
    total = 0.0
    for node, share in zip(nodes, shares):
        ids = torch.tensor(sequence).expand(len(patterns), -1)
        noised = add_noise(ids, ids, torch.full(ids.shape, (node + 1) / 2), patterns, model.mask)
        chance = torch.where(noised.masked, noised.probability, 1 - noised.probability).prod(dim=1, keepdim=True)
        if complementary:
            noised = complement(noised, ids, ids, model.mask)
        weights = chance * loss_weights(ids, noised, answer_of_each_row(ids), BOUND, num_answers=1)
        surprise = torch.nn.functional.cross_entropy(
            model(noised.input_ids, noised.masked).logits, ids[noised.masked], reduction="none"
        )
        total += share / 2 * float((weights[noised.masked] * surprise).sum())
    return total


@given(model=tables, complementary=st.booleans())
def test_the_expected_loss_is_a_bound_on_the_likelihood(model, complementary):
    """It is the mean over all orders of revealing tokens (arXiv 2502.09992, appendix A), but for masking probabilities
    below 1e-3, for every sequence of the vocabulary; and the probabilities that it bounds do not exceed 1 in sum."""
    mass = 0.0
    for sequence in itertools.product(range(model.size), repeat=model.length):
        expected, bound = expected_loss(model, sequence, complementary), model.bound(sequence)
        assert expected == pytest.approx(bound, abs=3 * EPSILON * sum(model.hidden(sequence).values()))
        mass += math.exp(-bound)
    assert mass <= 1 + 1e-9


@given(model=tables, sequence_seed=seeds, seed=seeds, stratified=st.booleans(), complementary=st.booleans())
def test_random_noise_estimates_the_bound_without_bias(model, sequence_seed, seed, stratified, complementary):
    """Within Bernstein's bound of 262,144 draws for an error once in 1e9 cases: weights reach 1,000, but rarely."""
    draws, generator = 2**18, torch.Generator().manual_seed(seed)
    sequence = torch.randint(model.size, (model.length,), generator=torch.Generator().manual_seed(sequence_seed))
    ids = sequence.expand(draws, -1)
    t = torch.rand(draws, 1, generator=generator)
    if stratified:
        t = (torch.arange(draws)[:, None] + t) / draws
    uniform = torch.rand(ids.shape, generator=generator)
    batch = {"input_ids": ids, "labels": ids, "answer_ids": answer_of_each_row(ids)}
    args = LossArguments(loss_normalization="batch", complementary_masking=complementary)
    estimate = float(masked_diffusion_loss(model, batch, lambda *_: (t, uniform), args, model.mask).loss)
    costs = model.hidden(sequence.tolist())
    variance = sum(cost**2 * second_moment(len(own), model.length) for own, cost in costs.items())
    width, largest = math.log(2e9) / draws, max(costs.values()) / EPSILON
    tolerance = largest * width / 3 + math.sqrt((largest * width / 3) ** 2 + 2 * variance * width)
    bias = 3 * EPSILON * sum(costs.values())
    assert estimate == pytest.approx(model.bound(sequence.tolist()), abs=tolerance + bias)


def second_moment(masked, length):
    """At most this is the mean over p, from 1e-3 to 1, of the chance that `masked` given places are masked / p²."""
    if masked == 1:
        return -math.log(EPSILON) / (1 - EPSILON)
    whole = math.gamma(masked - 1) * math.gamma(length - masked + 1) / math.gamma(length)
    return whole / (1 - EPSILON)


# Loss and gradients


def gradients(model, loss):
    """Of all weights, one after the other."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return torch.cat([each.flatten().double() for each in found])


def assert_equal(ours, theirs):
    """Losses and gradients, whose cross-entropies are float32."""
    for left, right in zip(ours, theirs, strict=True):
        scale = max(1e-3, float(right.abs().max()))
        torch.testing.assert_close(left.double(), right.double(), rtol=0, atol=2e-5 * scale)


def draw_noise(seed, sampling, labels, answer_ids):
    return AnswerNoise(seed, sampling)(labels, answer_ids, 0, 0, len(labels))


def our_loss(model, inputs, labels, answer_ids, noise, args, fused=False):
    batch = {**inputs, "labels": labels, "answer_ids": answer_ids}
    loss, _ = masked_diffusion_loss(model, batch, lambda *_: noise, args, MASK, fused=fused)
    return loss.detach(), gradients(model, loss)


def plain_noise(labels, t, uniform):
    probability = 0.999 * t + 0.001
    return (labels != -100) & (uniform < probability), probability


def plain_loss(model, inputs, labels, answer_ids, masked, probability, args):
    """Written down token by token, on logits at all places."""
    noised = torch.where(masked, MASK, inputs["input_ids"])
    surprise = -model(**inputs | {"input_ids": noised}).logits.log_softmax(dim=-1)
    answers, lengths = int(answer_ids.max()) + 1, {}
    for row, place in (labels != -100).nonzero().tolist():
        number = int(answer_ids[row, place])
        lengths[number] = lengths.get(number, 0) + 1
    loss = 0 * surprise.sum()
    for row, place in masked.nonzero().tolist():
        assume(surprise[row, place, labels[row, place]] > 0.01)  # less is a small difference of large numbers
        p = float(probability[row, place])
        weight = {"inverse_probability": 1 / p, "clipped": min(1 / p, 4.0), "uniform": 1.0}[args.loss_weighting]
        own = lengths[int(answer_ids[row, place])]
        divisors = {"answer_length": own * answers, "tokens": sum(lengths.values()), "batch": answers}
        divisor = divisors[args.loss_normalization]
        loss = loss + surprise[row, place, labels[row, place]] * weight / divisor
    return loss.detach(), gradients(model, loss)


@cache
def with_fused_head(spec):
    model = copy.deepcopy(build_model(spec))
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    return model


@given(case=training_cases(), seed=seeds, sampling=samplings, args=variants, fused=st.booleans())
def test_loss_and_gradients_are_those_of_the_plain_loss(case, seed, sampling, args, fused):
    spec, batch = case
    model = build_model(spec)
    inputs, labels, answer_ids = training_batch(model, batch)
    noise = draw_noise(seed, sampling, labels, answer_ids)
    hidden = plain_noise(labels, *noise)
    expected = plain_loss(model, inputs, labels, answer_ids, *hidden, args)
    ours = with_fused_head(spec) if fused else model
    assert_equal(our_loss(ours, inputs, labels, answer_ids, noise, args, fused), expected)


@given(case=training_cases(), padding=paddings, seed=seeds, sampling=samplings, args=variants)
def test_padding_does_not_matter(case, padding, seed, sampling, args):
    """Neither for the noise that answers get, nor for loss and gradients."""
    spec, batch = case
    model = build_model(spec)
    results, draws = [], []
    for each in (Padding("right"), padding):
        inputs, labels, answer_ids = training_batch(model, batch, each)
        noise = draw_noise(seed, sampling, labels, answer_ids)
        fixed = AnswerNoise(seed).fixed(labels, answer_ids, 2, 8)
        draws.append([values[labels != -100] for values in (*noise, *fixed)])
        results.append(our_loss(model, inputs, labels, answer_ids, noise, args))
    for left, right in zip(*draws):
        assert torch.equal(left, right)
    assert_equal(*results)


@given(case=training_cases(), data=st.data(), seed=seeds, args=variants)
def test_the_order_of_the_rows_does_not_matter(case, data, seed, args):
    """Each keeping its noise."""
    spec, batch = case
    model = build_model(spec)
    inputs, labels, answer_ids = training_batch(model, batch)
    t, uniform = draw_noise(seed, "uniform", labels, answer_ids)
    before = our_loss(model, inputs, labels, answer_ids, (t, uniform), args)
    order = data.draw(st.permutations(range(len(batch))))
    inputs, labels, answer_ids = training_batch(model, [batch[row] for row in order])
    after = our_loss(model, inputs, labels, answer_ids, (t[order], uniform[order]), args)
    assert_equal(after, before)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer of a model of ours; its data set is not looked at."""
    model = copy.deepcopy(build_model(TRAINED))
    return make_trainer(
        tmp_path_factory.mktemp("run"), model=model, dataset=rows(2, images=False), trainable="all", bf16=False
    )


TRAINED = ModelSpec("anyres_max_2", 3)


@given(batch=st.lists(training_rows(TRAINED.kind), min_size=2, max_size=6), data=st.data(), seed=seeds,
       sampling=samplings, args=variants, complementary=st.booleans(), padding=paddings)  # fmt: skip
def test_accumulated_parts_are_the_whole_batch(trainer, batch, data, seed, sampling, args, complementary, padding):
    """The trainer's losses and gradients of the parts of a batch sum up to those of the batch, however it is split; and
    they are the plain ones, with complementary masks the mean of two."""
    trainer.noise = AnswerNoise(seed, sampling)
    for name, value in (vars(args) | {"complementary_masking": complementary}).items():
        setattr(trainer.args, name, value)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(batch) - 1))))
    results = []
    for edges in ([0, len(batch)], [0, *cuts, len(batch)]):
        parts = []
        for start, end in itertools.pairwise(edges):
            inputs, labels, answer_ids = training_batch(trainer.model, batch[start:end], padding)
            parts.append({**inputs, "labels": labels, "answer_ids": answer_ids})
        parts, _ = trainer.get_batch_samples(iter(parts), len(parts), torch.device("cpu"))
        losses = [trainer.compute_loss(trainer.model, part) for part in parts]
        gradient = sum(gradients(trainer.model, loss) for loss in losses)
        results.append((sum(loss.detach() for loss in losses), gradient))
    assert_equal(*results)
    inputs, labels, answer_ids = training_batch(trainer.model, batch, padding)
    masked, probability = plain_noise(labels, *draw_noise(seed, sampling, labels, answer_ids))
    noises = [(masked, probability)]
    if complementary:
        noises.append(((labels != -100) & ~masked, (1 - probability).clamp(min=0.001)))
    plain = [plain_loss(trainer.model, inputs, labels, answer_ids, *each, args) for each in noises]
    assert_equal(results[0], [sum(values) / len(plain) for values in zip(*plain)])


# Noise


@given(case=training_cases(), seed=seeds, sampling=samplings, args=variants)
def test_complementary_masks_cover_every_answer_token_once(case, seed, sampling, args):
    """And what they count is what it says: with plain masks every labelled token counts once in the two together."""
    spec, batch = case
    inputs, labels, answer_ids = training_batch(build_model(spec), batch)
    t, uniform = draw_noise(seed, sampling, labels, answer_ids)
    noised = add_noise(inputs["input_ids"], labels, t, uniform, MASK)
    both = [noised, complement(noised, inputs["input_ids"], labels, MASK)]
    assert torch.equal(sum(each.masked.long() for each in both), (labels != -100).long())
    total = 0
    for each in both:
        assert torch.equal(each.input_ids, torch.where(each.masked, MASK, inputs["input_ids"]))
        total = total + loss_weights(labels, each, answer_ids, LossArguments("uniform", loss_normalization="batch"))
        weights = loss_weights(labels, each, answer_ids, args)
        assert torch.equal(weights > 0, each.masked)
    assert torch.equal(total > 0, labels != -100)
    torch.testing.assert_close(total.sum(), (labels != -100).sum() / (answer_ids.max() + 1))


@given(seed=seeds, num_rows=st.integers(64, 128), answers=st.integers(1, 2), sampling=samplings)
def test_times_and_draws_are_uniform(seed, num_rows, answers, sampling):
    """By Kolmogorov's distance, which exceeds the bound once in 1e8 cases; strata and pairs are as documented."""
    answer_ids = torch.arange(num_rows * answers).view(num_rows, answers).repeat_interleave(3, dim=1)
    t, uniform = AnswerNoise(seed, sampling)(torch.zeros_like(answer_ids), answer_ids, 5, 0, num_rows)
    times = t[:, ::3]
    assert torch.equal(t, times.repeat_interleave(3, dim=1)), "an answer has one time"
    for values, repeats in ((times, 2 if sampling == "antithetic" else 1), (uniform, 1)):
        ordered = values.flatten().sort().values
        assert 0 <= ordered[0] and ordered[-1] <= 1
        distance = (ordered - (torch.arange(len(ordered)) + 0.5) / len(ordered)).abs().max()
        assert distance * (len(ordered) / repeats) ** 0.5 < 3.1
    if sampling == "stratified":
        strata = (times * num_rows).floor().long()
        assert sorted(strata[:, 0].tolist()) == list(range(num_rows))
        assert torch.equal(strata, strata[:, :1].expand_as(strata)), "a row's answers share its part"
    if sampling == "antithetic":
        torch.testing.assert_close(times[0::2][: num_rows // 2] + times[1::2], torch.ones(num_rows // 2, answers))
