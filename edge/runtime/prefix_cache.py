"""KV snapshots of prompt prefixes on disk, so that a system prompt is prefilled once per bundle.

A snapshot is one file, `<length>-<digest>.kv`: a checksum, then K and V of `length` tokens as the KV cache
holds them (float32: a restored cache gives the very same logits). The digest is over the bundle, the layout
and the token ids, so a snapshot is never used for other tokens or another bundle. It is read through the page
cache, which the system can reclaim.

A damaged snapshot is removed and counts as a miss. Writes are not synced; a power cut can lose a snapshot.
The bytes written in a day are limited, to spare the SD card, and so is the total size; the least recently
used snapshots are removed first.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.files import identity, identity_of, open_regular
from edge.runtime.kv_cache import KVCache

SHORTEST = 32
"""Tokens in the shortest prefix that is stored."""

_LAYOUT = 1
_CHECKSUM_BYTES = 4
_DAY_S = 24 * 3600
_NAME = re.compile(r"(\d+)-[0-9a-f]{32}\.kv")


class PrefixCache:
    """Snapshots in `directory` of one bundle's KV caches.

    The snapshots take at most `capacity` bytes, and at most `daily` bytes are written in 24 hours. A snapshot
    unused for `days` is removed. `written` counts the bytes written by this process. If the directory can't
    be written, nothing is stored.
    """

    def __init__(
        self,
        directory: Path,
        bundle_digest: str,
        capacity: int = 256 << 20,
        daily: int = 512 << 20,
        days: float = 30,
    ) -> None:
        self._directory, self._capacity, self._daily = directory, capacity, daily
        self._salt = f"{_LAYOUT}\n{bundle_digest}\n".encode()
        self._intact: dict[Path, str] = {}
        self.written = 0
        self._writes: list[tuple[float, int]] = []
        with contextlib.suppress(OSError):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in directory.glob("*.part"):  # left by a process that was killed while writing
                _remove(left)
        now = time.time()
        for path, status in self._files():
            if now - status.st_atime > days * _DAY_S and now - status.st_mtime > days * _DAY_S:
                _remove(path)
            elif now - status.st_mtime < _DAY_S:
                self._writes.append((status.st_mtime, status.st_size))

    def restore(
        self, ids: Sequence[int], cache: KVCache, longer_than: int, reserve: Callable[[int], None]
    ) -> int:
        """Load the longest stored prefix of `ids` into `cache` if it is longer than `longer_than` tokens.

        Calls `reserve` with its length first. Returns the length, or 0 with the cache as it was.
        """
        lengths = {int(match[1]) for path, _ in self._files() if (match := _NAME.fullmatch(path.name))}
        for length in sorted(lengths, reverse=True):
            if longer_than < length <= len(ids):
                path = self._path(ids[:length])
                if path.exists():
                    reserve(length)
                    if self._read(path, length, cache):
                        return length
        return 0

    def store(self, ids: Sequence[int], cache: KVCache) -> bool:
        """Store `cache`, which holds exactly the tokens `ids`. False if that was not done.

        Too few tokens, a stored snapshot of the same tokens, a limit or a disk error are the reasons.
        """
        path = self._path(ids)
        parts = [part for pair in cache.snapshot() for part in pair]
        size = _CHECKSUM_BYTES + sum(part.nbytes for part in parts)
        if len(ids) < SHORTEST or path.exists() or not self._may_write(size):
            return False
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part.data, checksum)
        scratch = path.with_suffix(".part")
        try:
            with open(scratch, "wb", opener=_private) as file:
                file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))
                for part in parts:
                    file.write(part.data)
            os.replace(scratch, path)
            self._intact[path] = identity(path)
        except OSError:
            _remove(scratch)
            return False
        self.written += size
        self._writes.append((time.time(), size))
        return True

    def clear(self) -> None:
        """Remove all snapshots, of every bundle."""
        for path, _ in self._files():
            with contextlib.suppress(OSError):
                path.unlink()

    def _path(self, ids: Sequence[int]) -> Path:
        digest = hashlib.sha256(self._salt + np.asarray(ids, "<i4").tobytes()).hexdigest()
        return self._directory / f"{len(ids)}-{digest[:32]}.kv"

    def _read(self, path: Path, length: int, cache: KVCache) -> bool:
        """Restore from `path`, or remove it if it is damaged."""
        content = self._intact_content(path)
        if content is None or not cache.restore(length, content):
            self._intact.pop(path, None)
            _remove(path)
            return False
        with contextlib.suppress(OSError):
            status = path.stat()
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return True

    def _intact_content(self, path: Path) -> NDArray[np.float32] | None:
        """K and V in a file, mapped; None if it is damaged. A file that has not changed is checked once."""
        try:
            with open_regular(path) as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                found = identity_of(os.fstat(file.fileno()))
            body = memoryview(mapped)[_CHECKSUM_BYTES:]
            if self._intact.get(path) != found:
                if zlib.crc32(body) != int.from_bytes(mapped[:_CHECKSUM_BYTES], "little"):
                    return None
                self._intact[path] = found
            return np.frombuffer(body, np.float32)
        except (OSError, ValueError):  # removed, empty, or not a whole number of floats
            return None

    def _may_write(self, size: int) -> bool:
        """Return whether the limits allow `size` more bytes; if so, make room for them."""
        now = time.time()
        self._writes = [(at, count) for at, count in self._writes if now - at < _DAY_S]
        if sum(count for _, count in self._writes) + size > self._daily or size > self._capacity:
            return False
        there = {path for path, _ in self._files()}
        self._intact = {path: found for path, found in self._intact.items() if path in there}
        files = sorted(self._files(), key=lambda item: max(item[1].st_atime, item[1].st_mtime))
        total = sum(status.st_size for _, status in files)
        for path, status in files:
            if total + size <= self._capacity:
                break
            if not _remove(path):
                return False
            total -= status.st_size
        return True

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        with contextlib.suppress(OSError):
            for path in self._directory.iterdir():
                if _NAME.fullmatch(path.name):
                    found.append((path, path.stat()))
        return found


def _remove(path: Path) -> bool:
    """Remove a file; False if that fails, as on a read-only disk."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
