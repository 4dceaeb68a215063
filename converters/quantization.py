"""Float rows to int8, int4 or int2 codes with scales, to packed bytes and back, and the quantisation error.

A value is `code * scale`, symmetric, with zero point 0. Every scale is positive and a normal number.
Codes are computed from the scale as it is stored, so the reported error is the runtime's. int4 and
int2 scales are chosen for the least squared error. Results depend only on the input, not on the number of
threads or on how a tensor is cut into slices of rows. Scratch memory is a few MB a thread.

XNNPACK accepts these as constant weights of FULLY_CONNECTED: int8, int4 and int2 with one float32 scale a
row, int4 with one float16 scale per block of 32 columns. It packs blockwise scales as bfloat16, so those
chosen here have 8 significant bits: float16 and bfloat16 hold them exactly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

LOWEST = {8: -127, 4: -8, 2: -2}
HIGHEST = {8: 127, 4: 7, 2: 1}

_TILE = 1 << 16
"""Values that a thread works on at a time: 256 KB of float32, which fits its L2 cache."""

_SMALLEST_HALF = np.float32(2.0**-14)
"""Smallest normal float16."""
_LARGEST_HALF = np.float32(255 * 2.0**8)
"""Largest float16 of 8 significant bits."""
_SMALLEST_SINGLE = np.float32(2.0**-100)
"""Far below any weight that matters and far above float32's subnormals, inverse included."""

# Trial scales, as shares of the smallest scale that clips nothing. A trial is rated by the error of its codes
# with *their* best scale (least squares), so a coarse grid is enough.
_BLOCK_TRIALS = (1.0, 0.92, 0.84, 0.76)
_ROW_TRIALS = {
    4: (1.0, 0.9, 0.81, 0.73, 0.66, 0.59, 0.53, 0.43),
    2: (1.0, 0.8, 0.64, 0.51, 0.41, 0.33, 0.26, 0.17),
}


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: `bits` a value (32: float32, unquantised) and `block` columns a scale.

    block 0 is one float32 scale per row, otherwise one float16 scale per `block` columns.
    """

    bits: int
    block: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8, 32) or self.block < 0 or (self.bits == 32 and self.block):
            raise ValueError(f"no format has {self.bits} bits in blocks of {self.block}")

    def __str__(self) -> str:
        if self.bits == 32:
            return "float32"
        return f"int{self.bits} in blocks of {self.block}" if self.block else f"int{self.bits}"

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of a [rows, columns] matrix; (0,) for float32, which has none."""
        if self.bits == 32:
            return (0,)
        return (rows, columns // self.block) if self.block else (rows,)

    def code_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed codes of a [rows, columns] matrix."""
        return rows * columns * self.bits // 8

    def scale_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the scales of a [rows, columns] matrix."""
        return int(np.prod(self.scale_shape(rows, columns))) * (2 if self.block else 4)

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of codes and scales of a [rows, columns] matrix."""
        return self.code_bytes(rows, columns) + self.scale_bytes(rows, columns)


@dataclass(frozen=True)
class Quantized:
    """Rows of a matrix in a `Format`.

    `codes` is int8 [rows, columns]; for a float32 format the values themselves, float32.
    `scales` is float32 [rows], float16 [rows, columns / block], or float32 [0].
    """

    format: Format
    codes: NDArray[Any]
    scales: NDArray[Any]

    def dequantize(self) -> Floats:
        """Return the values that the codes stand for, float32 [rows, columns]."""
        values = self.codes.astype(np.float32)
        if self.format.bits == 32:
            return values
        rows, columns = values.shape
        blocks = values.reshape(rows, -1, self.format.block or max(columns, 1))
        blocks *= self.scales.astype(np.float32).reshape(rows, -1, 1)
        return values

    def packed(self) -> NDArray[np.uint8]:
        """Return the codes as the bytes of a TFLite buffer, flat."""
        if self.format.bits == 32:
            return np.ascontiguousarray(self.codes, dtype="<f4").reshape(-1).view(np.uint8)
        return pack(self.codes, self.format.bits)


def quantize(rows: Floats, format: Format) -> Quantized:
    """Quantise float32 [n, k] rows; each row depends on itself alone.

    int8 maps the row's largest magnitude to 127. int4 and int2 search scales for the least squared error.
    Raises ValueError if k is not a multiple of the block.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, columns = rows.shape
    if format.bits == 32:
        return Quantized(format, rows, np.empty(0, np.float32))
    if format.block and columns % format.block:
        raise ValueError(f"{columns} columns can't be cut into blocks of {format.block}")
    codes = np.empty((count, columns), np.int8)
    scales = np.empty(format.scale_shape(count, columns), np.float16 if format.block else np.float32)
    if format.block:
        blocks, block_codes = rows.reshape(-1, format.block), codes.reshape(-1, format.block)
        block_scales = scales.reshape(-1)
        _in_tiles(
            len(blocks),
            format.block,
            lambda part: _quantize_blocks(blocks[part], format.bits, block_codes[part], block_scales[part]),
        )
    else:
        _in_tiles(
            count, columns, lambda part: _quantize_rows(rows[part], format.bits, codes[part], scales[part])
        )
    return Quantized(format, codes, scales)


def half_scales(scales: Floats) -> Floats:
    """Round scales to what a blockwise format can hold: 8 significant bits, positive, normal in float16."""
    bits = np.clip(scales, _SMALLEST_HALF, _LARGEST_HALF).astype(np.float32).view(np.uint32)
    bits += np.uint32(0x8000)
    bits &= np.uint32(0xFFFF0000)
    return np.clip(bits.view(np.float32), _SMALLEST_HALF, _LARGEST_HALF)


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Pack codes into bytes, flat: int4 two a byte, low nibble first; int2 four a byte, lowest bits first.

    Raises ValueError if the codes do not fill whole bytes.
    """
    flat = np.ascontiguousarray(codes, dtype=np.int8).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat
    if flat.size % (8 // bits):
        raise ValueError(f"{flat.size} codes of {bits} bits do not fill whole bytes")
    if bits == 4:
        pairs = flat.view("<u2") & np.uint16(0x0F0F)
        pairs |= pairs >> np.uint16(4)
        return pairs.astype(np.uint8)
    quads = flat.view("<u4") & np.uint32(0x03030303)
    quads |= quads >> np.uint32(6)
    quads |= quads >> np.uint32(12)
    return quads.astype(np.uint8)


def unpack(data: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Undo `pack`: int8 codes, flat."""
    if bits == 8:
        return data.view(np.int8)
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    high = np.left_shift(data[:, None], shifts).view(np.int8)
    return (high >> np.int8(8 - bits)).reshape(-1)


class ErrorMeter:
    """Sums squared errors by group of tensors, for the converter's report."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, Format], tuple[int, float, float]] = {}

    def add(self, group: str, rows: Floats, quantized: Quantized) -> None:
        """Count the error of `quantized` against the float32 `rows` it was made from."""
        parts: list[tuple[float, float]] = []
        step = max(1, _TILE // max(rows.shape[1], 1))
        whole = quantized.format.bits == 32
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            scales = quantized.scales if whole else quantized.scales[part]
            values = Quantized(quantized.format, quantized.codes[part], scales).dequantize()
            original = rows[part]
            values -= original
            parts.append((_square_sum(values), _square_sum(original)))
        key = (group, quantized.format)
        values_so_far, error, energy = self._sums.get(key, (0, 0.0, 0.0))
        self._sums[key] = (
            values_so_far + rows.size,
            error + sum(part[0] for part in parts),
            energy + sum(part[1] for part in parts),
        )

    def relative(self, group: str) -> float:
        """Return a group's squared error over its sum of squares. Raises KeyError for an unknown group."""
        found = [sums for (name, _), sums in self._sums.items() if name == group]
        if not found:
            raise KeyError(group)
        energy = sum(sums[2] for sums in found)
        return sum(sums[1] for sums in found) / energy if energy else 0.0

    def lines(self) -> list[str]:
        """One line per group and format: values, format and the root of the relative squared error."""
        lines = []
        for (group, format), (count, error, energy) in self._sums.items():
            relative = (error / energy if energy else 0.0) ** 0.5
            lines.append(f"{group:<28} {format!s:<20} {count:>13,} values   error {relative:8.3%}")
        return lines


def tensor_group(name: str) -> str:
    """Group of a tensor for reports: its name without the layer, e.g. "layers.3.query" -> "query"."""
    return name.rsplit(".", 1)[-1]


def _square_sum(values: Floats) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _in_tiles(count: int, width: int, work: Callable[[slice], None]) -> None:
    """Call `work` for tiles of `count` rows of `width` values, on all CPUs."""
    step = max(1, _TILE // max(width, 1))
    tiles = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    workers = min(os.cpu_count() or 1, len(tiles))
    if workers <= 1:
        for tile in tiles:
            work(tile)
        return

    def every(first: int) -> None:
        for tile in tiles[first::workers]:
            work(tile)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(every, range(workers)))


def _quantize_rows(rows: Floats, bits: int, codes: NDArray[np.int8], scales: Floats) -> None:
    """Per-channel: fill `codes` and `scales` from float32 [n, k] rows."""
    if bits == 8:
        scales[:] = _widest(rows, 8, axis=1)
    else:
        scales[:] = _search(rows, bits, _ROW_TRIALS[bits], axis=1)
    work = np.empty_like(rows)
    _round(rows, np.float32(1) / scales[:, None], bits, work)
    np.copyto(codes, work, casting="unsafe")


def _quantize_blocks(blocks: Floats, bits: int, codes: NDArray[np.int8], scales: NDArray[np.float16]) -> None:
    """Blockwise: fill `codes` and `scales` from float32 [n, block].

    Works on the transpose, where the sums over a block are sums of whole arrays.
    """
    columns = np.ascontiguousarray(blocks.T)
    chosen = half_scales(_search(columns, bits, _BLOCK_TRIALS, axis=0))
    work = np.empty_like(columns)
    _round(columns, np.float32(1) / chosen, bits, work)
    codes[:] = work.astype(np.int8).T
    scales[:] = chosen


def _round(values: Floats, inverse: Floats, bits: int, out: Floats) -> None:
    np.multiply(values, inverse, out=out)
    np.rint(out, out=out)
    np.clip(out, np.float32(LOWEST[bits]), np.float32(HIGHEST[bits]), out=out)


def best_scales(columns: Floats, format: Format, weights: Floats) -> Floats:
    """Search scales, float32 [n], of least weighted squared error for [k, n] columns of a block or of rows.

    `weights` float32 [k] says how much an error in each column counts. The scales are not yet rounded.
    """
    if format.bits == 8:
        return _widest(columns, 8, axis=0)
    trials = _BLOCK_TRIALS if format.block else _ROW_TRIALS[format.bits]
    return _search(columns, format.bits, trials, axis=0, weights=weights)


def _widest(values: Floats, bits: int, axis: int) -> Floats:
    """The smallest scales along `axis` that clip nothing; 1 where all values are 0."""
    top = values.max(axis=axis, initial=0) / np.float32(HIGHEST[bits])
    bottom = values.min(axis=axis, initial=0) / np.float32(LOWEST[bits])
    widest = np.maximum(top, bottom)
    return np.where(widest > 0, np.maximum(widest, _SMALLEST_SINGLE), np.float32(1)).astype(np.float32)


def _search(
    values: Floats, bits: int, trials: tuple[float, ...], axis: int, weights: Floats | None = None
) -> Floats:
    """Scales of least squared error along `axis` of a 2-d array, as float32, before any rounding of them.

    For codes c of values x the best scale is x.c / c.c and the squared error it leaves x.x - (x.c)^2 / c.c:
    so the trial with the largest (x.c)^2 / c.c wins, and its least-squares scale is taken. With weights,
    these products are weighted sums.
    """
    sums = "ij,ij->j" if axis == 0 else "ij,ij->i"
    weighted = values if weights is None else values * np.expand_dims(weights, 1 - axis)
    widest = _widest(values, bits, axis)
    work, powers = np.empty_like(values), np.empty_like(values)
    best, gain = widest, np.full_like(widest, -1)
    for share in trials:
        inverse = np.float32(1) / (widest * np.float32(share))
        _round(values, np.expand_dims(inverse, axis), bits, work)
        along = np.einsum(sums, weighted, work)
        if weights is None:
            square = np.einsum(sums, work, work)
        else:
            np.multiply(work, work, out=powers)
            square = np.tensordot(weights, powers, (0, axis))
        square = np.maximum(square, _SMALLEST_SINGLE)
        trial_gain = along * along / square
        better = trial_gain > gain
        gain = np.where(better, trial_gain, gain)
        best = np.where(better, along / square, best)
    return np.where(best > 0, np.maximum(best, _SMALLEST_SINGLE), widest).astype(np.float32)
