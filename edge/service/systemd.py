"""Notifications to systemd (sd_notify(3)); each does nothing where systemd does not listen."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Protocol

log = logging.getLogger(__name__)


class Part(Protocol):
    """A thread of the daemon. `progress` grows while it works or waits, but not when it hangs."""

    @property
    def progress(self) -> float:
        """A count; its unit is the part's own."""

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""


def notify(*states: str) -> None:
    """Send states such as `READY=1` to systemd, without waiting."""
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
        log.warning("systemd could not be notified of %s: %s", states[0], error.strerror)


def watchdog_s() -> float | None:
    """After how many seconds of silence systemd restarts this process; None if it does not watch."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    owner = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    watched = microseconds.isdigit() and int(microseconds) > 0 and owner == str(os.getpid())
    return int(microseconds) / 1e6 if watched else None


class Watchdog:
    """Notifies systemd that the process lives, but only if every part has made progress since last time."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._seen: dict[str, float] = {}
        self._stuck: list[str] = []

    def check(self) -> bool:
        """Send `WATCHDOG=1` if all parts have made progress; returns whether they have."""
        now = {name: part.progress for name, part in self._parts.items()}
        stuck = [name for name, count in now.items() if count == self._seen.get(name)]
        self._seen = now
        if stuck and stuck != self._stuck:
            log.warning("no progress: %s; systemd restarts the daemon if this persists", ", ".join(stuck))
        self._stuck = stuck
        if not stuck:
            notify("WATCHDOG=1")
        return not stuck
