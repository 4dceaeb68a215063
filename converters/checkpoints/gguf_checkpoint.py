"""Opens a GGUF file of architecture gemma3 or gemma4 as a `Checkpoint`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from converters.architectures import gemma3, gemma4
from converters.architectures.fields import Fields
from converters.architectures.names import gguf_name
from converters.architectures.tensor_shapes import tensor_shapes
from converters.checkpoints.base import Checkpoint, ExactCodes, LazyTensor
from converters.checkpoints.chat import chat_info, licence_notice
from converters.checkpoints.gguf_file import GgufFile, TensorEntry, read_gguf
from converters.checkpoints.q4_0 import GgufCodes
from converters.checkpoints.tensor_reader import (
    Bytes,
    Floats,
    Stored,
    StoredTensor,
    bfloat16_rows,
    float16_rows,
    float32_rows,
)
from converters.checkpoints.tokenizer_model import from_gguf
from edge.bundles.architecture import Architecture
from edge.errors import CheckpointError

_PLAIN = {
    GGMLQuantizationType.F32: float32_rows,
    GGMLQuantizationType.F16: float16_rows,
    GGMLQuantizationType.BF16: bfloat16_rows,
}
# llama.cpp falls back from Q5_K to Q5_1 where rows are not whole blocks of 256 (270M, 1B).
_BLOCKWISE = {
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q6_K,
    GGMLQuantizationType.IQ2_XXS,
    GGMLQuantizationType.IQ2_XS,
    GGMLQuantizationType.IQ2_S,
    GGMLQuantizationType.IQ3_XXS,
    GGMLQuantizationType.IQ3_S,
    GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.IQ4_XS,
}
_ROPE_FREQS = "rope_freqs.weight"
_STILL = 1e29  # a divisor so large that the pair does not rotate


def open_gguf(path: Path) -> Checkpoint:
    """Open the GGUF file at `path`.

    Raises CheckpointError, naming the file and the key or tensor, if it is damaged or not supported.
    """
    file = read_gguf(path)
    architecture = _architecture(file)
    tensors = {name: _tensor(file, name, shape) for name, shape in tensor_shapes(architecture).items()}
    template = file.metadata.get("tokenizer.chat_template")
    return Checkpoint(
        path=path,
        architecture=architecture,
        tensors=tensors,
        tokenizer_model=from_gguf(file.metadata, path, architecture.vocabulary),
        chat=chat_info(architecture.family, template if isinstance(template, str) else ""),
        source_files=(path,),
        licence=licence_notice(str(file.metadata.get("general.license", ""))),
    )


def _architecture(file: GgufFile) -> Architecture:
    if file.metadata.get("split.count") not in (None, 0, 1):  # gguf-split --merge leaves a 0
        raise CheckpointError(f"{file.path}: is one part of a split model; join them with gguf-split --merge")
    name = file.metadata.get("general.architecture")
    if name not in (gemma3.FAMILY, gemma4.FAMILY):
        raise CheckpointError(
            f"{file.path}: architecture {name!r:.60} is not supported; gemma3 and gemma4 are"
        )
    embedding = file.tensors.get(gguf_name("embedding"))
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor {gguf_name('embedding')} is missing or no matrix")
    metadata = Fields(str(file.path), file.metadata, f"{name}.")
    vocabulary, tied_head = embedding.shape[0], gguf_name("head") not in file.tensors
    if name == gemma3.FAMILY:
        return gemma3.from_metadata(metadata, vocabulary, tied_head)
    return gemma4.from_metadata(metadata, vocabulary, tied_head, _rotated_share(file))


def _rotated_share(file: GgufFile) -> float:
    """The share of rotated pairs on full layers: `rope_freqs.weight` divides their frequencies.

    Gemma 4's has ones for the rotated pairs, then 1e30.
    """
    entry = file.tensors.get(_ROPE_FREQS)
    if entry is None:
        raise CheckpointError(f"{file.path}: tensor {_ROPE_FREQS} is missing")
    if entry.quantization != GGMLQuantizationType.F32 or len(entry.shape) != 1:
        raise CheckpointError(f"{file.path}: tensor {_ROPE_FREQS} must be a float32 vector")
    stored = Stored(file.path, entry.name, entry.offset, entry.row_bytes)
    divisors = float32_rows(stored.read(0, entry.shape[0])).ravel()
    turning = int((divisors == 1).sum())
    if not turning or (divisors[:turning] != 1).any() or (divisors[turning:] < _STILL).any():
        raise CheckpointError(f"{file.path}: tensor {_ROPE_FREQS} scales frequencies, which is not supported")
    return turning / len(divisors)


def _tensor(file: GgufFile, name: str, shape: tuple[int, ...]) -> LazyTensor:
    entry = file.tensors.get(gguf_name(name))
    if entry is None:
        raise CheckpointError(f"{file.path}: tensor {gguf_name(name)} is missing")
    if entry.shape != shape:
        raise CheckpointError(
            f"{file.path}: tensor {entry.name} has shape {entry.shape} but the metadata require {shape}"
        )
    return stored_tensor(file.path, entry)


def stored_tensor(path: Path, entry: TensorEntry) -> LazyTensor:
    """A tensor of the GGUF file at `path`; CheckpointError, naming it, if its type is not supported."""
    shape, kind = entry.shape, entry.quantization
    stored = Stored(path, entry.name, entry.offset, entry.row_bytes)
    if kind in _PLAIN:
        return StoredTensor(stored, shape, kind.name, _PLAIN[kind])
    if kind == GGMLQuantizationType.Q4_0 and len(shape) > 1:
        return _Q40Tensor(stored, shape, kind.name, partial(_dequantized, kind))
    if kind not in _BLOCKWISE or len(shape) == 1:
        raise CheckpointError(
            f"{path}: tensor {entry.name}: type {kind.name} is not supported; use a BF16, Q8_0 or Q4_K_M file"
        )
    return StoredTensor(stored, shape, kind.name, partial(_dequantized, kind))


class _Q40Tensor(StoredTensor):
    """A matrix of Q4_0 blocks."""

    def codes(self) -> ExactCodes:
        """See `LazyTensor.codes`."""
        return GgufCodes(self._stored)


def _dequantized(kind: GGMLQuantizationType, raw: Bytes) -> Floats:
    with np.errstate(invalid="ignore", over="ignore"):  # the result is checked
        values: Floats = gguf.quants.dequantize(raw, kind).astype(np.float32, copy=False)
    return values
