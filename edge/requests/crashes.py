"""Crashes, counted for the client whose request was in work.

A process can't know why its last run ended, so any end during work on a request counts: a bug, a lack of
memory, the watchdog, a kill. A client with SUSPEND_AFTER crashes within WITHIN_S is suspended: its new
requests are refused for SUSPENDED_S after the latest. Times are CLOCK_BOOTTIME, so setting the clock has
no effect; crashes before the board restarted do not count.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable

TABLE = "crashes"
SCHEMA = """CREATE TABLE crashes (
    number INTEGER PRIMARY KEY,
    client TEXT NOT NULL,
    at     REAL NOT NULL  -- CLOCK_BOOTTIME
) STRICT"""

SUSPEND_AFTER = 3
WITHIN_S = 3600.0
SUSPENDED_S = 600.0
MAX_CRASHES = 64  # in the table; the oldest are dropped first


class Crashes:
    """The crashes of recent runs. They change only at a start, so requests never read the file for them.

    `ended_last_run`: whether the last run ended while it worked on a request.
    """

    def __init__(self) -> None:
        self.ended_last_run = False
        self._count: Counter[str] = Counter()
        self._latest: dict[str, float] = {}

    def note(self, database: sqlite3.Connection, clients: Iterable[str], now: float, same_boot: bool) -> None:
        """Add the crash that ended the last run, charged to `clients`, and load the earlier ones."""
        charged = [(client, now) for client in clients]
        self.ended_last_run = bool(charged)
        if not same_boot:
            database.execute(f"DELETE FROM {TABLE}")
        database.execute(f"DELETE FROM {TABLE} WHERE at <= ? OR at > ?", (now - WITHIN_S, now))
        database.executemany(f"INSERT INTO {TABLE} (client, at) VALUES (?, ?)", charged)
        database.execute(
            f"DELETE FROM {TABLE} WHERE number NOT IN"
            f" (SELECT number FROM {TABLE} ORDER BY number DESC LIMIT {MAX_CRASHES})"
        )
        self._count.clear()
        self._latest.clear()
        for client, at in database.execute(f"SELECT client, at FROM {TABLE} ORDER BY number"):
            self._count[client] += 1
            self._latest[client] = at

    def suspended_s(self, client: str, now: float) -> float:
        """The seconds for which requests of a client are still refused; 0 if they are accepted."""
        if self._count[client] < SUSPEND_AFTER:
            return 0.0
        return max(0.0, self._latest[client] + SUSPENDED_S - now)
