"""Blocked linear algebra: the same results as NumPy's general functions in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.calibration.linear_algebra import add_product, add_square, cholesky, solve
from converters.quantization import Floats


def random(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def positive_definite(seed: int, size: int) -> Floats:
    x = random(seed, 2 * size, size)
    return x.T @ x + np.eye(size, dtype=np.float32)


@given(seed=st.integers(0, 99), size=st.sampled_from([1, 63, 64, 65, 200]))
@settings(max_examples=15)
def test_the_factor_equals_numpys_and_its_upper_triangle_is_zero(seed: int, size: int) -> None:
    matrix = positive_definite(seed, size)
    lower_only = np.tril(matrix)
    factor = cholesky(lower_only)
    expected = np.linalg.cholesky(matrix.astype(np.float64))
    np.testing.assert_allclose(factor, expected, atol=1e-4 * expected.max())
    assert not np.triu(factor, 1).any()


def test_a_matrix_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        cholesky(-np.eye(100, dtype=np.float32))


@given(seed=st.integers(0, 99), rows=st.integers(1, 5), size=st.sampled_from([1, 64, 65, 200]))
@settings(max_examples=15)
def test_a_solution_multiplied_by_the_matrix_is_the_right_side(seed: int, rows: int, size: int) -> None:
    matrix, right = positive_definite(seed, size), random(seed + 1, rows, size)
    factor = cholesky(matrix)
    diagonal = factor.diagonal().copy()
    before = right.copy()
    solution = solve(factor / diagonal, np.square(diagonal), right)
    np.testing.assert_allclose(solution.astype(np.float64) @ matrix, right, atol=1e-3)
    np.testing.assert_array_equal(right, before)


@pytest.mark.parametrize("size", [5, 1024, 1500])
def test_products_are_added_panel_by_panel(size: int) -> None:
    a, b, total = random(0, 7, size), random(1, 7, size), random(2, size, size)
    product, square = total.copy(), total.copy()
    add_product(product, a, b)
    add_square(square, a)
    np.testing.assert_allclose(product, total + a.T @ b, atol=1e-4)
    np.testing.assert_allclose(np.tril(square), np.tril(total + a.T @ a), atol=1e-4)
