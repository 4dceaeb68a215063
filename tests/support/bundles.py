"""Bundles for tests: small checkpoints and the real 270M, converted once a run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from converters.calibration.text import CalibrationText
from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from edge.bundles.bundle import Bundle
from edge.runtime.decoder import Decoder
from tests.support import scratch
from tests.support.checkpoint_files import FIXTURES, NAMES

SMALL = NAMES


def bundle_directory(checkpoint: Path, recipe: str, context: int = 128, calibrated: bool = False) -> Path:
    """The bundle of a checkpoint; callers must not change it (`copy_of` gives one to change)."""
    name = f"{checkpoint.name}-{recipe}-{context}" + "-calibrated" * calibrated

    def make(target: Path) -> None:
        text = CalibrationText.built_in() if calibrated else None
        convert(open_checkpoint(checkpoint), target, recipe, context, calibration=text)

    return scratch.made_once(scratch.directory() / "bundles" / name, make)


def small_bundle(name: str, recipe: str = "float32", context: int = 128) -> Path:
    """The bundle of one of the `SMALL` checkpoints."""
    return bundle_directory(FIXTURES / name, recipe, context)


def copy_of(bundle: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(bundle, target)
    return target


def cache_directory() -> Path:
    """Where this worker keeps packed weights during the run."""
    return scratch.directory() / f"cache-{os.getpid()}"


def open_decoder(directory: Path, context: int | None = None, threads: int = 1) -> Decoder:
    """A decoder over a bundle, with the run's shared cache of packed weights."""
    bundle = Bundle.open(directory, cache_directory())
    return Decoder(bundle, cache_directory(), threads, context or bundle.manifest.context)
