"""Files that must be whole or absent: atomic writes, and a cheap mark that a file is unchanged."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def identity(path: Path) -> str:
    """Size, modification time and inode of a file, as text: changes whenever its content may have changed.

    Raises OSError if the file is not there.
    """
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable. Does nothing where directories can't be opened (Windows)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until what was written to a file is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a power cut, finds the old file or the new one.

    Raises OSError; then nothing is left behind.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    sync_directory(path.parent)
