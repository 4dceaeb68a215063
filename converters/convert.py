"""Converts a checkpoint into a bundle.

Tensors are read, quantised and written a slice of rows at a time, so memory is bounded by the slice, not by
the model (calibration needs more, see `calibration.calibrate`). The bundle appears under its name only when
it is complete and on disk. It depends only on the checkpoint, the options and this version.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from converters.bundle_writer import Tables, bundle_size, write_files
from converters.calibration.calibrate import calibrate
from converters.calibration.mixed_precision import plan_within
from converters.calibration.text import CalibrationText
from converters.checkpoints.base import Checkpoint
from converters.decoder_graph import Widths, widths_of
from converters.encoding import Encoder, NearestCodes, Quantizer
from converters.merged_adapter import ADAPTER_WEIGHTS
from converters.output_directory import all_or_nothing
from converters.progress import ReportProgress, Work, ignore_progress
from converters.quantization import tensor_group
from converters.recipes import AUTO, Plan, StoredCodes, choose_recipe, plan_that_keeps, stored_codes
from converters.source_digests import digests_of
from converters.weight_layout import weight_layout
from edge.bundles.bundle import MANIFEST, FileEntry, Manifest, file_digest
from edge.errors import EdgeError

DEFAULT_CONTEXT = 4096

_CALIBRATION_WEIGHT, _SENSITIVITY_WEIGHT = 10, 5
"""The duration of these phases relative to writing the model; used to estimate the time left."""


@dataclass(frozen=True)
class Converted:
    """The recipe, the size of the bundle, the weight bytes read for each decoded token, and a report.

    `error_lines` has the error of each group of tensors and the share of the checkpoint's codes that was
    kept.
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
    report: ReportProgress = ignore_progress,
    calibration: CalibrationText | None = None,
    budget: int | None = None,
    widths: Widths | None = None,
) -> Converted:
    """Write the bundle `target`, which must not exist.

    `recipe` None: see `choose_recipe`. `widths` None: see `widths_of`. With a `calibration` text, codes are
    chosen for the inputs that the matrices get on that text. `budget`, only with the recipe "auto", is the
    maximum size of the bundle in bytes.

    Raises CheckpointError for a wrong tensor, EdgeError if the recipe does not suit the checkpoint or the
    target exists or can't be written. After any exception, KeyboardInterrupt included, no file is left.
    """
    if context > checkpoint.architecture.max_positions:
        raise EdgeError(
            f"--context {context}: the model has at most {checkpoint.architecture.max_positions} positions"
        )
    work = _Conversion(checkpoint, recipe, context, report, calibration, budget, widths)
    with (
        all_or_nothing(target, work.estimated_bytes) as scratch,
        digests_of(checkpoint.source_files) as digests,
    ):
        tables = work.run(scratch)
        manifest = work.manifest(scratch, tables, digests.result())
        (scratch / MANIFEST).write_text(manifest.to_json())
        size = sum(path.stat().st_size for path in scratch.iterdir())
    return Converted(work.recipe, size, work.bytes_per_token, tuple(work.report_lines))


class _Conversion:
    """The plan of one conversion, its phases in order, and their reports."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: str | None,
        context: int,
        report: ReportProgress,
        calibration: CalibrationText | None,
        budget: int | None,
        widths: Widths | None,
    ) -> None:
        if (recipe == AUTO) != (budget is not None):
            raise EdgeError("--recipe auto and --budget need each other: give both, or another recipe alone")
        self._checkpoint, self._context, self._budget = checkpoint, context, budget
        self._calibration = calibration if budget is None else calibration or CalibrationText.built_in()
        layout = weight_layout(checkpoint.architecture)
        self._stored = stored_codes(checkpoint, layout)
        formats = {name: stored.format for name, stored in self._stored.items()}
        self.recipe = choose_recipe(recipe, set(formats.values()))
        self._widths = widths or widths_of(checkpoint.architecture)
        self._plan = plan_that_keeps(self.recipe, layout, formats)
        size = bundle_size(checkpoint, self._plan, self._widths)  # with a budget: all formats are int8
        self.estimated_bytes = size if budget is None else min(budget, size)
        self._work = Work(layout.values, report)
        self._notes: dict[str, object] = {}
        self.report_lines: list[str] = []

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes that a decode step reads."""
        matrices = self._plan.layout.matrices.items()
        return sum(self._plan.formats[name].stored_bytes(*matrix.shape) for name, matrix in matrices)

    def run(self, directory: Path) -> Tables:
        """Choose formats and codes, and write every file except the manifest."""
        calibration = self._calibration
        if self._budget is not None and calibration is not None:
            self._choose_formats(self._budget, calibration)
        formats = self._plan.of_tensors()
        kept = {name: codes for name, codes in self._stored.items() if codes.format == formats[name]}
        quantizer: Quantizer = NearestCodes()
        calibration_lines: list[str] = []
        if calibration is not None:
            to_choose = {name: format for name, format in formats.items() if name not in kept}
            advance = self._work.phase(_CALIBRATION_WEIGHT)
            quantizer = calibrated = calibrate(self._checkpoint, to_choose, calibration, advance)
            self._checkpoint = calibrated.checkpoint
            self._notes["calibration"] = calibrated.notes()
            calibration_lines = calibrated.report_lines()
        tables = self._write(directory, kept, quantizer)
        self.report_lines += calibration_lines
        return tables

    def _choose_formats(self, budget: int, calibration: CalibrationText) -> None:
        size_of = partial(bundle_size, self._checkpoint, widths=self._widths)
        ids = calibration.sequences(self._checkpoint)[0]
        advance = self._work.phase(_SENSITIVITY_WEIGHT)
        self._plan, self._notes["choice"] = plan_within(
            budget, self._checkpoint, self._plan.layout, ids, size_of, advance
        )

    def _write(self, directory: Path, kept: Mapping[str, StoredCodes], quantizer: Quantizer) -> Tables:
        codes = {name: stored.codes for name, stored in kept.items()}
        encoder = Encoder(self._checkpoint.tensors, codes, quantizer, self._work.advance)
        tables = write_files(self._checkpoint, self._plan, self._widths, encoder, directory)
        self.report_lines += encoder.report_lines()
        self._notes |= {"stored_groups": encoder.stored_groups, "kept_groups": encoder.kept_groups}
        return tables

    def manifest(self, directory: Path, tables: Tables, source_digests: Mapping[str, str]) -> Manifest:
        """Describe the bundle whose other files are in `directory`."""
        checkpoint, paths = self._checkpoint, sorted(directory.iterdir())
        return Manifest(
            architecture=checkpoint.architecture,
            context=self._context,
            verify_width=self._widths.verify,
            prefill_widths=self._widths.prefill,
            prompt_format=checkpoint.chat.prompt_format,
            bos_id=checkpoint.chat.bos_id,
            stop_ids=checkpoint.chat.stop_ids,
            recipe=self.recipe,
            quantization={
                "groups": _formats_by_group(self._plan),
                "bytes_per_token": self.bytes_per_token,
                **self._notes,
            },
            embedding=tables.embedding,
            head=tables.head,
            per_layer_embedding=tables.per_layer,
            files={path.name: FileEntry(path.stat().st_size, file_digest(path)) for path in paths},
            source=self._source(source_digests),
            licence=checkpoint.licence,
            made_by=f"edge-gemma {version('edge-gemma')}",
        )

    def _source(self, digests: Mapping[str, str]) -> dict[str, object]:
        """The manifest's entry for the checkpoint and the merged adapter."""
        source: dict[str, object] = {"name": _name_of(self._checkpoint.path), "sha256": digests}
        if self._checkpoint.adapter is not None:
            adapter = {"name": _name_of(self._checkpoint.adapter), "sha256": digests[ADAPTER_WEIGHTS]}
            source["adapter"] = adapter
        return source


def _name_of(path: Path) -> str:
    """The last part of a path, resolved if it is "."."""
    return Path(os.path.abspath(path)).name


def _formats_by_group(plan: Plan) -> dict[str, str]:
    """The formats of each group of matrices and of each table."""
    formats: dict[str, set[str]] = {}
    for name in plan.layout.matrices:
        formats.setdefault(tensor_group(name), set()).add(str(plan.formats[name]))
    groups = {group: " / ".join(sorted(found)) for group, found in formats.items()}
    for name in plan.layout.tables:
        format = plan.formats[name]
        per_layer = name == "per_layer_embedding" and not format.block
        groups[name] = f"{format} per layer" if per_layer else str(format)
    return groups
