"""One directory for a whole test run, shared by its workers, where slow things are made once."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

SHARED = (
    "EDGE_GEMMA_TEST_DIRECTORY"  # environment variable: the directory of the run that this worker is part of
)


@cache
def _own() -> tempfile.TemporaryDirectory[str]:
    """A directory that is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="edge-gemma-tests-")


def share() -> None:
    """Make the directory of a run, for this process and the workers it starts; in a worker, do nothing.

    Programs that the tests start keep their caches there too, and not in the user's home.
    """
    os.environ.setdefault(SHARED, _own().name)
    os.environ["XDG_CACHE_HOME"] = str(directory() / "xdg-cache")


def directory() -> Path:
    """The directory of the run; of this process alone where nothing shared one."""
    return Path(os.environ.get(SHARED) or _own().name)


def made_once(target: Path, make: Callable[[Path], object]) -> Path:
    """Return `target`; the first worker that asks for it makes it, the others wait.

    `make` writes a file or directory at the path that it is given. If it fails, nothing is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            # In a directory of its own, because what makes it can leave files next to it.
            unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
            try:
                make(unfinished / target.name)
                (unfinished / target.name).replace(target)
            finally:
                shutil.rmtree(unfinished)
    return target
