"""Closed forms; the authors' numbers are in tests/parity."""

import torch

from lladamedv.trainers.masked_diffusion_loss import add_noise, masked_diffusion_loss, sample_timesteps


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
