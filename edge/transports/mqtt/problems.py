"""Warnings about a broker, logged once however many connections have the same problem."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)


class Problems:
    """What is wrong with each of the connections to one broker. Any thread may call its methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: dict[object, str] = {}

    def of(self, connection: object) -> str | None:
        """Give the present problem of a connection, or None."""
        return self._now.get(connection)

    def note(self, connection: object, problem: str) -> bool:
        """Note a connection's problem, one line; False if one of the connections has it already."""
        with self._lock:
            new = problem not in self._now.values()
            self._now[connection] = problem
        return new

    def report(self, connection: object, problem: str) -> None:
        """Note a problem, and log it if it is new; the connection is tried again."""
        if self.note(connection, problem):
            log.warning("%s%s Trying again.", problem, "" if problem.endswith("?") else ".")

    def clear(self, connection: object) -> None:
        """Note that a connection has no problem any more."""
        with self._lock:
            self._now.pop(connection, None)
