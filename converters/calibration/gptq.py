"""GPTQ: codes of least error at a matrix's output, instead of least error in its weights.

Replacing a matrix W [n, k] with Q gives, for inputs x, the expected squared output error
tr((Q - W) H (Q - W)^T) with H = E[x x^T]. Inputs of a language model are strongly correlated, so an error in
one column can be compensated in others. With H = L L^T (Cholesky, L lower triangular) the error of a row is

    sum over j of  L_jj^2 (D_j + sum over i > j of D_i L_ij / L_jj)^2,      D = Q - W

so columns are rounded from the last to the first, each to the value that cancels the error of those after it
(GPTQ, Frantar et al. 2022; Chee et al. 2023 show that their LDLQ is the same). Sweeps over the columns then
move one scale or code at a time to its best value given all others, which can only lower the error.

Columns keep their order and scales stay positive, as XNNPACK's formats require. Rows are independent.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.calibration.linear_algebra import cholesky, solve
from converters.quantization import (
    HIGHEST,
    LOWEST,
    Floats,
    Format,
    Quantized,
    best_scales,
    half_scales,
)

DAMPING = 0.1
"""Share of the mean of H's diagonal that is added to it, because calibration sees few inputs and must not
rely on directions in which it saw none."""

_SWEEPS = 2
_GROUP = 32
"""Columns that are rounded one by one before one matrix product updates the rest."""

_SLICE_ROWS = 1024
"""Rows that a thread works on at a time; constant, so results do not depend on the machine."""


@dataclass(frozen=True)
class Objective:
    """The error measure of a matrix with k columns.

    `moment` is H, damped, float32 [k, k]; `feedback` L with each column divided by its diagonal; `weights`
    float32 [k] the squares of that diagonal.
    """

    moment: Floats
    feedback: Floats
    weights: Floats

    @classmethod
    def of(cls, moment: Floats, damping: float = DAMPING) -> Objective:
        """The objective of a second moment x^T x, float32 [k, k]. Reads its lower triangle and overwrites it.

        Raises ValueError if it is not finite.
        """
        mean = float(moment.diagonal().mean(dtype=np.float64))
        if not np.isfinite(mean):
            raise ValueError("the second moment is not finite")
        diagonal = np.einsum("ii->i", moment)
        diagonal += np.float32(damping * mean if mean > 0 else 1)
        factor = cholesky(moment)
        for column in range(1, len(moment)):
            moment[:column, column] = moment[column, :column]
        spread = factor.diagonal().copy()
        factor /= spread
        return cls(moment, factor, np.square(spread))

    def solve(self, right: Floats) -> Floats:
        """`right` [n, k] times the inverse of H."""
        return solve(self.feedback, self.weights, right)

    def error(self, rows: Floats, quantized: Quantized) -> float:
        """Squared output error of `quantized` relative to the squared output of float32 `rows` [n, k]."""
        difference = quantized.dequantize() - rows
        error = float(np.einsum("ij,ij->", difference @ self.moment, difference, dtype=np.float64))
        whole = float(np.einsum("ij,ij->", rows @ self.moment, rows, dtype=np.float64))
        return error / whole if whole else 0.0


def quantize_for(objective: Objective, rows: Floats, format: Format) -> Quantized:
    """Choose codes for float32 `rows` [n, k]. Raises ValueError if k is not a multiple of the block."""
    count, columns = rows.shape
    if format.block and columns % format.block:
        raise ValueError(f"{columns} columns can't be cut into blocks of {format.block}")
    starts = range(0, count, _SLICE_ROWS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(
            pool.map(lambda start: _slice(objective, rows[start : start + _SLICE_ROWS], format), starts)
        )
    codes = np.concatenate([part[0] for part in parts])
    scales = np.concatenate([part[1] for part in parts])
    return Quantized(format, codes, scales.astype(np.float16) if format.block else scales[:, 0])


def _slice(objective: Objective, rows: Floats, format: Format) -> tuple[NDArray[np.int8], Floats]:
    work = _Columns(objective, np.ascontiguousarray(rows.T), format)
    work.round_with_feedback()
    for _ in range(_SWEEPS):
        work.sweep()
    return np.ascontiguousarray(work.codes.astype(np.int8).T), np.ascontiguousarray(work.scales.T)


class _Columns:
    """The codes so far of a slice of a matrix, transposed: arrays are [k, n], so a column is contiguous.

    `difference` is Q - W; `scales` [k / block, n], or [1, n] without blocks.
    """

    def __init__(self, objective: Objective, weights: Floats, format: Format) -> None:
        columns, rows = weights.shape
        self.objective, self.weights, self.format = objective, weights, format
        self.codes = np.zeros_like(weights)
        self.difference = np.zeros_like(weights)
        self.limits = np.float32(LOWEST[format.bits]), np.float32(HIGHEST[format.bits])
        self.group = format.block or _GROUP
        if format.block:
            self.scales = np.empty((columns // format.block, rows), np.float32)
        else:
            self.scales = best_scales(weights, format, objective.weights)[None]

    def round_with_feedback(self) -> None:
        """Choose all codes once, from the last column to the first, with error feedback."""
        feedback, columns = self.objective.feedback, len(self.weights)
        for stop in range(columns, 0, -self.group):
            start = max(0, stop - self.group)
            target = self.weights[start:stop] - feedback[stop:, start:stop].T @ self.difference[stop:]
            if self.format.block:
                self.scales[start // self.group] = half_scales(
                    best_scales(target, self.format, self.objective.weights[start:stop])
                )
            scale, inverse = self._scale(start)
            for column in range(stop - 1, start - 1, -1):
                change = self._round(column, target[column - start], scale, inverse)
                target[: column - start] -= feedback[column, start:column, None] * change

    def sweep(self) -> None:
        """Improve scales and codes, a group of columns at a time, given all others."""
        moment = self.objective.moment
        if not self.format.block:
            self._refit_row_scales()
        for start in range(0, len(self.weights), self.group):
            part = slice(start, min(start + self.group, len(self.weights)))
            gradient = moment[part] @ self.difference
            local = moment[part, part]
            if self.format.block:
                self._refit_block_scale(part, gradient, local)
            scale, inverse = self._scale(start)
            for column in range(part.start, part.stop):
                at = column - start
                before = self.difference[column].copy()
                wanted = before - gradient[at] * np.float32(1 / local[at, at])
                wanted += self.weights[column]
                change = self._round(column, wanted, scale, inverse)
                gradient[at + 1 :] += local[at + 1 :, at, None] * (change - before)

    def _scale(self, start: int) -> tuple[Floats, Floats]:
        scale = self.scales[start // self.group if self.format.block else 0]
        return scale, np.float32(1) / scale

    def _round(self, column: int, wanted: Floats, scale: Floats, inverse: Floats) -> Floats:
        """Set a column to the codes nearest to `wanted`; returns its new difference."""
        codes: Floats = self.codes[column]
        difference: Floats = self.difference[column]
        np.multiply(wanted, inverse, out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, *self.limits, out=codes)
        np.multiply(codes, scale, out=difference)
        difference -= self.weights[column]
        return difference

    def _refit_block_scale(self, part: slice, gradient: Floats, local: Floats) -> None:
        """Move a block's scales to the least error given all codes, if the rounded scale lowers it."""
        codes, scale = self.codes[part], self.scales[part.start // self.group]
        curvature = np.einsum("ij,ij->j", codes, local @ codes)
        slope = np.einsum("ij,ij->j", codes, gradient)
        step = half_scales(scale - slope / np.maximum(curvature, np.float32(1e-30))) - scale
        step = np.where(step * (2 * slope + step * curvature) < 0, step, np.float32(0))
        scale += step
        change = codes * step
        self.difference[part] += change
        gradient += local @ change

    def _refit_row_scales(self) -> None:
        """Move rows' scales to the least error given the codes, by a half at most: they stay positive."""
        moment, scale = self.objective.moment, self.scales[0]
        slope = np.einsum("ij,ij->j", self.codes, moment @ self.difference)
        curvature = np.einsum("ij,ij->j", self.codes, moment @ self.codes)
        scale -= np.clip(slope / np.maximum(curvature, np.float32(1e-30)), -0.5 * scale, 0.5 * scale)
        np.multiply(self.codes, scale, out=self.difference)
        self.difference -= self.weights
