"""Repetition control against plain versions of its descriptions, alone, in the loop and in batches."""

import itertools

import pytest
import torch

from lladamedv.modeling_lladamedv.repetition_lladamedv import ban_repeated_ngrams
from tests.brute_force import denoise, would_repeat
from tests.test_generation_lladamedv import PIXELS, PROMPT, SUPPRESSED, generate
from tests.tiny import image_prompt


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_bans_against_trying_every_token(size):
    """Short canvases over two ids, so that n-grams meet in every way, overlapping ones included."""
    generator = torch.Generator().manual_seed(size)
    banned = 0
    for _ in range(300):
        length = int(torch.randint(1, 14, (), generator=generator))
        canvas = torch.randint(0, 2, (2, length), generator=generator)
        canvas[torch.rand(2, length, generator=generator) < 0.2] = -1
        rows, places = (canvas < 0).nonzero(as_tuple=True)
        logits = ban_repeated_ngrams(torch.zeros(len(rows), 3), rows, places, canvas, size)
        for row, place, values in zip(rows.tolist(), places.tolist(), logits.tolist()):
            for token, value in enumerate(values):
                expected = would_repeat(canvas[row].tolist(), place, token, size, -1)
                assert (value == float("-inf")) == expected
                banned += expected
    assert banned > 50


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        *itertools.product(
            [{"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}, {"no_repeat_ngram_size": 1},
             {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3, "repetition_penalty": 0.5}],
            [(12, 12), (12, 4)],
        )
    ],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_against_brute_force(model, options, lengths):
    length, block_length = lengths
    prompt = image_prompt(PROMPT)
    expected, commits, _ = denoise(
        model, prompt[0].tolist(), PIXELS, length, block_length, length, suppressed=SUPPRESSED,
        penalty=options.get("repetition_penalty", 1.0), ngram=options.get("no_repeat_ngram_size"),
    )  # fmt: skip
    output = generate(model, max_new_tokens=length, block_length=block_length, **options)
    assert output.sequences[0, prompt.shape[1] :].tolist() == expected
    order = [(int(step), place) for place, step in enumerate(output.commit_step[0])]
    assert sorted(order) == sorted(commits)
    plain = generate(model, max_new_tokens=length, block_length=block_length)
    assert not torch.equal(plain.sequences, output.sequences), "the option must have had something to do"
