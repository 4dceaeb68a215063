"""Open a bundle in a separate thread while the program imports its other modules.

Compiling needs neither the GIL nor numpy, whose import takes about as long.
"""

from __future__ import annotations

import threading
from pathlib import Path

from edge.bundles.bundle import DECODER, Bundle
from edge.runtime.compiled_model import CompiledModel


def compile_graph(bundle: Bundle, cache_directory: Path, threads: int) -> CompiledModel:
    """Compile the bundle's graph. Raises RuntimeFailure."""
    digest = bundle.manifest.files[DECODER].sha256
    return CompiledModel(bundle.path(DECODER), digest, cache_directory, threads)


class Opening:
    """Verifies a bundle and compiles its graph in a thread. The program can't exit before that ends."""

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
        except Exception as error:  # raised again in `result`
            self._opened = error
