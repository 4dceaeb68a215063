"""A checkpoint in, a bundle out; whole or not at all.

Tensors are read, quantised and written a slice of rows at a time, so memory is bounded by the slice and not
by the model (calibration holds more, see `calibration.calibrate`). The bundle is made in a scratch directory
beside its final place and renamed when it is whole and on disk. The result depends on the input, the recipe
and this version only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.calibration.calibrate import calibrate
from converters.calibration.mixed_precision import plan_within
from converters.calibration.text import CalibrationText
from converters.checkpoints.base import Checkpoint, ExactCodes
from converters.decoder_graph import Widths, build, matrix_shapes, stacked_matrices, widths_of
from converters.encoding import Encoder, NearestCodes, Quantizer
from converters.quantization import Format, tensor_group
from converters.recipes import AUTO, Plan, choose_recipe, plan_that_keeps, stored_format
from converters.tflite.graph import Model, Region, Weight
from converters.tflite.writer import ModelWriter, file_size
from edge.bundles.architecture import Architecture
from edge.bundles.bundle import (
    DECODER,
    EMBEDDING,
    MANIFEST,
    PER_LAYER,
    TOKENIZER,
    FileEntry,
    Manifest,
    file_digest,
)
from edge.bundles.row_table import RowTable
from edge.errors import EdgeError
from edge.files import sync_directory

DEFAULT_CONTEXT = 4096

_CALIBRATION_EFFORT, _PROBE_EFFORT = 10, 5
"""How many times as long as writing a model these take, to tell how much is left."""

_MANIFEST_BYTES = 1 << 15

_TFLITE_TYPES = {32: "float32", 8: "int8", 4: "int4", 2: "int2"}


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: values converted, of how many, and what is in hand."""

    done: int
    total: int
    name: str


@dataclass(frozen=True)
class Converted:
    """What a conversion made: the recipe, bytes in all, weight bytes read per decoded token, and a report.

    `error_lines` has the error of each group of tensors and how much of the checkpoint's own codes was kept.
    """

    recipe: str
    bytes: int
    bytes_per_token: int
    error_lines: tuple[str, ...]


def convert(
    checkpoint: Checkpoint,
    target: Path,
    recipe: str | None = None,
    context: int = DEFAULT_CONTEXT,
    report: Callable[[Progress], None] = lambda _progress: None,
    calibration: CalibrationText | None = None,
    budget: int | None = None,
    widths: Widths | None = None,
) -> Converted:
    """Write the bundle `target`, which must not exist.

    None lets `choose_recipe` choose the recipe, and `widths_of` the widths of the signatures. With a text,
    codes are chosen by what the matrices multiply when the model reads it. With a budget, which goes with the
    recipe "auto", formats are chosen so that the bundle has at most so many bytes.
    Raises CheckpointError for a wrong tensor, EdgeError if the recipe does not suit the checkpoint or the
    target exists or can't be written. Whatever is raised, KeyboardInterrupt included, nothing is left behind.
    """
    arch = checkpoint.architecture
    if context > arch.max_positions:
        raise EdgeError(f"--context {context}: the model has at most {arch.max_positions} positions")
    stored = _stored_codes(checkpoint)
    recipe = choose_recipe(recipe, {format for _, format in stored.values()})
    if (recipe == AUTO) != (budget is not None):
        raise EdgeError("--recipe auto and --budget need each other: give both, or another recipe alone")
    widths = widths or widths_of(arch)
    plan = plan_that_keeps(recipe, arch, {name: format for name, (_, format) in stored.items()})
    most = _size(checkpoint, plan, widths)  # with a budget, of a bundle all in int8
    with (
        _whole_or_nothing(target, most if budget is None else min(budget, most)) as scratch,
        _digests(checkpoint.source_files) as digests,
    ):
        work = _Work(_values_in(arch), report)
        notes: dict[str, object] = {}
        if budget is not None:
            calibration = calibration or CalibrationText.built_in()
            size_of = partial(_size, checkpoint, widths=widths)
            ids = calibration.sequences(checkpoint)[0]
            plan, notes["choice"] = plan_within(budget, checkpoint, ids, size_of, work.part(_PROBE_EFFORT))
        formats = plan.of_tensors(arch)
        carried = {name: codes for name, (codes, format) in stored.items() if format == formats[name]}
        quantizer: Quantizer = NearestCodes()
        lines: list[str] = []
        if calibration is not None:
            fresh = {name: format for name, format in formats.items() if name not in carried}
            quantizer = found = calibrate(checkpoint, fresh, calibration, work.part(_CALIBRATION_EFFORT))
            checkpoint, notes["calibration"], lines = found.checkpoint, found.notes(), found.report_lines()
        encoder = Encoder(checkpoint.tensors, carried, quantizer, work.advance)
        job = _Conversion(checkpoint, plan, widths, scratch, encoder)
        tables = job.run()
        manifest = _manifest(checkpoint, recipe, context, job, tables, scratch, digests, notes)
        (scratch / MANIFEST).write_text(manifest.to_json())
        size = sum(path.stat().st_size for path in scratch.iterdir())
        for path in scratch.iterdir():
            _sync(path)
        sync_directory(scratch)
    return Converted(recipe, size, job.bytes_per_token, (*job.report_lines(), *lines))


def _stored_codes(checkpoint: Checkpoint) -> dict[str, tuple[ExactCodes, Format]]:
    """Tensors that are stored in a format of ours."""
    arch = checkpoint.architecture
    found = {}
    for name, tensor in checkpoint.tensors.items():
        codes = tensor.codes() if len(tensor.shape) == 2 else None
        width = arch.per_layer_width if name == "per_layer_embedding" else tensor.shape[-1]
        format = None if codes is None else stored_format(codes, width)
        if codes is not None and format is not None:
            found[name] = codes, format
    return found


@contextlib.contextmanager
def _digests(files: tuple[Path, ...]) -> Iterator[Future[dict[str, str]]]:
    """SHA-256 of files by name, computed beside the conversion; given up when that ends early."""
    over = threading.Event()

    def heed(_bytes: int) -> None:
        if over.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(lambda: {path.name: file_digest(path, heed) for path in files})
        finally:
            over.set()


@contextlib.contextmanager
def _whole_or_nothing(target: Path, estimate: int) -> Iterator[Path]:
    """A scratch directory beside `target` that becomes it at the end, or vanishes."""
    if os.path.lexists(target):  # a link that leads nowhere is in the way too
        raise EdgeError(f"{target}: exists already; remove it or choose another name with -o")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < estimate:
            raise EdgeError(
                f"{target.parent}: {free / 1e6:.1f} MB free, the bundle needs {estimate / 1e6:.1f} MB"
            )
    except OSError as error:
        raise EdgeError(f"{target}: can't be written: {error.strerror}") from None
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        scratch.mkdir(0o700)  # in here, so that a signal that comes just then leaves nothing either
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


def _size(checkpoint: Checkpoint, plan: Plan, widths: Widths) -> int:
    """Bytes of the bundle, or a few more."""
    arch = checkpoint.architecture
    total = file_size(*_decoder_layout(checkpoint, plan, widths)) + len(checkpoint.tokenizer_model)
    if not arch.tied_head:
        total += plan.embedding.stored_bytes(arch.vocabulary, arch.hidden)
    if arch.per_layer_width:
        total += plan.per_layer.stored_bytes(arch.vocabulary * len(arch.layers), arch.per_layer_width)
    return total + _MANIFEST_BYTES


def _decoder_layout(checkpoint: Checkpoint, plan: Plan, widths: Widths) -> tuple[Model, dict[str, int]]:
    """The graph over weights that are still to be written, and how many scales each per-channel one has."""
    arch = checkpoint.architecture
    shapes = matrix_shapes(arch)
    weights = {name: _weight(name, plan.matrices[name], shape) for name, shape in shapes.items()}

    @cache
    def vector(name: str) -> NDArray[np.float32]:
        return checkpoint.tensors[name].array()

    channels = {name: shape[0] for name, shape in shapes.items() if weights[name].scales_key}
    return build(arch, widths, weights, vector), channels


def _weight(name: str, format: Format, shape: tuple[int, int]) -> Weight:
    codes = Region(f"{name}.codes", format.code_bytes(*shape))
    kind = _TFLITE_TYPES[format.bits]
    if format.block:
        scales = Region(f"{name}.scales", format.scale_bytes(*shape))
        return Weight(codes, shape, kind, block=format.block, block_scales=scales)
    return Weight(codes, shape, kind, scales_key=name if format.bits < 32 else "")


def _values_in(arch: Architecture) -> int:
    """How many values a conversion quantises."""
    total = sum(rows * columns for rows, columns in matrix_shapes(arch).values())
    total += arch.vocabulary * len(arch.layers) * arch.per_layer_width
    return total + (0 if arch.tied_head else arch.vocabulary * arch.hidden)


class _Work:
    """Adds up the values that are done, and reports. What comes before counts as so many more values."""

    def __init__(self, values: int, report: Callable[[Progress], None]) -> None:
        self._done, self._total, self._report = 0, values, report
        self._values = values

    def advance(self, name: str, values: int) -> None:
        self._done += values
        self._report(Progress(self._done, self._total, name))

    def part(self, effort: int) -> Callable[[str, float], None]:
        """Add a part that takes `effort` times as long as writing the model; it reports its shares."""
        whole = effort * self._values
        self._total += whole
        return lambda name, share: self.advance(name, round(share * whole))


@dataclass(frozen=True)
class _Tables:
    """Where rows that are gathered one by one lie."""

    embedding: RowTable
    head: RowTable
    per_layer: RowTable | None


class _Conversion:
    """One conversion's state: the checkpoint, the plan, the files being written and the errors made."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        widths: Widths,
        directory: Path,
        encoder: Encoder,
    ) -> None:
        self.checkpoint, self.plan, self.widths, self.directory = checkpoint, plan, widths, directory
        self.encoder = encoder
        self.shapes = matrix_shapes(checkpoint.architecture)
        self.bytes_per_token = sum(
            plan.matrices[name].stored_bytes(*shape) for name, shape in self.shapes.items()
        )

    def run(self) -> _Tables:
        """Write every file but the manifest. Returns where the rows lie that are gathered one by one."""
        arch = self.checkpoint.architecture
        (self.directory / TOKENIZER).write_bytes(self.checkpoint.tokenizer_model)
        per_layer = None
        if arch.per_layer_width:
            name = "per_layer_embedding"
            per_layer = self._table(PER_LAYER, name, self.plan.per_layer, arch.per_layer_width)
        head = embedding = self._decoder()
        if not arch.tied_head:
            embedding = self._table(EMBEDDING, "embedding", self.plan.embedding, arch.hidden)
        return _Tables(embedding, head, per_layer)

    def report_lines(self) -> list[str]:
        """Error of each group of tensors, and the share of the checkpoint's own codes that was kept."""
        lines, stored, kept = (
            self.encoder.errors.lines(),
            self.encoder.stored_groups,
            self.encoder.kept_groups,
        )
        if stored:
            lines.append(
                f"{kept / stored:.1%} of the checkpoint's {stored:,} groups of codes are kept bit for bit"
            )
        return lines

    def _decoder(self) -> RowTable:
        """Write the graph and its weights. Returns where the head's rows lie."""
        model, channels = _decoder_layout(self.checkpoint, self.plan, self.widths)
        with contextlib.closing(ModelWriter(self.directory / DECODER, model, channels)) as writer:
            for name, parts in stacked_matrices(self.checkpoint.architecture).items():
                self._write_matrix(writer, name, parts)
            writer.finish()
        return self._head_rows(writer)

    def _write_matrix(self, writer: ModelWriter, name: str, parts: tuple[str, ...]) -> None:
        format, row = self.plan.matrices[name], 0
        for part in parts:
            for quantized in self.encoder.encode(part, format, self.shapes[name][1]):
                writer.write(f"{name}.codes", quantized.packed().data)
                if format.block:
                    writer.write(f"{name}.scales", quantized.scales.view(np.uint8).reshape(-1).data)
                elif format.bits < 32:
                    writer.scales(name, row, quantized.scales)
                row += len(quantized.codes)

    def _head_rows(self, writer: ModelWriter) -> RowTable:
        arch, format = self.checkpoint.architecture, self.plan.matrices["head"]
        if format.block:
            at, groups, kind = writer.offsets["head.scales"], arch.hidden // format.block, "float16"
        else:
            at, groups, kind = (writer.scales_offset("head") if format.bits < 32 else 0), 1, "float32"
        codes = writer.offsets["head.codes"]
        return RowTable(DECODER, arch.vocabulary, arch.hidden, format.bits, codes, at, groups, kind)

    def _table(self, file_name: str, name: str, format: Format, width: int) -> RowTable:
        """Write a table of rows to gather: all codes, then all scales, of pieces of `width` columns."""
        rows, columns = self.checkpoint.tensors[name].shape
        codes_at, scales_at = 0, format.code_bytes(rows, columns)
        table = RowTable(
            file_name,
            rows,
            columns,
            format.bits,
            codes_at,
            scales_at,
            columns // (format.block or width),
            "float16" if format.block else "float32",
        )
        with (self.directory / file_name).open("wb") as file:
            for quantized in self.encoder.encode(name, format, width):
                file.seek(codes_at)
                codes_at += file.write(quantized.packed().data)
                file.seek(scales_at)
                scales_at += file.write(quantized.scales.data)
        return table


def _manifest(
    checkpoint: Checkpoint,
    recipe: str,
    context: int,
    job: _Conversion,
    tables: _Tables,
    scratch: Path,
    digests: Future[dict[str, str]],
    notes: Mapping[str, object],
) -> Manifest:
    paths = {path.name: path for path in sorted(scratch.iterdir())}
    return Manifest(
        architecture=checkpoint.architecture,
        context=context,
        verify_width=job.widths.verify,
        prefill_widths=job.widths.prefill,
        prompt_format=checkpoint.chat.prompt_format,
        bos_id=checkpoint.chat.bos_id,
        stop_ids=checkpoint.chat.stop_ids,
        recipe=recipe,
        quantization={**_quantization(job), **notes},
        embedding=tables.embedding,
        head=tables.head,
        per_layer_embedding=tables.per_layer,
        files={name: FileEntry(path.stat().st_size, file_digest(path)) for name, path in paths.items()},
        source={"name": Path(os.path.abspath(checkpoint.path)).name, "sha256": digests.result()},
        licence=checkpoint.licence,
        made_by=f"edge-gemma {version('edge-gemma')}",
    )


def _quantization(job: _Conversion) -> Mapping[str, object]:
    """For each group of matrices its formats, what was kept, and the weight bytes that a step reads."""
    arch = job.checkpoint.architecture
    formats: dict[str, set[str]] = {}
    for name, format in job.plan.matrices.items():
        formats.setdefault(tensor_group(name), set()).add(str(format))
    groups = {group: " / ".join(sorted(found)) for group, found in formats.items()}
    if not arch.tied_head:
        groups["embedding"] = str(job.plan.embedding)
    if arch.per_layer_width:
        per_layer = job.plan.per_layer
        groups["per_layer_embedding"] = str(per_layer) if per_layer.block else f"{per_layer} per layer"
    return {
        "groups": groups,
        "bytes_per_token": job.bytes_per_token,
        "stored_groups": job.encoder.stored_groups,
        "kept_groups": job.encoder.kept_groups,
    }
