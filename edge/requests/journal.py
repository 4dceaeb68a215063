"""What was accepted and what was answered, so that nothing is lost or answered twice.

An entry is accepted, started, answered, published. Acceptance and answer are on the disk (fsync) before the
call returns, an acceptance that is not `durable` at the next `sync`, with others; `started` and `published`
cost no fsync: they survive a crash of the daemon, and what a power cut may undo of them is harmless (a start
not counted, an identical answer published again). That is at most two fsyncs a request, in a write-ahead log
that is folded back rarely, as an SD card likes it.
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

MAX_STARTS = 2  # a request that the daemon did not survive this often is not tried again
MAX_CUTS = 3  # starts ended by the board itself that are not counted; more, and the request may be why
HOUSEKEEPING_S = 60.0  # between two looks for entries that are too old
OVERHEAD_BYTES = 128  # of an entry beside its texts
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
    """What the journal keeps: entries, bytes of requests and answers, and for how long (seconds).

    A published answer is repeated for `replay_s`; one that could not be published waits for `keep_s`.
    """

    entries: int = 2000
    bytes: int = 8 * 1024 * 1024
    replay_s: float = 3600.0
    keep_s: float = 86_400.0


@dataclass(frozen=True)
class Accepted:
    """The request is new, or was left over by a former run: work on it."""


@dataclass(frozen=True)
class InProgress:
    """This run works on the same request already: its answer will come."""


@dataclass(frozen=True)
class Answered:
    """The same request has this answer; nothing is to be computed."""

    answer: bytes
    published: bool


@dataclass(frozen=True)
class Poisoned:
    """The daemon did not survive this request `starts` times: answer it with an error."""

    starts: int


@dataclass(frozen=True)
class Conflict:
    """Another request with this key has no answer yet: refuse this one."""


Verdict = Accepted | InProgress | Answered | Poisoned | Conflict


@dataclass(frozen=True)
class Unfinished:
    """A request of a former run without an answer. `deadline`: seconds since the epoch, or None.

    `request` is None if the disk has damaged it. `starts` counts those that the daemon did not survive.
    """

    key: str
    request: bytes | None
    source: str
    deadline: float | None
    starts: int

    @property
    def poisoned(self) -> bool:
        """Whether to answer it with an error instead of another try."""
        return self.starts >= MAX_STARTS


@dataclass(frozen=True)
class Unpublished:
    """An answer that its asker has not got."""

    key: str
    answer: bytes
    source: str


class Journal:
    """The journal in the file `path`, or in memory only if it is None. Any thread may call its methods.

    A key is the client, a space and the request's id. `source` is the transport's own note on where the
    answer goes; the journal only keeps it. `clock` gives seconds since the epoch, `uptime` seconds since the
    board started, `boot` names that boot (None: as the kernel does). Raises EdgeError if another process
    holds the file; a damaged file or a failing disk raises nothing (see `edge.requests.sqlite_store`).
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
        self._alive: dict[str, bool] = {}  # keys that this run works on; True once started
        self._keys: set[str] = set()  # all that have an entry, and perhaps some that had one
        self._owed = False  # whether something was accepted that `sync` is to bring to the disk
        self._looked = time.monotonic()
        self._damaged_requests = 0
        self._entries = self._bytes = 0  # the latter never less than the truth
        self._store = SqliteStore(path, TABLES, self._measure)
        self._crashes, self._uptime = Crashes(), uptime
        number = zlib.crc32((boot_id() if boot is None else boot).encode()) >> 1
        self._store.run(lambda database: self._note_end(database, number))

    @property
    def problem(self) -> str | None:
        """One line on why nothing is written to the disk, or None if all is well."""
        return self._store.problem

    @property
    def damage(self) -> int:
        """How many records, or pages of them, the disk was found to have damaged since the start."""
        return self._store.damage + self._damaged_requests

    @property
    def writes(self) -> tuple[int, int]:
        """Transactions that changed something since the start, and how many of them waited for the disk."""
        return self._store.writes, self._store.syncs

    @property
    def lasting(self) -> bool:
        """Whether what it holds outlives this process."""
        return self._on_disk and self._store.problem is None

    def may_know(self, key: str) -> bool:
        """Whether `find` may find something; costs no look into the file. False is certain."""
        return key in self._keys

    def suspended_s(self, client: str) -> float:
        """For how many seconds a client is refused because its requests ended the process, or 0."""
        return self._crashes.suspended_s(client, self._uptime())

    def find(self, key: str, request: bytes) -> Verdict | None:
        """Say what is known of a request, changing nothing; None if it is new."""
        return self._store.run(lambda database: self._find(database, key, request))

    def accept(
        self, key: str, request: bytes, source: str, deadline: float | None = None, durable: bool = True
    ) -> Verdict:
        """Take a request on, unless the verdict says that it is known.

        `deadline`: seconds since the epoch. If not `durable` it is on the disk after the next `sync`.
        Raises RequestError("busy") if the journal is full of requests that have no answer yet.
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
        """Wait until all that was accepted is on the disk; does nothing if it is."""
        if self._owed:
            self._owed = False
            self._store.sync()

    def started(self, key: str) -> None:
        """Note that work on a request begins; a start that no answer or `close` follows was a crash."""

        def work(database: sqlite3.Connection) -> None:
            database.execute(
                "UPDATE entries SET starts = starts + 1 WHERE key = ? AND answer IS NULL", (key,)
            )
            self._alive[key] = True

        self._store.run(work)

    def answered(self, key: str, answer: bytes) -> None:
        """Keep the final answer; it may be published as soon as this returns."""

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
        """Note that the asker has the answer (for MQTT: that the broker has acknowledged it)."""
        if not self.may_know(key):  # it was a refusal
            return
        statement = "UPDATE entries SET published = 1 WHERE key = ? AND answer IS NOT NULL"
        self._store.run(lambda database: database.execute(statement, (key,)))

    def forget(self, key: str) -> None:
        """Drop a request that was accepted but will not be worked on, so that it may be asked again."""

        def work(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM entries WHERE key = ? AND answer IS NULL", (key,))
            self._alive.pop(key, None)

        self._store.run(work, durable=True)

    def unfinished(self) -> list[Unfinished]:
        """Hand over what earlier runs left without an answer, each once.

        The oldest comes first, but what may have ended the process comes last, after its neighbours.
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
        """List the answers that nobody has got yet, oldest first."""

        def work(database: sqlite3.Connection) -> list[Unpublished]:
            rows = database.execute(
                "SELECT key, answer, source FROM entries WHERE answer IS NOT NULL AND NOT published"
                " ORDER BY number"
            )
            return [Unpublished(*row) for row in rows]

        return self._store.run(work)

    def close(self) -> None:
        """Stop cleanly: what was started and not answered does not count as a crash."""
        interrupted = [(key,) for key, started in self._alive.items() if started]
        statement = "UPDATE entries SET starts = starts - 1 WHERE key = ? AND answer IS NULL"
        self._store.run(lambda database: database.executemany(statement, interrupted), durable=True)
        self._store.close()

    # What is below runs inside a transaction, so under the store's lock.

    def _note_end(self, database: sqlite3.Connection, boot: int) -> None:
        """Charge the end of the last run to the request that was in work: to the board if that restarted."""
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
        if answer is not None:  # an asker that counts from 1 again after a reset must not get an old answer
            fresh = not published or self._clock() - answered < self._limits.replay_s
            return Answered(answer, bool(published)) if same and fresh else None
        if not same:
            return Conflict()
        if key in self._alive:
            return InProgress()
        return Poisoned(starts) if starts >= MAX_STARTS else Accepted()

    def _make_room(self, database: sqlite3.Connection, size: int) -> None:
        """Drop what is too old, and, if a limit is reached, the oldest answers down to nine tenths of it."""
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
            raise RequestError(
                "busy", f"{self._entries} requests wait for an answer already; ask again later"
            )

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
