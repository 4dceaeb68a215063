"""Packed weights on disk: one file for each model, LiteRT version and CPU, and its checksums.

    <key>.xnnpack         what XNNPACK packed, mapped by LiteRT, which does not check what it maps
    <key>.stamp           size, time and inode of that file, CRC-32 of each block, CRC-32 of the stamp
    <key>.XXXX/building   a file that is being packed, or what a crash left of one

A start checks the stamp, the first and the last blocks, which LiteRT parses, and a few random ones. The whole
file is checked next, a few blocks at a time while no request runs, and again each day. A damaged file is
removed and packed again. Two processes may pack at once: each has a directory of its own, and the rename that
publishes a file is atomic.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
import weakref
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edge.errors import RuntimeFailure
from edge.files import identity_of, open_regular, read_regular, sync_file, write_atomically
from edge.runtime import litert_api

BLOCK_BYTES = 1 << 20
IN_MEMORY = ":memory"
"""What XNNPACK takes instead of a path for packed weights in memory, of all signatures together."""
CHECK_EVERY_S = 24 * 3600.0
"""Between two checks of a whole file in one process."""

_BLOCKS_AT_ONCE = 4
_RANDOM_BLOCKS = 5
_CHECKSUM = array("I").itemsize
_MAX_STAMP_BYTES = 1 << 20
"""Of a stamp: enough for 250 GB of weights."""
_PACKED_SHARE, _PACKED_BYTES = 1.1, 1 << 20
"""Packed weights take at most so much of the model file's size, and so many bytes more."""


class PackedWeights:
    """An open file of packed weights that passed the check at the start."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file is not there, ValueError if the stamp or a checked block is wrong."""
        self._path = path
        with open_regular(path) as file:
            self._descriptor = os.dup(file.fileno())
        self.close = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        self._checksums = _read_stamp(_stamp(path), identity_of(status))
        if len(self._checksums) != -(-status.st_size // BLOCK_BYTES):
            raise ValueError("the stamp is of another file")
        if not all(map(self._is_right, _sampled(len(self._checksums)))):
            raise ValueError("a block is damaged")
        self._next, self._due = 0, time.monotonic()

    def check(self) -> bool:
        """Check the next few blocks, if a check is due; False if one of them is damaged."""
        if time.monotonic() < self._due:
            return True
        blocks = range(self._next, min(self._next + _BLOCKS_AT_ONCE, len(self._checksums)))
        self._next = blocks.stop
        if self._next == len(self._checksums):
            self._next, self._due = 0, time.monotonic() + CHECK_EVERY_S
        return all(map(self._is_right, blocks))

    def remove(self) -> None:
        """Remove the file unless another process has replaced it; what is mapped stays mapped."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
                _remove(self._path)

    def _is_right(self, block: int) -> bool:
        try:
            content = os.pread(self._descriptor, BLOCK_BYTES, block * BLOCK_BYTES)
        except OSError:  # a bad sector
            return False
        return zlib.crc32(content) == self._checksums[block]


def weight_cache_name(model_digest: str) -> str:
    """File name of the packed weights of a model on this CPU with this LiteRT."""
    key = "\n".join((litert_api.version(), _cpu_identity(), model_digest))
    return f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.xnnpack"


def open_packed(path: Path) -> PackedWeights | None:
    """Open packed weights, or None if there are none that are intact."""
    try:
        return PackedWeights(path)
    except (OSError, ValueError):
        return None


def forget_packed_weights(directory: Path, kept_models: Sequence[str]) -> None:
    """Remove all packed weights in `directory` but those of some models, and what a crash left of packing."""
    kept = {weight_cache_name(digest) for digest in kept_models}
    for path in directory.glob("*.xnnpack"):
        if path.name not in kept:
            with contextlib.suppress(OSError):
                _remove(path)
    forget_abandoned(directory)


def forget_abandoned(directory: Path) -> None:
    """Remove files that a crash or a power cut left half packed; they can be as large as the model."""
    for building in directory.glob("*/building"):
        with contextlib.suppress(OSError), _locked(building.parent):
            shutil.rmtree(building.parent)


def require_room(directory: Path, model: Path) -> None:
    """Raise OSError if the packed weights of `model` would fill the disk: XNNPACK ends the process then."""
    free = os.statvfs(directory)
    if free.f_bavail * free.f_frsize < _PACKED_SHARE * model.stat().st_size + _PACKED_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Yield a path to pack to; at the end what is there is synced and published as `path`, with its stamp.

    Raises OSError, or RuntimeFailure if nothing was packed.
    """
    with contextlib.ExitStack() as stack:
        scratch = tempfile.TemporaryDirectory(prefix=f"{path.stem}.", dir=path.parent)
        building = Path(stack.enter_context(scratch), "building")
        with contextlib.suppress(OSError):  # without a lock another process may take it for abandoned
            stack.enter_context(_locked(building.parent))
        yield building
        if not building.is_file():
            raise RuntimeFailure(
                f"{path.parent}: LiteRT could not write the packed weights; is the disk full?"
            )
        building.chmod(0o600)
        sync_file(building)
        stamp = _stamp_of(building)
        _stamp(path).unlink(missing_ok=True)
        os.replace(building, path)
        write_atomically(_stamp(path), stamp)


def _stamp(path: Path) -> Path:
    return path.with_suffix(".stamp")


def _remove(path: Path) -> None:
    _stamp(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _stamp_of(path: Path) -> bytes:
    checksums = array("I")
    with open_regular(path) as file:
        head = f"{identity_of(os.fstat(file.fileno()))}\n".encode()
        while block := file.read(BLOCK_BYTES):
            checksums.append(zlib.crc32(block))
    body = head + checksums.tobytes()
    return body + array("I", [zlib.crc32(body)]).tobytes()


def _read_stamp(stamp: Path, identity: str) -> array[int]:
    """The checksums of the blocks of the file that has this identity. Raises OSError or ValueError."""
    content = read_regular(stamp, _MAX_STAMP_BYTES)
    body, checksum = content[:-_CHECKSUM], content[-_CHECKSUM:]
    head = f"{identity}\n".encode()
    if array("I", [zlib.crc32(body)]).tobytes() != checksum or not body.startswith(head):
        raise ValueError("damaged, or of another file")
    return array("I", body[len(head) :])


def _sampled(count: int) -> Iterable[int]:
    """The blocks to check at a start: those that LiteRT parses, and some that nobody can foresee."""
    if count <= _RANDOM_BLOCKS + 3:
        return range(count)
    drawn = (int.from_bytes(os.urandom(4)) % count for _ in range(_RANDOM_BLOCKS))
    return {0, count - 2, count - 1, *drawn}


def _cpu_identity() -> str:
    """What decides which kernels XNNPACK picks, and so how it packs: the machine and its CPU features."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "CPU implementer", "CPU part", "model name")
    lines = {line for line in text.splitlines() if line.startswith(wanted)}
    return platform.machine() + "".join(sorted(lines))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock, which is gone with its process. Raises OSError if another process has it."""
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
