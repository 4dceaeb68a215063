"""Packed integers: the mobile release's and Q4_0's codes and scales come out bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from converters.checkpoints.base import ExactCodes, LazyTensor
from converters.checkpoints.gemma_quant import unpack
from converters.checkpoints.opening import open_checkpoint
from converters.checkpoints.q4_0 import GROUP, carried, q4_0_grid
from tests.converters.test_checkpoints import refusal
from tests.support.checkpoint_files import (
    GEMMA3,
    bfloat16,
    copy_fixture,
    read_arrays,
    write_gguf,
    write_packed_release,
    write_safetensors,
)

LAYER = "model.language_model.layers.0."


def codes_of(tensor: LazyTensor) -> ExactCodes:
    codes = tensor.codes()
    assert codes is not None
    return codes


def test_packed_codes_are_unpacked_starting_with_the_lowest_bits() -> None:
    raw = np.array([[0xF0, 0x78]], np.uint8)
    assert unpack(raw, 4).tolist() == [[-8, 7, 0, -1]]
    assert unpack(np.array([[0b11_10_01_00]], np.uint8), 2).tolist() == [[-2, -1, 0, 1]]
    assert unpack(np.array([[0x80, 0x7F]], np.uint8), 8).tolist() == [[-128, 127]]


def test_the_mobile_release_gives_its_codes_and_scales_bit_for_bit(tmp_path: Path) -> None:
    written = write_packed_release(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert not checkpoint.architecture.tied_head
    packed = {name for name, tensor in checkpoint.tensors.items() if tensor.codes() is not None}
    assert packed == set(written)
    for name, (codes, scales) in written.items():
        tensor, exact = checkpoint.tensors[name], codes_of(checkpoint.tensors[name])
        assert exact.group == codes.shape[1] // scales.shape[1]
        assert exact.scale_type == "F32"
        middle = len(codes) // 2
        for start, stop in ((0, len(codes)), (middle, middle + 1)):
            part = exact.rows(start, stop)
            np.testing.assert_array_equal(part.codes, codes[start:stop])
            np.testing.assert_array_equal(part.scales, scales[start:stop])
            assert part.exact.all()
        values = codes * np.repeat(scales, exact.group, axis=1)
        np.testing.assert_array_equal(tensor.array(), values)


def test_the_bit_widths_of_a_mobile_release_are_detected(tmp_path: Path) -> None:
    write_packed_release(tmp_path / "model")
    tensors = open_checkpoint(tmp_path / "model").tensors
    bits = {name: codes_of(tensor).bits for name, tensor in tensors.items() if tensor.codes()}
    assert (bits["embedding"], bits["head"], bits["per_layer_embedding"]) == (2, 2, 4)
    assert (bits["layers.0.query"], bits["layers.0.up"], bits["layers.7.up"]) == (4, 4, 2)
    assert (bits["layers.3.per_layer_gate"], bits["layers.3.per_layer_projection"]) == (8, 8)
    assert tensors["per_layer_model_projection"].source_type == "BF16"
    assert tensors["layers.7.up"].source_type == "INT2"


@pytest.mark.parametrize(
    ("name", "array", "named"),
    [
        ("mlp.up_proj.weight_scale", None, "mlp.up_proj.weight: its scales are missing"),
        ("mlp.up_proj.weight_scale", np.ones((64, 3), np.float32), "weight_scale has shape (64, 3)"),
        ("mlp.up_proj.weight_scale", np.full((64, 1), np.nan, np.float32), "weight_scale: has NaN"),
        ("mlp.up_proj.weight", np.zeros((64, 10), np.uint8), "U8 of shape (64, 10) can't hold (64, 64)"),
        ("mlp.up_proj.weight", np.zeros((64, 32), np.int8), "I8 of shape (64, 32) can't hold (64, 64)"),
        ("mlp.up_proj.weight", None, "mlp.up_proj.weight is in none of the safetensors files"),
    ],
)
def test_a_damaged_mobile_release_is_refused_by_tensor(
    name: str, array: NDArray[np.float32] | None, named: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write_packed_release(folder)
    path = folder / "model.safetensors"
    arrays = read_arrays(path)
    arrays.pop(LAYER + name)
    if array is not None:
        arrays[LAYER + name] = array
    write_safetensors(path, arrays)
    assert named in refusal(folder)


@given(
    codes=hnp.arrays(np.int8, (3, 2, GROUP), elements=st.integers(-8, 7)),
    scales=hnp.arrays(np.float16, (3, 2), elements=st.floats(-4, 4, width=16)),
)
def test_stored_codes_have_non_negative_scales_or_are_reported_as_inexact(
    codes: NDArray[np.int8], scales: NDArray[np.float16]
) -> None:
    wide = scales.astype(np.float32)
    part = carried(codes, wide, np.ones((3, 2), np.bool_))
    assert (part.scales > 0).all()
    assert (part.scales == part.scales.astype(np.float16)).all()
    assert part.codes.min() >= -8
    assert part.codes.max() <= 7
    before = codes * wide[..., None]
    after = part.codes.reshape(codes.shape) * part.scales[..., None]
    np.testing.assert_array_equal(after[part.exact], before[part.exact])
    impossible = (wide < 0) & (codes == -8).any(axis=-1)
    np.testing.assert_array_equal(part.exact, ~impossible)


def test_a_q4_0_gguf_gives_its_codes_with_non_negative_scales(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, GEMMA3, Kind.Q4_0)
    tensor = open_checkpoint(path).tensors["layers.3.gate"]
    exact = codes_of(tensor)
    assert (exact.bits, exact.group, exact.scale_type) == (4, 32, "F16")
    part = exact.rows(10, 90)
    values = (part.codes.reshape(80, -1, 32) * part.scales[..., None]).reshape(80, -1)
    kept = np.repeat(part.exact, 32, axis=1)
    np.testing.assert_array_equal(values[kept], tensor.rows(10, 90)[kept])
    # llama.cpp puts the peak of a group on code -8, so where the peak is positive the scale is negative.
    groups = tensor.rows(10, 90).reshape(80, -1, 32)
    np.testing.assert_array_equal(part.exact, groups.max(axis=-1) < -groups.min(axis=-1))
    assert np.abs(values - tensor.rows(10, 90)).max() <= part.scales.max()


def on_grid(draw: np.random.Generator, shape: tuple[int, int], positive: bool) -> NDArray[np.float32]:
    """bfloat16 values on the Q4_0 grid; `positive`: no code -8 under a negative scale."""
    groups = (shape[0], shape[1] // GROUP, GROUP)
    codes = draw.integers(-8, 8, groups).astype(np.float32)
    scales = bfloat16(draw.uniform(0.001, 0.1, groups[:2]).astype(np.float32)).astype(np.uint32) << 16
    codes[..., 0] = -8
    values = codes * scales.view(np.float32)[..., None]
    if not positive:
        values[:, ::2] *= -1
    bits = bfloat16(values.astype(np.float32)).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(shape)


def test_codes_are_recovered_from_bfloat16_values_on_the_grid() -> None:
    values = on_grid(np.random.default_rng(1), (40, 96), positive=False)
    codes, scales, found = q4_0_grid(values)
    assert found.all()
    again = (codes * scales[..., None]).astype(np.float32).reshape(values.shape)
    np.testing.assert_array_equal(bfloat16(again), bfloat16(values))
    packed = gguf.quants.quantize(values, Kind.Q4_0)  # llama.cpp's quantiser finds the same
    np.testing.assert_array_equal(gguf.quants.dequantize(packed, Kind.Q4_0), again)


def test_a_group_whose_peak_has_a_smaller_code_is_recovered_too() -> None:
    codes = np.zeros((1, GROUP), np.float32)
    codes[0, :5] = [7, -6, 5, 1, -1]
    found_codes, scales, found = q4_0_grid(codes * np.float32(0.25))
    assert found.all()
    assert scales.tolist() == [[0.25]]
    np.testing.assert_array_equal(found_codes.reshape(1, -1), codes)


def test_values_off_the_grid_give_no_codes() -> None:
    noise = np.random.default_rng(2).normal(size=(50, 64)).astype(np.float32)
    bits = (bfloat16(noise).astype(np.uint32) << 16).view(np.float32)
    assert not q4_0_grid(bits)[2].any()


def test_only_a_bfloat16_matrix_on_the_grid_offers_codes(tmp_path: Path) -> None:
    folder = copy_fixture(GEMMA3, tmp_path / "model")
    path = folder / "model.safetensors"
    arrays = read_arrays(path)
    name = "model.layers.1.mlp.up_proj.weight"
    values = on_grid(np.random.default_rng(3), (96, 64), positive=True)
    stray = values.copy()
    stray[2, 40] += 0.0123  # in a row that is not among the samples
    for matrix in (values, stray):
        write_safetensors(path, arrays | {name: bfloat16(matrix)})
        tensors = open_checkpoint(folder).tensors
        part = codes_of(tensors["layers.1.up"]).rows(0, 96)
        stray_groups = np.argwhere(~part.exact).tolist()
        assert stray_groups == ([] if matrix is values else [[2, 1]])
    assert tensors["layers.1.down"].codes() is None
    assert tensors["layers.1.attention_norm"].codes() is None
