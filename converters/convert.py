"""A checkpoint in, a bundle out; whole or not at all.

Tensors are read, quantised and written a slice of rows at a time, so memory is bounded by the slice and not
by the model. The bundle is made in a scratch directory beside its final place and renamed when it is whole
and on disk. The result depends on the input, the recipe and this version only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.checkpoints.base import Checkpoint
from converters.decoder_graph import Widths, build, stacked_matrices
from converters.quantization import ErrorMeter, quantize, tensor_group
from converters.recipes import Plan, plan_for
from converters.tflite.graph import Region, Weight
from converters.tflite.writer import ModelWriter
from edge.architecture import Architecture, tensor_shapes
from edge.bundle import DECODER, MANIFEST, PER_LAYER, TOKENIZER, FileEntry, Manifest, file_digest
from edge.errors import EdgeError
from edge.files import sync_directory
from edge.row_table import RowTable

WIDTHS = Widths(verify=8, prefill=(8, 128))
DEFAULT_CONTEXT = 4096

_SLICE = 1 << 22
"""Values read and quantised at a time: 16 MB of float32."""

_TFLITE_TYPES = {32: "float32", 8: "int8", 4: "int4", 2: "int2"}


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: values converted, of how many, and what is in hand."""

    done: int
    total: int
    name: str


@dataclass(frozen=True)
class Converted:
    """What a conversion made: bytes in all, weight bytes read per decoded token, errors by group."""

    bytes: int
    bytes_per_token: int
    error_lines: tuple[str, ...]


def convert(
    checkpoint: Checkpoint,
    target: Path,
    recipe: str,
    context: int = DEFAULT_CONTEXT,
    report: Callable[[Progress], None] = lambda _progress: None,
) -> Converted:
    """Write the bundle `target`, which must not exist.

    Raises CheckpointError for a wrong tensor, EdgeError if the target exists or can't be written. Whatever
    is raised, KeyboardInterrupt included, nothing is left behind.
    """
    arch = checkpoint.architecture
    if context > arch.max_positions:
        raise EdgeError(f"--context {context}: the model has at most {arch.max_positions} positions")
    plan = plan_for(recipe, arch)
    with _whole_or_nothing(target, _estimate(arch, plan)) as scratch, ThreadPoolExecutor(1) as pool:
        digests = pool.submit(lambda: {path.name: file_digest(path) for path in checkpoint.source_files})
        job = _Conversion(checkpoint, plan, scratch, report)
        tables = job.run()
        manifest = _manifest(checkpoint, recipe, context, job, tables, scratch, digests)
        (scratch / MANIFEST).write_text(manifest.to_json())
        size = sum(path.stat().st_size for path in scratch.iterdir())
        for path in scratch.iterdir():
            _sync(path)
        sync_directory(scratch)
    return Converted(size, job.bytes_per_token, tuple(job.errors.lines()))


@contextlib.contextmanager
def _whole_or_nothing(target: Path, estimate: int) -> Iterator[Path]:
    """A scratch directory beside `target` that becomes it at the end, or vanishes."""
    if target.exists():
        raise EdgeError(f"{target}: exists already; remove it or choose another name with -o")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < estimate:
            raise EdgeError(f"{target.parent}: {free >> 20} MB free, the bundle needs {estimate >> 20} MB")
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise EdgeError(f"{target}: can't be written: {error.strerror}") from None
    try:
        yield scratch
        scratch.chmod(0o755)
        os.rename(scratch, target)
        sync_directory(target.parent)
    except OSError as error:
        raise EdgeError(f"{target}: can't be written: {error.strerror}; nothing was kept") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _estimate(arch: Architecture, plan: Plan) -> int:
    """Bytes of the bundle, to see early that a disk is too small."""
    shapes = matrix_shapes(arch)
    total = sum(plan.matrices[n].code_bytes(*s) + plan.matrices[n].scale_bytes(*s) for n, s in shapes.items())
    columns = len(arch.layers) * arch.per_layer_width
    return total + plan.per_layer.code_bytes(arch.vocabulary, columns) + (32 << 20)


def matrix_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Shape [out, in] of each of the graph's matrices."""
    tensors = tensor_shapes(arch)
    return {
        name: (sum(tensors[part][0] for part in parts), tensors[parts[0]][1])
        for name, parts in stacked_matrices(arch).items()
    }


class _Conversion:
    """One conversion's state: the checkpoint, the plan, the files being written and the errors made."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, directory: Path, report: Callable[[Progress], None]
    ) -> None:
        self.checkpoint, self.plan, self.directory = checkpoint, plan, directory
        self.errors = ErrorMeter()
        self.shapes = matrix_shapes(checkpoint.architecture)
        self.bytes_per_token = sum(
            plan.matrices[name].code_bytes(*shape) + plan.matrices[name].scale_bytes(*shape)
            for name, shape in self.shapes.items()
        )
        self._report, self._done = report, 0
        arch = checkpoint.architecture
        self._total = sum(rows * columns for rows, columns in self.shapes.values())
        self._total += arch.vocabulary * len(arch.layers) * arch.per_layer_width

    def run(self) -> tuple[RowTable, RowTable | None]:
        """Write every file but the manifest. Returns where embedding and per-layer rows lie."""
        (self.directory / TOKENIZER).write_bytes(self.checkpoint.tokenizer_model)
        per_layer = self._per_layer_table() if self.checkpoint.architecture.per_layer_width else None
        return self._decoder(), per_layer

    def _decoder(self) -> RowTable:
        arch = self.checkpoint.architecture
        weights = {name: self._weight(name) for name in self.shapes}

        @cache
        def vector(name: str) -> NDArray[np.float32]:
            return self.checkpoint.tensors[name].array()

        model = build(arch, WIDTHS, weights, vector)
        channels = {name: shape[0] for name, shape in self.shapes.items() if weights[name].scales_key}
        writer = ModelWriter(self.directory / DECODER, model, channels)
        with contextlib.closing(writer):
            for name, parts in stacked_matrices(arch).items():
                self._write_matrix(writer, name, parts)
            writer.finish()
        return self._embedding(writer)

    def _weight(self, name: str) -> Weight:
        format, shape = self.plan.matrices[name], self.shapes[name]
        codes = Region(f"{name}.codes", format.code_bytes(*shape))
        kind = _TFLITE_TYPES[format.bits]
        if format.block:
            scales = Region(f"{name}.scales", format.scale_bytes(*shape))
            return Weight(codes, shape, kind, block=format.block, block_scales=scales)
        return Weight(codes, shape, kind, scales_key=name if format.bits < 32 else "")

    def _write_matrix(self, writer: ModelWriter, name: str, parts: tuple[str, ...]) -> None:
        format, row = self.plan.matrices[name], 0
        for part in parts:
            for values in self._slices(part):
                quantized = quantize(values, format)
                self.errors.add(tensor_group(part), values, quantized)
                writer.write(f"{name}.codes", quantized.packed().data)
                if format.block:
                    writer.write(f"{name}.scales", quantized.scales.view(np.uint8).reshape(-1).data)
                elif format.bits < 32:
                    writer.scales(name, row, quantized.scales)
                row += len(values)

    def _slices(self, name: str) -> Iterator[NDArray[np.float32]]:
        tensor = self.checkpoint.tensors[name]
        step = max(1, _SLICE // tensor.shape[1])
        for start in range(0, tensor.shape[0], step):
            values = tensor.rows(start, min(start + step, tensor.shape[0]))
            yield values
            self._done += values.size
            self._report(Progress(self._done, self._total, name))

    def _embedding(self, writer: ModelWriter) -> RowTable:
        """The embedding's rows lie in the head's bytes."""
        arch, format = self.checkpoint.architecture, self.plan.matrices["head"]
        if format.block:
            at, groups, kind = writer.offsets["head.scales"], arch.hidden // format.block, "float16"
        else:
            at, groups, kind = (writer.scales_offset("head") if format.bits < 32 else 0), 1, "float32"
        codes = writer.offsets["head.codes"]
        return RowTable(DECODER, arch.vocabulary, arch.hidden, format.bits, codes, at, groups, kind)

    def _per_layer_table(self) -> RowTable:
        """Rows of the per-layer table, one scale per layer's slice: codes first, then all scales."""
        arch, format = self.checkpoint.architecture, self.plan.per_layer
        name, groups = "per_layer_embedding", len(arch.layers)
        rows, columns = self.checkpoint.tensors[name].shape
        codes_size = format.code_bytes(rows, columns)
        scales = np.empty((rows * groups if format.bits < 32 else 0), np.float32)
        with (self.directory / PER_LAYER).open("wb") as file:
            row = 0
            for values in self._slices(name):
                pieces = values.reshape(-1, arch.per_layer_width)
                quantized = quantize(pieces, format)
                self.errors.add(name, pieces, quantized)
                file.write(quantized.packed().data)
                scales[row : row + len(quantized.scales)] = quantized.scales
                row += len(pieces)
            file.write(scales.data)
        return RowTable(PER_LAYER, rows, columns, format.bits, 0, codes_size, groups, "float32")


def _manifest(
    checkpoint: Checkpoint,
    recipe: str,
    context: int,
    job: _Conversion,
    tables: tuple[RowTable, RowTable | None],
    scratch: Path,
    digests: Future[dict[str, str]],
) -> Manifest:
    names = [DECODER, TOKENIZER] + ([PER_LAYER] if tables[1] is not None else [])
    paths = {name: scratch / name for name in names}
    return Manifest(
        architecture=checkpoint.architecture,
        context=context,
        verify_width=WIDTHS.verify,
        prefill_widths=WIDTHS.prefill,
        prompt_format=checkpoint.chat.prompt_format,
        bos_id=checkpoint.chat.bos_id,
        stop_ids=checkpoint.chat.stop_ids,
        recipe=recipe,
        quantization=_quantization(job),
        embedding=tables[0],
        per_layer_embedding=tables[1],
        files={name: FileEntry(path.stat().st_size, file_digest(path)) for name, path in paths.items()},
        source={"name": checkpoint.path.name, "sha256": digests.result()},
        licence=checkpoint.licence,
        made_by=f"edge-gemma {version('edge-gemma')}",
    )


def _quantization(job: _Conversion) -> Mapping[str, object]:
    """For each group of matrices its formats, and the weight bytes that one decode step reads."""
    formats: dict[str, set[str]] = {}
    for name, format in job.plan.matrices.items():
        formats.setdefault(tensor_group(name), set()).add(str(format))
    groups = {group: " / ".join(sorted(found)) for group, found in formats.items()}
    if job.checkpoint.architecture.per_layer_width:
        groups["per_layer_embedding"] = f"{job.plan.per_layer} per layer"
    return {"groups": groups, "bytes_per_token": job.bytes_per_token}
