"""Quantisation: the range of each format, its error, and that packed bytes round-trip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from converters.quantization import HIGHEST, LOWEST, ErrorMeter, Format, half_scales, pack, quantize, unpack

FORMATS = [Format(8), Format(4), Format(2), Format(4, 32), Format(4, 64), Format(8, 32), Format(2, 32)]
CODES = [Format(8), Format(4), Format(2)]


def normal_rows(seed: int, rows: int, columns: int, spread: float = 0.02) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((rows, columns)) * spread).astype(np.float32)


def relative_error(values: NDArray[np.float32], format: Format) -> float:
    meter = ErrorMeter()
    meter.add("all", values, quantize(values, format))
    return meter.relative("all")


weights = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.sampled_from([64, 128])),
    elements=st.floats(-(2.0**40), 2.0**40, width=32),
)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@given(values=weights)
@settings(max_examples=60)
def test_any_finite_weights_give_codes_in_range_and_positive_normal_scales(
    format: Format, values: NDArray[np.float32]
) -> None:
    quantized = quantize(values, format)
    assert quantized.codes.dtype == np.int8
    assert quantized.codes.min() >= LOWEST[format.bits]
    assert quantized.codes.max() <= HIGHEST[format.bits]
    assert quantized.scales.dtype == (np.float16 if format.block else np.float32)
    assert quantized.scales.shape == format.scale_shape(*values.shape)
    assert np.isfinite(quantized.scales).all()
    assert (quantized.scales >= np.finfo(quantized.scales.dtype).smallest_normal).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@given(values=weights)
@settings(max_examples=60)
def test_codes_are_the_nearest_to_the_weights_under_the_stored_scale(
    format: Format, values: NDArray[np.float32]
) -> None:
    quantized = quantize(values, format)
    rows, columns = values.shape
    scales = quantized.scales.astype(np.float64).reshape(rows, -1, 1)
    blocks = values.astype(np.float64).reshape(rows, -1, format.block or columns)
    wanted = np.clip(blocks / scales, LOWEST[format.bits], HIGHEST[format.bits])
    distance = np.abs(wanted - quantized.codes.reshape(blocks.shape))
    assert distance.max() <= 0.5 + 1e-4


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_all_zero_rows_stay_zero_with_a_scale_of_one_or_less(format: Format) -> None:
    quantized = quantize(np.zeros((3, 64), np.float32), format)
    assert not quantized.dequantize().any()
    assert (quantized.scales > 0).all()
    assert (quantized.scales <= 1).all()


def test_int8_gives_the_largest_value_of_a_row_code_127() -> None:
    values = normal_rows(1, 50, 96)
    codes = quantize(values, Format(8)).codes
    assert (np.abs(codes).max(axis=1) == 127).all()


def least_error(values: NDArray[np.float32], bits: int) -> float:
    """Relative squared error with the best of 400 scales a row, each refined by least squares."""
    widest = np.maximum(values.max(axis=1) / HIGHEST[bits], values.min(axis=1) / LOWEST[bits])
    gain = np.zeros(len(values))
    for share in np.linspace(0.05, 1.3, 400):
        codes = np.clip(np.rint(values / (widest * share)[:, None]), LOWEST[bits], HIGHEST[bits])
        gain = np.maximum(gain, (values * codes).sum(axis=1) ** 2 / np.maximum((codes**2).sum(axis=1), 1))
    return float(1 - gain.sum() / (values.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize(
    ("format", "columns"), [(Format(4, 32), 32), (Format(4), 2048), (Format(2), 2048)], ids=str
)
@pytest.mark.parametrize("tail", ["normal", "heavy"])
def test_error_is_within_three_percent_of_an_exhaustive_search(
    format: Format, columns: int, tail: str
) -> None:
    generator = np.random.default_rng(3)
    shape = (262144 // columns, columns)
    drawn = generator.standard_normal(shape) if tail == "normal" else generator.standard_t(5, size=shape)
    values: NDArray[np.float32] = drawn.astype(np.float32)
    assert relative_error(values, format) <= 1.03 * least_error(values, format.bits)


def test_fewer_bits_and_longer_blocks_increase_the_error() -> None:
    values = normal_rows(4, 64, 1024)
    errors = [relative_error(values, f) for f in (Format(32), Format(8), Format(4, 32), Format(4), Format(2))]
    assert errors[0] == 0
    assert errors == sorted(errors)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_values_already_on_the_grid_of_a_format_are_kept(format: Format) -> None:
    generator = np.random.default_rng(5)
    codes = generator.integers(LOWEST[format.bits], HIGHEST[format.bits] + 1, (8, 128))
    codes[:, ::32], codes[:, 1::32] = LOWEST[format.bits], HIGHEST[format.bits]
    values = (codes * 2.0**-9).astype(np.float32)
    assert np.array_equal(quantize(values, format).dequantize(), values)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_slice_of_rows_gives_the_same_codes_as_the_whole(
    format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = normal_rows(6, 300, 640)
    whole = quantize(values, format)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    part = quantize(values[17:42], format)
    assert np.array_equal(part.codes, whole.codes[17:42])
    assert np.array_equal(part.scales, whole.scales[17:42])


@given(scales=arrays(np.float32, 20, elements=st.floats(0, 2.0**100, width=32)))
def test_blockwise_scales_are_exact_in_float16_and_in_bfloat16(scales: NDArray[np.float32]) -> None:
    rounded = half_scales(scales)
    assert np.array_equal(rounded, rounded.astype(np.float16).astype(np.float32))
    assert not (rounded.view(np.uint32) & 0xFFFF).any()
    inside = (scales > 2.0**-14) & (scales < 60000)
    assert (np.abs(rounded - scales)[inside] <= scales[inside] * 2.0**-8).all()


def test_packing_puts_the_first_value_in_the_lowest_bits() -> None:
    assert pack(np.array([1, -8, 7, -1], np.int8), 4).tolist() == [0x81, 0xF7]
    assert pack(np.array([1, -2, -1, 0], np.int8), 2).tolist() == [0b00_11_10_01]
    assert pack(np.array([-127, 5], np.int8), 8).tolist() == [0x81, 5]


@pytest.mark.parametrize("format", CODES, ids=str)
@given(data=st.data())
def test_packed_codes_unpack_to_themselves(format: Format, data: st.DataObject) -> None:
    elements = st.integers(LOWEST[format.bits], HIGHEST[format.bits])
    codes = data.draw(arrays(np.int8, st.integers(0, 24).map(lambda n: 4 * n), elements=elements))
    packed = pack(codes, format.bits)
    assert packed.size == format.code_bytes(1, codes.size)
    assert np.array_equal(unpack(packed, format.bits), codes)


def test_values_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 codes of 4 bits"):
        pack(np.zeros(3, np.int8), 4)
    with pytest.raises(ValueError, match="48 columns"):
        quantize(np.zeros((1, 48), np.float32), Format(4, 32))
    with pytest.raises(ValueError, match="3 bits"):
        Format(3)


def test_float32_format_keeps_the_values_and_their_bytes() -> None:
    values = normal_rows(7, 3, 8)
    quantized = quantize(values, Format(32))
    assert np.array_equal(quantized.dequantize(), values)
    assert quantized.packed().tobytes() == values.tobytes()


def test_error_meter_adds_up_groups_over_slices_and_reports_a_line_each() -> None:
    values = normal_rows(8, 40, 64)
    quantized = quantize(values, Format(4))
    meter = ErrorMeter()
    for part in (slice(0, 30), slice(30, 40)):
        meter.add("query", values[part], quantize(values[part], Format(4)))
    meter.add("head", values, quantize(values, Format(8)))
    error = ((quantized.dequantize() - values).astype(np.float64) ** 2).sum() / (
        values.astype(np.float64) ** 2
    ).sum()
    assert meter.relative("query") == pytest.approx(error, rel=1e-4)
    lines = meter.lines()
    assert len(lines) == 2
    assert "query" in lines[0]
    assert "int4" in lines[0]
    assert "2,560 values" in lines[0]
    with pytest.raises(KeyError):
        meter.relative("gate")
