"""How far the distributions that cached states give are from the exact ones, and how often rows refresh for that.

The drift is the KL divergence, in nats, of the cached from the exact distributions, averaged over a row's candidates.
"""

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

    def begin_step(self, state) -> None:
        """Make room for what this step measures."""
        nothing = torch.full(state.stop.shape, float("nan"), dtype=torch.float64, device=state.stop.device)
        self.history.append(nothing)

    def run(self, state, run, each):
        """Run a pass and measure.

        Args:
            run: gives a pass's [`CandidateLogits`]; with `whole=True` of whole rows, without the cache.
        """
        if each.partial:
            cached = run(each)
            if self.every_step:
                self._note(each, run(each, whole=True), cached)
            return cached
        stale = []
        if self.bound is not None:
            # What the old states would have said, before this pass overwrites them.
            for probe in state.partial_passes([row for row in each.numbers if state.progress.step[row] > 0]):
                stale.append((probe, run(probe)))
        exact = run(each)
        for probe, cached in stale:
            self._note(probe, exact.take(torch.searchsorted(exact.slots, cached.slots)), cached)
            drift, interval = self.history[-1][probe.rows], state.interval[probe.rows]
            changed = torch.where(drift > self.bound, interval // 2, interval * 2).clamp(min=1)
            state.interval[probe.rows] = torch.where(drift.isnan(), interval, changed)
        return exact

    def _note(self, each, exact, cached) -> None:
        drift = self.history[-1]
        sums, counts = torch.zeros_like(drift), torch.zeros_like(drift)
        size = max(1, _ELEMENTS // exact.logits.shape[-1])
        parts = (values.split(size) for values in (exact.logits, cached.logits, cached.rows, cached.valid))
        for p, q, rows, valid in zip(*parts):
            p, q = p.double().log_softmax(dim=-1), q.double().log_softmax(dim=-1)
            sums.index_add_(0, rows, torch.where(valid, (p.exp() * (p - q)).sum(dim=-1), 0.0))
            counts.index_add_(0, rows, valid.double())
        drift[each.rows] = (sums / counts)[each.rows]


__all__ = ["INITIAL_INTERVAL", "CacheDrift"]
