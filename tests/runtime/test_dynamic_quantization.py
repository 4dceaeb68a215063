"""The rounding of activations, compared with XNNPACK's own."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundles.bundle import DECODER, read_manifest
from edge.runtime.compiled_model import CompiledModel
from edge.runtime.dynamic_quantization import dynamic_int8
from edge.runtime.mapped_rows import MappedRows
from tests.support import bundles

NUMBERS = st.just(0.0) | st.floats(-4096, -(2**-10), width=32) | st.floats(2**-10, 4096, width=32)


@cache
def head() -> tuple[NDArray[np.float64], CompiledModel, NDArray[np.float32], NDArray[np.float32]]:
    """The dequantised weights of an int8 head, and the graph that multiplies by them, with its arrays."""
    directory = bundles.small_bundle("gemma3-two-kv-heads", "int8")
    manifest = read_manifest(directory)
    digest = manifest.files[DECODER].sha256
    model = CompiledModel(directory / DECODER, digest, bundles.cache_directory(), threads=1)
    signature = model.signatures["head"]
    rows = MappedRows(directory, manifest.head).rows(np.arange(manifest.head.rows, dtype=np.int32))
    return rows.astype(np.float64), model, signature.bind_new("hidden"), signature.bind_new("logits")


@given(st.lists(NUMBERS, min_size=1, max_size=8))
def test_a_row_is_rounded_as_in_xnnpack(numbers: list[float]) -> None:
    weights, model, hidden, logits = head()
    hidden.reshape(-1)[:] = np.resize(np.array(numbers, np.float32), hidden.size)
    model.signatures["head"].run()
    codes, inverse = dynamic_int8(hidden.reshape(-1))
    largest = np.abs(hidden).max() * np.abs(weights).sum(axis=1).max()
    np.testing.assert_allclose(logits.reshape(-1), weights @ codes / inverse, rtol=1e-5, atol=1e-6 * largest)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=5))
def test_each_row_is_rounded_separately(rows: list[tuple[float, float, float]]) -> None:
    x = np.array(rows, np.float32)
    codes, inverse = dynamic_int8(x)
    for row, its_codes, its_inverse in zip(x, codes, inverse, strict=True):
        np.testing.assert_array_equal(dynamic_int8(row)[0], its_codes)
        assert dynamic_int8(row)[1] == its_inverse


@pytest.mark.parametrize("value", [0.0, 1e-44])
def test_a_row_of_negligible_values_becomes_zeros(value: float) -> None:
    codes, inverse = dynamic_int8(np.full(4, value, np.float32))
    assert not codes.any()
    assert inverse == 1
