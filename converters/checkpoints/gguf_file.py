"""The header of a GGUF file (versions 2 and 3): its metadata and the positions of its tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf.GGUFReader` builds several numpy
arrays for every string: 14 s and 0.7 GB for Gemma's vocabulary, where this takes a fraction of a second.
Types, sizes and dequantisation come from the `gguf` package.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from edge.errors import CheckpointError

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_MAX_DIMENSIONS = 4
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: `shape` is [out, in] (GGUF lists it reversed), `offset` is from the file's start."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes for each index of the first dimension; of a vector, for each element."""
        block, size = GGML_QUANT_SIZES[self.quantization]
        return math.prod(self.shape[1:]) // block * size if len(self.shape) > 1 else size


@dataclass(frozen=True)
class GgufFile:
    """A file's metadata (numbers, strings, numpy arrays, lists of strings) and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of the GGUF file at `path`.

    Raises CheckpointError, naming the file, if it is not a GGUF file, or truncated or corrupt.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data).parse()
    except ValueError as error:  # from mmap for an empty file, from NumPy and enums for invalid values
        raise CheckpointError(f"{path}: not a usable GGUF file ({error}); fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error


class _Parser:
    """Reads forward through the header; every length is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def parse(self) -> GgufFile:
        if self._take(4) != b"GGUF":
            raise CheckpointError(
                f"{self._path}: not a GGUF file (it does not start with GGUF); give one, or a model folder"
            )
        version = self._number("<u4")
        if version not in (2, 3):
            raise CheckpointError(f"{self._path}: GGUF version {version} is not supported; 2 and 3 are")
        tensor_count, field_count = self._number("<u8"), self._number("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._text()
            metadata[key] = self._value(GGUFValueType(self._number("<u4")))
        entries = [self._entry() for _ in range(tensor_count)]
        alignment = int(metadata.get("general.alignment", 32))
        if alignment <= 0:
            raise ValueError(f"alignment {alignment}")
        start = -(-self._at // alignment) * alignment
        tensors = {entry.name: self._placed(entry, start) for entry in entries}
        if len(tensors) != len(entries):
            raise ValueError("duplicate tensor name")
        return GgufFile(self._path, metadata, tensors)

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise CheckpointError(f"{self._path}: truncated or corrupt in its header; fetch it again")
        raw = self._data[self._at : end]
        self._at = end
        return raw

    def _number(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self._take(kind.itemsize), kind)[0].item()

    def _text(self) -> str:
        return self._take(_LENGTH.unpack(self._take(8))[0]).decode("utf-8")

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._text()
        if kind != GGUFValueType.ARRAY:
            return self._number(_SCALARS[kind])
        item, count = GGUFValueType(self._number("<u4")), self._number("<u8")
        if item == GGUFValueType.STRING:
            return [self._text() for _ in range(count)]
        if item == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays")
        dtype = np.dtype(_SCALARS[item])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _entry(self) -> TensorEntry:
        name = self._text()
        dimensions = self._number("<u4")
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("<u8") for _ in range(dimensions))[::-1]
        code = self._number("<u4")
        try:
            quantization = GGMLQuantizationType(code)
        except ValueError:
            raise CheckpointError(f"{self._path}: tensor {name}: unknown type {code}") from None
        return TensorEntry(name, shape, quantization, self._number("<u8"))

    def _placed(self, entry: TensorEntry, start: int) -> TensorEntry:
        """The entry with its offset from the file's start, after a check that all its bytes are there."""
        block, _ = GGML_QUANT_SIZES[entry.quantization]
        if entry.shape[-1] % block or 0 in entry.shape:
            raise ValueError(f"tensor {entry.name} has rows of {entry.shape[-1]} in blocks of {block}")
        rows = entry.shape[0] if len(entry.shape) > 1 else entry.shape[0] // block
        end = start + entry.offset + rows * entry.row_bytes
        if end > len(self._data):
            raise CheckpointError(
                f"{self._path}: truncated: tensor {entry.name} ends past the end of the file"
            )
        return TensorEntry(entry.name, entry.shape, entry.quantization, start + entry.offset)
