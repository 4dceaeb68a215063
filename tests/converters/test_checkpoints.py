"""GGUF files: values written by the gguf library are read back; invalid files are refused in one line."""

from __future__ import annotations

import contextlib
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.architectures.tensor_shapes import tensor_shapes
from converters.checkpoints.gguf_checkpoint import stored_tensor
from converters.checkpoints.gguf_file import read_gguf
from converters.checkpoints.opening import open_checkpoint
from edge.bundles.architecture import Rope
from edge.errors import CheckpointError
from tests.support.checkpoint_files import FIXTURES, GEMMA3, GEMMA4, NAMES, real_model, write_gguf


def refusal(path: Path) -> str:
    """Return the one-line error of opening `path` and reading everything in it."""
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def read_all(path: Path) -> None:
    """Open the checkpoint at `path` and read every tensor."""
    for tensor in open_checkpoint(path).tensors.values():
        tensor.array()


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_equals_the_folder_it_was_made_from(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    pattern = [layer.attention == "sliding" for layer in open_checkpoint(FIXTURES / name).architecture.layers]
    family = name.partition("-")[0]
    folder = write_gguf(path, name, fields={f"{family}.attention.sliding_window_pattern": pattern})
    opened = open_checkpoint(path)
    implied = folder.architecture.attention_scale
    if family == "gemma3":
        implied = folder.architecture.head_dim("full") ** -0.5  # GGUF has no key for it
    assert opened.architecture == replace(folder.architecture, attention_scale=implied)
    assert list(opened.tensors) == list(tensor_shapes(opened.architecture))
    for key, tensor in folder.tensors.items():
        np.testing.assert_array_equal(opened.tensors[key].array(), tensor.array(), err_msg=key)


def test_a_gguf_without_a_pattern_has_gemma3s_period_and_sliding_base(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    architecture = open_checkpoint(tmp_path / "model.gguf").architecture
    assert [index for index, layer in enumerate(architecture.layers) if layer.attention == "full"] == [5]
    assert (architecture.rope_sliding, architecture.rope_full) == (Rope(1e4), Rope(1e6))


def test_newer_gemma3_keys_are_used_if_present(tmp_path: Path) -> None:
    fields = {"gemma3.attention.sliding_window_pattern": 3, "gemma3.rope.freq_base_swa": 2e4}
    write_gguf(tmp_path / "model.gguf", fields=fields)
    architecture = open_checkpoint(tmp_path / "model.gguf").architecture
    assert [index for index, layer in enumerate(architecture.layers) if layer.attention == "full"] == [2, 5]
    assert architecture.rope_sliding == Rope(2e4)


# All that llama-quantize may put into a file of the supported models, down to 2 bits.
QUANTISED = [
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    *(Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL, Kind.IQ4_XS),
]


def blocks(kind: Kind, rows: int, width: int) -> Any:
    """Random blocks of a type, uint8 [rows, bytes], with finite float16 scales wherever the type has them."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(kind.value).integers(0, 256, (rows, width // block, size), np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    two = dict.fromkeys((Kind.Q4_K, Kind.Q5_K, Kind.Q4_1, Kind.Q5_1), (0, 2))
    for at in {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q6_K: (208,), **two}.get(kind, (0,)):
        raw[..., at : at + 2] = scale
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_slice_of_a_quantised_tensor_is_dequantised_as_by_the_gguf_package(
    kind: Kind, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    raw = blocks(kind, 300, 512)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = read_gguf(path).tensors["token_embd.weight"]
    assert (entry.shape, entry.quantization) == ((300, 512), kind)
    whole = gguf.quants.dequantize(raw, kind)
    assert np.isfinite(whole).all()
    tensor = stored_tensor(path, entry)
    assert tensor.source_type == kind.name
    for start, stop in ((0, 300), (7, 8), (100, 250), (299, 300)):
        np.testing.assert_array_equal(tensor.rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16])
def test_half_floats_are_widened(kind: Kind, tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "model.gguf", GEMMA3, kind)
    opened = open_checkpoint(tmp_path / "model.gguf")
    for key, tensor in folder.tensors.items():
        expected = tensor.array()  # bfloat16 values; some are too small for float16
        np.testing.assert_allclose(opened.tensors[key].array(), expected, rtol=2e-3, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q5_1])
def test_a_file_in_the_fallback_types_of_llama_cpp_has_the_original_values(
    kind: Kind, tmp_path: Path
) -> None:
    """Q5_K_M of the 270M and the 1B is mostly Q5_1: their rows are not whole blocks of 256."""
    folder = write_gguf(tmp_path / "model.gguf", GEMMA3, kind)
    opened = open_checkpoint(tmp_path / "model.gguf")
    for key, tensor in folder.tensors.items():
        expected = tensor.array()
        step = 0.0 if len(tensor.shape) == 1 else float(np.ptp(expected)) / (15 if kind == Kind.Q4_1 else 31)
        np.testing.assert_allclose(opened.tensors[key].array(), expected, atol=step, err_msg=key)


def test_an_unsupported_tensor_type_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", kind=Kind.MXFP4)
    message = refusal(tmp_path / "model.gguf")
    assert "token_embd.weight: type MXFP4 is not supported; use a BF16, Q8_0 or Q4_K_M file" in message


def test_a_non_finite_value_is_refused_by_the_name_of_its_tensor(tmp_path: Path) -> None:
    for value in (np.nan, np.inf, -np.inf):
        weight = np.ones((96, 64), np.float32)
        weight[95, 63] = value
        write_gguf(tmp_path / "model.gguf", tensors={"blk.2.ffn_up.weight": weight})
        assert "blk.2.ffn_up.weight" in refusal(tmp_path / "model.gguf")


def test_a_missing_tensor_and_a_wrong_shape_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors={"blk.1.ffn_gate.weight": None})
    assert "blk.1.ffn_gate.weight is missing" in refusal(path)
    write_gguf(path, tensors={"blk.1.ffn_gate.weight": np.ones((96, 32), np.float32)})
    assert "blk.1.ffn_gate.weight has shape (96, 32)" in refusal(path)
    write_gguf(path, tensors={"token_embd.weight": None})
    assert "token_embd.weight" in refusal(path)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"gemma3.rope.scaling.type": "linear"}, "rope.scaling.type"),
        ({"gemma3.block_count": None}, "block_count is missing"),
        ({"gemma3.block_count": 10**6}, "block_count = 1000000 is out of range"),
        ({"gemma3.attention.head_count": "four"}, "attention.head_count must be a whole number"),
        ({"gemma3.attention.head_count_kv": 3}, "4 query heads, 3 KV heads"),
        ({"gemma3.rope.freq_base": -1.0}, "rope.freq_base"),
        ({"gemma3.attention.sliding_window_pattern": [True]}, "sliding_window_pattern"),
        ({"general.architecture": "gemma3n"}, "architecture 'gemma3n'"),
        ({"split.count": 3}, "one part of a split model"),
        ({"split.count": 3, "general.architecture": "?"}, "one part of a split model"),  # the first has it
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer 'gpt2'"),
        ({"tokenizer.ggml.scores": None}, "tokenizer.ggml.scores"),
    ],
)
def test_inconsistent_metadata_is_refused_by_key(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", fields=fields)
    assert named in refusal(tmp_path / "model.gguf")


@pytest.mark.parametrize("count", [0, 1])
def test_a_merged_split_model_can_be_opened(count: int, tmp_path: Path) -> None:
    """`gguf-split --merge` writes a split.count of 0; a split into one part has 1."""
    write_gguf(tmp_path / "model.gguf", fields={"split.count": count})
    read_all(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"gemma4.attention.head_count_kv": [1, 1, 2, 1, 2, 1, 1, 2]},
            "head_count_kv differs between layers",
        ),
        ({"gemma4.expert_count": 8}, "expert_count"),
        ({"gemma4.embedding_length_per_layer_input": 0}, "embedding_length_per_layer_input"),
        ({"gemma4.feed_forward_length": [64] * 3}, "feed_forward_length has 3 entries for 8 layers"),
        ({"gemma4.attention.shared_kv_layers": 7}, "no full layer before layer 1"),
        ({"gemma4.rope.dimension_count": 32}, "rope.dimension_count"),
    ],
)
def test_an_unsupported_gemma4_variant_is_refused_by_key(
    fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", GEMMA4, fields=fields)
    assert named in refusal(tmp_path / "model.gguf")


def test_rope_freqs_must_rotate_the_first_pairs_only(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    share = np.array([1] * 16 + [1e30] * 16, np.float32)
    write_gguf(path, GEMMA4, tensors={"rope_freqs.weight": share})
    assert open_checkpoint(path).architecture.rope_full.rotated_share == 0.5
    for wrong in (None, share[::-1].copy(), share * 2, np.full(32, 8, np.float32)):
        write_gguf(path, GEMMA4, tensors={"rope_freqs.weight": wrong})
        assert "rope_freqs.weight" in refusal(path)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path)
    return path


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_truncated_anywhere_is_refused(share: float, small_gguf: Path) -> None:
    whole = small_gguf.read_bytes()
    cut = small_gguf.with_name("cut.gguf")
    # The header is the first 40 kB of this file; the padding behind the last tensor may be missing.
    cut.write_bytes(whole[: int(share * (len(whole) - 32))])
    refusal(cut)


@given(at=st.integers(0, 40_000), value=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused_but_never_crashes(at: int, value: int, small_gguf: Path) -> None:
    damaged = small_gguf.with_name("damaged.gguf")
    raw = bytearray(small_gguf.read_bytes())
    raw[at] = value
    damaged.write_bytes(raw)
    with contextlib.suppress(CheckpointError):  # any other exception fails the test
        read_all(damaged)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(20), b"PK\x03\x04" + bytes(99)])
def test_a_file_that_is_not_a_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    refusal(tmp_path / "model.gguf")


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("template", "source", "expected"),
    [
        ("{{ '<start_of_turn>' }}", GEMMA3, ("gemma3", (1, 106))),
        ("{{ '<|turn>' }}", GEMMA4, ("gemma4", (1, 106, 50))),
        ("{{ '<|im_start|>' }}", GEMMA3, ("plain", (1,))),
        (None, GEMMA4, ("plain", (1,))),
    ],
)
def test_the_chat_template_distinguishes_a_chat_model_from_a_base_model(
    template: str | None, source: str, expected: tuple[str, tuple[int, ...]], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", source, fields={"tokenizer.chat_template": template})
    chat = open_checkpoint(tmp_path / "model.gguf").chat
    assert (chat.prompt_format, chat.stop_ids) == expected
    assert chat.bos_id == 2


def test_the_licence_named_in_a_file_becomes_a_notice(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", fields={"general.license": "gemma"})
    assert "Gemma Terms of Use" in open_checkpoint(tmp_path / "model.gguf").licence
    write_gguf(tmp_path / "model.gguf")
    assert open_checkpoint(tmp_path / "model.gguf").licence == ""


def test_reading_a_slice_of_a_large_tensor_takes_only_the_memory_of_the_slice() -> None:
    embedding = open_checkpoint(real_model()).tensors["embedding"]
    assert embedding.shape == (262144, 640)
    tracemalloc.start()
    try:
        embedding.rows(200_000, 200_256)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 256 * 640 * 4


def test_the_real_270m_is_read_with_its_architecture() -> None:
    checkpoint = open_checkpoint(real_model())
    arch = checkpoint.architecture
    assert (arch.vocabulary, arch.hidden, arch.query_heads, arch.kv_heads) == (262144, 640, 4, 1)
    assert [index for index, layer in enumerate(arch.layers) if layer.attention == "full"] == [5, 11, 17]
    assert (arch.attention_scale, arch.rms_epsilon, arch.tied_head) == (1 / 16, 1e-6, True)
    assert {tensor.source_type for tensor in checkpoint.tensors.values()} == {
        "F32",
        "Q4_K",
        "Q5_0",
        "Q6_K",
        "Q8_0",
    }
    final_norm = checkpoint.tensors["final_norm"].array()
    assert final_norm.min() == pytest.approx(0.19, abs=0.01)
    assert final_norm.max() == pytest.approx(301, abs=1)
    assert checkpoint.chat.prompt_format == "plain"
    assert "Gemma Terms of Use" in checkpoint.licence
