"""Accepted requests and their answers on the disk, so that none is lost or answered twice.

An entry is accepted, started, answered and published. Acceptance and answer are on the disk (fsync) before
the call returns; an acceptance that is not `durable` is on the disk after the next `sync`, together with
others. `started` and `published` need no fsync: they survive a crash of the daemon, and a power cut undoes
them without harm (a start is not counted, an identical answer is published again). That makes at most two
fsyncs for a request, in a write-ahead log that is rarely checkpointed, to spare an SD card.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.board import boot_id
from edge.errors import RequestError
from edge.requests import crashes
from edge.requests.crashes import Crashes
from edge.requests.sqlite_store import SqliteStore

MAX_STARTS = 2  # a request that has ended the daemon this many times is not tried again
MAX_CUTS = 3  # ends by a board restart that do not count; further ones count, as the request may be the cause
HOUSEKEEPING_S = 60.0  # between two searches for entries that are too old
OVERHEAD_BYTES = 128  # of an entry, besides its texts
SCHEMA = """CREATE TABLE entries (
    number    INTEGER PRIMARY KEY,         -- order of acceptance
    key       TEXT    NOT NULL UNIQUE,
    source    TEXT    NOT NULL,
    digest    BLOB    NOT NULL,            -- of the request
    deadline  REAL,                        -- seconds since the epoch, as is answered
    starts    INTEGER NOT NULL DEFAULT 0,
    cuts      INTEGER NOT NULL DEFAULT 0,  -- starts that ended when the board went down
    crashes   INTEGER NOT NULL DEFAULT 0,  -- starts that ended with the process
    answered  REAL,
    published INTEGER NOT NULL DEFAULT 0,
    request   BLOB,                        -- until it is answered
    answer    BLOB
) STRICT"""
TABLES = {"entries": SCHEMA, crashes.TABLE: crashes.SCHEMA}
CRASHES = f"crashes + max(cuts - {MAX_CUTS}, 0)"
SIZE = f"length(key) + length(source) + ifnull(length(request), length(answer)) + {OVERHEAD_BYTES}"


@dataclass(frozen=True)
class Limits:
    """Limits of the journal: entries, bytes of requests and answers, and storage times in seconds.

    A published answer is kept for duplicates for `replay_s`, an unpublished one for `keep_s`.
    """

    entries: int = 2000
    bytes: int = 8 * 1024 * 1024
    replay_s: float = 3600.0
    keep_s: float = 86_400.0


@dataclass(frozen=True)
class Accepted:
    """The request is new, or an earlier run left it unanswered: work on it."""


@dataclass(frozen=True)
class InProgress:
    """This run is working on the same request, and will answer it."""


@dataclass(frozen=True)
class Answered:
    """The same request has this answer."""

    answer: bytes
    published: bool


@dataclass(frozen=True)
class Poisoned:
    """Work on this request has ended the daemon `starts` times: answer it with an error."""

    starts: int


@dataclass(frozen=True)
class Conflict:
    """Another request with this key is unanswered: refuse this one."""


Verdict = Accepted | InProgress | Answered | Poisoned | Conflict


@dataclass(frozen=True)
class Unfinished:
    """An unanswered request of an earlier run. `deadline`: seconds since the epoch, or None.

    `request` is None if the disk has damaged it. `starts` counts those that ended the daemon.
    """

    key: str
    request: bytes | None
    source: str
    deadline: float | None
    starts: int

    @property
    def poisoned(self) -> bool:
        """Whether to answer it with an error rather than try again."""
        return self.starts >= MAX_STARTS


@dataclass(frozen=True)
class Unpublished:
    """An answer that its client has not received."""

    key: str
    answer: bytes
    source: str


class Journal:
    """The journal in the file `path`, or in memory only if it is None. Any thread may call its methods.

    A key is the client, a space and the request's id. `source` is the transport's note on where the answer
    goes; the journal does not interpret it. `clock` gives seconds since the epoch, `uptime` seconds since the
    board started, `boot` names that boot (None: as the kernel does). Raises EdgeError if another process has
    the file open; a damaged file or a failing disk raises nothing (see `edge.requests.sqlite_store`).
    """

    def __init__(
        self,
        path: Path | None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
        boot: str | None = None,
        uptime: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._limits, self._clock, self._on_disk = limits or Limits(), clock, path is not None
        self._alive: dict[str, bool] = {}  # requests of this run by key; True once started
        self._keys: set[str] = set()  # all keys with an entry, and possibly some without
        self._owed = False  # whether an accepted request must be synced
        self._looked = time.monotonic()
        self._damaged_requests = 0
        self._entries = self._bytes = 0  # `_bytes` is never too low
        self._store = SqliteStore(path, TABLES, self._measure)
        self._crashes, self._uptime = Crashes(), uptime
        number = zlib.crc32((boot_id() if boot is None else boot).encode()) >> 1
        self._store.run(lambda database: self._note_end(database, number))

    @property
    def problem(self) -> str | None:
        """The reason why the journal is not on the disk, in one line; None if it is."""
        return self._store.problem

    @property
    def damage(self) -> int:
        """Number of records, or pages of them, found damaged since the start."""
        return self._store.damage + self._damaged_requests

    @property
    def writes(self) -> tuple[int, int]:
        """Transactions that changed something since the start, and how many of them waited for the disk."""
        return self._store.writes, self._store.syncs

    @property
    def lasting(self) -> bool:
        """Whether its entries survive the end of this process."""
        return self._on_disk and self._store.problem is None

    def may_know(self, key: str) -> bool:
        """Whether there may be an entry; False is certain. Does not read the file."""
        return key in self._keys

    @property
    def crashed_in_work(self) -> bool:
        """Whether the last run ended, in this boot, while it worked on a request."""
        return self._crashes.ended_last_run

    def suspended_s(self, client: str) -> float:
        """The seconds for which a client is still refused because its requests ended the process, or 0."""
        return self._crashes.suspended_s(client, self._uptime())

    def find(self, key: str, request: bytes) -> Verdict | None:
        """Look up a request without changing anything; None if it is new."""
        return self._store.run(lambda database: self._find(database, key, request))

    def accept(
        self, key: str, request: bytes, source: str, deadline: float | None = None, durable: bool = True
    ) -> Verdict:
        """Accept a request if it is new; return the verdict.

        `deadline`: seconds since the epoch. If not `durable` the entry is on the disk after the next `sync`.
        Raises RequestError("busy") if the journal is full of unanswered requests.
        """
        size = len(key) + len(source) + len(request) + OVERHEAD_BYTES

        def work(database: sqlite3.Connection) -> Verdict:
            verdict = self._find(database, key, request)
            if verdict is None:
                verdict = Accepted()
                self._make_room(database, size)
                database.execute(
                    "INSERT OR REPLACE INTO entries (key, source, digest, deadline, request)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (key, source, _digest(request), deadline, request),
                )
                self._entries, self._bytes = self._entries + 1, self._bytes + size
                self._keys.add(key)
            if isinstance(verdict, Accepted):
                self._alive[key] = False
                self._owed = self._owed or not durable
            return verdict

        return self._store.run(work, durable)

    def sync(self) -> None:
        """Wait until all accepted requests are on the disk."""
        if self._owed:
            self._owed = False
            self._store.sync()

    def started(self, key: str) -> None:
        """Note that work on a request starts. A start without an answer or `close` after it is a crash."""

        def work(database: sqlite3.Connection) -> None:
            database.execute(
                "UPDATE entries SET starts = starts + 1 WHERE key = ? AND answer IS NULL", (key,)
            )
            self._alive[key] = True

        self._store.run(work)

    def answered(self, key: str, answer: bytes) -> None:
        """Store the final answer, which can be published once this returns."""

        def work(database: sqlite3.Connection) -> None:
            database.execute(
                "UPDATE entries SET answer = ?, answered = ?, request = NULL"
                " WHERE key = ? AND answer IS NULL",
                (answer, self._clock(), key),
            )
            self._bytes += len(answer)
            self._alive.pop(key, None)

        self._store.run(work, durable=True)

    def published(self, key: str) -> None:
        """Note that the client has the answer (for MQTT: that the broker has acknowledged it)."""
        if not self.may_know(key):  # a refusal has no entry
            return
        statement = "UPDATE entries SET published = 1 WHERE key = ? AND answer IS NOT NULL"
        self._store.run(lambda database: database.execute(statement, (key,)))

    def forget(self, key: str) -> None:
        """Drop an accepted request that will not be worked on; it can then be sent again."""

        def work(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM entries WHERE key = ? AND answer IS NULL", (key,))
            self._alive.pop(key, None)

        self._store.run(work, durable=True)

    def unfinished(self) -> list[Unfinished]:
        """Return the unanswered requests of earlier runs, each once, the oldest first.

        Requests that may have ended the process come last.
        """

        def work(database: sqlite3.Connection) -> list[Unfinished]:
            rows = database.execute(
                f"SELECT digest, key, request, source, deadline, {CRASHES} FROM entries"
                f" WHERE answer IS NULL ORDER BY {CRASHES}, number"
            )
            left = [_unfinished(*row) for row in rows if row[1] not in self._alive]
            self._damaged_requests += sum(entry.request is None for entry in left)
            self._alive.update({entry.key: False for entry in left})
            return left

        return self._store.run(work)

    def unpublished(self) -> list[Unpublished]:
        """List the answers that no client has received, the oldest first."""

        def work(database: sqlite3.Connection) -> list[Unpublished]:
            rows = database.execute(
                "SELECT key, answer, source FROM entries WHERE answer IS NOT NULL AND NOT published"
                " ORDER BY number"
            )
            return [Unpublished(*row) for row in rows]

        return self._store.run(work)

    def close(self) -> None:
        """Close cleanly: requests in work do not count as crashes."""
        interrupted = [(key,) for key, started in self._alive.items() if started]
        statement = "UPDATE entries SET starts = starts - 1 WHERE key = ? AND answer IS NULL"
        self._store.run(lambda database: database.executemany(statement, interrupted), durable=True)
        self._store.close()

    # The methods below run inside a transaction, under the store's lock.

    def _note_end(self, database: sqlite3.Connection, boot: int) -> None:
        """Count the end of the last run as a crash of the request in work, unless the board restarted."""
        (before,) = database.execute("PRAGMA user_version").fetchone()
        same_boot = before in (0, boot)
        in_work = "answer IS NULL AND starts > cuts + crashes"
        keys = database.execute(f"SELECT key FROM entries WHERE {in_work}").fetchall()
        column = "crashes" if same_boot else "cuts"
        database.execute(f"UPDATE entries SET {column} = {column} + 1 WHERE {in_work}")
        clients = [key.rpartition(" ")[0] for (key,) in keys] if same_boot else []
        self._crashes.note(database, clients, self._uptime(), same_boot)
        if before != boot:
            database.execute(f"PRAGMA user_version = {boot}")

    def _find(self, database: sqlite3.Connection, key: str, request: bytes) -> Verdict | None:
        row: tuple[Any, ...] | None = database.execute(
            f"SELECT digest, {CRASHES}, answer, answered, published FROM entries WHERE key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        digest, starts, answer, answered, published = row
        same = digest == _digest(request)
        if answer is not None:  # a client that counts from 1 again after a reset must not get an old answer
            fresh = not published or self._clock() - answered < self._limits.replay_s
            return Answered(answer, bool(published)) if same and fresh else None
        if not same:
            return Conflict()
        if key in self._alive:
            return InProgress()
        return Poisoned(starts) if starts >= MAX_STARTS else Accepted()

    def _make_room(self, database: sqlite3.Connection, size: int) -> None:
        """Drop entries that are too old and, at a limit, the oldest answers down to nine tenths of it."""
        limits, now = self._limits, time.monotonic()
        if self._fits(size, 1.0) and now - self._looked < HOUSEKEEPING_S:
            return
        self._looked = now
        database.execute(
            "DELETE FROM entries WHERE answered < ? - CASE published WHEN 1 THEN ? ELSE ? END",
            (self._clock(), limits.replay_s, limits.keep_s),
        )
        self._measure(database)
        if self._fits(size, 1.0):
            return
        oldest_first = database.execute(
            f"SELECT number, {SIZE} FROM entries WHERE answer IS NOT NULL ORDER BY published DESC, number"
        ).fetchall()
        for number, freed in oldest_first:
            if self._fits(size, 0.9):
                break
            database.execute("DELETE FROM entries WHERE number = ?", (number,))
            self._entries, self._bytes = self._entries - 1, self._bytes - freed
        if not self._fits(size, 1.0):
            raise RequestError("busy", f"{self._entries} requests are unanswered; try again later")

    def _fits(self, size: int, share: float) -> bool:
        limits = self._limits
        return self._entries + 1 <= share * limits.entries and self._bytes + size <= share * limits.bytes

    def _measure(self, database: sqlite3.Connection) -> None:
        counted = database.execute(f"SELECT count(*), ifnull(sum({SIZE}), 0) FROM entries").fetchone()
        self._entries, self._bytes = int(counted[0]), int(counted[1])
        self._keys = {key for (key,) in database.execute("SELECT key FROM entries")}


def _unfinished(digest: bytes, key: str, request: bytes | None, *others: Any) -> Unfinished:
    whole = request is not None and _digest(request) == digest
    return Unfinished(key, request if whole else None, *others)


def _digest(request: bytes) -> bytes:
    return hashlib.blake2b(request, digest_size=16).digest()
