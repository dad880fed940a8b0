"""Closed forms; the authors' numbers are in tests/parity."""

import copy

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from lladamedv.trainers.masked_diffusion_loss import (
    IGNORE_INDEX,
    add_noise,
    complement,
    loss_weights,
    masked_diffusion_loss,
    run_masked_loss,
    sample_timesteps,
)
from tests.tiny import small_vocabulary_config, tiny_model


def test_uniform_logits_give_log_vocabulary():
    """With constant logits every cross-entropy is log V, so the loss is log V times masked / (p n), row by row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (3, 40), generator=generator)
    labels = ids.clone()
    labels[:, :10] = -100
    t = torch.tensor([0.2, 0.5, 0.9])
    noised = add_noise(ids, labels, t, mask_token_id=50, generator=generator)
    loss = masked_diffusion_loss(torch.zeros(int(noised.masked.sum()), 51), labels, noised)
    p = 0.999 * t + 0.001
    expected = (noised.masked.sum(1) / p / 30).mean() * torch.log(torch.tensor(51.0))
    torch.testing.assert_close(loss, expected)


def test_only_labelled_tokens_are_masked_at_the_right_rate():
    ids = torch.arange(20_000).view(2, -1)
    labels = ids.clone()
    labels[:, ::2] = -100
    noised = add_noise(ids, labels, torch.tensor([0.25, 0.75]), 99_999, generator=torch.Generator().manual_seed(0))
    assert not noised.masked[:, ::2].any()
    assert (noised.input_ids == 99_999).equal(noised.masked) and noised.input_ids[~noised.masked].equal(
        ids[~noised.masked]
    )
    torch.testing.assert_close(
        noised.masked[:, 1::2].float().mean(1), torch.tensor([0.2508, 0.7503]), atol=0.02, rtol=0
    )


def test_stratified_times_fill_every_stratum():
    t = sample_timesteps(16, torch.Generator().manual_seed(0), stratified=True)
    assert sorted((t * 16).floor().long().tolist()) == list(range(16))
    assert t.tolist() != sorted(t.tolist())


def test_a_row_without_labels_counts_as_zero():
    ids = torch.tensor([[1, 2], [3, 4]])
    labels = torch.tensor([[-100, -100], [3, 4]])
    noised = add_noise(ids, labels, torch.ones(2), 9, uniform=torch.zeros(2, 2))
    logits = torch.randn(2, 10)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 4])) / 2
    torch.testing.assert_close(masked_diffusion_loss(logits, labels, noised), expected)


# Variants of the loss


def draw(lengths, t, seed=0):
    labels = torch.full((len(lengths), max(lengths) + 2), IGNORE_INDEX)
    for row, length in enumerate(lengths):
        labels[row, 2 : 2 + length] = torch.arange(length) + 5
    ids = labels.clamp(min=3)
    return ids, labels, add_noise(ids, labels, torch.tensor(t), 1, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighting", ["inverse_probability", "clipped", "uniform"])
@pytest.mark.parametrize("normalization", ["answer_length", "tokens", "batch"])
def test_weights(weighting, normalization):
    """Token by token, as their descriptions say."""
    lengths, t = [3, 5, 4], [0.05, 0.6, 0.9]
    _, labels, noised = draw(lengths, t)
    weights = loss_weights(labels, noised, weighting=weighting, max_weight=4.0, normalization=normalization)
    for row, length in enumerate(lengths):
        p = (1 - 1e-3) * t[row] + 1e-3
        weight = {"inverse_probability": 1 / p, "clipped": min(1 / p, 4.0), "uniform": 1.0}[weighting]
        divisor = {"answer_length": length * 3, "tokens": sum(lengths), "batch": 3}[normalization]
        for place in range(labels.shape[1]):
            expected = weight / divisor if noised.masked[row, place] else 0.0
            assert weights[row, place].item() == pytest.approx(expected, rel=1e-5)
    part = loss_weights(labels, noised, weighting=weighting, max_weight=4.0, normalization=normalization,
                        num_answers=6, num_tokens=24)  # fmt: skip
    torch.testing.assert_close(part, weights / 2)


def test_a_row_of_several_answers_counts_as_several():
    ids, labels, noised = draw([4], [0.7])
    labels[0, 4] = IGNORE_INDEX  # between two answers of two and one tokens
    noised = add_noise(ids, labels, torch.tensor([0.7]), 1, uniform=torch.zeros_like(labels, dtype=torch.float))
    answers = torch.tensor([[0, 0, 0, 0, 0, 1]])
    weights = loss_weights(labels, noised, answers)
    p = (1 - 1e-3) * 0.7 + 1e-3
    expected = torch.tensor([[0, 0, 1 / 2, 1 / 2, 0, 1]]) / p / 2
    torch.testing.assert_close(weights, expected)


def test_weights_are_unbiased():
    """A loss of 1 per token has an expected value of 1 per answer, with and without complement: what 1 / p is for."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((20_000, 3), 7)
    noised = add_noise(labels, labels, torch.rand(20_000, generator=generator), 1, generator)
    for each in (noised, complement(noised, labels, labels, 1)):
        sums = loss_weights(labels, each, normalization="batch").sum(dim=1) * 20_000 / 3
        error = sums.std() / 20_000**0.5
        assert sums.mean().item() == pytest.approx(1, abs=5 * error.item())


def test_complements_cover_every_answer_token_once():
    ids, labels, noised = draw([3, 5, 4], [0.2, 0.5, 0.8])
    other = complement(noised, ids, labels, 1)
    assert torch.equal(noised.masked ^ other.masked, labels != IGNORE_INDEX)
    assert not (noised.masked & other.masked).any()
    assert torch.equal(other.input_ids == 1, other.masked)
    torch.testing.assert_close(other.probability, 1 - noised.probability)


@pytest.mark.parametrize("t", [[0.9, 0.3], [1.0, 0.0], [0.0, 0.0]])
@pytest.mark.parametrize("fused", [True, False])
def test_the_output_layer_runs_at_masked_tokens_alone(t, fused):
    """Loss and gradients of whole logits; also for a row, and for a batch, of which nothing is masked."""
    model = tiny_model(config=small_vocabulary_config()).train()
    ours = copy.deepcopy(model)
    add_fused_lm_head(ours, outputs=("log_probs", "is_top1"))
    ids, labels, _ = draw([6, 3], t)
    noised = add_noise(ids, labels, torch.tensor(t), 98, uniform=torch.full(labels.shape, 0.5))
    weights = loss_weights(labels, noised)
    loss, found = run_masked_loss(ours, {}, labels, noised, weights, fused)
    loss.backward()
    logits = model(input_ids=noised.input_ids).logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
    expected = (nll * weights).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(found, (logits.argmax(dim=-1) == labels)[noised.masked])
    for (name, weight), other in zip(model.named_parameters(), ours.parameters()):
        if weight.grad is not None:
            torch.testing.assert_close(other.grad, weight.grad, msg=name)
