"""The KV cache: numpy arrays that the graph reads in place, and the masks that hide rows from queries.

Position p is in row p; on sliding-attention layers, in row p % window. Caches start small and double, up to
the context or, on sliding-attention layers, the window; those are then rings. A short conversation therefore
needs little memory.
Rows are float32 [1, kv_heads, rows, head_dim], aligned for LiteRT.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edge.bundles.architecture import Architecture, Attention
from edge.runtime.signature import aligned_array

Floats = NDArray[np.float32]

HIDDEN_FROM_VIEW = np.float32(-1e9)
"""The mask value for a row that a query must not see; it is added to the attention score."""

_FIRST_ROWS = 128


class KVCache:
    """K and V of the layers that own them, for `length` tokens of one conversation.

    `rows` is the current number of rows in the caches of each attention type.
    """

    def __init__(self, arch: Architecture, context: int) -> None:
        self.arch = arch
        self.length = 0
        self._most: dict[Attention, int] = {"sliding": arch.sliding_window, "full": context}
        self.rows = {attention: min(_FIRST_ROWS, most) for attention, most in self._most.items()}
        self.keys: dict[int, Floats] = {}
        self.values: dict[int, Floats] = {}
        for i in arch.owners:
            self._allocate(i)

    def truncate(self, length: int) -> bool:
        """Drop the tokens from `length` on. False, with no change, if a ring lost earlier ones."""
        if length != self.length and self.length > self.arch.sliding_window:
            return False
        self.length = length
        return True

    def reserve(self, length: int) -> bool:
        """Make room for `length` tokens in total. True if arrays were replaced with larger ones."""
        grown = set[Attention]()
        for attention, most in self._most.items():
            while self.rows[attention] < min(length, most):
                self.rows[attention] = min(2 * self.rows[attention], most)
                grown.add(attention)
        for i in self.arch.owners:
            if self.arch.layers[i].attention in grown:
                old, stored = (self.keys[i], self.values[i]), min(self.length, self.keys[i].shape[2])
                self._allocate(i)
                self.keys[i][:, :, :stored] = old[0][:, :, :stored]
                self.values[i][:, :, :stored] = old[1][:, :, :stored]
        return bool(grown)

    def append(self, keys: dict[int, Floats], values: dict[int, Floats], count: int) -> None:
        """Store the first `count` rows of each owner's new K and V [1, kv_heads, T, head_dim]."""
        places = {attention: self._places(attention, count) for attention in self._most}
        for i in self.arch.owners:
            for new, row in places[self.arch.layers[i].attention]:
                self.keys[i][:, :, row] = keys[i][:, :, new]
                self.values[i][:, :, row] = values[i][:, :, new]
        self.length += count

    def _places(self, attention: Attention, count: int) -> list[tuple[slice, slice]]:
        """Map `count` new rows to rows of a cache, as pairs of slices (new rows, cache rows)."""
        if attention == "full":
            return [(slice(0, count), slice(self.length, self.length + count))]
        window = self.arch.sliding_window
        skipped = max(0, count - window)
        first = (self.length + skipped) % window
        turn = min(count, skipped + window - first)
        runs = [(slice(skipped, turn), slice(first, first + turn - skipped))]
        return runs if turn == count else [*runs, (slice(turn, count), slice(0, count - turn))]

    def snapshot(self) -> Iterator[tuple[Floats, Floats]]:
        """K and V of each owner as contiguous copies of the rows in use, [1, kv_heads, used, head_dim]."""
        for i in self.arch.owners:
            used = self._used(i, self.length)[2]
            yield (
                np.ascontiguousarray(self.keys[i][:, :, :used]),
                np.ascontiguousarray(self.values[i][:, :, :used]),
            )

    def restore(self, length: int, content: Floats) -> bool:
        """Load `length` tokens from `content`, a flat `snapshot`. Call `reserve` first.

        False, with the cache unchanged, if the size of `content` does not match.
        """
        shapes = [self._used(i, length) for i in self.arch.owners for _ in range(2)]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        if content.size != ends[-1]:
            return False
        targets = [array for i in self.arch.owners for array in (self.keys[i], self.values[i])]
        for target, shape, end in zip(targets, shapes, ends, strict=True):
            target[:, :, : shape[2]] = content[end - int(np.prod(shape)) : end].reshape(shape)
        self.length = length
        return True

    def keys_of(self, owner: int) -> Floats:
        """The K rows in the cache of a layer that owns them, the latest last: [kv_heads, n, head_dim]."""
        positions = self._positions(self.arch.layers[owner].attention, self.keys[owner].shape[2])
        order = np.argsort(positions)
        keys: Floats = self.keys[owner][0][:, order[positions[order] >= 0]]
        return keys

    def _used(self, owner: int, length: int) -> tuple[int, int, int, int]:
        layer = self.arch.layers[owner]
        return 1, self.arch.kv_heads, min(length, self._most[layer.attention]), layer.head_dim

    def write_mask(self, attention: Attention, mask: Floats) -> None:
        """Fill `mask` [1, 1, T, rows + T] for T new tokens, the first at position `length`.

        Key j is visible to query i iff j <= i, and on sliding layers also i - j < window.
        """
        width = mask.shape[2]
        rows = mask.shape[3] - width
        queries = self.length + np.arange(width)[:, None]
        window = self.arch.sliding_window
        first = np.maximum(queries - window + 1, 0) if attention == "sliding" else np.zeros((1, 1))
        held, new = self._positions(attention, rows), self.length + np.arange(width)
        mask[0, 0, :, :rows] = np.where(held >= first, np.float32(0), HIDDEN_FROM_VIEW)
        visible = (new >= first) & (new <= queries)
        mask[0, 0, :, rows:] = np.where(visible, np.float32(0), HIDDEN_FROM_VIEW)

    def _positions(self, attention: Attention, rows: int) -> NDArray[np.int64]:
        """The position in each row of a cache, -1 for an unused row."""
        slots = np.arange(rows)
        if attention == "sliding" and self.length > rows:
            return self.length - 1 - (self.length - 1 - slots) % rows
        return np.where(slots < self.length, slots, -1)

    def _allocate(self, owner: int) -> None:
        layer = self.arch.layers[owner]
        shape = (1, self.arch.kv_heads, self.rows[layer.attention], layer.head_dim)
        self.keys[owner], self.values[owner] = aligned_array(shape), aligned_array(shape)
