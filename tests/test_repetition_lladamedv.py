"""Repetition control against plain versions of its descriptions, alone, in the loop and in batches."""

import itertools

import pytest
import torch

from lladamedv.modeling_lladamedv.repetition_lladamedv import ban_repeated_ngrams
from tests.brute_force import denoise, would_repeat
from tests.test_denoising_cache_lladamedv import padded
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


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_no_ngram_twice(model, use_cache):
    """A penalty below 1 asks for repetition; the ban holds nevertheless."""
    for size in (1, 2, 3):
        output = generate(
            model, max_new_tokens=24, block_length=8, no_repeat_ngram_size=size, repetition_penalty=0.3,
            use_cache=use_cache,
        )  # fmt: skip
        answer = output.sequences[0, -24:].tolist()
        runs = [tuple(answer[i : i + size]) for i in range(24 - size + 1)]
        assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_not_penalised(model, side):
    prompts = [image_prompt(PROMPT), torch.tensor([[8, 9]])]
    options = {"max_new_tokens": 8, "repetition_penalty": 2.0, "suppress_tokens": [98]}  # 91, the padding, may occur
    ids, mask = padded(prompts, side)
    together = generate(model, ids, PIXELS, attention_mask=mask, **options)
    for row, (prompt, image) in enumerate(zip(prompts, (PIXELS, None))):
        alone = generate(model, prompt, image, **options)
        assert together.sequences[row, -8:].tolist() == alone.sequences[0, -8:].tolist()
        torch.testing.assert_close(together.commit_confidence[row], alone.commit_confidence[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_repeat_ngram_size": 2, "steps": 4, "max_new_tokens": 8}, "and `steps` is 4: tokens that are committed"),
        ({"no_repeat_ngram_size": 2, "confidence_threshold": 0.9}, "and `confidence_threshold` is 0.9: tokens"),
        ({"no_repeat_ngram_size": -1}, "`no_repeat_ngram_size` is -1; allowed are whole numbers"),
        ({"repetition_penalty": 0}, "`repetition_penalty` is 0; allowed are finite numbers above 0"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **options)
