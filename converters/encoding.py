"""Encodes rows of tensors: the checkpoint's own codes are kept, other values are quantised.

A kept group has the same codes and scale, bit for bit. A group that can't be kept (LiteRT accepts no scale
that is negative, zero or subnormal) is quantised again from its values, which loses less than clipping codes.
Slices are read and quantised on all CPUs and returned in order. Only a few slices are in memory at a time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from converters.checkpoints.base import CodeRows, ExactCodes, LazyTensor
from converters.quantization import ErrorMeter, Floats, Format, Quantized, quantize, tensor_group

_SLICE = 1 << 20
"""Values read and quantised at a time: 2 MB of bfloat16, 4 MB of float32."""

_WORKERS = os.cpu_count() or 1


class Quantizer(Protocol):
    """Turns rows of a tensor into codes."""

    def codes_for(self, name: str, start: int, rows: Floats, format: Format) -> Quantized:
        """Codes of `rows`, float32 [n, k]: rows `start` to `start + n` of tensor `name`.

        Called from several threads; the result depends only on these arguments.
        """


class NearestCodes:
    """The quantiser without calibration: the codes of a row depend only on its values."""

    def codes_for(self, name: str, start: int, rows: Floats, format: Format) -> Quantized:
        """See `Quantizer.codes_for`."""
        return quantize(rows, format)


@dataclass(frozen=True)
class _Slice:
    values: Floats
    quantized: Quantized
    kept: int
    """Groups kept bit for bit."""


class Encoder:
    """Encodes tensors one after the other and sums up their errors.

    `carried` are the stored codes to keep, by tensor. `advance` is called with the tensor and the
    number of its values that have been encoded since the last call.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        carried: Mapping[str, ExactCodes],
        quantizer: Quantizer,
        advance: Callable[[str, int], None],
    ) -> None:
        self.errors = ErrorMeter()
        self.stored_groups = self.kept_groups = 0
        self._tensors, self._carried, self._quantizer, self._advance = tensors, carried, quantizer, advance

    def encode(self, name: str, format: Format, width: int) -> Iterator[Quantized]:
        """Codes of a tensor in order, as rows of `width` columns (a part of the tensor's own row, or all)."""
        rows, columns = self._tensors[name].shape
        step = max(1, _SLICE // columns)
        starts = range(0, rows, step)
        with ThreadPoolExecutor(_WORKERS) as pool:
            slices = (
                pool.submit(self._slice, name, start, min(start + step, rows), format, width)
                for start in starts
            )
            for part in _in_order(slices, _WORKERS + 1):
                self.errors.add(tensor_group(name), part.values, part.quantized)
                if name in self._carried:
                    self.stored_groups += part.values.size // (format.block or width)
                    self.kept_groups += part.kept
                yield part.quantized
                self._advance(name, part.values.size)

    def report_lines(self) -> list[str]:
        """The error of each group of tensors, and the share of the checkpoint's own codes that was kept."""
        lines, stored, kept = self.errors.lines(), self.stored_groups, self.kept_groups
        if stored:
            lines.append(
                f"{kept / stored:.1%} of the checkpoint's {stored:,} groups of codes are kept bit for bit"
            )
        return lines

    def _slice(self, name: str, start: int, stop: int, format: Format, width: int) -> _Slice:
        values = self._tensors[name].rows(start, stop).reshape(-1, width)
        first = start * (len(values) // (stop - start))
        if name not in self._carried:
            return _Slice(values, self._quantizer.codes_for(name, first, values, format), 0)
        stored = self._carried[name].rows(start, stop)
        keep = stored.exact.reshape(-1) & _usable(stored.scales.reshape(-1), format)
        if keep.all():
            return _Slice(values, _as_stored(stored, format, values.shape), keep.size)
        fresh = self._quantizer.codes_for(name, first, values, format)
        return _Slice(values, _merged(stored, keep, fresh), int(keep.sum()))


def _in_order(work: Iterator[Future[_Slice]], ahead: int) -> Iterator[_Slice]:
    """Results in order, with at most `ahead` of them running or waiting."""
    pending: deque[Future[_Slice]] = deque()
    for future in work:
        pending.append(future)
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _usable(scales: Floats, format: Format) -> NDArray[np.bool_]:
    """Marks the scales that LiteRT accepts: positive and normal numbers of the format's type."""
    limits = np.finfo(np.float16 if format.block else np.float32)
    usable: NDArray[np.bool_] = (scales >= limits.smallest_normal) & (scales <= limits.max)
    return usable


def _as_stored(stored: CodeRows, format: Format, shape: tuple[int, ...]) -> Quantized:
    scales = stored.scales.astype(np.float16 if format.block else np.float32)
    rows, width = shape
    return Quantized(format, stored.codes.reshape(shape), scales.reshape(format.scale_shape(rows, width)))


def _merged(stored: CodeRows, keep: NDArray[np.bool_], fresh: Quantized) -> Quantized:
    """Stored groups where `keep` is true, those of `fresh` elsewhere."""
    group = fresh.codes.size // keep.size
    codes = np.where(keep[:, None], stored.codes.reshape(-1, group), fresh.codes.reshape(-1, group))
    scales = np.where(keep, stored.scales.reshape(-1), fresh.scales.reshape(-1)).astype(fresh.scales.dtype)
    return Quantized(fresh.format, codes.reshape(fresh.codes.shape), scales.reshape(fresh.scales.shape))
