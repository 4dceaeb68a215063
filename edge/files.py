"""Files that are written whole or not at all, read without trust, and marked as checked.

Every file that lies in a bundle, in the cache or in the state directory is opened with `open_regular` or read
with `read_regular`: a FIFO or a device in its place is an error, never a hang or a read without an end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO


def keep_private() -> None:
    """Let only this process's user read what it creates from now on, unless a mode is set explicitly."""
    os.umask(os.umask(0o077) | 0o077)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, also if `path` is a FIFO, a device or a directory."""
    nonblocking = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would wait for a writer
    descriptor = os.open(path, os.O_RDONLY | nonblocking | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises OSError, also if it is longer."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return content


def identity(path: Path) -> str:
    """Size, modification time and inode of a file, as text: changes when its content is written.

    Raises OSError if the file is not there.
    """
    return identity_of(path.stat())


def identity_of(status: os.stat_result) -> str:
    """Do what `identity` does for a file whose status is known."""
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def matches(stamp: Path, content: str) -> bool:
    """Whether a stamp holds exactly `content`. A stamp that is damaged or can't be read does not match."""
    expected = content.encode()
    try:
        return read_regular(stamp, len(expected)) == expected
    except OSError:
        return False


def write_stamp(stamp: Path, content: str) -> None:
    """Write a stamp, for `matches`. A full or read-only disk is no error: the check is made again."""
    with contextlib.suppress(OSError):
        stamp.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(stamp, content.encode())


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
    """Write `content` to `path`, mode 0600, so that a reader, or a power cut, finds the old file or the new.

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
