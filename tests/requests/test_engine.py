"""The engine: exactly one answer per request, in order; deadlines and cancellation hold."""

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import EdgeError, Interruption, RequestError, RuntimeFailure
from edge.logs import PAYLOADS
from edge.protocol.messages import Answer, Failure, Final, Partial, Request
from edge.requests.engine import Engine
from tests.support.counterparts import wait_for
from tests.support.speller import WAIT_S, Speller


@dataclass
class Inbox:
    """Collects the answers to one request."""

    answers: list[Answer] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, answer: Answer) -> None:
        self.answers.append(answer)
        if not isinstance(answer, Partial):
            self.done.set()

    def last(self) -> Answer:
        assert self.done.wait(WAIT_S)
        assert [isinstance(answer, Partial) for answer in self.answers].index(False) == len(self.answers) - 1
        return self.answers[-1]

    def final(self) -> Final:
        answer = self.last()
        assert isinstance(answer, Final), answer
        return answer

    def failure(self) -> Failure:
        answer = self.last()
        assert isinstance(answer, Failure), answer
        return answer


@dataclass
class Bench:
    """An engine with a Speller, and methods to submit requests."""

    speller: Speller
    engine: Engine

    def ask(self, name: str, prompt: str = "abc def", **fields: Any) -> Inbox:
        inbox = Inbox()
        self.engine.submit("test", Request(name, prompt, **fields), inbox)
        return inbox

    def hold(self, name: str = "held", **fields: Any) -> Inbox:
        """Submit a request that waits at the closed gate."""
        self.speller.gate.clear()
        inbox = self.ask(name, **fields)
        self.speller.wait_until_held()
        return inbox


@pytest.fixture
def bench() -> Iterator[Bench]:
    speller = Speller()
    engine = Engine(speller, queue_length=2, partial_interval_s=0)
    engine.start()
    yield Bench(speller, engine)
    speller.gate.set()
    engine.stop(WAIT_S)
    assert not engine.alive


def test_an_answer_is_sent_as_partials_and_then_as_a_final(bench: Bench) -> None:
    inbox = bench.ask("a", "abc def")
    final = inbox.final()
    assert (final.text, final.finish_reason, final.usage.generated) == ("cba fed ", "stop", 2)
    assert inbox.answers[:-1] == [Partial("a", 0, "cba "), Partial("a", 1, "fed ")]


def test_no_partials_are_sent_without_stream(bench: Bench) -> None:
    inbox = bench.ask("a", "abc def", stream=False)
    assert inbox.final().text == "cba fed "
    assert len(inbox.answers) == 1


def test_partials_within_the_interval_are_combined() -> None:
    engine = Engine(Speller(), queue_length=1, partial_interval_s=3600)
    engine.start()
    inbox = Inbox()
    engine.submit("test", Request("a", "abc def ghi"), inbox)
    assert inbox.final().text == "cba fed ihg "
    assert inbox.answers[:-1] == [Partial("a", 0, "cba ")]
    engine.stop(WAIT_S)


def test_requests_are_answered_in_order_of_arrival(bench: Bench) -> None:
    inboxes = [bench.hold("a"), bench.ask("b"), bench.ask("c")]
    bench.speller.gate.set()
    for inbox in inboxes:
        inbox.final()
    assert bench.speller.asked == ["a", "b", "c"]


def test_a_full_queue_answers_busy_at_once_with_a_time_to_retry(bench: Bench) -> None:
    bench.hold()
    waiting = [bench.ask("b"), bench.ask("c")]
    failure = bench.ask("d").failure()
    assert failure.code == "busy"
    assert failure.retry_after_ms is not None
    assert failure.retry_after_ms >= 100
    assert bench.engine.waiting == 2
    bench.speller.gate.set()
    assert {inbox.final().finish_reason for inbox in waiting} == {"stop"}


def test_the_last_place_is_reserved_for_a_client_that_has_none_waiting() -> None:
    engine = Engine(Speller(), queue_length=4)  # not started: all of them wait
    answers: dict[str, list[Answer]] = {"flood": [], "other": []}
    for client, name in [*(("flood", str(number)) for number in range(9)), ("other", "x"), ("other", "y")]:
        engine.submit(client, Request(name, "abc"), answers[client].append)
    assert [answer.id for answer in answers["flood"]] == list("345678")
    assert [answer.id for answer in answers["other"]] == ["y"]
    assert {getattr(answer, "code", "") for answer in answers["flood"]} == {"busy"}
    assert engine.waiting == 4


def test_a_duplicate_of_a_pending_request_is_not_answered_twice(bench: Bench) -> None:
    first = bench.hold("a")
    waiting = bench.ask("b")
    repeats = [bench.ask("a"), bench.ask("b")]
    bench.speller.gate.set()
    first.final()
    waiting.final()
    assert bench.ask("c").final()
    assert [repeat.answers for repeat in repeats] == [[], []]


def test_two_clients_can_use_the_same_id(bench: Bench) -> None:
    held, other = bench.hold("a"), Inbox()
    bench.engine.submit("other", Request("a", "xyz"), other)
    assert bench.engine.cancel("other", "a")
    assert other.final().finish_reason == "cancelled"
    bench.speller.gate.set()
    assert held.final().finish_reason == "stop"


def test_cancelling_stops_a_running_request_and_returns_its_text(bench: Bench) -> None:
    inbox = bench.hold("a")
    assert bench.engine.cancel("test", "a")
    assert inbox.final().finish_reason == "cancelled"
    assert not bench.engine.cancel("test", "a")


def test_cancelling_a_waiting_request_answers_it_while_another_runs(bench: Bench) -> None:
    bench.hold()
    waiting = bench.ask("b")
    assert bench.engine.cancel("test", "b")
    assert waiting.final().finish_reason == "cancelled"
    assert bench.engine.waiting == 0
    assert "b" not in bench.speller.asked


def test_cancelling_an_unknown_request_has_no_effect(bench: Bench) -> None:
    assert not bench.engine.cancel("test", "nobody")
    assert bench.ask("a").final()


def test_a_deadline_stops_a_running_request(bench: Bench) -> None:
    assert bench.hold("a", deadline_ms=500).final().finish_reason == "deadline"


@pytest.mark.parametrize("reason", ["deadline", "cancelled"])
def test_a_request_stopped_before_its_first_token_gets_an_empty_final(
    bench: Bench, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(_word: str) -> None:
        raise Interruption(reason)

    monkeypatch.setattr(bench.speller, "step", step)
    final = bench.ask("a").final()
    assert (final.finish_reason, final.text, final.usage.prompt) == (reason, "", 0)


def test_a_deadline_that_passes_in_the_queue_is_answered_while_another_runs(bench: Bench) -> None:
    bench.hold()
    failure = bench.ask("b", deadline_ms=20).failure()
    assert (failure.code, failure.message) == (
        "expired",
        "the deadline of 20 ms passed while the request waited",
    )
    assert "b" not in bench.speller.asked


@pytest.mark.parametrize(
    ("prompt", "code", "said"),
    [
        ("abc CRASH", "internal", "the runtime failed; see the daemon's log"),
        ("LITERT", "internal", "Invoke failed on decoder.tflite"),
        ("LONG", "too_long", "9 tokens, at most 8 fit"),
    ],
)
def test_a_failing_request_is_answered_and_the_engine_continues(
    bench: Bench, prompt: str, code: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    failure = bench.ask("a", prompt).failure()
    assert (failure.code, failure.message) == (code, said)
    assert bench.ask("b").final().text == "cba fed "


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RequestError("bad_request", "unknown key 'SECRET'"),
            "bad_request: a request was invalid",
        ),
        (RequestError("too_long", "SECRET is too long"), "too_long: a request did not fit"),
        (KeyError("SECRET"), "internal: KeyError at engine.py:"),
        (EdgeError("SECRET"), "internal: EdgeError at engine.py:"),
        (RuntimeFailure("Invoke failed on decoder.tflite"), "internal: Invoke failed on decoder.tflite"),
    ],
)
def test_neither_log_nor_health_quote_a_request(
    bench: Bench,
    error: Exception,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger(PAYLOADS).setLevel(logging.WARNING)

    def fail(_word: str) -> None:
        raise error

    monkeypatch.setattr(bench.speller, "step", fail)
    failure = bench.ask("a", "SECRET prompt").failure()
    assert isinstance(error, (KeyError, EdgeError)) or failure.message == str(error)
    wait_for(lambda: "failed id=a" in caplog.text)
    assert "SECRET" not in caplog.text
    assert str(bench.engine.last_error).startswith(said)
    assert said.partition(": ")[2] in caplog.text


def test_a_sink_that_raises_does_not_affect_other_requests(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(answer: Answer) -> None:
        raise OSError("no")

    bench.engine.submit("test", Request("a", "abc"), broken)
    assert bench.ask("b").final()
    assert "could not be delivered" in caplog.text


def test_a_stop_answers_waiting_requests_and_refuses_new_ones(bench: Bench) -> None:
    inboxes = [bench.hold("a"), bench.ask("b")]
    stopper = threading.Thread(target=bench.engine.stop, args=(WAIT_S,))
    stopper.start()
    while (failure := bench.ask("late").answers) == []:
        time.sleep(0.01)
    assert isinstance(failure[0], Failure)
    assert failure[0].code in ("unavailable", "busy")
    bench.speller.gate.set()
    stopper.join(WAIT_S)
    assert [inbox.final().finish_reason for inbox in inboxes] == ["stop", "stop"]


def test_a_stop_waits_no_longer_than_its_limit(bench: Bench) -> None:
    inboxes = [bench.hold("a"), bench.ask("b")]
    bench.engine.stop(0.05)
    assert not bench.engine.alive
    assert [inbox.failure().code for inbox in inboxes] == ["unavailable", "unavailable"]


def test_progress_increases_with_every_step_and_stops_when_a_step_hangs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bench.engine.progress
    bench.ask("a").final()
    assert bench.engine.progress > before
    hung = threading.Event()
    monkeypatch.setattr(bench.speller, "step", lambda _word: hung.wait(WAIT_S))
    bench.ask("b")
    while not bench.engine.working:
        time.sleep(0.001)
    time.sleep(0.05)
    stuck = bench.engine.progress
    time.sleep(0.1)
    assert bench.engine.progress == stuck
    hung.set()


asking = st.tuples(
    st.sampled_from(["ask", "cancel"]),
    st.integers(0, 5),
    st.sampled_from(["a b c", "CRASH", "a LONG", "", "a"]),
    st.sampled_from([None, 1, 10_000]),
)


@settings(max_examples=50)
@given(st.lists(asking, max_size=20))
def test_every_accepted_request_gets_exactly_one_final_answer(
    actions: list[tuple[str, int, str, int | None]],
) -> None:
    logging.disable(logging.CRITICAL)
    engine = Engine(Speller(), queue_length=3, partial_interval_s=0)
    engine.start()
    answers: list[Answer] = []
    asked = 0
    for serial, (action, number, prompt, deadline) in enumerate(actions):
        if action == "ask":
            asked += 1
            engine.submit("test", Request(f"{serial}", prompt, deadline_ms=deadline), answers.append)
        else:
            engine.cancel("test", f"{serial - number}")
    engine.stop(WAIT_S)
    logging.disable(logging.NOTSET)
    last = [answer.id for answer in answers if not isinstance(answer, Partial)]
    assert sorted(last, key=str) == sorted(set(last), key=str)
    assert len(last) == asked == engine.answered + engine.failed
