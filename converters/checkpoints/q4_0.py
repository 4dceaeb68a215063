"""Weights on the Q4_0 grid: groups of 32 along a row, one float16 scale d, values d * code, codes -8..7.

They come packed, in GGUF files, or as bfloat16 values rounded from that grid (the `qat-q4_0-unquantized`
releases). llama.cpp's quantiser takes d = peak / -8, peak being the value of largest magnitude, so d is
negative where the peak is positive. LiteRT refuses negative scales: such a group is exact with -d and
negated codes unless it uses code -8, for there is no code 8.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from converters.checkpoints.base import CodeRows, ExactCodes
from converters.checkpoints.tensor_reader import Floats, Stored, StoredTensor, bfloat16_rows, require_finite

GROUP = 32
_LOW, _HIGH = -8, 7
_SAMPLE_ROWS = 64
_SMALLEST_NORMAL = np.float32(2.0**-14)  # of float16


def carried(codes: NDArray[np.int8], scales: Floats, on_grid: NDArray[np.bool_]) -> CodeRows:
    """The same values with non-negative scales, where that is possible.

    `codes` int8 [rows, groups, 32], `scales` float32 [rows, groups] of either sign, `on_grid` bool [rows,
    groups]. Groups whose scale is 0 get zero codes and the smallest normal scale (LiteRT refuses 0 too).
    """
    negative = scales < 0
    lost = negative & (codes == _LOW).any(axis=-1)
    flipped = np.where(negative[..., None], np.minimum(-codes.astype(np.int16), _HIGH), codes).astype(np.int8)
    flipped[scales == 0] = 0
    positive = np.where(scales == 0, _SMALLEST_NORMAL, np.abs(scales))
    return CodeRows(flipped.reshape(len(codes), -1), positive, on_grid & ~lost)


def q4_0_grid(values: Floats) -> tuple[NDArray[np.int8], Floats, NDArray[np.bool_]]:
    """Codes and scales of bfloat16 values, float32 `values` [rows, width], and where they are exact.

    Returns int8 [rows, groups, 32], float32 [rows, groups] (float16 values of either sign) and bool [rows,
    groups]. Tries d = peak / -8, then positive scales that put the peak on a smaller code.
    """
    blocks = values.reshape(-1, GROUP)
    high, low = blocks.max(axis=1), blocks.min(axis=1)
    peak = np.where(high > -low, high, low)
    scales = _float16(peak / np.float32(_LOW))
    codes, fits = _fit(blocks, scales)
    for code in range(_HIGH, 0, -1):
        left = np.flatnonzero(~fits)
        if not left.size:
            break
        again = _float16(np.abs(peak[left]) / np.float32(code))
        codes[left], fits[left] = _fit(blocks[left], again)
        scales[left] = again
    shape = (len(values), -1)
    return codes.reshape(*shape, GROUP), scales.reshape(shape), fits.reshape(shape)


def _float16(values: Floats) -> Floats:
    with np.errstate(over="ignore"):  # an infinite scale fits nothing
        return values.astype(np.float16).astype(np.float32)


def _fit(blocks: Floats, scales: Floats) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """The nearest codes, and where scale * code, rounded to bfloat16, equals the block."""
    divisors = np.where(scales == 0, np.float32(1), scales)[:, None]
    codes = np.clip(np.rint(blocks / divisors), _LOW, _HIGH)
    with np.errstate(invalid="ignore", over="ignore"):
        fits = (_bfloat16(codes * scales[:, None]) == blocks).all(axis=1)
    return codes.astype(np.int8), fits


def _bfloat16(values: Floats) -> Floats:
    """Rounded to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded: Floats = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded


class GgufCodes(ExactCodes):
    """The blocks of a Q4_0 tensor in a GGUF file: float16 d, then 16 bytes of codes, each stored plus 8.

    The low nibbles hold the first 16 codes, the high ones the others.
    """

    bits, group, scale_type = 4, GROUP, "F16"

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    def rows(self, start: int, stop: int) -> CodeRows:
        """See `ExactCodes.rows`."""
        blocks = self._stored.read(start, stop).reshape(stop - start, -1, 2 + GROUP // 2)
        scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
        require_finite(scales, self._stored)
        halves = blocks[..., 2:]
        nibbles = np.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=-1)
        codes = nibbles.view(np.int8) - np.int8(8)
        return carried(codes, scales, np.ones(scales.shape, np.bool_))


class GridTensor(StoredTensor):
    """A bfloat16 matrix, whose values may lie on the Q4_0 grid."""

    def __init__(self, stored: Stored, shape: tuple[int, ...]) -> None:
        super().__init__(stored, shape, "BF16", bfloat16_rows)

    def codes(self) -> ExactCodes | None:
        """The codes if rows from all over the tensor lie on the grid (a stray group is not `exact`)."""
        if self.shape[1] % GROUP:
            return None
        picks = np.unique(np.linspace(0, self.shape[0] - 1, _SAMPLE_ROWS).astype(int)).tolist()
        sample = np.concatenate([self.rows(row, row + 1) for row in picks])
        return _GridCodes(self) if sample.any() and q4_0_grid(sample)[2].all() else None


class _GridCodes(ExactCodes):
    """Codes recovered from the values of a `GridTensor`."""

    bits, group, scale_type = 4, GROUP, "F16"

    def __init__(self, tensor: GridTensor) -> None:
        self._tensor = tensor

    def rows(self, start: int, stop: int) -> CodeRows:
        """See `ExactCodes.rows`."""
        return carried(*q4_0_grid(self._tensor.rows(start, stop)))
