"""How far the distributions that cached states give are from the exact ones, and how often rows refresh for that.

The drift is the KL divergence, in nats, of the cached from the exact distributions, averaged over a row's candidates.
"""

import functools

import torch


INITIAL_INTERVAL = 4  # of rows that find their own
_ELEMENTS = 2**22  # of the logits that are compared at a time, in float64


class CacheDrift:
    """Runs the passes of a step and takes note of the drift.

    Args:
        every_step: measure each partial pass against a pass of the whole row.
        bound: where a row's states are refreshed, compare with what the old ones would have said: above the bound its
            refresh interval is halved, otherwise doubled. `None` leaves the intervals alone.
    """

    def __init__(self, every_step: bool, bound: float | None):
        self.every_step, self.bound = every_step, bound
        self.history: list[torch.DoubleTensor] = []  # (batch,) per step; NaN where nothing was measured

    def begin_step(self, state, candidates, run):
        """How the passes of a step are run and measured, a function of a pass; `run` is how they are run.

        Args:
            candidates (`(rows, canvas)`): of the step.
            run: gives a pass's logits; with `whole=True` of whole rows, without the cache.
        """
        nothing = torch.full(state.stop.shape, float("nan"), dtype=torch.float64, device=state.stop.device)
        self.history.append(nothing)
        return functools.partial(self._run, state, candidates, run)

    def finish_step(self, state) -> None:
        """Set the next refresh of the rows whose states were refreshed, by the measured drift."""
        drift = self.history[-1][state.rows]
        if self.bound is not None:
            measured = ~drift.isnan() & (state.age[state.rows] == 1)
            rows, above = state.rows[measured], drift[measured] > self.bound
            changed = torch.where(above, state.interval[rows] // 2, state.interval[rows] * 2)
            state.interval[rows] = changed.clamp(min=1)

    def _run(self, state, candidates, run, each):
        if each.start is not None:
            cached = run(each)
            if self.every_step:
                self._note(state, each, candidates, run(each, whole=True), cached)
            return cached
        stale = []
        if self.bound is not None:
            # What the old states would have said, before this pass overwrites them.
            for probe in state.partial_passes(each.part[state.step[state.rows[each.part]] > 0]):
                stale.append((probe, run(probe)))
        exact = run(each)
        for probe, cached in stale:
            inside = state.run_by(probe, candidates)[state.run_by(each, candidates)]  # which rows of `exact`
            self._note(state, probe, candidates, exact[inside], cached)
        return exact

    def _note(self, state, each, candidates, exact, cached) -> None:
        row = state.run_by(each, candidates).nonzero()[:, 0]
        sums = torch.zeros(len(state.rows), dtype=torch.float64, device=row.device)
        size = max(1, _ELEMENTS // exact.shape[-1])
        for p, q, rows in zip(exact.split(size), cached.split(size), row.split(size)):
            p, q = p.double().log_softmax(dim=-1), q.double().log_softmax(dim=-1)
            sums.index_add_(0, rows, (p.exp() * (p - q)).sum(dim=-1))
        counts = torch.bincount(row, minlength=len(state.rows))
        self.history[-1][state.rows[each.part]] = (sums / counts)[each.part]


__all__ = ["INITIAL_INTERVAL", "CacheDrift"]
