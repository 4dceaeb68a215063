"""Repair of sqlite's write-ahead log after damage on the disk.

sqlite reads a log up to the first frame with a wrong checksum. After a power cut that is right. If the card
has changed one byte, it silently loses everything after it. `repair` drops the damaged pages, keeps those
after them, and computes the checksums again. sqlite's integrity check must follow, since a dropped page can
be needed. A torn frame at the end of the log is not damage: a kill or a power cut leaves one.

Format: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

from __future__ import annotations

import fcntl
import os
import struct
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.files import write_atomically

HEADER, FRAME_HEADER, PAGE = 32, 24, 4096  # bytes
FRAME = FRAME_HEADER + PAGE
VERSION = 3_007_000
MAGIC = 0x377F0682  # of a log whose checksums are over little-endian words, as this machine writes it
LOCKS, LOCK_BYTES = 0x40000000, 512  # sqlite's locks on the database file
MASK = 0xFFFFFFFF

Checksum = tuple[int, int]


def repair(database: Path) -> int:
    """Repair the log of a database; returns the number of damaged frames, and of damaged headers.

    Does nothing if there is no damage, or if another process has the database open. Raises OSError.
    """
    wal = database.with_name(database.name + "-wal")
    if not (database.exists() and wal.exists()):
        return 0
    descriptor = os.open(database, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, LOCK_BYTES, LOCKS)
        content, damaged = repaired(wal.read_bytes())
        if damaged:
            write_atomically(wal, content)
        return damaged
    except BlockingIOError:
        return 0
    finally:
        os.close(descriptor)


def repaired(log: bytes) -> tuple[bytes, int]:
    """Return a log without its damaged frames, and their number; an unreadable log stays as it is."""
    if len(log) < HEADER + FRAME:
        return log, 0
    header = log[:HEADER]
    broken_header = _after((0, 0), _words(header[:24])) != struct.unpack(">2I", header[24:])
    if broken_header:
        header = struct.pack(">4I", MAGIC, VERSION, PAGE, 0) + log[HEADER + 8 : HEADER + 16]
        header += struct.pack(">2I", *_after((0, 0), _words(header)))
    if struct.unpack(">3I", header[:12]) != (MAGIC, VERSION, PAGE):
        return log, 0
    frames = [log[at : at + FRAME] for at in range(HEADER, len(log) - FRAME + 1, FRAME)]
    while frames and frames[-1][8:16] != header[16:24]:  # left from an earlier generation of the log
        frames.pop()
    intact, valid = _examined(frames, header)
    while intact and not intact[-1]:
        intact.pop()
    damaged = valid[: len(intact)].count(False) + (broken_header and bool(intact))
    if not damaged:
        return log, 0
    return _chained(header, [frame for frame, good in zip(frames, intact, strict=False) if good]), damaged


def _examined(frames: list[bytes], header: bytes) -> tuple[list[bool], list[bool]]:
    """Return for each frame whether its page is intact, and whether the whole frame is.

    A checksum continues from the previous frame's. The stored one is used, so a damaged page does not affect
    later frames; if only the stored one is damaged, the computed one is used.
    """
    intact: list[bool] = []
    valid: list[bool] = []
    stored = computed = struct.unpack(">2I", header[24:])
    for frame in frames:
        words = _words(frame[:8] + frame[FRAME_HEADER:])
        own = struct.unpack(">2I", frame[16:24])
        current = frame[8:16] == header[16:24]
        after_stored, after_computed = _after(stored, words), _after(computed, words)
        if current and own == after_computed and intact:
            intact[-1] = True
        valid.append(current and own in (after_stored, after_computed))
        intact.append(valid[-1])
        stored, computed = own, own if intact[-1] else after_stored
    return intact, valid


def _chained(header: bytes, frames: list[bytes]) -> bytes:
    """Return a log of these frames, with new salts and checksums."""
    log, checksum = bytearray(header), struct.unpack(">2I", header[24:])
    for frame in frames:
        checksum = _after(checksum, _words(frame[:8] + frame[FRAME_HEADER:]))
        log += frame[:8] + header[16:24] + struct.pack(">2I", *checksum) + frame[FRAME_HEADER:]
    return bytes(log)


def _words(data: bytes) -> NDArray[np.uint32]:
    return np.frombuffer(data, "<u4")


def _after(before: Checksum, words: NDArray[np.uint32]) -> Checksum:
    """Continue a checksum: for each two words x, y: a += x + b; b += y + a (modulo 2^32)."""
    weights, of_a, of_b = _weights(len(words))
    first, second = (int(each) for each in (weights * words).sum(axis=1, dtype=np.uint64))
    a, b = before
    return (of_a[0] * a + of_b[0] * b + first) & MASK, (of_a[1] * a + of_b[1] * b + second) & MASK


@cache
def _weights(count: int) -> tuple[NDArray[np.uint32], Checksum, Checksum]:
    """What each word, and a and b before them, contribute to a checksum of `count` words: it is linear."""
    of_a, of_b = (1, 0), (0, 1)
    columns: list[Checksum] = []
    for _ in range(count // 2):  # the last two words first
        columns += [of_b, (of_a[0] + of_b[0] & MASK, of_a[1] + of_b[1] & MASK)]
        of_a, of_b = columns[-1], (of_a[0] + 2 * of_b[0] & MASK, of_a[1] + 2 * of_b[1] & MASK)
    return np.array(columns[::-1], np.uint32).T.copy(), of_a, of_b
