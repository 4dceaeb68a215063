"""A directory that is written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from edge.errors import EdgeError
from edge.files import sync_directory


@contextlib.contextmanager
def all_or_nothing(target: Path, estimated_bytes: int) -> Iterator[Path]:
    """Yield a scratch directory next to `target`; rename it to `target` at the end, once it is on disk.

    After any exception, KeyboardInterrupt included, no file is left. Raises EdgeError if the target exists,
    can't be written, or the disk has less than `estimated_bytes` free.
    """
    _require_space(target, estimated_bytes)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        scratch.mkdir(0o700)  # inside `try`, to clean up after a signal at this point
        yield scratch
        for path in scratch.iterdir():
            _sync(path)
        sync_directory(scratch)
        scratch.chmod(0o755)
        os.rename(scratch, target)
        sync_directory(target.parent)
    except OSError as error:
        raise EdgeError(f"{target}: can't be written: {error.strerror}; nothing was kept") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _require_space(target: Path, estimated_bytes: int) -> None:
    if os.path.lexists(target):  # also a dangling link
        raise EdgeError(f"{target}: already exists; remove it or choose another name with -o")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise EdgeError(f"{target}: can't be written: {error.strerror}") from None
    if free < estimated_bytes:
        raise EdgeError(
            f"{target.parent}: {free / 1e6:.1f} MB free, the bundle needs {estimated_bytes / 1e6:.1f} MB"
        )


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
