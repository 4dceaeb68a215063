"""Reads weights back from a TFLite file with the official schema, independently of the writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.tflite.schema import schema

BITS = {schema.TensorType.INT8: 8, schema.TensorType.INT4: 4, schema.TensorType.INT2: 2}


@dataclass(frozen=True)
class StoredMatrix:
    """Codes int8 [out, in], bits a code, scales [out] or [out, blocks] in their stored type."""

    codes: NDArray[np.int8]
    bits: int
    scales: NDArray[Any]


def stored_matrices(path: Path) -> dict[str, StoredMatrix]:
    """Every quantised weight of the file by its name, from the first subgraph that has it."""
    raw = path.read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(raw, 0))

    def content(tensor: Any) -> NDArray[np.uint8]:
        buffer = model.buffers[tensor.buffer]
        return np.frombuffer(raw, np.uint8, buffer.size, buffer.offset)

    found: dict[str, StoredMatrix] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            name = tensor.name.decode()
            if tensor.type not in BITS or name in found:
                continue
            bits, quantization = BITS[tensor.type], tensor.quantization
            codes = signed(content(tensor), bits).reshape(tensor.shape)
            if quantization.detailsType == schema.QuantizationDetails.BlockwiseQuantization:
                scales = graph.tensors[quantization.details.scales]
                stored = content(scales).view(np.float16).reshape(scales.shape)
            else:
                assert not np.any(quantization.zeroPoint)
                stored = np.asarray(quantization.scale, np.float32)
            found[name.removesuffix(".codes")] = StoredMatrix(codes, bits, stored)
    return found


def signed(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Two's complement codes, the first in the lowest bits of a byte."""
    if bits == 8:
        return packed.view(np.int8)
    count = 8 // bits
    places = np.stack([(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(count)], axis=-1)
    values = places.reshape(-1).astype(np.int16)
    return np.where(values >= 1 << (bits - 1), values - (1 << bits), values).astype(np.int8)
