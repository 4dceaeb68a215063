"""Cholesky factor, solver and accumulated products of large float32 matrices, in NumPy.

They work in blocks: nearly all of the work is matrix products, which BLAS does fast, and no step needs memory
for a further copy of a [k, k] matrix. NumPy's own `cholesky` takes twice as long, its general `solve` four
times as long as a solver that has the factor.
"""

from __future__ import annotations

import numpy as np

from converters.quantization import Floats

_BLOCK = 64
_PANEL = 1024


def cholesky(matrix: Floats) -> Floats:
    """The lower triangular L with L L^T = `matrix` [k, k], of which the lower triangle is read.

    Raises numpy.linalg.LinAlgError if it is not positive definite.
    """
    factor = np.zeros_like(matrix)
    for start in range(0, len(matrix), _BLOCK):
        block, below = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        left = factor[block, :start].T
        factor[block, block] = np.linalg.cholesky(matrix[block, block] - factor[block, :start] @ left)
        rest = matrix[below, block] - factor[below, :start] @ left
        factor[below, block] = rest @ np.linalg.inv(factor[block, block]).T
    return factor


def solve(unit_lower: Floats, diagonal: Floats, right: Floats) -> Floats:
    """`right` [n, k] times the inverse of L diag(d) L^T, for a unit lower triangular L [k, k] and d [k]."""
    solved = np.array(right.T, np.float32, order="C")
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(unit_lower), _BLOCK)]
    inverses = [np.linalg.inv(unit_lower[block, block]) for block in blocks]
    for block, inverse in zip(blocks, inverses, strict=True):
        part = solved[block] - unit_lower[block, : block.start] @ solved[: block.start]
        np.matmul(inverse, part, out=solved[block])
    solved /= diagonal[:, None]
    for block, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
        part = solved[block] - unit_lower[block.stop :, block].T @ solved[block.stop :]
        np.matmul(inverse.T, part, out=solved[block])
    return np.ascontiguousarray(solved.T)


def add_product(total: Floats, a: Floats, b: Floats) -> None:
    """Add a^T b to `total` [k, k], for a and b [n, k]."""
    for start in range(0, len(total), _PANEL):
        rows = slice(start, start + _PANEL)
        total[rows] += a[:, rows].T @ b


def add_square(total: Floats, x: Floats) -> None:
    """Add x^T x to `total` [k, k], for x [n, k]; its lower triangle at least."""
    for start in range(0, len(total), _PANEL):
        rows, columns = slice(start, start + _PANEL), slice(start + _PANEL)
        total[rows, columns] += x[:, rows].T @ x[:, columns]
