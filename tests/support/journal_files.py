"""What tests of the journal and of its file have in common."""

import shutil
from pathlib import Path

REQUEST = b'{"id":"a","prompt":"why"}'


def crash(path: Path, target: Path) -> Path:
    """What a process that dies now leaves behind: the files as the kernel has them."""
    target.mkdir()
    for name in (path.name, path.name + "-wal"):
        if (path.parent / name).exists():
            shutil.copy(path.parent / name, target / name)
    return target / path.name
