"""Where every row of a `generate` or `infill` call stands, and what of it the next forward pass must run.

Two views of the same progress: tensors on the model's device, which every step changes without being read, and
[`Progress`], what the host knows of them, from which passes are planned. Shapes on the device do not depend on what the
rows hold, so a step needs no synchronisation and can be captured in a graph.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from .cache_drift_lladamedv import INITIAL_INTERVAL, CacheDrift
from .commit_rules_lladamedv import CandidateScores, build_commit_rule, commit_schedule


NOT_FINITE = (
    "Either its weights are broken, or numbers became too large for its dtype: load it anew, with dtype='bfloat16' or "
    "'float32'."
)


@dataclass
class ForwardPass:
    """What one forward pass of a step runs.

    Args:
        numbers: of the rows.
        rows (`(rows,)`): the same on the device.
        end: up to where the longest canvas of them takes part.
        attends_everywhere: whether no row has a place that is not attended to.
        partial: whether it runs a part of each row, on cached states of the rest.
        start: where in the canvas that part begins, if all rows begin at one place (the prefix cache).
        versions: of each row that it runs, one behind the other: the row and its drafts.
    """

    numbers: list[int]
    rows: torch.LongTensor
    end: int
    attends_everywhere: bool
    partial: bool = False
    start: int | None = None
    versions: int = 1


@dataclass
class CandidateLogits:
    """Logits of one pass at its candidates.

    Args:
        rows (`(n,)`): the row of each.
        slots (`(n,)`): its place among those of all rows' windows, `(batch, window)` flattened.
        valid (`(n,)`): whether it is a candidate: with fixed shapes every place of a window has logits.
        logits (`(n, vocabulary)`).
        unguided (`(n, vocabulary)`, *optional*): those before image guidance.
    """

    rows: torch.LongTensor
    slots: torch.LongTensor
    valid: torch.BoolTensor
    logits: torch.Tensor
    unguided: torch.Tensor | None = None

    def take(self, chosen: torch.Tensor) -> CandidateLogits:
        """Some of them: indices, or a mask."""
        unguided = None if self.unguided is None else self.unguided[chosen]
        return CandidateLogits(self.rows[chosen], self.slots[chosen], self.valid[chosen], self.logits[chosen], unguided)


@dataclass
class Proposals:
    """What a step has found at the places where it may commit; all `(batch, window)`.

    Args:
        window: the places in the canvas.
        candidates: which of them may be committed.
        tokens: the proposed tokens.
        scores: what is known of them.
        broken (`(batch,)`): rows whose logits are not finite.
    """

    window: torch.LongTensor
    candidates: torch.BoolTensor
    tokens: torch.LongTensor
    scores: CandidateScores
    broken: torch.BoolTensor

    def split(self, rows: int) -> list[Proposals]:
        """Parts of `rows` rows each."""
        scores = {name: values.split(rows) for name, values in vars(self.scores).items() if values is not None}
        values = (each.split(rows) for each in (self.window, self.candidates, self.tokens, self.broken))
        return [
            Proposals(
                window, candidates, tokens,
                CandidateScores(**{name: parts[number] for name, parts in scores.items()}), broken,
            )
            for number, (window, candidates, tokens, broken) in enumerate(zip(*values))
        ]  # fmt: skip


class StepHooks:
    """What a step does besides committing single tokens; these do nothing."""

    predictable = True  # whether rows move on as the schedule says

    def choose(self, state, each: ForwardPass, found: CandidateLogits, proposed, scores) -> None:
        """Change a pass's proposals `(batch, window)` and their `scores` where tokens belong together."""

    def complete(self, state, window, committed):
        """The places to commit `(batch, window)`, made complete where they belong together."""
        return committed

    def close(self, state) -> None:
        """What follows from what is committed."""


_KNOWN = ("block", "step", "age", "initial", "interval", "finished", "broken", "saved")  # of each row


class Progress:
    """What the host knows of the rows: lists, one entry a row.

    With the count rule rows move on as the schedule says until an end is found, so the host counts along and a flag is
    all that is looked at: on CUDA it is copied beside the computation and looked at one step late, which costs at most
    one pass. From the first end on, and for rules that look at the scores, one small tensor is copied a step.
    """

    def __init__(self, state: DenoisingState):
        self.block, self.step = state.block.tolist(), [0] * len(state.block)
        self.age = [0] * len(state.block)  # steps since the row's states were refreshed
        self.interval = state.interval.tolist()  # after how many they are
        self.initial = state.initial.tolist()
        self.finished = [False] * len(state.block)
        self.broken = [-1] * len(state.block)  # first forward pass whose logits were not finite
        self.saved = [0] * len(state.block)  # steps that needed no pass of their own
        # The schedule of a block full of masks; commits that may be masks, or wholes, are not foreseen.
        self.foreseen = state.hooks.predictable and not state.rule.adaptive and state.drift is None
        self.foreseen &= state.mask_is_suppressed and not state.options.speculation_depth
        self.steps_in_block = int((state.schedule[-1] > 0).sum())
        self._flag = None

    def update(self, state: DenoisingState, passes: list[ForwardPass]) -> None:
        """Follow what a step has done."""
        run = sorted({row for each in passes for row in each.numbers})
        renewed = {row for each in passes if not each.partial for row in each.numbers}
        saved = self.saved
        if self.foreseen and not self._seen(state):
            for row in run:
                step = self.step[row]
                block_is_done = step + 1 >= self.steps_in_block
                self.step[row] = 0 if block_is_done else step + 1
                self.block[row] += block_is_done
                self.finished[row] = self.block[row] >= state.num_blocks
        else:
            self.foreseen = False
            self.read(state)
        for row in run:
            self.age[row] = 1 if row in renewed else self.age[row] + 1 + self.saved[row] - saved[row]

    def read(self, state: DenoisingState) -> None:
        """Copy the progress from the device."""
        known = [state.block, state.step, state.interval, state.finished.long(), state.broken, state.num_saved]
        self.block, self.step, self.interval, finished, self.broken, self.saved = torch.stack(known).tolist()
        self.finished = [bool(each) for each in finished]

    def take(self, rows: list[int]) -> Progress:
        """The same for some of the rows."""
        taken = copy.copy(self)
        for name in _KNOWN:
            setattr(taken, name, [getattr(self, name)[row] for row in rows])
        return taken

    def join(self, other: Progress) -> None:
        """Append the rows of another."""
        for name in _KNOWN:
            getattr(self, name).extend(getattr(other, name))
        self.foreseen &= other.foreseen

    def _seen(self, state) -> bool:
        """Whether an end, or a logit that is not finite, has been found; on CUDA as of the step before."""
        found = ((state.stop < len(state.positions)) | (state.broken >= 0)).any()
        if found.device.type != "cuda":
            return bool(found.cpu().numpy())
        before, flag = self._flag, torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(found, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._flag = flag, copied
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0].numpy())


# Tensors with an entry for each row.
OF_ROWS = (
    "prompt_ids", "prompt_embeds", "neutral_embeds", "prompt_mask", "prompt_lengths", "prompt_positions", "canvas",
    "absent", "stop", "block", "step", "initial", "masks_at_start", "finished", "broken", "interval", "num_forwards",
    "num_full_forwards", "num_saved", "commit_step", "commit_confidence", "drafted", "draft_scores",
)  # fmt: skip


class DenoisingState:
    """The canvas and the progress of each row.

    Args:
        model: gives the ids of its config.
        options: checked [`LLaDAMedVGenerationConfig`].
        prompt_ids (`(batch, prompt)`): of the prompts.
        canvas (`(batch, length)`): masks to denoise, and whatever is fixed between them.
        prompt_mask (`(batch, prompt)`): 1 for tokens, 0 for padding.
        suffix: ids of the fixed text behind the canvas, 1-D.
        stops: token sequences that end an answer: those of the end ids, then those of the stop strings.
        absent (`(batch, length)`, *optional*): places that are not there: never attended to.
        hooks ([`StepHooks`], *optional*): of every step.
    """

    def __init__(self, model, options, prompt_ids, canvas, prompt_mask, suffix, stops=(), absent=None, hooks=None):
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
        self.stop_sequences = stops
        self.stops = [torch.tensor(stop, device=device) for stop in stops if len(stop) <= length]
        suppressed = options.suppress_tokens if options.suppress_tokens is not None else [self.mask_token_id]
        self.suppressed = torch.tensor(suppressed, dtype=torch.long, device=device)
        self.mask_is_suppressed = self.mask_token_id in self.suppressed.flatten().tolist()
        eos = [] if options.eos_token_id is None else torch.tensor(options.eos_token_id).flatten().tolist()
        self.padding = options.pad_token_id if options.pad_token_id is not None else 0
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        deferred = [*eos, *([] if options.pad_token_id is None else [options.pad_token_id])]
        self.deferred = torch.tensor(deferred, dtype=torch.long, device=device)
        self.prompt_mask, self.suffix = prompt_mask.bool(), suffix.to(device)
        self.prompt_lengths = prompt_mask.sum(dim=1)
        self.prompt_positions = (prompt_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # padding is not counted
        self.is_padded = not bool(self.prompt_mask.all())
        self.canvas = canvas
        self.absent = absent
        self.hooks = hooks or StepHooks()
        self.prompt_ids = prompt_ids
        self.prompt_embeds = self.neutral_embeds = self.cache = None  # as soon as the loop begins
        self.guides_by_image = options.image_guidance_scale > 0
        self.needs_neutral = self.guides_by_image or bool(options.output_image_reliance)
        self.sides = 2 if options.cfg_scale > 0 or self.guides_by_image else 1  # rows of a pass for each of the batch
        self.positions = torch.arange(length, device=device)
        self.initial = torch.full((batch,), options.initial_canvas_length or length, device=device)  # of the canvas
        self.stop = torch.full((batch,), length, device=device)  # first position that is not part of the answer
        masks = self._masks_per_block(canvas)
        self.block = (masks > 0).byte().argmax(dim=1)  # the first with masks
        self.step = torch.zeros(batch, dtype=torch.long, device=device)  # within the block
        self.masks_at_start = masks.gather(1, self.block[:, None])[:, 0]  # of the block
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.broken = torch.full((batch,), -1, device=device)  # first forward pass whose logits were not finite
        interval = options.cache_refresh_interval
        if interval is None and options.cache_drift_bound is not None:
            interval = INITIAL_INTERVAL
        self.interval = torch.full((batch,), interval or torch.iinfo(torch.long).max, device=device)
        self.num_forwards = torch.zeros(batch, dtype=torch.long, device=device)
        self.num_full_forwards = torch.zeros(batch, dtype=torch.long, device=device)
        self.num_saved = torch.zeros(batch, dtype=torch.long, device=device)  # steps without a pass of their own
        self.commit_step = torch.full((batch, length), -1, device=device)
        self.commit_confidence = torch.full((batch, length), float("nan"), dtype=torch.float64, device=device)
        self.drift = None
        if options.output_cache_drift or options.cache_drift_bound is not None:
            self.drift = CacheDrift(options.output_cache_drift, options.cache_drift_bound)
        self.rows_are_equal = False  # the same prompt, and nothing committed yet
        self.versions = 1  # of each row: itself and its drafts
        self.packs = model.packs_candidates
        if self.packs is None:
            self.packs = device.type == "cpu" and options.compile_config is None
        # Steps that rows due for a whole pass may wait for others, so that not every step has passes of both kinds.
        self.patience = self.waited = 0
        # What the last pass has proposed, from which drafts are made.
        self.drafted = self.draft_scores = None
        if options.speculation_depth:
            self.drafted = self.window.clone()
            of_rule = (batch, 1 + len(self.rule.needs), self.drafted.shape[1])
            self.draft_scores = torch.zeros(of_rule, dtype=torch.float64, device=device)
        self.progress = Progress(self)
        self.kept = list(range(batch))  # rows that passes run
        self._indices: dict[tuple[int, ...], torch.LongTensor] = {}

    @property
    def block_end(self):
        return (self.block + 1) * self.block_length

    def _masks_per_block(self, canvas):
        return (canvas == self.mask_token_id).view(len(canvas), self.num_blocks, self.block_length).sum(dim=2)

    def index(self, numbers: list[int]) -> torch.LongTensor:
        """Numbers of rows, on the device."""
        key = tuple(numbers)
        if key not in self._indices:
            self._indices[key] = torch.tensor(numbers, device=self.canvas.device)
        return self._indices[key]

    @property
    def is_finished(self) -> bool:
        return all(self.progress.finished)

    def check_finite(self) -> None:
        """ValueError for logits that were not finite, as far as the host knows."""
        for row, number in enumerate(self.progress.broken):
            if number >= 0:
                raise ValueError(
                    f"The model's logits are not finite in forward pass {number} (from 0) of row {row}. {NOT_FINITE}"
                )

    # Rows that come and go

    def take(self, rows: list[int]) -> DenoisingState:
        """The same for some of the rows, which are then numbered from 0; this state is of no use any more where it has
        a cache."""
        taken, index, batch = copy.copy(self), torch.tensor(rows, device=self.canvas.device), len(self.canvas)
        for name in OF_ROWS:
            values = getattr(self, name)
            setattr(taken, name, None if values is None else values[index])
        taken.progress = self.progress.take(rows)
        taken.kept, taken._indices = list(range(len(rows))), {}
        taken.is_padded = not bool(taken.prompt_mask.all())
        if self.cache is not None:
            self._keep_cached(rows, batch)
            self.cache.slots = None  # rows are where their numbers say
        return taken

    def row(self, number: int) -> DenoisingState:
        """A copy of one row, without its cache and what was measured of it."""
        alone = copy.copy(self)
        alone.cache = alone.drift = None
        return alone.take([number])

    def join(self, other: DenoisingState) -> None:
        """Append the rows of a state with the same options and the same lengths of prompt and canvas."""
        for name in OF_ROWS:
            values = getattr(self, name)
            setattr(self, name, None if values is None else torch.cat([values, getattr(other, name)]))
        self.progress.join(other.progress)
        self.kept, self._indices = list(range(len(self.canvas))), {}
        self.is_padded |= other.is_padded
        if self.cache is not None:
            self.cache.join(other.cache, self.sides)

    def _keep_cached(self, rows: list[int], batch: int) -> None:
        """Let the cache of `batch` rows keep some; those that they are contrasted with follow all of them."""
        kept = [row + batch * side for side in range(self.sides) for row in rows]
        self.cache.keep(self.index(kept), batch * self.sides)

    # What stands in the row

    def canvas_length(self, block, initial):
        """How long a row's canvas is by now, for the number of its block and its first length, or those of many."""
        full, end = len(self.positions), (block + 1) * self.block_length
        if isinstance(block, torch.Tensor):
            return torch.maximum(end, initial).clamp(max=full)
        return min(max(end, initial), full)

    def canvas_in_row(self, block, initial):
        """Up to where a row's canvas takes part in a pass, as [`canvas_length`]."""
        end = self.canvas_length(block, initial)
        if self.options.suffix_blocks is None:
            return end
        seen = (block + 1 + self.options.suffix_blocks) * self.block_length
        return torch.minimum(end, seen) if isinstance(block, torch.Tensor) else min(end, seen)

    def tail_ids(self, rows):
        """Canvas and suffix of each row, `(rows, tail)`."""
        return torch.cat([self.canvas[rows], self.suffix.expand(len(rows), -1)], dim=1)

    def tail_position_ids(self, rows):
        """Position of each place of canvas and suffix, `(rows, tail)`; the suffix stands behind the canvas as it is."""
        length = self.canvas_length(self.block[rows], self.initial[rows])
        suffix = length[:, None] + torch.arange(len(self.suffix), device=self.suffix.device)
        return self.prompt_lengths[rows, None] + torch.cat([self.positions.expand(len(rows), -1), suffix], dim=1)

    def tail_mask(self, rows):
        """Which places of canvas and suffix are attended to, `(rows, tail)`."""
        there = self.positions < self.canvas_in_row(self.block[rows], self.initial[rows])[:, None]
        if self.absent is not None:
            there = there & ~self.absent[rows]
        return torch.cat([there, there.new_ones(len(rows), len(self.suffix))], dim=1)

    def tail_columns(self, start: int, end: int):
        """The places of canvas and suffix that a pass runs if the canvas takes part from `start` to `end`, 1-D."""
        length = len(self.positions)
        columns = torch.arange(start, length + len(self.suffix), device=self.canvas.device)
        return columns if end >= length else torch.cat([columns[: end - start], columns[length - start :]])

    # What a step runs

    def plan_passes(self) -> list[ForwardPass]:
        """The forward passes of this step.

        A row's passes depend on its own block and step alone, so that neighbours change nothing. Rows of a partial
        pass run equally many positions; with the prefix cache those are rows in the same block.
        """
        progress = self.progress
        rows = [row for row in self.kept if not progress.finished[row]]
        if not self.options.use_cache:
            return [self.whole_pass(self.kept)]
        full = [row for row in rows if progress.step[row] == 0 or progress.age[row] >= progress.interval[row]]
        rest = [row for row in rows if row not in full]
        some_wait = bool(full and rest) and self.waited < self.patience
        self.waited = self.waited + 1 if some_wait else 0
        if some_wait:
            full = []
        elif rest and not self.packs and self.options.cache_implementation != "prefix" and self.drift is None:
            if not (full and self.options.speculation_depth):
                rest = self.kept  # one shape; what it says of the others is overwritten by the full pass
        return self.partial_passes(rest) + ([self.whole_pass(full)] if full else [])

    def partial_passes(self, rows: list[int]) -> list[ForwardPass]:
        """Partial passes that run all of `rows`."""
        if self.options.cache_implementation != "prefix":
            return [self._pass(rows, True)] if rows else []
        last = self.num_blocks - 1
        starts = [min(self.progress.block[row], last) * self.block_length for row in rows]
        groups = {start: [row for row, own in zip(rows, starts) if own == start] for start in sorted(set(starts))}
        return [self._pass(group, True, start) for start, group in groups.items()]

    def whole_pass(self, rows: list[int]) -> ForwardPass:
        """A pass over all of `rows`."""
        return self._pass(rows)

    def _pass(self, numbers: list[int], partial: bool = False, start: int | None = None) -> ForwardPass:
        progress = self.progress
        counted = [row for row in numbers if not progress.finished[row]] or numbers
        ends = {self.canvas_in_row(progress.block[row], progress.initial[row]) for row in counted}
        everywhere = not self.is_padded and self.absent is None
        everywhere &= len(ends) == 1 and (not partial or ends == {len(self.positions)})
        depth = self.options.speculation_depth or 0
        if partial:  # where all rows are run whole again, drafts end
            depth = min(depth, max(progress.interval[row] - progress.age[row] - 1 for row in counted))
        elif self.options.use_cache or not any(progress.step[row] for row in counted):
            depth = 0
        return ForwardPass(numbers, self.index(numbers), max(ends), everywhere, partial, start, 1 + max(depth, 0))

    @property
    def window(self):
        """The places of each row among which a step may commit, `(batch, window)`: its block.

        Where the mask itself may be proposed, masks stay behind in earlier blocks: there it is the whole canvas.
        """
        if not self.mask_is_suppressed:
            return self.positions.expand(len(self.canvas), -1)
        start = self.block.clamp(max=self.num_blocks - 1) * self.block_length
        return start[:, None] + self.positions[: self.block_length]

    def candidates(self, window, passes):
        """Which places of the window may be committed, `(batch, window)`: the masked ones up to the end of the row's
        block and left of its stop, as far as the passes run them."""
        limit = torch.minimum(self.block_end, self.stop)
        masked = (self.canvas.gather(1, window) == self.mask_token_id) & (window < limit[:, None])
        for each in passes if not self.mask_is_suppressed else ():
            if each.partial:
                masked[each.rows] &= window[each.rows] >= (self.block[each.rows] * self.block_length)[:, None]
        ran = {row for each in passes for row in each.numbers}
        if len(ran) < len(self.canvas):  # others wait, or are finished
            masked &= torch.zeros_like(self.finished).index_fill_(0, self.index(sorted(ran)), True)[:, None]
        return masked & ~self.finished[:, None]

    def slots(self, candidates, each: ForwardPass):
        """Which of a pass's places of windows get logits: indices into `(rows of the pass, window)` flattened."""
        own = candidates[each.rows].flatten()
        return own.nonzero()[:, 0] if self.packs else torch.arange(len(own), device=own.device)

    def tokens_to_commit(self):
        """The schedule's k for each row."""
        step = self.step.clamp(max=self.steps_per_block - 1)  # an adaptive rule may take more steps
        return self.schedule[self.masks_at_start, step]

    # What a step changes

    def grow(self, rows: list[int]):
        """Make the canvas of `rows` a block longer before their first step, for which a pass was run."""
        for row in rows:
            self.progress.initial[row] += self.block_length
        self.initial.index_add_(0, self.index(rows), torch.full_like(self.index(rows), self.block_length))

    def broken_rows(self, found: CandidateLogits):
        """Rows `(batch,)` whose logits are not finite."""
        # A sum is finite if what it is of is, and much cheaper than to look at each.
        bad = ~found.logits.sum(dim=1).isfinite() & found.valid
        return torch.zeros_like(self.broken).index_add_(0, found.rows, bad.long()) > 0

    def note_broken(self, broken):
        """Take note of rows `(batch,)` whose logits are not finite."""
        self.broken.copy_(torch.where(broken & (self.broken < 0), self.num_forwards, self.broken))

    def note_passes(self, passes, active):
        """Count the passes of the rows that were `active` `(batch,)`."""
        active = active.long()
        self.num_forwards += active
        for each in passes:
            if not each.partial:
                self.num_full_forwards.index_add_(0, each.rows, active[each.rows])

    def commit(self, window, committed, proposed, confidences):
        """Write the committed proposals into the canvas and take note of when and how sure; all `(batch, window)`."""
        when = (self.num_forwards + self.num_saved)[:, None].expand_as(window)
        for target, values in (
            (self.canvas, proposed), (self.commit_step, when), (self.commit_confidence, confidences),
        ):  # fmt: skip
            target.scatter_(1, window, torch.where(committed, values, target.gather(1, window)))

    def keep_for_drafts(self, found: Proposals, active):
        """Keep what was proposed to the `active` rows `(batch,)`."""
        if self.drafted is not None:
            scores = torch.stack([getattr(found.scores, name) for name in ("confidence", *self.rule.needs)], dim=1)
            self.drafted.copy_(torch.where(active[:, None], found.tokens, self.drafted))
            self.draft_scores.copy_(torch.where(active[:, None, None], scores, self.draft_scores))

    def remove(self, places):
        """Take `places` `(batch, canvas)` out of the canvas for good."""
        self.absent |= places
        self.canvas.masked_fill_(places, self.padding)

    def find_stops(self):
        """Set `stop` to the first place where a stop sequence stands in the canvas.

        Once a row has a stop, end ids and the first stop string can move it further left, but no other string: the
        authors' rule.
        """
        stop = self.stop
        unstopped = stop == len(self.positions)
        for index, sequence in enumerate(self.stops):
            matches = (self.canvas.unfold(1, len(sequence), 1) == sequence).all(dim=-1)  # (batch, places)
            places = torch.where(matches, self.positions[: matches.shape[1]], len(self.positions)).amin(dim=1)
            stop = torch.where(unstopped | (index <= len(self.eos)), torch.minimum(stop, places), stop)
        self.stop.copy_(torch.where(self.finished, self.stop, stop))

    def advance(self, active):
        """Leave blocks that are done, and see which of the `active` rows `(batch,)` are finished."""
        step = self.step + active
        masked = (self.canvas == self.mask_token_id) & (self.positions < self.stop[:, None])
        left = (masked & (self.positions < self.block_end[:, None])).any(dim=1)
        # An adaptive rule commits at least one token a step, and so needs no more steps than the block has places,
        # unless the model proposes the mask itself.
        used_up = step >= (self.block_length if self.rule.adaptive else self.steps_per_block)
        done = (~left | used_up) & active
        # The next block that has masks: fixed text may fill one.
        masks = self._masks_per_block(self.canvas)
        later = (torch.arange(self.num_blocks, device=step.device) > self.block[:, None]) & (masks > 0)
        following = torch.where(later.any(dim=1), later.byte().argmax(dim=1), self.num_blocks)
        block = torch.where(done, following, self.block)
        begin = masks.gather(1, block[:, None].clamp(max=self.num_blocks - 1))[:, 0]
        self.block.copy_(torch.where(self.finished, self.block, block))
        self.step.copy_(torch.where(done, 0, step))
        self.masks_at_start.copy_(torch.where(done, begin, self.masks_at_start))
        self.finished |= (block >= self.num_blocks) | ((self.stop < len(self.positions)) & ~masked.any(dim=1))

    def follow(self, passes):
        """Let the host catch up with a step, and stop running finished rows: at once where fewer rows are cheaper,
        elsewhere once, when half of them are finished, and never in a compiled step, which has one shape."""
        self.progress.update(self, passes)
        left = [row for row in self.kept if not self.progress.finished[row]]
        half = 2 * len(left) <= len(self.kept) == len(self.canvas) and self.options.compile_config is None
        if left and (len(left) < len(self.kept) if self.packs else half):
            self.kept = left
            if self.cache is not None:
                self._keep_cached(left, len(self.canvas))


__all__ = ["OF_ROWS", "CandidateLogits", "DenoisingState", "ForwardPass", "Proposals", "StepHooks"]
