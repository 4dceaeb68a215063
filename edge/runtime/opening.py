"""A bundle opened in a thread of its own, while the program imports the rest of itself.

LiteRT compiles without Python's lock and without numpy, whose import takes as long.
"""

from __future__ import annotations

import threading
from pathlib import Path

from edge.bundles.bundle import DECODER, Bundle
from edge.runtime.compiled_model import CompiledModel


def compile_graph(bundle: Bundle, cache_directory: Path, threads: int) -> CompiledModel:
    """The bundle's graph, compiled. Raises RuntimeFailure."""
    digest = bundle.manifest.files[DECODER].sha256
    return CompiledModel(bundle.path(DECODER), digest, cache_directory, threads)


class Opening:
    """Verifies a bundle and compiles its graph from now on. A program that ends meanwhile waits for it."""

    def __init__(self, directory: Path, cache_directory: Path, threads: int) -> None:
        self._opened: tuple[Bundle, CompiledModel] | Exception
        arguments = (directory, cache_directory, threads)
        self._thread = threading.Thread(target=self._open, args=arguments, name="opening")
        self._thread.start()

    def result(self) -> tuple[Bundle, CompiledModel]:
        """Wait for both. Raises BundleError or RuntimeFailure."""
        self._thread.join()
        if isinstance(self._opened, Exception):
            raise self._opened
        return self._opened

    def _open(self, directory: Path, cache_directory: Path, threads: int) -> None:
        try:
            bundle = Bundle.open(directory, cache_directory)
            self._opened = bundle, compile_graph(bundle, cache_directory, threads)
        except Exception as error:  # whoever waits gets it
            self._opened = error
