"""The journal's file: damage, full or read-only disks, power cuts and kills lose nothing confirmed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import EdgeError
from edge.requests import journal as journal_module
from edge.requests import sqlite_store
from edge.requests.journal import Accepted, Answered, InProgress, Journal
from tests.support.journal_files import REQUEST, crash


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


def test_a_second_process_is_refused_and_the_error_names_the_file(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(EdgeError, match=r"journal\.sqlite: another process has it open"):
        Journal(path)
    journal.close()


def test_the_file_is_readable_by_its_owner_only(path: Path) -> None:
    journal = Journal(path)
    journal.accept("a", REQUEST, "mqtt")
    assert [entry.stat().st_mode & 0o077 for entry in path.parent.iterdir()] == [0, 0]
    journal.close()


def test_a_damaged_file_is_moved_aside_and_a_new_one_created(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 1000)
    journal = Journal(path)
    assert journal.problem is None
    assert journal.accept("a", REQUEST, "mqtt") == Accepted()
    assert path.with_name("journal.sqlite.damaged").read_bytes().startswith(b"not a database")
    assert "journal.sqlite is damaged" in caplog.text
    journal.close()
    reopened = Journal(path)
    assert [entry.key for entry in reopened.unfinished()] == ["a"]
    reopened.close()


def test_entries_of_an_earlier_version_are_preserved(path: Path) -> None:
    old = "".join(line for line in journal_module.SCHEMA.splitlines(True) if "    crashes " not in line)
    assert old != journal_module.SCHEMA
    store = sqlite_store.SqliteStore(path, {"entries": old}, lambda _: None)
    insert = "INSERT INTO entries (key, source, digest, request) VALUES (?, '', ?, ?)"
    store.run(lambda database: database.execute(insert, ("a", journal_module._digest(REQUEST), REQUEST)))
    store.close()
    for _ in range(2):
        journal = Journal(path)
        assert [entry.request for entry in journal.unfinished()] == [REQUEST]
        journal.close()
    assert not path.with_name("journal.sqlite.damaged").exists()


def test_a_file_with_other_columns_is_moved_aside(path: Path) -> None:
    store = sqlite_store.SqliteStore(path, {"entries": "CREATE TABLE entries (other TEXT)"}, lambda _: None)
    store.close()
    journal = Journal(path)
    assert journal.accept("a", REQUEST, "mqtt") == Accepted()
    assert path.with_name("journal.sqlite.damaged").exists()
    journal.close()


def test_damage_while_running_preserves_the_readable_entries(path: Path) -> None:
    journal = Journal(path)
    for number in range(40):
        journal.accept(str(number), REQUEST, "mqtt")
        journal.answered(str(number), bytes(100_000))  # more than sqlite keeps in memory
    journal.close()
    journal = Journal(path)
    middle = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(middle)
        file.write(os.urandom(400_000))
    journal.accept("new", REQUEST, "mqtt")
    found = [journal.find(str(number), REQUEST) for number in range(40)]
    assert found[0] == found[39] == Answered(bytes(100_000), published=False)
    assert found[20] is None
    assert journal.find("new", REQUEST) == InProgress()
    assert journal.problem is None
    assert path.with_name("journal.sqlite.damaged").exists()
    journal.close()


def page_of(path: Path, name: str) -> int:
    """Byte offset of the first page of a table or an index."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        return 4096 * (int(database.execute(query, (name,)).fetchone()[0]) - 1)


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def test_damage_found_at_the_start_preserves_the_readable_entries(path: Path) -> None:
    journal = Journal(path)
    for number in range(10):
        journal.accept(str(number), REQUEST, "mqtt")
    journal.answered("3", b"answer")
    journal.close()
    overwrite(path, page_of(path, "sqlite_autoindex_entries_1"), os.urandom(4096))  # the rows are whole
    journal = Journal(path)
    journal.accept("new", REQUEST, "mqtt")
    assert [entry.key for entry in journal.unfinished()] == list("012456789")
    assert [entry.answer for entry in journal.unpublished()] == [b"answer"]
    assert path.with_name("journal.sqlite.damaged").exists()
    journal.close()


def test_damage_after_a_crash_preserves_the_entries_of_the_write_ahead_log(
    path: Path, tmp_path: Path
) -> None:
    journal = Journal(path)
    for number in range(100):
        journal.accept(f"early{number:03}", REQUEST, "mqtt")
    journal.close()
    journal = Journal(path)
    journal.accept("late", REQUEST, "mqtt")  # in the write-ahead log only
    hurt = crash(path, tmp_path / "hurt")
    journal.close()
    hurt.write_bytes(hurt.read_bytes().replace(b"early000", b"\xffarly000"))  # no UTF-8
    journal = Journal(hurt)
    journal.accept("new", REQUEST, "mqtt")
    found = [entry.key for entry in journal.unfinished()]
    assert found == [*(f"early{number:03}" for number in range(1, 100)), "late"]
    assert hurt.with_name("journal.sqlite.damaged").exists()
    journal.close()


def test_use_after_the_close_is_an_error_and_not_damage(path: Path) -> None:
    journal = Journal(path)
    journal.accept("a", REQUEST, "mqtt")
    journal.close()
    with pytest.raises(sqlite3.ProgrammingError):
        journal.answered("a", b"of a thread that a stop has not waited for")
    assert not path.with_name("journal.sqlite.damaged").exists()
    reopened = Journal(path)
    assert [entry.key for entry in reopened.unfinished()] == ["a"]
    reopened.close()


@settings(max_examples=30)
@given(data=st.data())
def test_any_damage_to_the_files_still_gives_a_working_journal(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.sqlite"
        journal = Journal(path)
        for number in range(5):
            journal.accept(str(number), bytes(2000), "mqtt")
            journal.answered(str(number), b"answer")
        hurt = crash(path, Path(folder) / "hurt")
        journal.close()
        victim = hurt.parent / data.draw(st.sampled_from([hurt.name, hurt.name + "-wal"]))
        content = bytearray(victim.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        victim.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        reopened = Journal(hurt)
        assert reopened.accept("new", REQUEST, "mqtt") == Accepted()
        reopened.answered("new", b"answer")
        assert reopened.find("new", REQUEST) == Answered(b"answer", published=False)
        assert reopened.problem is None
        reopened.close()


@settings(max_examples=30)
@given(data=st.data())
def test_a_power_cut_loses_nothing_that_was_synced(data: st.DataObject) -> None:
    """The write-ahead log can be torn anywhere after its last fsync; everything before must survive."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.sqlite"
        wal = path.with_name(path.name + "-wal")
        journal = Journal(path)
        for number in range(3):
            journal.accept(f"old{number}", REQUEST, "mqtt")
            journal.answered(f"old{number}", b"answer")
        synced = wal.stat().st_size
        for number in range(3):
            journal.started(f"old{number}")
            journal.published(f"old{number}")
        torn = crash(path, Path(folder) / "torn")
        journal.close()
        content = (torn.parent / wal.name).read_bytes()
        cut = data.draw(st.integers(synced, len(content)))
        garbage = data.draw(st.binary(max_size=64))
        (torn.parent / wal.name).write_bytes(content[:cut] + garbage)
        reopened = Journal(torn)
        for number in range(3):
            verdict = reopened.find(f"old{number}", REQUEST)
            assert isinstance(verdict, Answered)
            assert verdict.answer == b"answer"
        assert not torn.with_name(torn.name + ".damaged").exists()
        reopened.close()


WORKER = """
import sys
from pathlib import Path
from edge.requests.journal import Journal

journal, first = Journal(Path(sys.argv[1])), int(sys.argv[2])
for entry in journal.unfinished():
    print("left", entry.key, flush=True)
for number in range(first, first + 100_000):
    key = str(number)
    journal.accept(key, b"request" * 50, "mqtt"); print("accepted", key, flush=True)
    journal.started(key)
    journal.answered(key, b"answer" + key.encode()); print("answered", key, flush=True)
    journal.published(key); print("published", key, flush=True)
"""


def test_a_process_killed_at_any_moment_loses_nothing_it_confirmed(path: Path) -> None:
    chance = random.Random(7)
    said: dict[str, str] = {}
    for life in range(8):
        command = [sys.executable, "-c", WORKER, str(path), str(life * 100_000)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            lines = 0
            wanted = chance.randrange(1, 400)
            for line in process.stdout:
                if not line.endswith("\n"):  # truncated by the kill: not confirmed
                    break
                what, key = line.split()
                said[key] = what
                lines += 1
                if lines == wanted:
                    process.send_signal(signal.SIGKILL)
        assert lines >= wanted
    journal = Journal(path)
    assert journal.problem is None
    assert not path.with_name(path.name + ".damaged").exists()
    unpublished = {entry.key for entry in journal.unpublished()}
    unfinished = {entry.key for entry in journal.unfinished()}
    assert len(unfinished) <= 12
    for key, what in said.items():
        if what in ("accepted", "left"):
            assert key in unfinished or key in unpublished
        else:
            verdict = journal.find(key, b"request" * 50)
            assert isinstance(verdict, Answered)
            assert verdict.answer == b"answer" + key.encode()
            assert verdict.published or what == "answered"
    journal.close()


FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
from edge.requests import sqlite_store
from edge.requests import journal as journal_module
from edge.requests.journal import Accepted, Answered, Journal

mount = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(mount)], check=True)
journal = Journal(mount / "journal.sqlite")
journal.accept("before", b"r", "mqtt")
(ballast := mount / "ballast").write_bytes(bytes(300_000))
for number in range(200):
    assert journal.accept(str(number), bytes(2000), "mqtt") == Accepted()
    journal.answered(str(number), bytes(1000))
assert journal.problem and "full" in journal.problem, journal.problem
assert journal.find("7", bytes(2000)) == Answered(bytes(1000), published=False)
assert journal.accept("before", b"r", "mqtt").__class__.__name__ == "InProgress"
sqlite_store.RETRY_S = 0.0
journal.started("before")
assert journal.problem, "there is no room yet"
ballast.unlink()
subprocess.run(["mount", "-o", "remount,size=4m", str(mount)], check=True)
journal.answered("before", b"late")
assert journal.problem is None, journal.problem
journal.close()
again = Journal(mount / "journal.sqlite")
assert again.find("before", b"r") == Answered(b"late", published=False)
assert again.find("199", bytes(2000)) == Answered(bytes(1000), published=False)
again.close()
"""

READ_ONLY_DISK = """
import subprocess, sys
from pathlib import Path
from edge.requests import sqlite_store
from edge.requests import journal as journal_module
from edge.requests.journal import Accepted, Answered, Journal

mount = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)], check=True)
path = mount / "journal.sqlite"
journal = Journal(path)
journal.accept("old", b"r", "mqtt")
journal.answered("old", b"of the disk")
journal.close()
subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
journal = Journal(path)
assert journal.problem and "Read-only" in journal.problem, journal.problem
assert journal.accept("new", b"r", "mqtt") == Accepted()
journal.answered("new", b"of memory")
sqlite_store.RETRY_S = 0.0
subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)
assert [entry.key for entry in journal.unpublished()] == ["old", "new"]
assert journal.problem is None, journal.problem
journal.close()
"""


@pytest.mark.parametrize("script", [FULL_DISK, READ_ONLY_DISK], ids=["full", "read-only"])
def test_a_failing_disk_does_not_stop_the_journal_and_is_used_again_when_it_recovers(
    script: str, tmp_path: Path
) -> None:
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
