"""What the daemon records about its bundles, for itself after a crash and for `edge-daemon bundle`.

One small file in the store, written when loading a bundle starts or ends and when one fails, and only if
that changes something; never synced. It counts crashes, so it has to survive the process, not a power cut:
a record of an earlier boot, or a damaged one, is ignored. Times are
CLOCK_BOOTTIME, so that a clock that is set does no harm.

The file is locked while the daemon runs.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edge.board import boot_id
from edge.errors import EdgeError
from edge.files import read_regular
from edge.protocol import typed_json
from edge.protocol.checks import FieldError
from edge.protocol.strict_json import StrictJsonError, dumps, loads

log = logging.getLogger(__name__)

RECORD = "daemon.json"
MAX_FAILURES = 3
WITHIN_S = 3600.0
"""After MAX_FAILURES failures in this many seconds, the previous bundle is used."""

_SIZE, _MOST_BYTES = 4096, 65_536
_MOST_TEXT = 400
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class BundleFailure:
    """A failure of a bundle, at `at` (CLOCK_BOOTTIME)."""

    bundle: str
    at: float
    why: str


@dataclass(frozen=True)
class Record:
    """`begun` is the bundle that is being loaded and tested, `running` the one that answers.

    `trouble` is one line on the last fallback or refusal, until another bundle is activated.
    """

    boot: str = ""
    begun: str | None = None
    running: str | None = None
    failures: tuple[BundleFailure, ...] = ()
    trouble: str | None = None

    def recent(self, bundle: str) -> tuple[BundleFailure, ...]:
        """Failures of a bundle in the last WITHIN_S seconds."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        return tuple(f for f in self.failures if f.bundle == bundle and now - f.at < WITHIN_S)


def read_record(directory: Path) -> Record:
    """Read the record in a store; an empty one if there is none, or none of this boot."""
    try:
        record = typed_json.read(Record, loads(read_regular(directory / RECORD, _MOST_BYTES), _MOST_BYTES))
    except (OSError, StrictJsonError, FieldError):
        return Record(boot_id())
    return record if record.boot == boot_id() else Record(boot_id(), trouble=record.trouble)


def daemon_lives(directory: Path) -> bool:
    """Return whether a daemon is using a store."""
    try:
        with (directory / RECORD).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


class DaemonRecord:
    """The record, as the daemon writes it."""

    def __init__(self, directory: Path) -> None:
        """Lock the record. Raises EdgeError if another daemon holds it; a disk that fails is no harm."""
        self._descriptor = -1
        self.content = read_record(directory)
        try:
            self._descriptor = os.open(directory / RECORD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            log.warning("%s: %s; failures of bundles are not counted", directory / RECORD, error.strerror)
            return
        self._lock(directory)
        self.content = read_record(directory)

    def _lock(self, directory: Path) -> None:
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:  # `daemon_lives` holds it for a moment, a daemon for ever
                if time.monotonic() > until:
                    raise EdgeError(
                        f"{directory}: another daemon uses this store; stop it, or use another store"
                    ) from None
                time.sleep(0.05)

    def change(self, **fields: Any) -> None:
        """Change some fields."""
        self._write(replace(self.content, **fields))

    def fail(self, bundle: str, why: str) -> int:
        """Record a failure of a bundle; returns the number of recent ones."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        failures = (*self.content.failures, BundleFailure(bundle, now, why[:_MOST_TEXT]))
        recent = replace(self.content, failures=failures).recent(bundle)
        if len(recent) <= MAX_FAILURES:  # more change nothing, and a card wears out
            others = tuple(failure for failure in failures if failure.bundle != bundle)
            self._write(replace(self.content, failures=(*others[-MAX_FAILURES:], *recent)))
        return len(recent)

    def close(self) -> None:
        """Unlock the record."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, content: Record) -> None:
        """Write in place with one call, so that a reader finds the old or the new, padded to one size."""
        if content == self.content:
            return
        self.content = content
        text = dumps(asdict(content)).encode()
        if self._descriptor >= 0:
            try:
                os.pwrite(self._descriptor, text.ljust(_SIZE), 0)
                os.ftruncate(self._descriptor, max(_SIZE, len(text)))
            except OSError as error:
                log.warning("%s: %s; failures of bundles are not counted", RECORD, error.strerror)
