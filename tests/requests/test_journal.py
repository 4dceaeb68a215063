"""The journal: no request is lost or answered twice after crashes, power cuts and disk errors."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from edge.errors import RequestError
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
from tests.support.journal_files import REQUEST, crash


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


def test_a_new_request_is_accepted_and_its_duplicate_is_in_progress(journal: Journal) -> None:
    assert journal.find("a", REQUEST) is None
    assert journal.accept("a", REQUEST, "mqtt") == Accepted()
    assert journal.accept("a", REQUEST, "mqtt") == InProgress()
    assert journal.find("a", REQUEST) == InProgress()


def test_a_duplicate_is_answered_from_the_journal(journal: Journal) -> None:
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


def test_the_first_answer_is_not_replaced(journal: Journal) -> None:
    journal.accept("a", REQUEST, "mqtt")
    journal.answered("a", b"first")
    journal.answered("a", b"second")
    assert journal.accept("a", REQUEST, "mqtt") == Answered(b"first", published=False)


def test_a_deleted_request_can_be_accepted_again(journal: Journal) -> None:
    journal.accept("a", REQUEST, "mqtt")
    journal.forget("a")
    assert journal.accept("a", REQUEST, "mqtt") == Accepted()


def test_unfinished_requests_of_a_crashed_run_are_returned_once(path: Path, tmp_path: Path) -> None:
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


def test_a_power_cut_counts_as_a_crash_only_after_several_during_one_request(
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


def test_a_crash_without_a_reboot_counts_also_after_a_power_cut(path: Path, tmp_path: Path) -> None:
    journals = [Journal(path, boot="first")]
    journals[0].accept("a", REQUEST, "mqtt")
    for number, boot in enumerate(["second", "second", "second"]):
        journals[-1].started("a")
        path = crash(path, tmp_path / f"crash{number}")
        journals.append(Journal(path, boot=boot))
    assert [entry.poisoned for entry in journals[-1].unfinished()] == [True]
    for journal in journals:
        journal.close()


def test_only_accepted_requests_are_possibly_known(path: Path) -> None:
    journal = Journal(path)
    journal.accept("a", REQUEST, "mqtt", durable=False)
    assert [journal.may_know(key) for key in "ab"] == [True, False]
    journal.close()
    again = Journal(path)
    assert [again.may_know(key) for key in "ab"] == [True, False]
    again.close()


def test_several_requests_share_one_sync(journal: Journal) -> None:
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


def test_a_published_answer_is_repeated_only_within_the_replay_time(journal: Journal, clock: Clock) -> None:
    journal.accept("1", REQUEST, "serial")
    journal.answered("1", b"old")
    journal.published("1")
    clock.now += Limits().replay_s - 1
    assert journal.find("1", REQUEST) == Answered(b"old", published=True)
    clock.now += 2
    assert journal.accept("1", REQUEST, "serial") == Accepted()


def test_a_clock_that_jumps_back_loses_no_answer(journal: Journal, clock: Clock) -> None:
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


def test_the_oldest_published_answers_are_removed_first(path: Path) -> None:
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


def test_a_journal_full_of_waiting_requests_answers_busy_and_loses_none(path: Path) -> None:
    journal = Journal(path, Limits(entries=3))
    for number in range(3):
        journal.accept(str(number), REQUEST, "mqtt")
    with pytest.raises(RequestError, match="3 requests are unanswered") as caught:
        journal.accept("3", REQUEST, "mqtt")
    assert caught.value.code == "busy"
    assert journal.find("2", REQUEST) == InProgress()
    assert journal.find("3", REQUEST) is None
    journal.close()


def test_a_request_costs_four_writes_and_two_syncs(journal: Journal) -> None:
    for number in range(10):
        key = str(number)
        journal.accept(key, REQUEST, "mqtt")
        journal.started(key)
        journal.answered(key, b"answer")
        journal.published(key)
        journal.accept(key, REQUEST, "mqtt")
        journal.find(key, REQUEST)
    assert journal.writes == (40, 20)


def test_explicit_syncs_add_no_writes(journal: Journal) -> None:
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


class JournalMachine(RuleBasedStateMachine):
    """Compares the journal with a dictionary over any order of calls, clean stops and crashes."""

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
