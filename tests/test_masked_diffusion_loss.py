"""Closed forms of the loss; the authors' numbers are in tests/parity, and tests/properties tries random cases."""

import copy

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from lladamedv.trainers.masked_diffusion_loss import (
    IGNORE_INDEX,
    LOSS_NORMALIZATIONS,
    LOSS_WEIGHTINGS,
    LossArguments,
    add_noise,
    complement,
    loss_weights,
    masked_diffusion_loss,
)
from tests.tiny import tiny_model


def answers(*lengths):
    """Ids, labels and answer ids of rows with a prompt of two tokens and an answer of each length."""
    labels = torch.full((len(lengths), max(lengths) + 2), IGNORE_INDEX)
    for row, length in enumerate(lengths):
        labels[row, 2 : 2 + length] = torch.arange(length) + 5
    return labels.clamp(min=3), labels, torch.arange(len(lengths))[:, None].expand_as(labels)


def draw(*lengths, t, seed=0):
    ids, labels, answer_ids = answers(*lengths)
    uniform = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))
    return labels, add_noise(ids, labels, torch.tensor(t)[:, None], uniform, 1), answer_ids


def test_only_labelled_tokens_are_masked_at_the_right_rate():
    ids = torch.arange(20_000).view(2, -1)
    labels = ids.clone()
    labels[:, ::2] = IGNORE_INDEX
    uniform = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    noised = add_noise(ids, labels, torch.tensor([[0.25], [0.75]]), uniform, 99_999)
    assert not noised.masked[:, ::2].any()
    assert torch.equal(noised.input_ids, torch.where(noised.masked, 99_999, ids))
    rates = noised.masked[:, 1::2].float().mean(dim=1)
    torch.testing.assert_close(rates, torch.tensor([0.2508, 0.7503]), atol=0.02, rtol=0)


@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
@pytest.mark.parametrize("normalization", LOSS_NORMALIZATIONS)
def test_weights(weighting, normalization):
    """Token by token, as their descriptions say."""
    lengths, t = [3, 5, 4], [0.05, 0.6, 0.9]
    labels, noised, answer_ids = draw(*lengths, t=t)
    args = LossArguments(weighting, 4.0 if weighting == "clipped" else 10.0, normalization)
    weights = loss_weights(labels, noised, answer_ids, args)
    for row, length in enumerate(lengths):
        p = (1 - 1e-3) * t[row] + 1e-3
        weight = {"inverse_probability": 1 / p, "clipped": min(1 / p, 4.0), "uniform": 1.0}[weighting]
        divisor = {"answer_length": length * 3, "tokens": sum(lengths), "batch": 3}[normalization]
        torch.testing.assert_close(weights[row], noised.masked[row] * (weight / divisor), rtol=1e-5, atol=0)
    part = loss_weights(labels, noised, answer_ids, args, num_answers=6, num_tokens=24)
    torch.testing.assert_close(part, weights / 2)


def test_a_row_of_several_answers_counts_as_several():
    ids, labels, _ = answers(4)
    labels[0, 4] = IGNORE_INDEX  # between two answers of two and one tokens
    noised = add_noise(ids, labels, torch.tensor([[0.7]]), torch.zeros(labels.shape), 1)
    weights = loss_weights(labels, noised, torch.tensor([[0, 0, 0, 0, 0, 1]]), LossArguments())
    torch.testing.assert_close(weights, torch.tensor([[0, 0, 1 / 2, 1 / 2, 0, 1]]) / (0.999 * 0.7 + 0.001) / 2)


@pytest.mark.parametrize("normalization", LOSS_NORMALIZATIONS)
def test_an_answer_without_labels_counts_as_zero(normalization):
    ids, labels, answer_ids = answers(2, 2)
    labels[0] = IGNORE_INDEX
    noised = add_noise(ids, labels, torch.ones(2, 1), torch.zeros(labels.shape), 1)
    weights = loss_weights(labels, noised, answer_ids, LossArguments(loss_normalization=normalization))
    assert weights[0].sum() == 0 and weights[1].sum() == {"answer_length": 0.5, "tokens": 1, "batch": 1}[normalization]


def test_weights_are_unbiased():
    """A loss of 1 per token has an expected value of 1 per answer, with and without complement: what 1 / p is for."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((20_000, 3), 7)
    t, uniform = torch.rand(20_000, 1, generator=generator), torch.rand(labels.shape, generator=generator)
    noised = add_noise(labels, labels, t, uniform, 1)
    answer_ids = torch.arange(20_000)[:, None].expand_as(labels)
    for each in (noised, complement(noised, labels, labels, 1)):
        args = LossArguments(loss_normalization="batch")
        sums = loss_weights(labels, each, answer_ids, args, num_answers=1).sum(dim=1) / 3
        assert sums.mean().item() == pytest.approx(1, abs=5 * (sums.std() / 20_000**0.5).item())


@pytest.mark.parametrize("t", [[0.9, 0.3], [1.0, 0.0], [0.0, 0.0]])
@pytest.mark.parametrize("fused", [True, False])
def test_the_output_layer_runs_at_masked_tokens_alone(t, fused):
    """Loss and gradients of whole logits; also for a row, and for a batch, of which nothing is masked."""
    model = tiny_model().train()
    ours = copy.deepcopy(model)
    add_fused_lm_head(ours, outputs=("log_probs", "is_top1"))
    ids, labels, answer_ids = answers(6, 3)
    draws = torch.tensor(t)[:, None].expand(labels.shape), torch.full(labels.shape, 0.5)
    batch = {"input_ids": ids, "labels": labels, "answer_ids": answer_ids}
    loss, found = masked_diffusion_loss(ours, batch, lambda *_: draws, LossArguments(), 98, fused=fused)
    loss.backward()
    noised = add_noise(ids, labels, *draws, 98)
    logits = model(input_ids=noised.input_ids).logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
    expected = (nll * loss_weights(labels, noised, answer_ids, LossArguments())).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(found, (logits.argmax(dim=-1) == labels)[noised.masked])
    for (name, weight), other in zip(model.named_parameters(), ours.parameters()):
        if weight.grad is not None:
            torch.testing.assert_close(other.grad, weight.grad, msg=name)
