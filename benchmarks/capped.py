"""Runs a command in a control group with as little memory as a small board has (Linux, root)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_VERSION_1 = Path("/sys/fs/cgroup/memory")
_VERSION_2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cap:
    """A control group; `prefix` in front of a command runs it there. `peak` is in bytes."""

    group: Path
    peak_file: str

    @property
    def prefix(self) -> list[str]:
        """A shell that joins the group and then becomes the command."""
        return ["sh", "-c", f'echo $$ > "{self.group}/cgroup.procs"; exec "$@"', "sh"]

    @property
    def peak(self) -> int:
        """The peak memory of the group, including file pages that it read."""
        return int((self.group / self.peak_file).read_text())


@contextlib.contextmanager
def memory_cap(limit: int) -> Iterator[Cap]:
    """A group of at most `limit` bytes: file pages beyond are dropped, anonymous memory beyond is killed.

    Raises OSError where control groups can't be made.
    """
    first = _VERSION_1.is_dir()
    group = (_VERSION_1 if first else _VERSION_2) / f"edge-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        if not first:
            (group / "memory.swap.max").write_text("0")
        yield Cap(group, "memory.max_usage_in_bytes" if first else "memory.peak")
    finally:
        group.rmdir()


def drop_from_page_cache(paths: Iterable[Path]) -> None:
    """Evict files from the page cache; their pages are then charged to the next reader."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
