"""The real 270M as a bundle, converted once and kept in `.cache` until something that made it changes."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from pathlib import Path

from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from tests.support.checkpoint_files import CACHE, real_model

CONTEXT = 2048
_ROOT = Path(__file__).parents[2]
_MADE_BY = ("converters", "edge/bundles", "edge/text")


def real_bundle(recipe: str = "int8") -> Path:
    """The bundle's directory, which callers must not change."""
    checkpoint = real_model()
    target = CACHE / f"gemma-3-270m-{recipe}-{_digest(checkpoint)}"
    with (CACHE / f".{recipe}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait for the one that converts
        if not target.exists():
            for stale in CACHE.glob(f"gemma-3-270m-{recipe}-*"):
                shutil.rmtree(stale)
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                convert(open_checkpoint(checkpoint), Path(scratch) / "bundle", recipe, CONTEXT)
                (Path(scratch) / "bundle").rename(target)
    return target


def _digest(checkpoint: Path) -> str:
    """A digest of all that decides the bundle's bytes: the checkpoint and the code that converts it."""
    digest = hashlib.sha256(str(checkpoint.stat().st_size).encode())
    for folder in _MADE_BY:
        for source in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
