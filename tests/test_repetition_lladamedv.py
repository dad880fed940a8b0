"""Repetition control against a plain version; `test_generation_lladamedv.py` has it in the loop."""

import pytest
import torch

from lladamedv.modeling_lladamedv.repetition_lladamedv import ban_repeated_ngrams
from tests.brute_force import would_repeat


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
