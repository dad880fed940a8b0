"""Lossless self-speculation: the model drafts its own next steps, and one forward pass verifies several of them.

What a pass proposes at the places that stay masked is a guess at the steps that follow. The next pass runs the row and
the states that these guesses lead to; as long as a real step leads to the drafted state, the draft's logits are the
real ones, and its step needs no pass. Sources: Self Speculative Decoding for diffusion language models (arXiv
2510.04147) and Spiffy (arXiv 2509.18085); the drafts are a chain here, made by the commit rule itself.
"""

import copy
from dataclasses import replace

import torch

from .commit_rules_lladamedv import CandidateScores
from .denoising_state_lladamedv import OF_ROWS, DenoisingState, ForwardPass, Proposals


_CHANGED = (  # what a step changes in place
    "canvas", "stop", "block", "step", "masks_at_start", "finished", "broken", "commit_step", "commit_confidence",
    "drafted", "draft_scores",
)  # fmt: skip


def draft_states(state: DenoisingState, passes: list[ForwardPass], commit) -> list[DenoisingState]:
    """The states that follow if the next passes propose what the last one has, as many as `passes` have room for.

    Args:
        commit: takes a state and its [`Proposals`] one step on.
    """
    drafts = []
    for _ in range(max(each.versions for each in passes) - 1):
        last = drafts[-1] if drafts else state
        draft = copy.copy(last)
        for name in _CHANGED:
            setattr(draft, name, getattr(last, name).clone())
        # Nothing is known of a block before its first pass.
        draft.finished |= last.step == 0
        names = ("confidence", *state.rule.needs)
        scores = CandidateScores(**dict(zip(names, state.draft_scores.unbind(1))))
        candidates = draft.candidates(state.window, passes)
        commit(draft, Proposals(state.window, candidates, state.drafted, scores, torch.zeros_like(draft.finished)))
        # A draft has no place in a block that follows, or where its row is due to be run whole.
        draft.finished |= (draft.block != state.block) | (draft.step % state.interval == 0)
        drafts.append(draft)
    return drafts


def with_drafts(state: DenoisingState, drafts: list[DenoisingState], passes: list[ForwardPass]):
    """The rows of a state and of its drafts, one state behind the other, and the passes that run all of them."""
    if not drafts:
        return state, passes
    joined, batch = copy.copy(state), len(state.canvas)
    joined.versions = 1 + len(drafts)
    for name in OF_ROWS:
        values = [getattr(each, name) for each in (state, *drafts)]
        setattr(joined, name, None if values[0] is None else torch.cat(values))
    widened = []
    for each in passes:
        numbers = [row + batch * version for row in each.numbers for version in range(each.versions)]
        rows = (each.rows[:, None] + batch * torch.arange(each.versions, device=each.rows.device)).flatten()
        widened.append(replace(each, numbers=numbers, rows=rows))
    return joined, widened


def reaches(state: DenoisingState, draft: DenoisingState) -> torch.BoolTensor:
    """Which rows `(batch,)` are not finished and stand where the draft does."""
    same = (state.canvas == draft.canvas).all(dim=1) & ~state.finished & ~draft.finished
    return same & (state.block == draft.block) & (state.step == draft.step) & (state.stop == draft.stop)


def mask_of_versions(visible: torch.BoolTensor, places: torch.LongTensor, versions: int) -> torch.BoolTensor:
    """What the versions of a row may attend to where they stand in one row behind its stored states: these without
    the places that are run, and themselves.

    Args:
        visible (`(rows * versions, row length)`): places that are attended to.
        places (`(rows * versions, run)`): those that each version runs.

    Returns:
        `torch.BoolTensor` `(rows, 1, versions * run, row length + versions * run)`.
    """
    run = places.shape[1]
    own = visible.gather(1, places).view(-1, 1, 1, versions, run)
    apart = torch.eye(versions, dtype=torch.bool, device=visible.device)[:, None, :, None]
    own = (own & apart).expand(-1, versions, run, -1, -1).reshape(len(own), versions * run, versions * run)
    stored = visible.scatter(1, places, False)[::versions, None].expand(-1, versions * run, -1)
    return torch.cat([stored, own], dim=2)[:, None]


__all__ = ["draft_states", "mask_of_versions", "reaches", "with_drafts"]
