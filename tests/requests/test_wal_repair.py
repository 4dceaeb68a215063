"""After damage to the write-ahead log, only the damaged page is lost and nothing after it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from edge.requests.journal import Journal
from edge.requests.wal_repair import FRAME, HEADER, repair, repaired
from tests.support.journal_files import REQUEST, crash

ENTRIES = 30


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """The files of a journal whose process was killed; all entries are in the log only."""
    path = tmp_path / "state" / "journal.sqlite"
    journal = Journal(path)
    for number in range(ENTRIES):
        journal.accept(f"client {number}", REQUEST, "note")
        if number % 2:
            journal.answered(f"client {number}", b"answer")
    left = crash(path, tmp_path / "left")
    journal.close()
    return left


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def entries(journal: Journal) -> set[str]:
    return {entry.key for entry in journal.unfinished()} | {entry.key for entry in journal.unpublished()}


def test_a_log_without_damage_or_with_a_torn_end_is_not_changed(crashed: Path) -> None:
    log = wal_of(crashed).read_bytes()
    assert repaired(log) == (log, 0)
    for cut in (1, FRAME - 10, FRAME, FRAME + 5, len(log) - HEADER, len(log)):
        assert repaired(log[: len(log) - cut]) == (log[: len(log) - cut], 0)
    torn = log[:-100] + bytes(100)
    assert repaired(torn) == (torn, 0)


def test_a_changed_byte_anywhere_in_the_log_is_detected_and_loses_no_other_entry(crashed: Path) -> None:
    log, chance = wal_of(crashed).read_bytes(), random.Random(3)
    database = crashed.read_bytes()
    everything = {f"client {number}" for number in range(ENTRIES)}
    last = HEADER + (len(log) - HEADER) // FRAME * FRAME - FRAME
    places = [*range(0, HEADER, 3), *range(HEADER, HEADER + 24, 3)]
    for at in [*places, *(chance.randrange(last) for _ in range(40))]:
        hurt = bytearray(log)
        hurt[at] ^= chance.randrange(1, 256)
        crashed.write_bytes(database)
        wal_of(crashed).write_bytes(hurt)
        journal = Journal(crashed)
        names = entries(journal)
        assert journal.damage >= 1, at
        journal.close()
        assert len(everything - names) <= 1, (at, everything - names)


HOLDER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA locking_mode = EXCLUSIVE")
database.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_log_in_use_is_not_changed(crashed: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(crashed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        log = bytearray(wal_of(crashed).read_bytes())
        log[HEADER + 100] ^= 1
        wal_of(crashed).write_bytes(log)
        assert repair(crashed) == 0
        assert wal_of(crashed).read_bytes() == log
        holder.kill()
    assert repair(crashed) == 1
