"""The daemon's log on stderr: one line an event, bounded, and without the content of requests."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path

PAYLOADS = "edge.payloads"
"""The logger of requests and answers in full; silent unless `log_payloads` is set."""


REPEAT_S = 60.0
"""Seconds between two lines about events of the same type that others can cause as often as they like."""


class RepeatedLog:
    """Logs events of one type, at most `burst` lines in REPEAT_S, with the number left out. Thread-safe."""

    def __init__(self, logger: logging.Logger, burst: int = 1) -> None:
        self._logger, self._burst = logger, burst
        self._lock = threading.Lock()
        self._since = float("-inf")
        self._lines = self._count = 0

    def warning(self, message: str, *args: object) -> None:
        """Log a warning, unless there were too many lines lately."""
        self._log(logging.WARNING, message, args)

    def info(self, message: str, *args: object) -> None:
        """Log a line of information, unless there were too many lately."""
        self._log(logging.INFO, message, args)

    def _log(self, level: int, message: str, args: tuple[object, ...]) -> None:
        with self._lock:
            self._count += 1
            now = time.monotonic()
            if now - self._since >= REPEAT_S:
                self._since, self._lines = now, 0
            if self._lines >= self._burst:
                return
            self._lines, count, self._count = self._lines + 1, self._count, 0
        more = f" ({count} times since the last such line)" if count > 1 else ""
        self._logger.log(level, message + more, *args)


def place_of(error: BaseException) -> str:
    """Type of an exception and where it was raised, but not its text, which may quote a request."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    calls = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__} at {calls}"


def log_to_stderr(payloads: bool) -> None:
    """Log to stderr from now on; with the priorities of sd-daemon(3) where journald reads them.

    Requests and answers are logged in full only if `payloads` is set.
    """
    handler = logging.StreamHandler(sys.stderr)
    journald = "JOURNAL_STREAM" in os.environ
    handler.setFormatter(
        _Priorities() if journald else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger(PAYLOADS).setLevel(logging.INFO if payloads else logging.WARNING)


class _Priorities(logging.Formatter):
    """Prefixes each line with the syslog priority, `<6>` for information."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; each line of a traceback gets the priority too."""
        levels = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
        priority = next((number for level, number in levels if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())
