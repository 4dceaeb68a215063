"""Integers stored in a checkpoint are in the bundle bit for bit; exceptions are reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from converters.checkpoints.base import LazyTensor
from converters.checkpoints.opening import open_checkpoint
from converters.convert import Converted, convert
from converters.quantization import Format, quantize
from converters.weight_layout import weight_layout
from edge.bundles.bundle import DECODER, EMBEDDING, PER_LAYER, read_manifest
from edge.bundles.row_table import RowTable
from edge.errors import EdgeError
from edge.runtime.mapped_rows import MappedRows
from tests.converters.test_checkpoints_gemma_quant import on_grid
from tests.support import bundles
from tests.support.checkpoint_files import (
    GEMMA3,
    GEMMA4,
    bfloat16,
    copy_fixture,
    read_arrays,
    write_gguf,
    write_packed_release,
    write_safetensors,
)
from tests.support.tflite_files import signed, stored_matrices

Written = dict[str, tuple[NDArray[np.int8], NDArray[np.float32]]]


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Written, Converted]:
    """A packed release, its bundle, and the codes and scales that were written."""
    folder = tmp_path_factory.mktemp("mobile")
    written = write_packed_release(folder / "model")
    result = convert(open_checkpoint(folder / "model"), folder / "bundle", None, 128)
    return folder / "model", folder / "bundle", written, result


def test_the_mobile_release_is_in_the_graph_bit_for_bit(
    mobile: tuple[Path, Path, Written, Converted],
) -> None:
    checkpoint, bundle, written, result = mobile
    assert result.recipe == "mobile"
    found = stored_matrices(bundle / DECODER)
    seen = set()
    for matrix, stack in weight_layout(open_checkpoint(checkpoint).architecture).matrices.items():
        if matrix == "per_layer_model_projection":  # the release stores it as bfloat16
            assert found[matrix].bits == 8
            continue
        row = 0
        for part in stack.tensors:
            codes, scales = written[part]
            rows = slice(row, row + len(codes))
            np.testing.assert_array_equal(found[matrix].codes[rows], codes)
            np.testing.assert_array_equal(found[matrix].scales[rows], scales[:, 0])
            row += len(codes)
            seen.add(part)
        assert row == len(found[matrix].codes)
    assert seen == written.keys() - {"embedding", "per_layer_embedding"}
    assert {found[f"layers.{i}.down"].bits for i in range(5)} == {4}
    assert {found[f"layers.{i}.down"].bits for i in range(5, 8)} == {2}


def table_of(bundle: Path, table: RowTable) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    raw = np.frombuffer((bundle / table.file).read_bytes(), np.uint8)
    size = table.rows * table.columns * table.bits // 8
    codes = signed(raw[table.codes : table.codes + size], table.bits)
    assert len(raw) == table.scales + 4 * table.rows * table.groups
    return codes.reshape(table.rows, -1), raw[table.scales :].view(np.float32).reshape(table.rows, -1)


def test_the_tables_of_the_mobile_release_are_in_separate_files_bit_for_bit(
    mobile: tuple[Path, Path, Written, Converted],
) -> None:
    _, bundle, written, _ = mobile
    manifest = read_manifest(bundle)
    assert manifest.per_layer_embedding is not None
    tables = {"embedding": manifest.embedding, "per_layer_embedding": manifest.per_layer_embedding}
    assert {table.file for table in tables.values()} == {EMBEDDING, PER_LAYER} <= manifest.files.keys()
    for name, table in tables.items():
        codes, scales = table_of(bundle, table)
        np.testing.assert_array_equal(codes, written[name][0])
        np.testing.assert_array_equal(scales, written[name][1])
        rows = MappedRows(bundle, table).rows([3, 77])
        np.testing.assert_array_equal(
            rows, (codes * np.repeat(scales, codes.shape[1] // scales.shape[1], 1))[[3, 77]]
        )


def test_the_manifest_and_the_report_state_that_all_codes_are_exact(
    mobile: tuple[Path, Path, Written, Converted],
) -> None:
    _, bundle, written, result = mobile
    groups = sum(scales.size for _, scales in written.values())
    quantization = read_manifest(bundle).quantization
    assert quantization["kept_groups"] == quantization["stored_groups"] == groups
    assert (
        result.error_lines[-1]
        == f"100.0% of the checkpoint's {groups:,} groups of codes are kept bit for bit"
    )


def test_a_decoder_with_mobile_codes_is_close_to_one_with_float32_values(
    mobile: tuple[Path, Path, Written, Converted], tmp_path: Path
) -> None:
    """The same values as float32 differ only by the rounding of activations to int8."""
    checkpoint, bundle, _, _ = mobile
    convert(open_checkpoint(checkpoint), tmp_path / "float", "float32", 128)
    ids = [2, 17, 333, 5, 480, 9, 64, 71]
    logits = [
        np.concatenate([block.copy() for block in bundles.open_decoder(directory).logits_of(ids)])
        for directory in (bundle, tmp_path / "float")
    ]
    error = np.sqrt(np.mean(np.square(logits[0] - logits[1]))) / logits[1].std()
    assert error < 0.12


def test_logits_of_a_few_tokens_come_from_the_head_and_not_from_the_embedding(
    mobile: tuple[Path, Path, Written, Converted],
) -> None:
    decoder = bundles.open_decoder(mobile[1])
    decoder.advance([2, 17, 333], lambda: None)
    some = np.array([4, 77, 300], np.int32)
    np.testing.assert_allclose(decoder.logits_for(some), decoder.logits()[some], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_the_mobile_release_is_not_quantised_a_second_time(
    recipe: str, mobile: tuple[Path, Path, Written, Converted], tmp_path: Path
) -> None:
    with pytest.raises(EdgeError, match=f"--recipe {recipe}: the checkpoint holds quantised integers"):
        convert(open_checkpoint(mobile[0]), tmp_path / "bundle", recipe, 128)
    assert not list(tmp_path.iterdir())


def groups_kept(
    tensor: LazyTensor, codes: NDArray[np.int8], scales: NDArray[np.float16]
) -> NDArray[np.bool_]:
    """Return which groups of 32 represent the values of the tensor exactly."""
    values = (codes.reshape(len(codes), -1, 32) * scales.astype(np.float32)[..., None]).reshape(codes.shape)
    same = values == tensor.array()
    return np.asarray(same.reshape(len(codes), -1, 32).all(axis=-1))


@pytest.mark.parametrize("source", [GEMMA3, GEMMA4])
def test_a_q4_0_gguf_keeps_every_group_that_a_bundle_can_hold(source: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", source, Kind.Q4_0)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    result = convert(checkpoint, tmp_path / "bundle", None, 128)
    assert result.recipe == "int4"
    found = stored_matrices(tmp_path / "bundle" / DECODER)
    kept = total = 0
    for matrix, stack in weight_layout(checkpoint.architecture).matrices.items():
        row = 0
        for part in stack.tensors:
            tensor = checkpoint.tensors[part]
            stored = tensor.codes()
            assert stored is not None
            expected, rows = stored.rows(0, tensor.shape[0]), slice(row, row + tensor.shape[0])
            codes, scales = found[matrix].codes[rows], found[matrix].scales[rows]
            wide = expected.exact.repeat(32, axis=1)
            np.testing.assert_array_equal(codes[wide], expected.codes[wide])
            np.testing.assert_array_equal(scales[expected.exact], expected.scales[expected.exact])
            assert groups_kept(tensor, codes, scales)[expected.exact].all()
            kept, total = kept + int(expected.exact.sum()), total + expected.exact.size
            row += tensor.shape[0]
    manifest = read_manifest(tmp_path / "bundle")
    if manifest.per_layer_embedding is None:
        assert (manifest.quantization["kept_groups"], manifest.quantization["stored_groups"]) == (kept, total)
    assert manifest.embedding.scale_type == "float16"
    assert 0.3 < kept / total < 0.7  # llama.cpp gives half of all groups a negative scale and the code -8


def test_the_per_layer_table_of_a_q4_0_gguf_keeps_its_blocks(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", GEMMA4, Kind.Q4_0)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    convert(checkpoint, tmp_path / "bundle", "int4", 128)
    table, tensor = (
        read_manifest(tmp_path / "bundle").per_layer_embedding,
        checkpoint.tensors["per_layer_embedding"],
    )
    stored = tensor.codes()
    assert table is not None
    assert stored is not None
    assert (table.groups, table.scale_type) == (tensor.shape[1] // 32, "float16")
    rows = MappedRows(tmp_path / "bundle", table).rows(range(tensor.shape[0]))
    exact = stored.rows(0, tensor.shape[0]).exact.repeat(32, axis=1)
    np.testing.assert_array_equal(rows[exact], tensor.array()[exact])


def test_bfloat16_values_on_the_grid_keep_their_codes_and_stray_groups_do_not(tmp_path: Path) -> None:
    folder = copy_fixture(GEMMA3, tmp_path / "model")
    arrays = read_arrays(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    values = on_grid(np.random.default_rng(3), arrays[name].shape, positive=True)
    values[2, 40] += 0.0123  # in a row that is not among those that are looked at first
    write_safetensors(folder / "model.safetensors", arrays | {name: bfloat16(values)})
    checkpoint = open_checkpoint(folder)
    convert(checkpoint, tmp_path / "bundle", "int4", 128)
    found = stored_matrices(tmp_path / "bundle" / DECODER)["layers.1.gate_up"]
    gate = checkpoint.tensors["layers.1.gate"].shape[0]
    codes, scales = found.codes[gate:].reshape(len(values), -1, 32), found.scales[gate:]
    again = (codes * scales.astype(np.float32)[..., None]).reshape(values.shape)
    differs = bfloat16(again) != bfloat16(values)
    assert np.argwhere(differs.reshape(len(values), -1, 32).any(axis=-1)).tolist() == [[2, 1]]
    quantization = read_manifest(tmp_path / "bundle").quantization
    assert quantization["stored_groups"] - quantization["kept_groups"] == 1


def test_a_group_without_exact_codes_is_quantised_from_its_values(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", GEMMA3, Kind.Q4_0)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    convert(checkpoint, tmp_path / "bundle", "int4", 128)
    tensor = checkpoint.tensors["layers.0.output"]
    stored, fresh = tensor.codes(), quantize(tensor.array(), Format(4, 32))
    assert stored is not None
    lost = ~stored.rows(0, tensor.shape[0]).exact
    found = stored_matrices(tmp_path / "bundle" / DECODER)["layers.0.output"]
    np.testing.assert_array_equal(found.scales[lost], fresh.scales[lost])
    wide = lost.repeat(32, axis=1)
    np.testing.assert_array_equal(found.codes[wide], fresh.codes[wide])
