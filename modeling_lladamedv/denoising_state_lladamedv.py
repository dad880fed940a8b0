"""Where every row of a `generate` or `infill` call stands, and what of it the next forward pass must run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cache_drift_lladamedv import INITIAL_INTERVAL, CacheDrift
from .commit_rules_lladamedv import build_commit_rule, commit_schedule


@dataclass
class ForwardPass:
    """What one forward pass of a step runs.

    Args:
        part: which of the unfinished rows, as indices into `DenoisingState.rows`, in ascending order.
        start: for each, where in its canvas a partial pass begins; `None` for whole rows.
    """

    part: torch.LongTensor
    start: torch.LongTensor | None = None


class StepHooks:
    """What a step does besides committing single tokens; these do nothing."""

    def choose(self, state, candidates, logits, proposed, scores):
        """The proposals `(rows, canvas)` with others where tokens belong together; changes `scores` for them."""
        return proposed

    def complete(self, state, committed):
        """The places to commit `(rows, canvas)`, made complete where they belong together."""
        return committed

    def close(self, state) -> None:
        """What follows from what is committed."""


class DenoisingState:
    """The canvas and the progress of each row; `rows` are the numbers of the unfinished ones.

    Args:
        model: gives the ids of its config.
        options: checked [`LLaDAMedVGenerationConfig`].
        canvas (`(batch, length)`): masks to denoise, and whatever is fixed between them.
        prompt_mask (`(batch, prompt)`): 1 for tokens, 0 for padding.
        suffix: ids of the fixed text behind the canvas, 1-D.
        stops: token sequences that end an answer: those of the end ids, then those of the stop strings.
        absent (`(batch, length)`, *optional*): places that are not there: never attended to.
        hooks ([`StepHooks`], *optional*): of every step.
    """

    def __init__(self, model, options, canvas, prompt_mask, suffix, stops=(), absent=None, hooks=None):
        batch, length = canvas.shape
        device = canvas.device
        self.options = options
        self.mask_token_id = model.config.mask_token_id
        self.block_length = options.block_length
        self.num_blocks = length // options.block_length
        self.steps_per_block = options.steps // self.num_blocks
        self.rule = build_commit_rule(options)
        # Rows are the numbers of masks that a block may start with.
        self.schedule = commit_schedule(self.block_length, self.steps_per_block, options.schedule_shift).to(device)
        self.stops = [torch.tensor(stop, device=device) for stop in stops if len(stop) <= length]
        suppressed = options.suppress_tokens if options.suppress_tokens is not None else [self.mask_token_id]
        self.suppressed = torch.tensor(suppressed, dtype=torch.long, device=device)
        eos = [] if options.eos_token_id is None else torch.tensor(options.eos_token_id).flatten().tolist()
        self.padding = options.pad_token_id if options.pad_token_id is not None else 0
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        deferred = [*eos, *([] if options.pad_token_id is None else [options.pad_token_id])]
        self.deferred = torch.tensor(deferred, dtype=torch.long, device=device)
        self.prompt_mask, self.suffix = prompt_mask, suffix.to(device)
        self.prompt_lengths = prompt_mask.sum(dim=1)
        self.canvas = canvas
        self.absent = absent
        self.hooks = hooks or StepHooks()
        self.prompt_ids = self.prompt_embeds = self.cache = None  # as soon as the loop begins
        self.positions = torch.arange(length, device=device)
        self.stop = torch.full((batch,), length, device=device)  # first position that is not part of the answer
        masks = self._masks_per_block(canvas)
        self.block = (masks > 0).byte().argmax(dim=1)  # the first with masks
        self.step = torch.zeros(batch, dtype=torch.long, device=device)  # within the block
        self.masks_at_start = masks.gather(1, self.block[:, None])[:, 0]  # of the block
        interval = options.cache_refresh_interval
        if interval is None and options.cache_drift_bound is not None:
            interval = INITIAL_INTERVAL
        # Steps since the states were refreshed, and after how many they are refreshed again.
        self.age = torch.zeros(batch, dtype=torch.long, device=device)
        self.interval = torch.full((batch,), interval or torch.iinfo(torch.long).max, device=device)
        self.num_forwards = torch.zeros(batch, dtype=torch.long, device=device)
        self.num_full_forwards = torch.zeros(batch, dtype=torch.long, device=device)
        self.commit_step = torch.full((batch, length), -1, device=device)
        self.commit_confidence = torch.full((batch, length), float("nan"), dtype=torch.float64, device=device)
        self.drift = None
        if options.output_cache_drift or options.cache_drift_bound is not None:
            self.drift = CacheDrift(options.output_cache_drift, options.cache_drift_bound)
        self.rows = torch.arange(batch, device=device)

    @property
    def block_end(self):
        return (self.block + 1) * self.block_length

    def _masks_per_block(self, canvas):
        return (canvas == self.mask_token_id).view(len(canvas), self.num_blocks, self.block_length).sum(dim=2)

    # What stands in the row

    @property
    def always_whole(self) -> bool:
        """Whether the rows are all of one length, and stay so."""
        growing = self.options.initial_canvas_length not in (None, len(self.positions))
        return not growing and self.options.suffix_blocks is None and self.absent is None

    def canvas_length(self, rows):
        """How long the canvas of each row is by now."""
        full = len(self.positions)
        initial = self.options.initial_canvas_length or full
        return self.block_end[rows].clamp(min=initial, max=full)

    def canvas_in_row(self, rows):
        """Up to where the canvas of each row takes part in a pass."""
        end = self.canvas_length(rows)
        if self.options.suffix_blocks is None:
            return end
        return torch.minimum(end, self.block_end[rows] + self.options.suffix_blocks * self.block_length)

    def tail_ids(self, rows):
        """Canvas and suffix of each row, `(rows, tail)`."""
        return torch.cat([self.canvas[rows], self.suffix.expand(len(rows), -1)], dim=1)

    def tail_position_ids(self, rows):
        """Position of each place of canvas and suffix, `(rows, tail)`; the suffix stands behind the canvas as it is."""
        suffix = self.canvas_length(rows)[:, None] + torch.arange(len(self.suffix), device=self.suffix.device)
        return self.prompt_lengths[rows, None] + torch.cat([self.positions.expand(len(rows), -1), suffix], dim=1)

    def tail_mask(self, rows):
        """Which places of canvas and suffix are attended to, `(rows, tail)`."""
        there = self.positions < self.canvas_in_row(rows)[:, None]
        if self.absent is not None:
            there &= ~self.absent[rows]
        return torch.cat([there, there.new_ones(len(rows), len(self.suffix))], dim=1)

    def tail_columns(self, rows):
        """The places of canvas and suffix that any of the rows needs, 1-D, ascending."""
        length = len(self.positions)
        end = length if self.always_whole else int(self.canvas_in_row(rows).max())
        columns = torch.arange(length + len(self.suffix), device=rows.device)
        return columns if end == length else torch.cat([columns[:end], columns[length:]])

    # What a step runs

    def plan_passes(self) -> list[ForwardPass]:
        """The forward passes of this step.

        A row's passes depend on its own block and step alone, so that neighbours change nothing. Rows of a partial
        pass run equally many positions; with the prefix cache those are rows in the same block.
        """
        everything = torch.arange(len(self.rows), device=self.rows.device)
        if not self.options.use_cache:
            return [ForwardPass(everything)]
        full = (self.step[self.rows] == 0) | (self.age[self.rows] >= self.interval[self.rows])
        passes = [ForwardPass(everything[full])] if bool(full.any()) else []
        return passes + self.partial_passes(everything[~full])

    def partial_passes(self, part) -> list[ForwardPass]:
        """Partial passes that run all of `part`."""
        start = self.block[self.rows[part]] * self.block_length
        groups = [start >= 0]
        if self.options.cache_implementation == "prefix":
            groups = [start == value for value in start.unique()]
        return [ForwardPass(part[group], start[group]) for group in groups if bool(group.any())]

    def candidates(self, passes):
        """Which positions may be committed, `(rows, canvas)`: the masked ones up to the end of the row's block and left
        of its stop, as far as the passes run them."""
        limit = torch.minimum(self.block_end[self.rows], self.stop[self.rows])
        masked = (self.canvas[self.rows] == self.mask_token_id) & (self.positions < limit[:, None])
        return torch.stack([self.run_by(each, masked) for each in passes]).any(dim=0)

    def run_by(self, each, candidates):
        """Those of the candidates `(rows, canvas)` that a pass runs."""
        own = torch.zeros_like(candidates)
        own[each.part] = candidates[each.part]
        if each.start is not None:
            own[each.part] &= self.positions >= each.start[:, None]
        return own

    def note_passes(self, passes):
        """Count the passes, and how old the cached states of each row are."""
        for each in passes:
            if each.start is None:
                rows = self.rows[each.part]
                self.num_full_forwards[rows] += 1
                self.age[rows] = 0
        self.age[self.rows] += 1
        if self.drift is not None:
            self.drift.finish_step(self)

    def tokens_to_commit(self):
        """The schedule's k for each unfinished row."""
        step = self.step[self.rows].clamp(max=self.steps_per_block - 1)  # an adaptive rule may take more steps
        return self.schedule[self.masks_at_start[self.rows], step]

    # What a step changes

    def commit(self, committed, proposed, confidences):
        """Write the committed proposals into the canvas and take note of when and how sure."""
        rows = self.rows
        self.canvas[rows] = torch.where(committed, proposed, self.canvas[rows])
        self.commit_step[rows] = torch.where(committed, self.num_forwards[rows, None], self.commit_step[rows])
        self.commit_confidence[rows] = torch.where(committed, confidences, self.commit_confidence[rows])
        self.num_forwards[rows] += 1
        self.step[rows] += 1

    def remove(self, places):
        """Take `places` `(rows, canvas)` of the unfinished rows out of their canvas for good."""
        self.absent[self.rows] |= places
        self.canvas[self.rows] = torch.where(places, self.padding, self.canvas[self.rows])

    def find_stops(self):
        """Set `stop` to the first place where a stop sequence stands in the canvas.

        Once a row has a stop, end ids and the first stop string can move it further left, but no other string: the
        authors' rule.
        """
        canvas = self.canvas[self.rows]
        stop = self.stop[self.rows]
        unstopped = stop == len(self.positions)
        for index, sequence in enumerate(self.stops):
            matches = (canvas.unfold(1, len(sequence), 1) == sequence).all(dim=-1)  # (rows, places)
            places = torch.where(matches, self.positions[: matches.shape[1]], len(self.positions)).amin(dim=1)
            stop = torch.where(unstopped | (index <= len(self.eos)), torch.minimum(stop, places), stop)
        self.stop[self.rows] = stop

    def advance(self):
        """Leave blocks that are done and drop rows that are finished."""
        rows = self.rows
        canvas, stop, end = self.canvas[rows], self.stop[rows], self.block_end[rows]
        masked = (canvas == self.mask_token_id) & (self.positions < stop[:, None])
        left = (masked & (self.positions < end[:, None])).any(dim=1)
        # An adaptive rule commits at least one token a step, and so needs no more steps than the block has places,
        # unless the model proposes the mask itself.
        used_up = self.step[rows] >= (self.block_length if self.rule.adaptive else self.steps_per_block)
        done = ~left | used_up
        # The next block that has masks: fixed text may fill one.
        masks = self._masks_per_block(canvas)
        later = (torch.arange(self.num_blocks, device=rows.device) > self.block[rows, None]) & (masks > 0)
        following = torch.where(later.any(dim=1), later.byte().argmax(dim=1), self.num_blocks)
        self.block[rows] = torch.where(done, following, self.block[rows])
        self.step[rows] = torch.where(done, 0, self.step[rows])
        begin = masks.gather(1, self.block[rows, None].clamp(max=self.num_blocks - 1))[:, 0]
        self.masks_at_start[rows] = torch.where(done, begin, self.masks_at_start[rows])
        finished = (self.block[rows] >= self.num_blocks) | ((stop < len(self.positions)) & ~masked.any(dim=1))
        self.rows = rows[~finished]


__all__ = ["DenoisingState", "ForwardPass", "StepHooks"]
