"""Keys and values of whole rows, for steps that run only a part of the row: Fast-dLLM's caches (arXiv 2505.22618).

Attention has no direction here, so a committed token changes the states of everything before it, and cached states grow
stale: a cache is an approximation. A full pass writes every slot; a partial one overwrites the slots of the positions
that it runs and attends to all of them, each key where it was in the full pass.
"""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


@dataclass
class CachedPass:
    """What the current pass runs, which all layers of a cache look up.

    Args:
        num_rows: rows that have slots.
        row_length: positions of a row.
        rows (`(rows of the pass,)`): their slots.
        positions (`(rows of the pass, positions)`): of each row; `None` for all of them.
        partial: whether the pass attends to the stored states of the other positions, too.
        versions: of each row, one behind the other.
    """

    num_rows: int
    row_length: int
    rows: torch.LongTensor | None = None
    positions: torch.LongTensor | None = None
    partial: bool = False
    versions: int = 1


class DenoisingCacheLayer(CacheLayerMixin):
    """One layer's keys and values, `(rows, heads, row length, head width)` each."""

    def __init__(self, current: CachedPass):
        super().__init__()
        self.current = current

    def lazy_initialization(self, key_states, value_states):
        shape = (self.current.num_rows, key_states.shape[1], self.current.row_length)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Write the states of the pass; returns what it attends to.

        Args:
            key_states, value_states: `(rows of the pass, heads, positions of the pass, head width)`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, positions = self.current.rows, self.current.positions
        if self.current.versions > 1:  # these are not kept: no pass attends to stored states of what it runs
            stored, passed = (self.keys[rows], self.values[rows]), (key_states, value_states)
            return tuple(torch.cat(pair, dim=2) for pair in zip(stored, passed))
        if positions is None:
            self.keys[rows], self.values[rows] = key_states, value_states
            return key_states, value_states
        place = (rows[:, None], slice(None), positions)
        self.keys[place] = key_states.transpose(1, 2)
        self.values[place] = value_states.transpose(1, 2)
        if not self.current.partial:
            return key_states, value_states
        if len(rows) == self.current.num_rows:
            return self.keys, self.values
        return self.keys[rows], self.values[rows]

    def keep(self, rows):
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def join(self, other, sides):
        if not self.is_initialized:  # nothing has been run yet
            return

        def joined(ours, theirs):
            if theirs is None:
                theirs = ours.new_zeros(other.current.num_rows, *ours.shape[1:])
            return torch.cat([part for pair in zip(ours.chunk(sides), theirs.chunk(sides)) for part in pair])

        self.keys, self.values = joined(self.keys, other.keys), joined(self.values, other.values)

    def get_mask_sizes(self, query_length):
        if not self.current.partial:
            return query_length, 0
        return self.current.row_length + (query_length if self.current.versions > 1 else 0), 0

    def get_seq_length(self):
        return self.current.row_length if self.is_initialized else 0

    def get_max_length(self):
        return self.current.row_length


class DenoisingCache(Cache):
    """A [`DenoisingCacheLayer`] for each layer, and which rows and positions the current pass runs.

    Args:
        num_layers: of the language model.
        num_rows: rows of the batch, those that they are contrasted with included.
        row_length: positions of a row: prompt, canvas and suffix.
    """

    def __init__(self, num_layers: int, num_rows: int, row_length: int):
        # Layers that knew the cache itself would keep all memory until Python looks for cycles.
        self.current = CachedPass(num_rows, row_length)
        super().__init__(layers=[DenoisingCacheLayer(self.current) for _ in range(num_layers)])
        self.slots: torch.LongTensor | None = None  # of each row, once some have left

    def select(
        self, rows: torch.LongTensor, positions: torch.LongTensor | None, partial: bool, versions: int = 1
    ) -> "DenoisingCache":
        """Say what the next pass runs.

        Args:
            rows (`(rows,)`): in ascending order.
            positions (`(rows, positions)`): of each row; `None` for all of them.
            partial: whether the pass attends to the stored states of the other positions, too.
            versions: of each row, one behind the other.
        """
        self.current.rows = rows if self.slots is None else self.slots[rows]
        self.current.positions, self.current.partial, self.current.versions = positions, partial, versions
        return self

    def spread(self, num_rows: int) -> None:
        """Give all of `num_rows` rows the states of the first, and those that they are contrasted with likewise."""
        for layer in self.layers:
            for states in (*layer.keys.split(num_rows), *layer.values.split(num_rows)):
                states.copy_(states[:1].expand_as(states))

    def keep(self, rows: torch.LongTensor, num_rows: int) -> None:
        """Let go of all rows but some, so that passes of these need no copies of their states.

        Args:
            rows: their numbers, in ascending order.
            num_rows: how many rows the batch has.
        """
        for layer in self.layers:
            layer.keep(rows if self.slots is None else self.slots[rows])
        self.slots = torch.zeros(num_rows, dtype=torch.long, device=rows.device)
        self.slots[rows] = torch.arange(len(rows), device=rows.device)
        self.current.num_rows = len(rows)

    def join(self, other: "DenoisingCache", sides: int) -> None:
        """Append the rows of another cache of the same row length.

        Args:
            sides: 2 if rows that others are contrasted with follow these, and then stay behind all of them; or else 1.
        """
        for layer, theirs in zip(self.layers, other.layers):
            layer.join(theirs, sides)
        self.current.num_rows += other.current.num_rows


__all__ = ["DenoisingCache"]
