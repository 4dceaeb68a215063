"""An sqlite file that stays usable when its disk fails.

A damaged file is renamed to `NAME.damaged` (the latest is kept), and a new one starts with all records that
can still be read. On a full or read-only disk the store continues in memory and reports that in `problem`;
when the disk works again it writes everything back. Only one process can open the file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from edge.errors import EdgeError
from edge.files import sync_file
from edge.requests.wal_repair import repair

log = logging.getLogger(__name__)
T = TypeVar("T")

CACHE_KIB = 256  # of anonymous memory; a journal fills sqlite's default of 2 MB within hours
RETRY_S = 60.0  # between two attempts to return to the disk
UNFIT = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT)  # records that do not fit a table
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
FAILED = (sqlite3.DatabaseError, UnicodeDecodeError)  # the latter for text in a damaged file
ASIDE = ".damaged"


class SqliteStore:
    """Tables in the file `path`, or in memory only if `path` is None. `tables` gives their schemas by name.

    The first column of each is the integer primary key. It only gives the order, and can be renumbered.

    `writes` counts transactions that changed something, `syncs` those that waited for the disk (fsync).
    `damage` counts records and pages that were found damaged. `problem` is None, or one line on why the
    tables are not on the disk. `opened` is called with each new connection. Raises EdgeError if another
    process has the file open.
    """

    def __init__(
        self, path: Path | None, tables: Mapping[str, str], opened: Callable[[sqlite3.Connection], None]
    ) -> None:
        self.writes = self.syncs = 0
        self.damage = 0
        self.problem: str | None = None
        self._path, self._tables, self._opened = path, tables, opened
        self._lock = threading.RLock()
        self._tried = time.monotonic()
        self._synchronous = self._unsynced = False
        disk = self._open_disk()
        self._rows_are_all = disk is not None
        self._database = disk or self._open_memory()
        self._opened(self._database)

    def run(self, work: Callable[[sqlite3.Connection], T], durable: bool = False) -> T:
        """Run `work` as one transaction; if the disk fails, run it again on the replacement.

        With `durable` the transaction is on the disk when this returns; otherwise it survives a crash of the
        process, but not a power cut.
        """
        with self._lock:
            if self.problem and time.monotonic() - self._tried >= RETRY_S:
                self._move_to_disk()
            try:
                return self._transaction(work, durable)
            except sqlite3.ProgrammingError:  # it was closed
                raise
            except FAILED as error:
                if self._path is None or self.problem:
                    raise
                self._leave_disk(error)
                return self._transaction(work, durable)

    def sync(self) -> None:
        """Wait until all transactions are on the disk; if that fails, continue in memory."""
        with self._lock:
            if not self._unsynced:
                return
            self._unsynced = False
            if self._path is not None and self.problem is None:
                self.syncs += 1
                try:
                    sync_file(_beside(self._path, "-wal"))
                except OSError as error:
                    self._report(error)
                    self._go_to_memory()

    def close(self) -> None:
        """Checkpoint the write-ahead log and close the file."""
        with self._lock:
            self._database.close()

    def _transaction(self, work: Callable[[sqlite3.Connection], T], durable: bool) -> T:
        database = self._database
        if durable != self._synchronous:  # in WAL mode FULL means an fsync for each commit, NORMAL none
            database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._synchronous = durable
        before = database.total_changes
        database.execute("BEGIN")
        try:
            result = work(database)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        if database.total_changes != before:
            self.writes += 1
            self.syncs += durable
            self._unsynced = not durable  # one fsync covers the whole log
        return result

    def _leave_disk(self, error: Exception) -> None:
        if _code(error) not in DAMAGE:
            self._report(error)
        elif self._move_aside(error) and self._move_to_disk():
            return
        self._go_to_memory()

    def _go_to_memory(self) -> None:
        self._take_over(self._open_memory())
        self._rows_are_all = True

    def _move_to_disk(self) -> bool:
        self._tried = time.monotonic()
        disk = self._open_disk()
        if disk is None:
            return False
        try:
            self._take_over(disk)
        except FAILED as error:
            self._report(error)
            disk.close()
            return False
        self._rows_are_all = True
        log.warning("%s: on the disk again", self._path)
        return True

    def _take_over(self, new: sqlite3.Connection) -> None:
        """Replace the database with `new` and copy all readable rows. Raises if `new` can't be written."""
        self._copy_rows(self._database, new, replacing=self._rows_are_all)
        self._database.close()
        self._database, self._synchronous = new, False
        self._opened(new)

    def _copy_rows(self, old: sqlite3.Connection, new: sqlite3.Connection, replacing: bool) -> None:
        """Copy all rows that can be read and satisfy the constraints; only damage breaks these."""
        new.execute("BEGIN")
        for table in self._tables:
            names, rows = self._readable_rows(old, table)
            values = ", ".join("?" * len(names))
            insert = f"INSERT OR REPLACE INTO {table} ({', '.join(names)}) VALUES ({values})"
            if replacing:  # otherwise the file can have rows that this process has never read
                new.execute(f"DELETE FROM {table}")
            for row in rows:
                try:
                    new.execute(insert, row)
                except sqlite3.IntegrityError as error:
                    self.damage += 1
                    log.error("%s: dropped a damaged record: %s", self._path, error)
        new.execute("COMMIT")

    def _readable_rows(
        self, database: sqlite3.Connection, table: str
    ) -> tuple[list[str], list[tuple[object, ...]]]:
        """Names and values of all columns but the first. A damaged page stops a scan: read from both ends."""
        names: list[str] = []
        rows: dict[int, tuple[object, ...]] = {}
        for order in ("ASC", "DESC"):
            try:
                found = database.execute(f"SELECT * FROM {table} ORDER BY 1 {order}")
                names = [column[0] for column in found.description[1:]]
                rows.update((row[0], row[1:]) for row in found)
                break
            except FAILED as error:
                self.damage += 1
                log.error("%s: read %d records before: %s", self._path, len(rows), error)
        return names, [rows[number] for number in sorted(rows)]

    def _open_disk(self) -> sqlite3.Connection | None:
        """Open the file, or a new one if it is damaged. None, with `problem` set, if the disk fails."""
        if self._path is None:
            return None
        damaged = False
        for _ in range(2):
            try:
                database = self._open_file(self._path)
                if damaged:
                    self._salvage(database)
                self.problem = None
                return database
            except FAILED as error:
                code = _code(error)
                if code == sqlite3.SQLITE_BUSY:
                    raise EdgeError(
                        f"{self._path}: another process has it open; stop it, or use another state directory"
                    ) from None
                if code in DAMAGE and self._move_aside(error):
                    damaged = True
                    continue
                self._report(error)
            except OSError as error:
                self._report(error)
            return None
        return None

    def _open_file(self, path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        damaged = repair(path)
        if damaged:
            self.damage += damaged
            log.error("%s-wal: the disk has damaged %d pages; the others are kept", path, damaged)
        database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            database.execute("PRAGMA synchronous = NORMAL")
            self._create(database)
            verdict = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if verdict != "ok":
                damage = sqlite3.DatabaseError(str(verdict).replace("\n", " "))
                damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
                raise damage
            for table in self._tables:
                for _ in database.execute(f"SELECT * FROM {table}"):
                    pass  # raises for text that is not UTF-8, which sqlite does not check
        except BaseException:
            database.close()
            raise
        return database

    def _open_memory(self) -> sqlite3.Connection:
        database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._create(database)
        return database

    def _create(self, database: sqlite3.Connection) -> None:
        """Create the tables or convert those of another version; one that can't be converted is damage."""
        database.execute("BEGIN IMMEDIATE")
        for table, schema in self._tables.items():
            found = database.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
            if found is None:
                database.execute(schema)
            elif found[0] != schema:
                try:
                    self._convert(database, table, schema)
                except sqlite3.DatabaseError as error:
                    database.execute("ROLLBACK")
                    if _code(error) not in UNFIT:
                        raise
                    foreign = sqlite3.DatabaseError("its tables are of another version")
                    foreign.sqlite_errorcode = sqlite3.SQLITE_NOTADB
                    raise foreign from None
        database.execute("COMMIT")

    def _convert(self, database: sqlite3.Connection, table: str, schema: str) -> None:
        """Convert the records of another version: the columns that both versions have."""
        before = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        database.execute(f"ALTER TABLE {table} RENAME TO another_version")
        database.execute(schema)
        names = [row[1] for row in database.execute(f"PRAGMA table_info({table})") if row[1] in before]
        both = ", ".join(names)
        database.execute(f"INSERT INTO {table} ({both}) SELECT {both} FROM another_version")
        database.execute("DROP TABLE another_version")

    def _salvage(self, new: sqlite3.Connection) -> None:
        """Copy what can still be read from the damaged file to the new one."""
        assert self._path is not None
        try:
            with contextlib.closing(sqlite3.connect(_beside(self._path, ASIDE), isolation_level=None)) as old:
                self._copy_rows(old, new, replacing=False)
        except FAILED as error:  # there is no such table, or it has other columns
            self.damage += 1
            log.error("%s: no record could be read: %s", self._path, error)
            if new.in_transaction:
                new.execute("ROLLBACK")

    def _move_aside(self, error: Exception) -> bool:
        assert self._path is not None
        aside = _beside(self._path, ASIDE)
        log.error("%s is damaged (%s): renamed to %s, starting a new file", self._path, error, aside.name)
        try:
            for suffix in ("-wal", "-shm", "-journal"):
                _beside(aside, suffix).unlink(missing_ok=True)
            self._path.replace(aside)
            log_file = _beside(self._path, "-wal")  # it has the latest records
            if log_file.exists():
                log_file.replace(_beside(aside, "-wal"))
            for suffix in ("-shm", "-journal"):
                _beside(self._path, suffix).unlink(missing_ok=True)
        except OSError as failure:
            log.error("%s could not be renamed: %s", self._path, failure)
            return False
        return True

    def _report(self, error: Exception) -> None:
        problem = f"{self._path}: {error}; records are kept in memory only: free or repair the disk"
        if problem != self.problem:
            log.error("%s", problem)
        self.problem = problem


def _code(error: Exception) -> int:
    """The error's primary code. Text that Python can't decode has none, and counts as damage."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code & 0xFF


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
