"""Runs the routes: takes readings, publishes events at once, submits questions, and publishes the answers.

One thread applies the routes, so that neither the network nor the decoder waits for them. Another submits the
questions, so that an event never waits for the model or the disk. `reading` can be called from any thread.

The known sensors, and which of them are alarmed or silent, are kept in a file. So a sensor that stays away
after a power cut is reported, and an alarm that ended meanwhile is cleared.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from edge.files import write_atomically
from edge.logs import RepeatedLog
from edge.protocol import typed_json
from edge.protocol.checks import FieldError
from edge.protocol.messages import Answer, Failure, Partial, Request
from edge.protocol.strict_json import StrictJsonError, dumps, loads, printable
from edge.protocol.topic_filter import disjoint
from edge.requests.engine import REFUSALS, Sink
from edge.requests.journaled_engine import JournaledEngine
from edge.routes.config import MAX_TOPIC_BYTES, Route
from edge.routes.display import Alarms, Display, answer_display
from edge.routes.router import Event, Ignored, Known, Outcome, Question, Router, answer_payload
from edge.routes.values import MAX_PAYLOAD_BYTES

log = logging.getLogger(__name__)

CLIENT = "route:"  # followed by the route's name: the namespace of ids
TICK_S = 1.0  # at most between two signs of life of the thread
MAX_WAITING = 1000  # readings that wait for the thread
MAX_OF_TOPIC = 100  # of these on one topic, so one sensor can't displace the others
MAX_IGNORED = 32  # topics whose ignored readings are logged once each
EVENT_LINES = 10  # in the log, a minute and route
MAX_QUESTIONS = 1000  # that wait for the disk
LATER_MS = 5000  # before a refused question is submitted again
MAX_NOTE_BYTES = 16 * 1024
KEEP_S = 60.0  # between two writes of the file, to spare the SD card
MAX_MEMORY_BYTES = 16 * 1024 * 1024

Publish = Callable[[str, str, Callable[[], None] | None], None]
"""Publishes JSON on a topic; the last argument, if any, is called on delivery."""


@dataclass(frozen=True)
class _Memory:
    """The content of the file of sensors."""

    sensors: tuple[Known, ...]


class RouteRunner:
    """Runs `routes`. `plain` is for models without a chat format.

    `progress` grows while the thread of readings lives.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        plain: bool,
        engine: JournaledEngine,
        publish: Publish,
        show: Callable[[Display], None] = lambda _display: None,
        memory: Path | None = None,
    ) -> None:
        """Prepare the routes. `show` gets each answer, and each event of a route that does not ask.

        `memory` is the file of known sensors; with None nothing is kept.
        """
        self.progress = 0
        self._templates = {route.name: route.ask.state for route in routes if route.ask is not None}
        self._alarms = Alarms()
        self._show = show
        self._router = Router(routes, plain)
        self._engine, self._publish = engine, publish
        self._work: queue.SimpleQueue[Callable[[], Sequence[Outcome]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: Counter[str] = Counter()  # readings in the queue, by topic
        self._dropped = RepeatedLog(log)
        self._ignored: set[tuple[str, str]] = set()
        self._other_ignored = RepeatedLog(log)
        self._events = {route.name: RepeatedLog(log, EVENT_LINES) for route in routes}
        self._stopping = False
        self._memory = memory
        self._known = self._looked_at = self._kept = self._remembered()
        self._unwritable = ""
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="routes", daemon=True)
        self._questions: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._asking = threading.Thread(target=self._ask, name="routes asking", daemon=True)

    def start(self) -> None:
        """Start the threads with the sensors that an earlier run knew."""
        self._router.recall(self._known, time.monotonic())
        self._thread.start()
        self._asking.start()

    def stop(self, timeout_s: float) -> None:
        """End the threads; waiting readings are dropped."""
        self._stopping = True
        self._thread.join(timeout_s)
        self._questions.put(None)
        self._asking.join(timeout_s)
        if not self._thread.is_alive():
            self._known = self._router.known()
        self.keep()

    def keep(self) -> None:
        """Write the known sensors to the file if they have changed.

        To be called regularly, in a thread that can wait for the disk.
        """
        known = self._known
        if self._memory is None or known is self._looked_at:
            return
        self._looked_at = known
        if known == self._kept:
            return
        try:
            write_atomically(self._memory, dumps({"sensors": [asdict(each) for each in known]}).encode())
            self._kept, self._unwritable = known, ""
        except OSError as error:  # tried again with what is known a minute later
            why = error.strerror or str(error)
            if why != self._unwritable:
                log.warning(
                    "%s: %s; until that is fixed, the next start knows no sensors",
                    self._memory,
                    why,
                )
            self._unwritable = why

    def listen(self, on: bool) -> None:
        """Note whether readings can arrive, from any thread; while they can't, no sensor counts as silent."""
        self._work.put(partial(self._listen, time.monotonic() if on else math.inf))

    @property
    def asking(self) -> frozenset[str]:
        """Names of the routes that ask the model."""
        return frozenset(self._templates)

    @property
    def displayed(self) -> Sequence[tuple[str, str]]:
        """Route and sensor of what an earlier run knew."""
        return self._router.names(self._known)

    def use_format(self, plain: bool) -> None:
        """Format questions for a model with or without a chat format from now on."""
        self._router.plain = plain

    @property
    def alive(self) -> bool:
        """Whether the threads run."""
        return self._thread.is_alive() and self._asking.is_alive()

    @property
    def filters(self) -> tuple[str, ...]:
        """The topic filters to subscribe to; they do not overlap, so that each reading arrives once."""
        return disjoint(self._router.filters)

    def reading(self, topic: str, payload: bytes) -> None:
        """Take in one message of a sensor; it is dropped if too many wait, or too many on its topic.

        Of one that is too large to be read only as much waits as shows that.
        """
        topic, payload = topic[: MAX_TOPIC_BYTES + 1], payload[: MAX_PAYLOAD_BYTES + 1]
        with self._lock:
            if self._work.qsize() >= MAX_WAITING or self._waiting[topic] >= MAX_OF_TOPIC:
                said = printable(topic, 200)
                self._dropped.warning("routes: readings arrive too fast; one on %s is dropped", said)
                return
            self._waiting[topic] += 1
            self._work.put(partial(self._read, topic, payload))

    def sink(self, client: str, request_id: str, note: str) -> Sink:
        """Make a sink for a question of an earlier run."""
        question = Question(**loads(note, MAX_NOTE_BYTES), request=Request(request_id))
        return partial(self._answered, question)

    def _read(self, topic: str, payload: bytes) -> Sequence[Outcome]:
        with self._lock:
            self._waiting[topic] -= 1
            if not self._waiting[topic]:
                del self._waiting[topic]
        return self._router.reading(topic, payload, time.monotonic())

    def _remembered(self) -> list[Known]:
        """Read the file; without a readable one no sensor is known."""
        try:
            content = b"" if self._memory is None else self._memory.read_bytes()
            return list(typed_json.read(_Memory, loads(content, MAX_MEMORY_BYTES)).sensors) if content else []
        except FileNotFoundError:
            return []
        except (OSError, StrictJsonError, FieldError) as error:
            log.warning("%s: %s; starting without known sensors", self._memory, error)
            return []

    def _listen(self, since: float) -> Sequence[Outcome]:
        self._router.listen(since)
        return ()

    def _run(self) -> None:
        while not self._stopping:
            self.progress += 1
            if time.monotonic() - self._looked >= KEEP_S:
                self._known, self._looked = self._router.known(), time.monotonic()
            due_s = self._router.next_due() - time.monotonic()
            if due_s <= 0:  # checked here because there may always be another reading
                self._do(partial(self._router.tick, time.monotonic()))
            try:
                work = self._work.get(timeout=min(max(due_s, 0.0), TICK_S))
            except queue.Empty:
                continue
            self._do(work)

    def _do(self, work: Callable[[], Sequence[Outcome]]) -> None:
        try:
            self._handle(work())
        except Exception:
            log.exception("routes: a reading could not be processed")

    def _handle(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Event):
                said = printable(outcome.topic, 200)
                self._events[outcome.route].info("route %s: event on %s", outcome.route, said)
                self._publish(outcome.topic, outcome.payload, None)
                if outcome.route not in self._templates:
                    self._show(self._alarms.display(json.loads(outcome.payload)))
            elif isinstance(outcome, Ignored):
                self._ignore(outcome)
            elif self._questions.qsize() < MAX_QUESTIONS:
                self._questions.put(outcome)
            else:  # the disk does not keep up
                self._router.postpone(outcome, time.monotonic() + LATER_MS / 1000)

    def _ask(self) -> None:
        """Submit questions to the engine, which may wait for the disk."""
        while (question := self._questions.get()) is not None:
            try:
                sink = partial(self._answered, question)
                self._engine.submit(_client(question.route), question.request, sink, _note(question))
            except Exception:
                log.exception("route %s: a question could not be submitted", question.route)

    def _ignore(self, reading: Ignored) -> None:
        """Log why readings of a topic are ignored, once a topic, and seldom when there are many topics."""
        key = (reading.route, reading.topic)
        if key in self._ignored:
            return
        logger = log if len(self._ignored) < MAX_IGNORED else self._other_ignored
        if logger is log:
            self._ignored.add(key)
        said = printable(reading.topic, 200)
        logger.warning("route %s: a reading on %s is ignored: %s", reading.route, said, reading.why)

    def _answered(self, question: Question, answer: Answer) -> None:
        """Publish an answer, or postpone a refused question; in the decoder's thread or our own."""
        if isinstance(answer, Partial):
            return
        if isinstance(answer, Failure) and answer.code in REFUSALS:
            until = time.monotonic() + (answer.retry_after_ms or LATER_MS) / 1000
            self._work.put(partial(self._postpone, question, until))
            return
        delivered = partial(self._engine.delivered, _client(question.route), question.request.id)
        payload = answer_payload(question, answer)
        self._publish(question.answer_topic, payload, delivered)
        self._show(answer_display(json.loads(payload), self._templates.get(question.route)))

    def _postpone(self, question: Question, until: float) -> Sequence[Outcome]:
        self._router.postpone(question, until)
        return ()


def _client(route: str) -> str:
    return CLIENT + route


def _note(question: Question) -> str:
    """Serialise a question without its request, which the journal has."""
    fields = asdict(replace(question, request=Request(question.request.id)))
    del fields["request"]
    return dumps(fields)
