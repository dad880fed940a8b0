"""Closed forms of the loss. The authors' numbers are in tests/parity; tests/properties compares losses and gradients of
random cases with a loss that is written down token by token."""

import pytest
import torch

from lladamedv.trainers.masked_diffusion_loss import (
    IGNORE_INDEX,
    LOSS_NORMALIZATIONS,
    LOSS_WEIGHTINGS,
    LossArguments,
    add_noise,
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


@pytest.mark.parametrize("normalization", LOSS_NORMALIZATIONS)
def test_an_answer_without_labels_counts_as_zero(normalization):
    ids, labels, answer_ids = answers(2, 2)
    labels[0] = IGNORE_INDEX
    noised = add_noise(ids, labels, torch.ones(2, 1), torch.zeros(labels.shape), 1)
    weights = loss_weights(labels, noised, answer_ids, LossArguments(loss_normalization=normalization))
    assert weights[0].sum() == 0 and weights[1].sum() == {"answer_length": 0.5, "tokens": 1, "batch": 1}[normalization]


@pytest.mark.parametrize("t", [[1.0, 0.0], [0.0, 0.0]])
def test_a_row_of_which_nothing_is_masked(t):
    """Loss and gradients are finite, also where that is so of the whole batch."""
    model = tiny_model().train()
    ids, labels, answer_ids = answers(6, 3)
    draws = torch.tensor(t)[:, None].expand(labels.shape), torch.full(labels.shape, 0.5)
    batch = {"input_ids": ids, "labels": labels, "answer_ids": answer_ids}
    loss, found = masked_diffusion_loss(model, batch, lambda *_: draws, LossArguments(), 98)
    loss.backward()
    assert bool(loss > 0) == (len(found) == 6) == bool(sum(t)) and loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
