"""Warnings about a broker, logged once even if several connections have the same problem."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)


class Problems:
    """The problems of the connections to one broker. Any thread can call its methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: dict[object, str] = {}

    def of(self, connection: object) -> str | None:
        """Return the present problem of a connection, or None."""
        return self._now.get(connection)

    def note(self, connection: object, problem: str) -> bool:
        """Record a connection's problem, one line; False if a connection already has it."""
        with self._lock:
            new = problem not in self._now.values()
            self._now[connection] = problem
        return new

    def report(self, connection: object, problem: str) -> None:
        """Record a problem, and log it if it is new; the connection will be retried."""
        if self.note(connection, problem):
            log.warning("%s%s Trying again.", problem, "" if problem.endswith("?") else ".")

    def clear(self, connection: object) -> None:
        """Record that a connection no longer has a problem."""
        with self._lock:
            self._now.pop(connection, None)
