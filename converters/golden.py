"""Records a bundle's loss on a short text in its manifest, as the reference of the self-test on a board.

This is not part of a conversion, which loads no inference library and gives the same bytes on every machine.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from edge.bundles.bundle import MANIFEST, SIGNATURE, Golden
from edge.errors import EdgeError
from edge.files import write_atomically
from edge.generation.generator import Generator
from edge.generation.self_test import record

MOST_CHARACTERS = 1000
"""The longest text used; in practice 64 tokens are shorter."""


def record_golden(directory: Path, text: str, cache_directory: Path) -> Golden:
    """Run a bundle over the start of `text` and write its loss into the manifest.

    Raises BundleError or RuntimeFailure for a bundle that can't be run, EdgeError for a text that is too
    short.
    """
    generator = Generator.open(directory, cache_directory, os.cpu_count() or 1, None)
    golden = record(generator, text[:MOST_CHARACTERS])
    manifest = replace(generator.bundle.manifest, golden=golden)
    generator.close()
    try:
        (directory / SIGNATURE).unlink(missing_ok=True)  # it is for the old manifest
        write_atomically(directory / MANIFEST, manifest.to_json().encode())
        (directory / MANIFEST).chmod(0o644)
    except OSError as error:
        raise EdgeError(f"{directory}: can't be written: {error.strerror}") from None
    return golden
