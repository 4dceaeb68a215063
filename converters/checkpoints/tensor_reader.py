"""Bytes of a tensor in a file, converted to float32 a slice of rows at a time.

Slices are read, not mapped: only the slice is resident, and a file that is truncated meanwhile gives an
error instead of a bus error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.checkpoints.base import LazyTensor
from edge.errors import CheckpointError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored: `row_bytes` bytes for each index of the first dimension, from `offset` on."""

    file: Path
    name: str
    offset: int
    row_bytes: int

    def read(self, start: int, stop: int) -> Bytes:
        """Bytes of rows `start` to `stop` as uint8 [stop - start, row_bytes].

        Raises CheckpointError if the file can't be read or is truncated.
        """
        count = (stop - start) * self.row_bytes
        try:
            raw = np.fromfile(self.file, np.uint8, count, offset=self.offset + start * self.row_bytes)
        except OSError as error:
            raise CheckpointError(f"{self.file}: tensor {self.name}: can't be read: {error}") from error
        if raw.size != count:
            raise CheckpointError(f"{self.file}: tensor {self.name}: the file is truncated; fetch it again")
        return raw.reshape(stop - start, self.row_bytes)


class StoredTensor(LazyTensor):
    """A tensor of one file, decoded by `decode`: uint8 [rows, row_bytes] -> float32 [rows, ...].

    `added` is added to every value (1 for the norms of Gemma 3's safetensors, which store w for a factor of 1
    + w).
    """

    def __init__(
        self,
        stored: Stored,
        shape: tuple[int, ...],
        source_type: str,
        decode: Callable[[Bytes], Floats],
        added: float = 0.0,
    ) -> None:
        self.name = stored.name
        self.shape = shape
        self.source_type = source_type
        self._stored = stored
        self._decode = decode
        self._added = np.float32(added)

    def rows(self, start: int, stop: int) -> Floats:
        """See `LazyTensor.rows`."""
        values = self._decode(self._stored.read(start, stop)).reshape(stop - start, *self.shape[1:])
        if self._added:
            values = values + self._added
        require_finite(values, self._stored)
        return values


def require_finite(values: Floats, stored: Stored) -> None:
    """Raise CheckpointError, naming the tensor, if `values` has a NaN or an infinity."""
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name}: has NaN or infinite values; the file is damaged or the"
            " training went wrong"
        )


def float32_rows(raw: Bytes) -> Floats:
    """Little-endian float32."""
    return raw.view("<f4").astype(np.float32, copy=False)


def float16_rows(raw: Bytes) -> Floats:
    """Little-endian float16, widened."""
    return raw.view("<f2").astype(np.float32)


def bfloat16_rows(raw: Bytes) -> Floats:
    """bfloat16, the upper half of a float32, widened (numpy has no such type)."""
    wide = raw.view("<u2").astype(np.uint32)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)
