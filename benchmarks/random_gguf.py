"""A random GGUF file of a Gemma 4 shape, so that llama.cpp and a bundle run on the same codes.

Matrices are Q4_0; the embedding, which is the head too, is Q8_0, as the head of an int4 bundle is int8. No
scale is negative, so a conversion carries every Q4_0 block over as it is. K and V of the layers that share
those of others are left out, since nothing reads them. Blocks come from pools that are read round and round
at an odd length, so no two rows are equal and few MB are in memory, whatever the file's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from benchmarks.random_checkpoint import random_values, repeated
from converters.architectures import gemma4
from converters.architectures.fields import Fields
from converters.architectures.names import gguf_name
from converters.architectures.tensor_shapes import tensor_shapes
from converters.checkpoints.gguf_file import read_gguf
from edge.bundles.architecture import Architecture

_POOL = (1 << 18) + 9
"""Values in a pool of floats, blocks in one of codes (5 MB of Q4_0); odd, and no multiple of any row's."""

_F32, _Q4_0, _Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
_ROPE_FREQS = "rope_freqs.weight"


def write_gguf(path: Path, config: Mapping[str, Any], vocabulary_from: Path) -> None:
    """Write the file of a config such as those in `SHAPES`; the tokenizer is that of another GGUF file."""
    arch = gemma4.from_config(Fields("config.json", config))
    fields = gemma4_fields(arch) | _tokenizer(vocabulary_from, arch.vocabulary)
    shapes = {_ROPE_FREQS: (arch.head_dim("full") // 2,), **tensor_shapes(arch)}
    scratch = path.with_name(f".{path.name}")
    writer = GGUFWriter(scratch, arch.family)
    for key, value in fields.items():
        add_field(writer, key, value)
    for name, shape in shapes.items():
        kind = _kind(name, shape)
        stored = name if name == _ROPE_FREQS else gguf_name(name)
        writer.add_tensor_info(stored, shape, np.dtype(np.float32), _bytes(kind, shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    _write_tensors(writer, arch, shapes)
    writer.close()
    scratch.rename(path)


def _write_tensors(writer: GGUFWriter, arch: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """What the header has announced; by hand, because the writer takes whole tensors only."""
    assert writer.fout is not None
    (file,) = writer.fout
    draw = np.random.default_rng(0)
    noise = draw.standard_normal(_POOL, np.float32)
    pools = {_Q4_0: _q4_0_codes(draw), _Q8_0: _q8_0_codes(draw)}
    writer.write_padding(file, file.tell())
    for name, shape in shapes.items():
        kind = _kind(name, shape)
        if name == _ROPE_FREQS:
            file.write(_rope_freqs(arch).data)
        else:
            width = arch.per_layer_width if name == "per_layer_embedding" else shape[-1]
            pool = random_values(noise, name, shape) if kind == _F32 else _blocks(*pools[kind], width)
            for part in repeated(pool.view(np.uint8), _bytes(kind, shape)):
                file.write(part.data)
        writer.write_padding(file, _bytes(kind, shape))


def _kind(name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    if len(shape) == 1:
        return _F32
    return _Q8_0 if name == "embedding" else _Q4_0


def _bytes(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _q4_0_codes(draw: np.random.Generator) -> tuple[NDArray[np.uint8], float]:
    """Packed codes [blocks, 16], and their standard deviation."""
    codes = np.clip(np.rint(draw.normal(0, 2.7, (_POOL, 32))), -8, 7).astype(np.int8)
    raw = (codes + 8).astype(np.uint8)
    packed: NDArray[np.uint8] = raw[:, :16] | raw[:, 16:] << np.uint8(4)
    return packed, float(codes.std())


def _q8_0_codes(draw: np.random.Generator) -> tuple[NDArray[np.uint8], float]:
    """Codes [blocks, 32], and their standard deviation."""
    codes = np.clip(np.rint(draw.normal(0, 40, (_POOL, 32))), -127, 127).astype(np.int8)
    return codes.view(np.uint8), float(codes.std())


def _blocks(codes: NDArray[np.uint8], deviation: float, width: int) -> NDArray[np.uint8]:
    """Blocks, flat, of values that a product over `width` leaves about as large as its input."""
    scales = np.random.default_rng(1).uniform(0.8, 1.2, len(codes)) / (deviation * math.sqrt(width))
    return np.hstack([scales.astype("<f2")[:, None].view(np.uint8), codes]).ravel()


def _rope_freqs(arch: Architecture) -> NDArray[np.float32]:
    """What divides the frequency of each pair of a full layer: so much that all but the first stand still."""
    pairs = arch.head_dim("full") // 2
    freqs = np.full(pairs, 1e30, np.float32)
    freqs[: int(pairs * arch.rope_full.rotated_share)] = 1
    return freqs


def gemma4_fields(arch: Architecture) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for Gemma 4."""
    full, sliding = arch.head_dim("full"), arch.head_dim("sliding")
    fields = {
        "context_length": arch.max_positions,
        "embedding_length": arch.hidden,
        "embedding_length_per_layer_input": arch.per_layer_width,
        "block_count": len(arch.layers),
        "feed_forward_length": [layer.feed_forward for layer in arch.layers],
        "attention.head_count": arch.query_heads,
        "attention.head_count_kv": arch.kv_heads,
        "attention.layer_norm_rms_epsilon": arch.rms_epsilon,
        "attention.key_length": full,
        "attention.key_length_swa": sliding,
        "attention.value_length": full,
        "attention.value_length_swa": sliding,
        "attention.sliding_window": arch.sliding_window,
        "attention.sliding_window_pattern": [layer.attention == "sliding" for layer in arch.layers],
        "attention.shared_kv_layers": len(arch.layers) - len(arch.owners),
        "rope.dimension_count": full,
        "rope.dimension_count_swa": sliding,
        "rope.freq_base": arch.rope_full.base,
        "rope.freq_base_swa": arch.rope_sliding.base,
        "final_logit_softcapping": arch.logit_softcap,
    }
    return {f"{arch.family}.{key}": value for key, value in fields.items()}


def _tokenizer(source: Path, vocabulary: int) -> dict[str, Any]:
    """The tokenizer keys of a GGUF file, cut to so many pieces."""
    fields = {k: v for k, v in read_gguf(source).metadata.items() if k.startswith("tokenizer.ggml.")}
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}
    return {k: v[:vocabulary] if isinstance(v, list) else v for k, v in plain.items()}


def add_field(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a field with the type that its Python type suggests; None leaves it out."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_string(key, value)
