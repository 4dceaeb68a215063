"""The KV cache: numpy arrays that the graph reads in place, and the masks that say which rows hold what.

Sliding-attention layers are rings of `sliding_window` rows: position p lies in row p % window. Caches of
full-attention layers start small and double, up to the context, so a short conversation does not pay for a
long one. Rows are float32 [1, kv_heads, rows, head_dim], aligned for LiteRT.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.architecture import Architecture, Attention
from edge.litert import aligned_array

Floats = NDArray[np.float32]

HIDDEN_FROM_VIEW = np.float32(-1e9)
"""What a mask adds to the score of a row that a query must not see."""

_FIRST_ROWS = 512


class KVCache:
    """K and V of the layers that own them, for `length` tokens of one conversation."""

    def __init__(self, arch: Architecture, context: int) -> None:
        self.arch, self.context = arch, context
        self.length = 0
        self.full_rows = min(_FIRST_ROWS, context)
        self.keys: dict[int, Floats] = {}
        self.values: dict[int, Floats] = {}
        for i in arch.owners:
            self._allocate(i, self.rows(arch.layers[i].attention))

    def rows(self, attention: Attention) -> int:
        """Rows allocated in the caches of an attention type."""
        return self.arch.sliding_window if attention == "sliding" else self.full_rows

    def truncate(self, length: int) -> bool:
        """Forget the tokens from `length` on. False, and nothing changed, if a ring lost what came before."""
        if length != self.length and self.length > self.arch.sliding_window:
            return False
        self.length = length
        return True

    def reserve(self, length: int) -> bool:
        """Make room for `length` tokens in all. True if the full-attention arrays were replaced."""
        if length <= self.full_rows:
            return False
        while self.full_rows < length:
            self.full_rows = min(2 * self.full_rows, self.context)
        for i in self.arch.owners:
            if self.arch.layers[i].attention == "full":
                old = self.keys[i], self.values[i]
                self._allocate(i, self.full_rows)
                self.keys[i][:, :, : self.length] = old[0][:, :, : self.length]
                self.values[i][:, :, : self.length] = old[1][:, :, : self.length]
        return True

    def append(self, keys: dict[int, Floats], values: dict[int, Floats], count: int) -> None:
        """Store the first `count` rows of each owner's new K and V [1, kv_heads, T, head_dim]."""
        window = self.arch.sliding_window
        skip = max(0, count - window)
        ring = np.arange(self.length + skip, self.length + count) % window
        straight = slice(self.length, self.length + count)
        for i in self.arch.owners:
            sliding = self.arch.layers[i].attention == "sliding"
            target, first = (ring, skip) if sliding else (straight, 0)
            self.keys[i][0, :, target] = _rows(keys[i], first, count, sliding)
            self.values[i][0, :, target] = _rows(values[i], first, count, sliding)
        self.length += count

    def write_mask(self, attention: Attention, mask: Floats) -> None:
        """Fill `mask` [1, 1, T, rows + T] for T new tokens at positions `length`...

        Key j is visible to query i iff j <= i, and on sliding layers also i - j < window.
        """
        width = mask.shape[2]
        rows = mask.shape[3] - width
        queries = self.length + np.arange(width)[:, None]
        keys = np.concatenate([self._positions(attention, rows), self.length + np.arange(width)])
        visible = (keys >= 0) & (keys <= queries)
        if attention == "sliding":
            visible &= queries - keys < self.arch.sliding_window
        mask[0, 0] = np.where(visible, np.float32(0), HIDDEN_FROM_VIEW)

    def _positions(self, attention: Attention, rows: int) -> NDArray[np.int64]:
        """Position held by each row of a cache, -1 where there is none."""
        slots = np.arange(rows)
        if attention == "sliding" and self.length > rows:
            return self.length - 1 - (self.length - 1 - slots) % rows
        return np.where(slots < self.length, slots, -1)

    def _allocate(self, owner: int, rows: int) -> None:
        shape = (1, self.arch.kv_heads, rows, self.arch.layers[owner].head_dim)
        self.keys[owner], self.values[owner] = aligned_array(shape), aligned_array(shape)


def _rows(new: Floats, first: int, count: int, ring: bool) -> Floats:
    """New rows in the axis order of the assignment: an index array moves its axis to the front."""
    part = new[0, :, first:count]
    return part.transpose(1, 0, 2) if ring else part
