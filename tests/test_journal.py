"""The journal: nothing lost, nothing answered twice, whatever happens to the process or its disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from edge.errors import EdgeError, RequestError
from edge.requests import durable_store
from edge.requests import journal as journal_module
from edge.requests.journal import (
    MAX_CUTS,
    MAX_STARTS,
    Accepted,
    Answered,
    Conflict,
    InProgress,
    Journal,
    Limits,
    Poisoned,
    Unpublished,
)

REQUEST = b'{"id":"a","prompt":"why"}'


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(path: Path, clock: Clock) -> Iterator[Journal]:
    opened = Journal(path, clock=clock)
    yield opened
    opened.close()


def crash(path: Path, target: Path) -> Path:
    """What a process that dies now leaves behind: the files as the kernel has them."""
    target.mkdir()
    for name in (path.name, path.name + "-wal"):
        if (path.parent / name).exists():
            shutil.copy(path.parent / name, target / name)
    return target / path.name


def test_a_new_request_is_accepted_and_its_repetition_is_in_progress(journal: Journal) -> None:
    assert journal.find("a", REQUEST) is None
    assert journal.accept("a", REQUEST, "mqtt") == Accepted()
    assert journal.accept("a", REQUEST, "mqtt") == InProgress()
    assert journal.find("a", REQUEST) == InProgress()


def test_a_repeated_request_is_answered_from_the_journal(journal: Journal) -> None:
    journal.accept("a", REQUEST, "mqtt")
    journal.started("a")
    journal.answered("a", b"because")
    assert journal.accept("a", REQUEST, "mqtt") == Answered(b"because", published=False)
    journal.published("a")
    assert journal.accept("a", REQUEST, "mqtt") == Answered(b"because", published=True)


def test_a_key_in_use_for_another_request_is_a_conflict_until_it_is_answered(journal: Journal) -> None:
    journal.accept("a", REQUEST, "mqtt")
    assert journal.accept("a", b"other", "mqtt") == Conflict()
    journal.answered("a", b"because")
    assert journal.accept("a", b"other", "mqtt") == Accepted()
    journal.answered("a", b"otherwise")
    assert journal.accept("a", b"other", "mqtt") == Answered(b"otherwise", published=False)


def test_the_first_answer_stays(journal: Journal) -> None:
    journal.accept("a", REQUEST, "mqtt")
    journal.answered("a", b"first")
    journal.answered("a", b"second")
    assert journal.accept("a", REQUEST, "mqtt") == Answered(b"first", published=False)


def test_a_forgotten_request_can_be_asked_again(journal: Journal) -> None:
    journal.accept("a", REQUEST, "mqtt")
    journal.forget("a")
    assert journal.accept("a", REQUEST, "mqtt") == Accepted()


def test_unfinished_requests_of_a_crashed_run_are_handed_over_once(path: Path, tmp_path: Path) -> None:
    first = Journal(path)
    first.accept("a", REQUEST, "serial:/dev/ttyACM0", deadline=12.5)
    first.accept("b", REQUEST, "mqtt")
    first.answered("b", b"done")
    second = Journal(crash(path, tmp_path / "after"))
    left = second.unfinished()
    assert [(e.key, e.request, e.source, e.deadline, e.poisoned) for e in left] == [
        ("a", REQUEST, "serial:/dev/ttyACM0", 12.5, False)
    ]
    assert second.unfinished() == []
    assert second.accept("a", REQUEST, "mqtt") == InProgress()
    assert second.unpublished() == [Unpublished("b", b"done", "mqtt")]
    first.close()
    second.close()


def test_a_request_that_crashed_the_daemon_twice_is_poisoned(path: Path, tmp_path: Path) -> None:
    journals = [Journal(path)]
    journals[0].accept("a", REQUEST, "mqtt")
    for attempt in (1, 2):
        journals[-1].started("a")
        path = crash(path, tmp_path / f"crash{attempt}")
        journals.append(Journal(path))
        if attempt == 1:
            assert [entry.poisoned for entry in journals[-1].unfinished()] == [False]
    assert journals[-1].accept("a", REQUEST, "mqtt") == Poisoned(2)
    assert [entry.poisoned for entry in journals[-1].unfinished()] == [True]
    journals[-1].answered("a", b"no third try")
    assert journals[-1].accept("a", REQUEST, "mqtt") == Answered(b"no third try", published=False)
    for journal in journals:
        journal.close()


def test_a_power_cut_is_not_counted_as_a_crash_until_a_request_has_seen_several(
    path: Path, tmp_path: Path
) -> None:
    journals = [Journal(path, boot="0")]
    journals[0].accept("a", REQUEST, "mqtt")
    seen = []
    for boot in range(1, MAX_CUTS + MAX_STARTS + 1):
        journals[-1].started("a")
        path = crash(path, tmp_path / f"cut{boot}")
        journals.append(Journal(path, boot=str(boot)))
        seen += [entry.starts for entry in journals[-1].unfinished()]
    assert seen == [0] * MAX_CUTS + [1, 2]
    for journal in journals:
        journal.close()


def test_a_crash_in_the_same_boot_counts_also_after_a_power_cut(path: Path, tmp_path: Path) -> None:
    journals = [Journal(path, boot="first")]
    journals[0].accept("a", REQUEST, "mqtt")
    for number, boot in enumerate(["second", "second", "second"]):
        journals[-1].started("a")
        path = crash(path, tmp_path / f"crash{number}")
        journals.append(Journal(path, boot=boot))
    assert [entry.poisoned for entry in journals[-1].unfinished()] == [True]
    for journal in journals:
        journal.close()


def test_a_refusal_leaves_nothing_that_the_journal_may_know(path: Path) -> None:
    journal = Journal(path)
    journal.accept("a", REQUEST, "mqtt", durable=False)
    assert [journal.may_know(key) for key in "ab"] == [True, False]
    journal.close()
    again = Journal(path)
    assert [again.may_know(key) for key in "ab"] == [True, False]
    again.close()


def test_several_requests_are_written_to_the_disk_at_once(journal: Journal) -> None:
    for number in range(8):
        journal.accept(str(number), REQUEST, "mqtt", durable=False)
    journal.sync()
    journal.sync()
    assert journal.writes == (8, 1)


def test_clean_stops_are_not_counted_as_crashes(path: Path) -> None:
    for _ in range(5):
        journal = Journal(path)
        journal.accept("a", REQUEST, "mqtt")
        journal.started("a")
        journal.close()
    journal = Journal(path)
    assert [entry.starts for entry in journal.unfinished()] == [0]
    journal.close()


def test_a_published_answer_is_repeated_for_its_time_only(journal: Journal, clock: Clock) -> None:
    journal.accept("1", REQUEST, "serial")
    journal.answered("1", b"old")
    journal.published("1")
    clock.now += Limits().replay_s - 1
    assert journal.find("1", REQUEST) == Answered(b"old", published=True)
    clock.now += 2
    assert journal.accept("1", REQUEST, "serial") == Accepted()


def test_a_clock_that_jumps_back_loses_nothing(journal: Journal, clock: Clock) -> None:
    journal.accept("1", REQUEST, "serial")
    journal.answered("1", b"kept")
    clock.now = 0.0
    assert journal.accept("1", REQUEST, "serial") == Answered(b"kept", published=False)


def test_unpublished_answers_outlive_the_replay_time_and_are_then_dropped(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.requests.journal.HOUSEKEEPING_S", 0.0)
    journal = Journal(path, Limits(replay_s=10, keep_s=100), clock)
    for key in ("published", "waiting"):
        journal.accept(key, REQUEST, "mqtt")
        journal.answered(key, b"answer")
    journal.published("published")
    clock.now += 50
    journal.accept("x", REQUEST, "mqtt")
    assert [entry.key for entry in journal.unpublished()] == ["waiting"]
    clock.now += 51
    journal.accept("y", REQUEST, "mqtt")
    assert journal.unpublished() == []
    journal.close()


def test_the_oldest_published_answers_make_room_first(path: Path) -> None:
    journal = Journal(path, Limits(entries=20))
    for number in range(20):
        journal.accept(str(number), REQUEST, "mqtt")
        journal.answered(str(number), b"answer")
        if number >= 5:
            journal.published(str(number))
    journal.accept("new", REQUEST, "mqtt")
    assert [entry.key for entry in journal.unpublished()] == ["0", "1", "2", "3", "4"]
    assert journal.find("5", REQUEST) is None
    assert journal.find("19", REQUEST) == Answered(b"answer", published=True)
    journal.close()


def test_the_file_stays_bounded_under_large_requests(path: Path) -> None:
    journal = Journal(path, Limits(bytes=400_000))
    for number in range(60):
        journal.accept(str(number), bytes(50_000), "mqtt")
        journal.answered(str(number), bytes(50_000))
    journal.close()
    assert path.stat().st_size < 1_000_000


def test_a_journal_full_of_waiting_requests_says_busy_and_keeps_them(path: Path) -> None:
    journal = Journal(path, Limits(entries=3))
    for number in range(3):
        journal.accept(str(number), REQUEST, "mqtt")
    with pytest.raises(RequestError, match="3 requests wait") as caught:
        journal.accept("3", REQUEST, "mqtt")
    assert caught.value.code == "busy"
    assert journal.find("2", REQUEST) == InProgress()
    assert journal.find("3", REQUEST) is None
    journal.close()


def test_a_request_costs_four_writes_of_which_two_wait_for_the_disk(journal: Journal) -> None:
    for number in range(10):
        key = str(number)
        journal.accept(key, REQUEST, "mqtt")
        journal.started(key)
        journal.answered(key, b"answer")
        journal.published(key)
        journal.accept(key, REQUEST, "mqtt")
        journal.find(key, REQUEST)
    assert journal.writes == (40, 20)


def test_syncing_after_every_step_costs_no_more(journal: Journal) -> None:
    steps = (
        lambda key: journal.accept(key, REQUEST, "mqtt", durable=False),
        journal.started,
        lambda key: journal.answered(key, b"answer"),
        journal.published,
    )
    for number in range(10):
        for step in steps:
            step(str(number))
            journal.sync()
    assert journal.writes == (40, 20)


def test_a_second_process_is_refused_with_a_line_that_names_the_file(journal: Journal, path: Path) -> None:
    with pytest.raises(EdgeError, match=r"journal\.sqlite: another process holds it"):
        Journal(path)


def test_the_file_is_readable_by_its_owner_only(journal: Journal, path: Path) -> None:
    journal.accept("a", REQUEST, "mqtt")
    assert [entry.stat().st_mode & 0o077 for entry in path.parent.iterdir()] == [0, 0]


def test_a_damaged_file_is_moved_aside_and_a_new_one_begun(
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


def test_a_file_of_an_earlier_version_keeps_its_records(path: Path) -> None:
    old = journal_module.SCHEMA.replace("    cuts      INTEGER NOT NULL DEFAULT 0,", "")
    assert "cuts " not in old
    store = durable_store.DurableStore(path, "entries", old, lambda _: None)
    insert = "INSERT INTO entries (key, source, digest, request) VALUES (?, '', x'00', ?)"
    store.run(lambda database: database.execute(insert, ("a", REQUEST)))
    store.close()
    for _ in range(2):
        journal = Journal(path)
        assert [entry.request for entry in journal.unfinished()] == [REQUEST]
        journal.close()
    assert not path.with_name("journal.sqlite.damaged").exists()


def test_a_file_with_other_columns_is_moved_aside(path: Path) -> None:
    store = durable_store.DurableStore(path, "entries", "CREATE TABLE entries (other TEXT)", lambda _: None)
    store.close()
    journal = Journal(path)
    assert journal.accept("a", REQUEST, "mqtt") == Accepted()
    assert path.with_name("journal.sqlite.damaged").exists()
    journal.close()


def test_damage_while_running_keeps_what_can_be_read(path: Path) -> None:
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


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_power_cut_loses_nothing_that_waited_for_the_disk(data: st.DataObject) -> None:
    """The write-ahead log may be torn anywhere after its last fsync; all before that must be there."""
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


def test_a_process_killed_at_any_moment_has_kept_all_it_said(path: Path) -> None:
    chance = random.Random(7)
    said: dict[str, str] = {}
    for life in range(12):
        command = [sys.executable, "-c", WORKER, str(path), str(life * 100_000)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            lines = 0
            wanted = chance.randrange(1, 400)
            for line in process.stdout:
                if not line.endswith("\n"):  # torn by the kill: not said
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
from edge.requests import durable_store
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
durable_store.RETRY_S = 0.0
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
from edge.requests import durable_store
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
durable_store.RETRY_S = 0.0
subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)
assert [entry.key for entry in journal.unpublished()] == ["old", "new"]
assert journal.problem is None, journal.problem
journal.close()
"""


@pytest.mark.parametrize("script", [FULL_DISK, READ_ONLY_DISK], ids=["full", "read-only"])
def test_a_failing_disk_stops_nothing_and_is_used_again_when_mended(script: str, tmp_path: Path) -> None:
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class JournalMachine(RuleBasedStateMachine):
    """Any order of calls, clean stops and crashes against a plain dictionary."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "0" / "journal.sqlite"
        self.lives = 0
        self.journal = Journal(self.path)
        self.open: dict[str, int] = {}
        self.running: set[str] = set()
        self.known: dict[str, tuple[bytes, bool]] = {}

    keys = st.sampled_from("abcd")

    @rule(key=keys)
    def accept(self, key: str) -> None:
        verdict = self.journal.accept(key, key.encode(), "mqtt")
        if key in self.known:
            assert verdict == Answered(*self.known[key])
        elif key in self.open:
            assert verdict == InProgress()
        else:
            assert verdict == Accepted()
            self.open[key] = 0

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.open)))
        if key not in self.running:
            self.journal.started(key)
            self.running.add(key)
            self.open[key] += 1

    @precondition(lambda self: self.open)
    @rule(data=st.data(), answer=st.binary(max_size=8))
    def answer(self, data: st.DataObject, answer: bytes) -> None:
        key = data.draw(st.sampled_from(sorted(self.open)))
        self.journal.answered(key, answer)
        self.known[key] = (answer, False)
        self.open.pop(key)
        self.running.discard(key)

    @rule(key=keys)
    def publish(self, key: str) -> None:
        self.journal.published(key)
        if key in self.known:
            self.known[key] = (self.known[key][0], True)

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        self.lives += 1
        if clean:
            self.journal.close()
            for key in self.running:
                self.open[key] -= 1
        else:
            crashed = crash(self.path, self.folder / str(self.lives))
            self.journal.close()
            self.path = crashed
        self.running.clear()
        self.journal = Journal(self.path)
        left = self.journal.unfinished()
        assert {entry.key: entry.starts for entry in left} == self.open
        assert {entry.key for entry in left if entry.poisoned} == {k for k, n in self.open.items() if n >= 2}
        waiting = {entry.key: entry.answer for entry in self.journal.unpublished()}
        assert waiting == {key: answer for key, (answer, sent) in self.known.items() if not sent}

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()
            shutil.rmtree(self.folder)


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
