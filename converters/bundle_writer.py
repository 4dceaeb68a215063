"""Writes a bundle's files except the manifest, a slice of rows at a time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.checkpoints.base import Checkpoint
from converters.decoder_graph import Widths, build
from converters.encoding import Encoder
from converters.quantization import Format
from converters.recipes import Plan
from converters.tflite.graph import Model, Region, Weight
from converters.tflite.writer import ModelWriter, file_size
from converters.weight_layout import StoredMatrix
from edge.bundles.bundle import DECODER, EMBEDDING, PER_LAYER, TOKENIZER
from edge.bundles.row_table import RowTable

_MANIFEST_BYTES = 1 << 15
"""An upper bound for the size of a manifest."""

_TFLITE_TYPES = {32: "float32", 8: "int8", 4: "int4", 2: "int2"}


@dataclass(frozen=True)
class Tables:
    """The locations of the rows that the runtime gathers one at a time."""

    embedding: RowTable
    head: RowTable
    per_layer: RowTable | None


def bundle_size(checkpoint: Checkpoint, plan: Plan, widths: Widths) -> int:
    """Bytes of the bundle, slightly overestimated."""
    total = file_size(*_decoder_model(checkpoint, plan, widths)) + len(checkpoint.tokenizer_model)
    total += sum(plan.formats[name].stored_bytes(*table.shape) for name, table in plan.layout.tables.items())
    return total + _MANIFEST_BYTES


def write_files(
    checkpoint: Checkpoint, plan: Plan, widths: Widths, encoder: Encoder, directory: Path
) -> Tables:
    """Write every file except the manifest into `directory`."""
    writer = _BundleWriter(checkpoint, plan, encoder, directory)
    (directory / TOKENIZER).write_bytes(checkpoint.tokenizer_model)
    per_layer = None
    if checkpoint.architecture.per_layer_width:
        per_layer = writer.table(PER_LAYER, "per_layer_embedding")
    head = embedding = writer.decoder(widths)
    if not checkpoint.architecture.tied_head:
        embedding = writer.table(EMBEDDING, "embedding")
    return Tables(embedding, head, per_layer)


def _decoder_model(checkpoint: Checkpoint, plan: Plan, widths: Widths) -> tuple[Model, dict[str, int]]:
    """The graph over weights still to be written, and the number of scales of each per-channel weight."""
    matrices = plan.layout.matrices
    weights = {name: _weight(name, plan.formats[name], matrix) for name, matrix in matrices.items()}

    @cache
    def vector(name: str) -> NDArray[np.float32]:
        return checkpoint.tensors[name].array()

    channels = {name: matrix.shape[0] for name, matrix in matrices.items() if weights[name].scales_key}
    return build(checkpoint.architecture, widths, weights, vector), channels


def _weight(name: str, format: Format, matrix: StoredMatrix) -> Weight:
    codes = Region(f"{name}.codes", format.code_bytes(*matrix.shape))
    type_ = _TFLITE_TYPES[format.bits]
    if format.block:
        scales = Region(f"{name}.scales", format.scale_bytes(*matrix.shape))
        return Weight(codes, matrix.shape, type_, block=format.block, block_scales=scales)
    return Weight(codes, matrix.shape, type_, scales_key=name if format.bits < 32 else "")


class _BundleWriter:
    def __init__(self, checkpoint: Checkpoint, plan: Plan, encoder: Encoder, directory: Path) -> None:
        self._checkpoint, self._plan, self._encoder, self._directory = checkpoint, plan, encoder, directory

    def decoder(self, widths: Widths) -> RowTable:
        """Write the graph and its weights. Returns the location of the head's rows."""
        model, channels = _decoder_model(self._checkpoint, self._plan, widths)
        with contextlib.closing(ModelWriter(self._directory / DECODER, model, channels)) as writer:
            for name, matrix in self._plan.layout.matrices.items():
                self._matrix(writer, name, matrix)
            writer.finish()
        return self._head_rows(writer)

    def table(self, file_name: str, name: str) -> RowTable:
        """Write a table to a file of its own: all codes, then all scales."""
        (tensor,), (_, width) = self._plan.layout.tables[name].tensors, self._plan.layout.tables[name].shape
        format, (rows, columns) = self._plan.formats[name], self._checkpoint.tensors[tensor].shape
        codes_at, scales_at = 0, format.code_bytes(rows, columns)
        groups, scale_type = columns // (format.block or width), "float16" if format.block else "float32"
        table = RowTable(file_name, rows, columns, format.bits, codes_at, scales_at, groups, scale_type)
        with (self._directory / file_name).open("wb") as file:
            for quantized in self._encoder.encode(tensor, format, width):
                file.seek(codes_at)
                codes_at += file.write(quantized.packed().data)
                file.seek(scales_at)
                scales_at += file.write(quantized.scales.data)
        return table

    def _matrix(self, writer: ModelWriter, name: str, matrix: StoredMatrix) -> None:
        format, row = self._plan.formats[name], 0
        for tensor in matrix.tensors:
            for quantized in self._encoder.encode(tensor, format, matrix.shape[1]):
                writer.write(f"{name}.codes", quantized.packed().data)
                if format.block:
                    writer.write(f"{name}.scales", quantized.scales.view(np.uint8).reshape(-1).data)
                elif format.bits < 32:
                    writer.scales(name, row, quantized.scales)
                row += len(quantized.codes)

    def _head_rows(self, writer: ModelWriter) -> RowTable:
        arch, format = self._checkpoint.architecture, self._plan.formats["head"]
        if format.block:
            scales_at, groups, type_ = writer.offsets["head.scales"], arch.hidden // format.block, "float16"
        else:
            scales_at = writer.scales_offset("head") if format.bits < 32 else 0
            groups, type_ = 1, "float32"
        codes_at, shape = writer.offsets["head.codes"], (arch.vocabulary, arch.hidden)
        return RowTable(DECODER, *shape, format.bits, codes_at, scales_at, groups, type_)
