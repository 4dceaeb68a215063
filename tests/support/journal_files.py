"""Shared by the tests of the journal and of its file."""

import shutil
from pathlib import Path

REQUEST = b'{"id":"a","prompt":"why"}'


def crash(path: Path, target: Path) -> Path:
    """Copy the files as a process that dies now would leave them."""
    target.mkdir()
    for name in (path.name, path.name + "-wal"):
        if (path.parent / name).exists():
            shutil.copy(path.parent / name, target / name)
    return target / path.name
