"""The tensors of Gemma 4's quantised mobile release (`quant_method` "gemma"): packed 2, 4 and 8-bit integers.

A linear layer X has `X.weight` (uint8 [out, in / 2] or [out, in / 4], the first value in the lowest bits and
stored plus 8 or plus 2; or int8 [out, in]) and `X.weight_scale` [out, 1]. An embedding has
`.embedding_quantized` in the same form and `.embedding_scale` [rows, groups]. The value is code * scale.
The int8 scales of activations and KV caches that it also has are not used (docs/gemma4.md).
Source: transformers, integrations/gemma_quant.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from converters.checkpoints.base import CodeRows, ExactCodes, LazyTensor
from converters.checkpoints.safetensors_file import TensorEntry
from converters.checkpoints.tensor_reader import (
    Bytes,
    Floats,
    Stored,
    bfloat16_rows,
    float16_rows,
    float32_rows,
    require_finite,
)
from edge.errors import CheckpointError

_FLOATS = {"F32": float32_rows, "F16": float16_rows, "BF16": bfloat16_rows}
_WEIGHT = ".weight"


def is_packed(entries: Mapping[str, TensorEntry], source: str) -> bool:
    """True if the tensor that a float checkpoint calls `source` is stored as integers."""
    if source.removesuffix(_WEIGHT) + ".embedding_quantized" in entries:
        return True
    return source in entries and entries[source].dtype in ("U8", "I8")


class PackedTensor(LazyTensor):
    """A matrix of packed integers with a float scale for each row or for equal parts of it.

    Raises CheckpointError, naming file and tensor, if codes and scales do not fit `shape` [out, in].
    """

    def __init__(self, entries: Mapping[str, TensorEntry], source: str, shape: tuple[int, ...]) -> None:
        stem = source.removesuffix(_WEIGHT)
        embedding = stem + ".embedding_quantized" in entries
        codes = entries[stem + ".embedding_quantized" if embedding else source]
        scales = entries.get(stem + (".embedding_scale" if embedding else ".weight_scale"))
        if scales is None or scales.dtype not in _FLOATS or len(scales.shape) != 2:
            raise CheckpointError(
                f"{codes.file}: tensor {codes.name}: its scales are missing or of a wrong type"
            )
        if scales.shape[0] != shape[0] or scales.shape[1] == 0 or shape[1] % scales.shape[1]:
            raise CheckpointError(f"{scales.file}: tensor {scales.name} has shape {scales.shape} for {shape}")
        self.name = codes.name
        self.shape = shape
        self._codes = _PackedCodes(codes, scales, shape)
        self.source_type = f"INT{self._codes.bits}"

    def rows(self, start: int, stop: int) -> Floats:
        """See `LazyTensor.rows`."""
        part = self._codes.rows(start, stop)
        grouped = part.codes.reshape(stop - start, -1, self._codes.group) * part.scales[:, :, None]
        return grouped.reshape(stop - start, self.shape[1])

    def codes(self) -> ExactCodes:
        """See `LazyTensor.codes`."""
        return self._codes


class _PackedCodes(ExactCodes):
    """Codes and scales of a `PackedTensor`."""

    def __init__(self, codes: TensorEntry, scales: TensorEntry, shape: tuple[int, ...]) -> None:
        self.bits = _bits(codes, shape)
        self.group = shape[1] // scales.shape[1]
        self.scale_type = "F16" if scales.dtype == "F16" else "F32"
        self._width = shape[1]
        self._codes = Stored(codes.file, codes.name, codes.offset, codes.size // shape[0])
        self._scales = Stored(scales.file, scales.name, scales.offset, scales.size // shape[0])
        self._decode: Callable[[Bytes], Floats] = _FLOATS[scales.dtype]

    def rows(self, start: int, stop: int) -> CodeRows:
        """See `ExactCodes.rows`."""
        codes = unpack(self._codes.read(start, stop), self.bits)[:, : self._width]
        scales = self._decode(self._scales.read(start, stop)).reshape(stop - start, -1)
        require_finite(scales, self._scales)
        return CodeRows(codes, scales, scales >= 0)


def _bits(codes: TensorEntry, shape: tuple[int, ...]) -> int:
    """The width of a code, from the type and the shape of the packed tensor."""
    rows, width = shape
    packed = {("I8", width): 8, ("U8", -(-width // 2)): 4, ("U8", -(-width // 4)): 2}
    if len(codes.shape) != 2 or codes.shape[0] != rows or (codes.dtype, codes.shape[1]) not in packed:
        raise CheckpointError(
            f"{codes.file}: tensor {codes.name}: {codes.dtype} of shape {codes.shape} can't hold {shape}"
        )
    return packed[codes.dtype, codes.shape[1]]


def unpack(raw: Bytes, bits: int) -> NDArray[np.int8]:
    """Signed codes int8 [rows, bytes * 8 / bits] of packed `raw` uint8 [rows, bytes]."""
    if bits == 8:
        return raw.view(np.int8)
    count, offset, mask = 8 // bits, 1 << (bits - 1), np.uint8((1 << bits) - 1)
    codes = np.empty((raw.shape[0], raw.shape[1] * count), np.int8)
    for place in range(count):
        codes[:, place::count] = ((raw >> np.uint8(bits * place)) & mask).view(np.int8) - np.int8(offset)
    return codes
