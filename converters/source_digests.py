"""SHA-256 of a conversion's source files, computed while the conversion runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

from edge.bundles.bundle import file_digest


@contextlib.contextmanager
def digests_of(files: tuple[Path, ...]) -> Iterator[Future[dict[str, str]]]:
    """Hash `files` in a thread; the result is their SHA-256 (hex) by file name.

    Leaving the context stops unfinished work.
    """
    abandoned = threading.Event()

    def stop_if_abandoned(_bytes: int) -> None:
        if abandoned.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(lambda: {path.name: file_digest(path, stop_if_abandoned) for path in files})
        finally:
            abandoned.set()
