"""The engine behind a journal: what is stored, what is repeated, and what the next run resumes."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

from edge.protocol.messages import (
    Answer,
    Failure,
    Final,
    Partial,
    Request,
    Timings,
    Usage,
    parse_answer,
)
from edge.requests.engine import Engine, Sink
from edge.requests.journal import Journal, Limits
from edge.requests.journaled_engine import JournaledEngine, Verdict
from tests.support.counterparts import WAIT_S, wait_for
from tests.support.speller import Speller

A = Request("a", "abc def", stream=False)


@dataclass
class Run:
    """One run of a daemon without transports; it is itself the Origin of all clients."""

    path: Path | None
    limits: Limits | None = None
    speller: Speller = field(default_factory=Speller)
    answers: queue.Queue[Answer] = field(default_factory=queue.Queue)
    notes: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = Engine(self.speller, queue_length=2, partial_interval_s=0)
        self.journal = Journal(self.path, self.limits)
        self.journaled = JournaledEngine(self.engine, self.journal)

    def start(self, known: bool = True) -> Run:
        self.journaled.resume(lambda _client: self if known else None)
        self.engine.start()
        return self

    def sink(self, client: str, request_id: str, note: str) -> Sink:
        self.notes.append((client, request_id, note))
        return self.collect

    def collect(self, answer: Answer) -> None:
        """Collect an answer in its encoded form."""
        self.answers.put(parse_answer(answer.to_json()))

    def ask(self, request: Request = A, redelivered: bool = False) -> Verdict:
        return self.journaled.submit("mqtt:a b", request, self.collect, "note", redelivered)

    def last(self) -> Answer:
        while isinstance(answer := self.answers.get(timeout=WAIT_S), Partial):
            pass
        return answer

    def crash(self) -> None:
        """End as after SIGKILL, without closing the journal; the lock on its file is released."""
        self.journal._store.close()
        self.journal = Journal(None)
        self.journaled._journal = self.journal
        self.stop()

    def stop(self) -> None:
        self.speller.gate.set()
        self.engine.stop(WAIT_S)
        self.journal.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
def run(path: Path) -> Iterator[Run]:
    run = Run(path).start()
    yield run
    run.stop()


def code(answer: Answer) -> str:
    assert isinstance(answer, Failure), answer
    return answer.code


def test_a_duplicate_gets_the_same_answer_without_generation(run: Run) -> None:
    run.ask()
    first = run.last()
    run.ask(replace(A, deadline_ms=5))
    assert run.last() == first
    assert run.speller.asked == ["a"]


def test_a_redelivery_is_not_answered_twice_but_a_duplicate_is(run: Run) -> None:
    assert run.ask() is Verdict.ACCEPTED
    first = run.last()
    assert run.ask(redelivered=True) is Verdict.IN_PROGRESS
    run.journaled.delivered("mqtt:a b", "a")
    assert run.ask(redelivered=True) is Verdict.DELIVERED
    assert run.ask() is Verdict.REPEATED
    assert run.last() == first
    assert run.answers.empty()


def test_a_redelivery_with_other_content_is_a_new_request(run: Run) -> None:
    run.ask()
    run.last()
    run.journaled.delivered("mqtt:a b", "a")
    assert run.ask(replace(A, prompt="other"), redelivered=True) is Verdict.ACCEPTED
    answer = run.last()
    assert isinstance(answer, Final)
    assert answer.text == "rehto "


def test_a_conflicting_request_is_refused_until_the_first_is_answered(run: Run) -> None:
    run.speller.gate.clear()
    run.ask()
    run.speller.wait_until_held()
    assert run.ask() is Verdict.IN_PROGRESS
    assert run.ask(Request("a", "other")) is Verdict.REFUSED
    assert code(run.last()) == "busy"
    run.speller.gate.set()
    assert isinstance(run.last(), Final)
    run.ask(Request("a", "other"))
    answer = run.last()
    assert isinstance(answer, Final)
    assert answer.text == "rehto "


def test_busy_is_not_stored_and_costs_no_write(run: Run) -> None:
    run.speller.gate.clear()
    run.ask()
    run.speller.wait_until_held()
    for name in ("b", "c"):
        run.ask(replace(A, id=name))
    before = run.journal.writes
    run.ask(replace(A, id="d"))
    assert code(run.last()) == "busy"
    assert run.journal.writes == before
    run.speller.gate.set()
    assert {run.last().id for _ in range(3)} == {"a", "b", "c"}
    run.ask(replace(A, id="d"))
    assert isinstance(run.last(), Final)


def test_a_journal_full_of_unanswered_requests_answers_busy(path: Path) -> None:
    run = Run(path, Limits(entries=1)).start()
    run.speller.gate.clear()
    run.ask()
    run.speller.wait_until_held()
    run.ask(replace(A, id="b"))
    assert code(run.last()) == "busy"
    run.stop()


def test_waiting_requests_are_answered_by_the_next_run(path: Path) -> None:
    first = Run(path).start()
    first.speller.gate.clear()
    first.ask()
    first.speller.wait_until_held()
    for name in ("b", "c"):
        first.ask(replace(A, id=name, stream=True))
    first.crash()
    second = Run(path).start()
    answers = [second.last() for _ in range(3)]
    assert [answer.id for answer in answers] == ["b", "c", "a"]  # a was in work when the daemon ended
    assert all(isinstance(answer, Final) for answer in answers)
    assert second.notes == [("mqtt:a b", name, "note") for name in ("b", "c", "a")]
    assert second.answers.empty()
    second.stop()


def test_an_answer_is_sent_again_in_each_run_until_it_is_delivered(path: Path) -> None:
    first = Run(path).start()
    first.ask()
    answer = first.last()
    first.crash()
    second = Run(path).start()
    assert second.last() == answer
    second.journaled.delivered("mqtt:a b", "a")
    second.crash()
    third = Run(path).start()
    third.ask(Request("b", "abc", stream=False))
    assert third.last().id == "b"
    assert (second.speller.asked, third.speller.asked) == ([], ["b"])
    third.stop()


def test_a_request_that_crashes_the_daemon_is_tried_twice_and_then_refused(path: Path) -> None:
    asked = []
    for life in range(3):
        run = Run(path)
        run.speller.gate.clear()
        run.start()
        if life == 0:
            run.ask()
        if life < 2:
            run.speller.wait_until_held()
            run.crash()
        asked += run.speller.asked
    assert asked == ["a", "a"]
    answer = run.last()
    assert code(answer) == "internal"
    run.ask()
    assert run.last() == answer
    run.stop()


def test_requests_interrupted_by_a_stop_are_resumed_and_not_counted_as_crashes(
    path: Path,
) -> None:
    for life in range(4):
        run = Run(path)
        run.speller.gate.clear()
        run.start()
        if life == 0:
            for name in ("a", "b"):
                run.ask(replace(A, id=name))
        run.speller.wait_until_held()
        run.engine.stop(0)
        run.journal.close()
        assert run.speller.asked == ["a"], life
        assert run.answers.empty()
    last = Run(path).start()
    assert [(answer.id, type(answer)) for answer in (last.last(), last.last())] == [
        ("a", Final),
        ("b", Final),
    ]
    last.stop()


def test_without_a_journal_file_requests_interrupted_by_a_stop_are_refused() -> None:
    run = Run(None).start()
    run.speller.gate.clear()
    run.ask()
    run.speller.wait_until_held()
    run.engine.stop(0)
    assert code(run.last()) == "unavailable"
    run.journal.close()


def crash_while_working_on(path: Path, name: str, client: str = "mqtt:a b") -> None:
    """Simulate a run of the daemon that crashes while it works on a new request."""
    run = Run(path)
    run.speller.gate.clear()
    run.start()
    run.journaled.submit(client, replace(A, id=name), run.collect, "note")
    run.speller.wait_until_held()
    run.crash()


def test_a_crash_counts_only_for_the_request_in_work(path: Path) -> None:
    first = Run(path)
    first.speller.gate.clear()
    first.start()
    for name in ("a", "b"):
        first.ask(replace(A, id=name))
    first.speller.wait_until_held()
    first.crash()
    second = Run(path)
    assert {entry.key[-1]: entry.starts for entry in second.journal.unfinished()} == {"a": 1, "b": 0}
    second.journal.close()


def test_a_client_whose_new_requests_crash_the_daemon_is_suspended_and_others_are_not(
    path: Path,
) -> None:
    for name in "abc":
        crash_while_working_on(path, name)
    run = Run(path).start()
    answers = {answer.id: answer for answer in (run.last() for _ in "abc")}
    assert {code(answer) for answer in answers.values()} == {"internal"}
    assert "3 times in an hour" in str(answers["c"])
    run.ask(replace(A, id="d"))
    refused = run.last()
    assert isinstance(refused, Failure)
    assert (refused.code, 0 < (refused.retry_after_ms or 0) <= 600_000) == ("unavailable", True)
    run.journaled.submit("mqtt:neighbour", A, run.collect)
    assert isinstance(run.last(), Final)
    run.stop()


def test_a_deadline_that_passes_between_two_runs_is_reported(path: Path) -> None:
    first = Run(path).start()
    first.speller.gate.clear()
    first.ask()
    first.speller.wait_until_held()
    first.ask(replace(A, id="soon", deadline_ms=50))
    first.ask(replace(A, id="late", deadline_ms=60_000))
    first.crash()
    time.sleep(0.06)
    second = Run(path).start()
    answers = {answer.id: answer for answer in (second.last(), second.last(), second.last())}
    assert code(answers["soon"]) == "expired"
    assert isinstance(answers["late"], Final)
    second.stop()


def test_requests_from_a_removed_port_are_dropped(path: Path) -> None:
    first = Run(path).start()
    first.ask(replace(A, id="answered"))
    first.last()
    first.speller.gate.clear()
    first.ask()
    first.speller.wait_until_held()
    first.crash()
    second = Run(path).start(known=False)
    assert (second.journal.unfinished(), second.journal.unpublished()) == ([], [])
    wait_for(lambda: second.engine.progress)
    assert second.speller.asked == []
    second.stop()


def damage(path: Path, whole: bytes, broken: bytes) -> None:
    """Change bytes in the file without a sqlite checksum, as a worn card does."""
    content = path.read_bytes()
    assert whole in content
    path.write_bytes(content.replace(whole, broken))


def test_a_damaged_entry_is_an_error_for_its_client_and_does_not_end_the_daemon(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(path)
    for name in ("good", "asked", "told"):
        request = Request(name, f"abc {name}", stream=False)
        journal.accept(f"mqtt:a {name}", replace(request, deadline_ms=None).to_json().encode(), "note")
    answer = Final("told", "abc", "stop", Usage(1, 1, 1, 0), Timings(1, 1, 1, 1))
    journal.answered("mqtt:a told", answer.to_json().encode())
    journal.close()
    damage(path, b'"text":"abc"', b'"text":\xff\xff\xff\xff\xff')
    damage(path, b"abc asked", b"abc axked")
    for _ in range(2):
        run = Run(path).start()
        answers = {answer.id: answer for answer in (run.last(), run.last())}
        answers |= {} if len(answers) > 2 else {answer.id: answer for answer in [run.last()]}
        run.stop()
        assert isinstance(answers["good"], Final)
        assert {code(answers["asked"]), code(answers["told"])} == {"internal"}
    assert "request asked: the request in the journal is damaged" in caplog.text
    assert "request told: the answer in the journal is damaged" in caplog.text


@pytest.mark.parametrize("deadline", [float("-inf"), -1e308, 0.0])
def test_a_damaged_deadline_counts_as_passed(path: Path, deadline: float) -> None:
    journal = Journal(path)
    journal.accept("mqtt:a a", A.to_json().encode(), "note", deadline)
    journal.close()
    run = Run(path).start()
    assert code(run.last()) == "expired"
    run.stop()


def test_an_unreadable_note_does_not_prevent_a_start(path: Path) -> None:
    journal = Journal(path)
    journal.accept("mqtt:a a", A.to_json().encode(), "note")
    journal.close()

    class Forgetful(Run):
        def sink(self, client: str, request_id: str, note: str) -> Sink:
            raise ValueError(f"{note} is of another version")

    second = Forgetful(path).start()
    assert second.journal.unfinished() == []
    second.ask(replace(A, id="b"))
    assert isinstance(second.last(), Final)
    second.stop()


def is_idle(engine: Engine) -> bool:
    return not engine.waiting and not engine.working


def test_after_any_damage_to_the_file_the_daemon_resumes_the_readable_entries(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "whole")
    final = Final("b", "abc", "stop", Usage(1, 1, 1, 0), Timings(1, 1, 1, 1)).to_json().encode()
    for name in "abcd":
        journal.accept(f"mqtt:a {name}", replace(A, id=name).to_json().encode(), "note", 4e9)
    journal.answered("mqtt:a b", final)
    journal.close()
    whole = (tmp_path / "whole").read_bytes()
    used = [at for at, byte in enumerate(whole) if byte]
    for seed in range(100):
        chance, content = random.Random(seed), bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            content[chance.choice(used)] ^= chance.randint(1, 255)
        path = tmp_path / str(seed) / "journal.sqlite"
        path.parent.mkdir()
        path.write_bytes(content)
        run = Run(path).start()
        wait_for(partial(is_idle, run.engine))
        run.ask(replace(A, id="new"))
        answers = [run.last()]
        while answers[-1].id != "new":
            answers.append(run.last())
        assert isinstance(answers[-1], Final), seed
        names = [answer.id for answer in answers]
        assert len(set(names)) == len(names), (seed, names)
        assert all(isinstance(answer, Final) or code(answer) == "internal" for answer in answers), seed
        run.stop()
