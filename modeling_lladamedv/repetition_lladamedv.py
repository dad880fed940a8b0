"""Repetition control for a canvas: which ids a place must not, or had better not, hold.

Transformers' processors look at a text that ends where the next token goes. A place of a canvas has neighbours on both
sides, some of them still masked. The penalty only asks which ids occur, so Transformers' processor serves; the ban on
n-grams is about neighbours, so it is our own, with the same meaning: no n-gram occurs twice.
"""

import torch


def ban_repeated_ngrams(logits: torch.Tensor, rows: torch.LongTensor, places: torch.LongTensor, canvas, size: int):
    """Set the logits of tokens that would complete an n-gram which the canvas already holds to -inf, in place.

    Args:
        logits (`(candidates, vocabulary)`).
        rows, places (`(candidates,)`): where in the canvas each candidate is.
        canvas (`(rows, length)`): committed ids, and -1 where nothing is committed.
        size: of the n-grams.
    """
    if size > canvas.shape[1]:
        return logits
    windows = canvas.unfold(1, size, 1)  # (rows, windows, size): every n-gram of the canvas
    whole = (windows >= 0).all(dim=-1)
    last = windows.shape[1] - 1
    for offset in range(size):  # of the candidate within the n-gram that it would complete
        first = places - offset
        own = windows[rows, first.clamp(0, last)]  # (candidates, size)
        others = [each for each in range(size) if each != offset]
        possible = (first >= 0) & (first <= last) & (own[:, others] >= 0).all(dim=-1)
        same = (windows[rows][..., others] == own[:, None, others]).all(dim=-1) & whole[rows]  # (candidates, windows)
        _ban(logits, windows[rows][..., offset], same & possible[:, None])
        # One token can also complete two equal n-grams at once, as a third "x" between two others does.
        for shift in range(1, size - offset):
            earlier = first - shift
            other = windows[rows, earlier.clamp(0, last)].clone()
            token = other[:, offset]
            filled = own.clone()
            filled[:, offset] = other[:, offset + shift] = token
            twice = possible & (earlier >= 0) & (other >= 0).all(dim=-1) & (filled == other).all(dim=-1)
            _ban(logits, token[:, None], twice[:, None])
    return logits


def _ban(logits, tokens, where) -> None:
    """Set the logits of `tokens` `(candidates, tokens)` to -inf where it says so, without looking at where that is."""
    lowest = torch.full_like(tokens, float("inf"), dtype=logits.dtype).masked_fill_(where, float("-inf"))
    logits.scatter_reduce_(1, tokens.clamp(min=0), lowest, "amin")


__all__ = ["ban_repeated_ngrams"]
