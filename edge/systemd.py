"""What a service tells systemd (sd_notify(3)), and nothing at all where there is no systemd."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

CONFIG = "/etc/edge-gemma/edge-daemon.toml"  # where the package's unit reads it
DIRECTORIES = {  # what systemd tells the package's unit, and nobody else
    "STATE_DIRECTORY": "/var/lib/edge-gemma",
    "CACHE_DIRECTORY": "/var/cache/edge-gemma",
}
PAYLOADS = "edge.payloads"  # the logger of what people ask and are answered


def notify(*states: str) -> None:
    """Send states such as `READY=1` to systemd; does nothing if it does not listen, and never waits."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract name space
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto("\n".join(states).encode(), address)
    except OSError as error:
        log.warning("systemd can't be told %s: %s", states[0], error.strerror)


def watchdog_s() -> float | None:
    """After how many seconds of silence systemd restarts this process; None if it does not watch."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    owner = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    watched = microseconds.isdigit() and int(microseconds) > 0 and owner == str(os.getpid())
    return int(microseconds) / 1e6 if watched else None


class Watchdog:
    """Tells systemd that the process lives, but only if every part has made progress since the last time.

    `parts` gives each part's progress counter by its name.
    """

    def __init__(self, parts: Mapping[str, Callable[[], float]]) -> None:
        self._parts = parts
        self._seen: dict[str, float] = {}
        self._stuck: list[str] = []

    def check(self) -> bool:
        """Send `WATCHDOG=1` if all parts have moved; returns whether they have."""
        now = {name: progress() for name, progress in self._parts.items()}
        stuck = [name for name, count in now.items() if count == self._seen.get(name)]
        self._seen = now
        if stuck and stuck != self._stuck:
            log.warning("no progress: %s; systemd restarts the daemon if that goes on", ", ".join(stuck))
        self._stuck = stuck
        if not stuck:
            notify("WATCHDOG=1")
        return not stuck


def log_to_stderr(payloads: bool) -> None:
    """Log one line an event; with the priorities of sd-daemon(3) where journald reads them.

    What people ask and are answered is logged only if `payloads` are wanted.
    """
    handler = logging.StreamHandler(sys.stderr)
    journald = "JOURNAL_STREAM" in os.environ
    handler.setFormatter(
        _Priorities() if journald else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger(PAYLOADS).setLevel(logging.INFO if payloads else logging.WARNING)


class _Priorities(logging.Formatter):
    """Begins each line with the syslog priority, `<6>` for information."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; a traceback's lines get the priority too."""
        levels = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
        priority = next((number for level, number in levels if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())
