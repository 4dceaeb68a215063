"""Bundles for tests: small checkpoints and the real 270M, converted once a run."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

from converters.calibration.text import CalibrationText
from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from edge.bundles.bundle import Bundle
from edge.runtime.decoder import Decoder
from tests.support.checkpoint_files import FIXTURES, NAMES

SMALL = NAMES


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory that goes when the run ends."""
    return tempfile.TemporaryDirectory(prefix="edge-gemma-tests-")


@cache
def bundle_directory(checkpoint: Path, recipe: str, context: int = 128, calibrated: bool = False) -> Path:
    """The bundle of a checkpoint; callers must not change it (`copy_of` gives one to change)."""
    target = Path(_scratch().name, f"{checkpoint.name}-{recipe}-{context}" + "-calibrated" * calibrated)
    text = CalibrationText.built_in() if calibrated else None
    convert(open_checkpoint(checkpoint), target, recipe, context, calibration=text)
    return target


def small_bundle(name: str, recipe: str = "float32", context: int = 128) -> Path:
    """The bundle of one of the `SMALL` checkpoints."""
    return bundle_directory(FIXTURES / name, recipe, context)


def copy_of(bundle: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(bundle, target)
    return target


def cache_directory() -> Path:
    """Where packed weights are kept for this run."""
    return Path(_scratch().name, "cache")


def open_decoder(directory: Path, context: int | None = None, threads: int = 2) -> Decoder:
    """A decoder over a bundle, with the run's shared cache of packed weights."""
    bundle = Bundle.open(directory, cache_directory())
    return Decoder(bundle, cache_directory(), threads, context or bundle.manifest.context)
