"""One decoder thread behind one bounded queue.

`submit` returns at once, and each request gets exactly one Final or Failure: `busy` if the queue is full,
`expired` if its deadline passes while it waits, `internal` if the generator raises an exception. Deadlines
and cancellation take effect within one decode step or prefill chunk. Sinks are called in the decoder thread
or in the caller's, never under the engine's lock, and must not block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from edge.errors import Interruption, RequestError, RuntimeFailure
from edge.generation.generator import Completion, Delta
from edge.logs import PAYLOADS, place_of
from edge.protocol.messages import Answer, Failure, Final, Partial, Request, Timings, Usage
from edge.protocol.strict_json import printable
from edge.protocol.topics import user_of

log = logging.getLogger(__name__)
payloads = logging.getLogger(PAYLOADS)

Sink = Callable[[Answer], None]

ABANDON_S = 5.0  # for the generator to stop
IDLE_S = 1.0  # between two increments of `progress` in an idle decoder thread
REFUSALS = ("busy", "unavailable")  # error codes of requests not accepted, or left to the next run
SUMMARIES = {
    "bad_request": "a request was invalid; its client has the reason",
    "too_long": "a request did not fit into the context",
    "expired": "the deadline of a request passed while it waited",
    "busy": "a request was refused because the queue was full",
    "unavailable": "a request was refused because the daemon was stopping",
    "internal": "a request failed; its client has the reason",
}
"""Failures as the log and health report them. Everybody can read these, so they never quote a request."""

STACK_BYTES = 16 * 1024 * 1024  # of the decoder thread
SHARED_LENGTH = 4  # shorter queues reserve no place for clients without a waiting request
FIRST_GUESS_S = 1.0  # the estimated time for a request, until one has been answered


class Generates(Protocol):
    """The part of `edge.generation.generator.Generator` that the engine uses."""

    def generate(
        self, request: Request, interrupted: Callable[[], str | None], client: str | None
    ) -> Iterator[Delta | Completion]:
        """Yield pieces of the answer to `client`, then one Completion.

        `interrupted` is polled at least every 100 ms; when it returns a reason, the answer ends. Raises
        RequestError, RuntimeFailure, or Interruption before the answer has started.
        """


@dataclass(eq=False)
class _Job:
    """An accepted request. Times are those of `time.monotonic`."""

    client: str
    request: Request
    sink: Sink
    started_work: Callable[[], None]
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    cancelled: bool = False

    @property
    def key(self) -> tuple[str, str]:
        return self.client, self.request.id

    def expired(self) -> bool:
        limit = self.request.deadline_ms
        return limit is not None and time.monotonic() - self.arrived >= limit / 1000


class Engine:
    """Answers requests one at a time, in the order of arrival.

    `progress` grows at every prefill chunk and decode step, and about once a second when idle. Partials are
    at least `partial_interval_s` seconds apart. `decoder_failures` counts requests on which LiteRT failed.
    """

    def __init__(self, generator: Generates, queue_length: int, partial_interval_s: float = 0.25) -> None:
        self.progress = 0
        self.answered = self.failed = self.decoder_failures = 0
        self.last_error: str | None = None
        self.last_final: Final | None = None
        self._generator = generator
        self._queue_length = queue_length
        self._partial_interval_s = partial_interval_s
        self._typical_s = FIRST_GUESS_S
        self._lock = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._jobs: dict[tuple[str, str], _Job] = {}
        self._stopping = self._abandoning = self._paused = False
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    def start(self) -> None:
        """Start the decoder thread."""
        usual = threading.stack_size(STACK_BYTES)
        self._thread.start()
        threading.stack_size(usual)

    @property
    def alive(self) -> bool:
        """Whether the decoder thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of requests in the queue, without the one in work."""
        return len(self._queue)

    @property
    def working(self) -> bool:
        """Whether a request is in work."""
        return len(self._jobs) > len(self._queue)

    def submit(
        self,
        client: str,
        request: Request,
        sink: Sink,
        started: Callable[[], None] = lambda: None,
        resumed: bool = False,
    ) -> None:
        """Queue `request`; `sink` gets its Partials and then its one Final or Failure.

        `client` is the namespace of the ids. A request with the client and id of an unanswered one is a
        duplicate and is ignored. `started` is called in the decoder thread when work on the request starts. A
        `resumed` request was accepted by an earlier run, so a full queue does not refuse it.
        """
        job = _Job(client, request, sink, started)
        with self._lock:
            if job.key in self._jobs:
                return
            refusal = None if resumed else self.refusal(client, request.id)
            if refusal is None:
                self._jobs[job.key] = job
                self._queue.append(job)
                self._lock.notify_all()
        if refusal is not None:
            self._deliver(job, refusal)
        elif payloads.isEnabledFor(logging.INFO):
            payloads.info("id=%s request=%s", request.id, request.to_json())

    def cancel(self, client: str, request_id: str) -> bool:
        """Cancel a request; its Final has the text so far. Returns False if there is no such request."""
        with self._lock:
            job = self._jobs.get((client, request_id))
            if job is None:
                return False
            job.cancelled = True
        self._sweep()
        return True

    def pause(self) -> None:
        """Start no request until `resume`; returns when none is in work. New requests wait."""
        with self._lock:
            self._paused = True
            self._lock.wait_for(lambda: not self.working)

    def resume(self, generator: Generates) -> None:
        """Continue after `pause`, with another generator."""
        with self._lock:
            self._generator, self._paused = generator, False
            self._lock.notify_all()

    def stop(self, drain_s: float) -> None:
        """Refuse new requests; answer the others for up to `drain_s` seconds, then with `unavailable`."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._thread.join(drain_s)
        self._abandoning = True
        for job in self._withdraw(lambda _: True):
            self._deliver(job, _stopping(job.request.id))
        self._thread.join(ABANDON_S)

    @property
    def full(self) -> bool:
        """Whether new requests are refused, from some or all clients."""
        return self._stopping or len(self._queue) >= self._queue_length - (
            self._queue_length >= SHARED_LENGTH
        )

    def refusal(self, client: str, request_id: str) -> Failure | None:
        """Return the failure that a new request of this client would get now, or None.

        The last place in the queue is reserved for clients without a waiting request, so that a client that
        floods the node does not keep the others out.
        """
        if self._stopping:
            return _stopping(request_id)
        with self._lock:
            left = self._queue_length - len(self._queue)
            if left == 1 and self._queue_length >= SHARED_LENGTH:
                left -= any(job.client == client for job in self._queue)
        if left > 0:
            return None
        wait_ms = max(100, round(self._typical_s * 1000))
        message = f"{len(self._queue)} requests are waiting; try again in {wait_ms} ms"
        return Failure(request_id, "busy", message, wait_ms)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._answer(job)

    def _next(self) -> _Job | None:
        """Wait for the next job; None when the engine stops and the queue is empty."""
        while True:
            self._sweep()
            with self._lock:
                if not self._queue and self._stopping:
                    return None
                if not self._queue or self._paused:
                    self._lock.wait(IDLE_S)
                self.progress += 1
                if self._queue and not self._paused:
                    return self._queue.popleft()

    def _sweep(self) -> None:
        """Answer the queued jobs that have been cancelled or have expired."""
        for job in self._withdraw(lambda job: job.cancelled or job.expired()):
            self._deliver(job, _empty(job, "cancelled") if job.cancelled else _expired(job))

    def _withdraw(self, which: Callable[[_Job], bool]) -> list[_Job]:
        """Take jobs out of the queue; the caller must answer them."""
        with self._lock:
            taken = [job for job in self._queue if which(job)]
            for job in taken:
                self._queue.remove(job)
                del self._jobs[job.key]
        return taken

    def _answer(self, job: _Job) -> None:
        """Answer a job that has left the queue."""
        job.started = time.monotonic()
        answer: Final | Failure
        summary = None
        try:
            job.started_work()
            answer = self._generate(job)
        except Interruption as interruption:  # before the answer started
            answer = _empty(job, interruption.reason)
        except RequestError as error:
            answer = Failure(job.request.id, error.code, str(error), error.retry_after_ms)
        except RuntimeFailure as error:
            self.decoder_failures += 1
            summary = str(error)  # the message has a call and a file name, so it is not sent
            answer = Failure(job.request.id, "internal", str(error))
        except Exception as error:
            summary = place_of(error)
            answer = Failure(job.request.id, "internal", "the runtime failed; see the daemon's log")
            payloads.info("id=%s failed", job.request.id, exc_info=error)
        if self._abandoning and isinstance(answer, Final) and answer.finish_reason == "cancelled":
            answer = answer if job.cancelled else _stopping(job.request.id)
        with self._lock:
            del self._jobs[job.key]
            self._lock.notify_all()
            if isinstance(answer, Final):
                self._typical_s += 0.25 * (time.monotonic() - job.started - self._typical_s)
        self._deliver(job, answer, summary)

    def _generate(self, job: _Job) -> Final:
        batch = _Batch(job, self._partial_interval_s)
        for item in self._generator.generate(
            job.request, lambda: self._interrupted(job), user_of(job.client)
        ):
            self.progress += 1
            if isinstance(item, Delta):
                for partial in batch.add(item):
                    self._deliver(job, partial)
                continue
            queue_ms = (job.started - job.arrived) * 1000
            first_ms = item.timings.first_token_ms + queue_ms
            return Final(
                job.request.id,
                item.text,
                item.finish_reason,
                item.usage,
                replace(item.timings, queue_ms=queue_ms, first_token_ms=first_ms),
                item.reasoning,
                tuple(item.tool_calls),
            )
        raise RuntimeError("the generator yielded no completion")

    def _interrupted(self, job: _Job) -> str | None:
        """The reason to stop generating, or None. Also answers waiting jobs that have expired."""
        self.progress += 1
        if self._queue:
            self._sweep()
        if job.cancelled or self._abandoning:
            return "cancelled"
        return "deadline" if job.expired() else None

    def _deliver(self, job: _Job, answer: Answer, summary: str | None = None) -> None:
        """Hand over an answer and log it. `summary` describes a failure in more detail than its code."""
        with self._lock:
            self.answered += isinstance(answer, Final)
            self.failed += isinstance(answer, Failure)
        if isinstance(answer, Final):
            self.last_final = answer
        elif isinstance(answer, Failure):
            self.last_error = f"{answer.code}: {summary or SUMMARIES[answer.code]}"
        if not isinstance(answer, Partial):
            _log_outcome(job, answer, summary)
        try:
            job.sink(answer)
        except Exception as error:
            log.error("the answer to request %s could not be delivered: %s", job.request.id, place_of(error))


def _log_outcome(job: _Job, answer: Final | Failure, summary: str | None) -> None:
    """Log the outcome of an accepted request, without its content; refusals are only counted in health."""
    about = f"id={job.request.id} client={printable(job.client, 200)}"
    if isinstance(answer, Final):
        used, took = answer.usage, answer.timings
        log.info(
            "answered %s finish=%s prompt=%d cached=%d generated=%d"
            " queue_ms=%.0f first_token_ms=%.0f decode_ms=%.0f",
            *(about, answer.finish_reason, used.prompt, used.cached, used.generated),
            *(took.queue_ms, took.first_token_ms, took.decode_ms),
        )
    elif answer.code not in REFUSALS:
        level = logging.ERROR if answer.code == "internal" else logging.WARNING
        log.log(level, "failed %s code=%s: %s", about, answer.code, summary or SUMMARIES[answer.code])
    if payloads.isEnabledFor(logging.INFO):
        payloads.info("id=%s answer=%s", job.request.id, answer.to_json())


class _Batch:
    """Collects text, to send fewer messages than tokens."""

    def __init__(self, job: _Job, interval_s: float) -> None:
        self._wanted = job.request.stream
        self._id = job.request.id
        self._interval_s = interval_s
        self._sent = float("-inf")
        self._count = 0
        self._text = self._reasoning = ""

    def add(self, delta: Delta) -> Iterator[Partial]:
        """Yield a Partial if one is due."""
        self._text += delta.text
        self._reasoning += delta.reasoning
        now = time.monotonic()
        if not self._wanted or not (self._text or self._reasoning) or now - self._sent < self._interval_s:
            return
        yield Partial(self._id, self._count, self._text, self._reasoning or None)
        self._sent = now
        self._count += 1
        self._text = self._reasoning = ""


def _stopping(request_id: str) -> Failure:
    return Failure(
        request_id, "unavailable", "the daemon is stopping; send the request again after its restart", 5000
    )


def _expired(job: _Job) -> Failure:
    return Failure(
        job.request.id,
        "expired",
        f"the deadline of {job.request.deadline_ms} ms passed while the request waited",
    )


def _empty(job: _Job, reason: str) -> Final:
    """Make the Final of a request that was stopped before its first token."""
    waited_ms = (time.monotonic() - job.arrived) * 1000
    return Final(job.request.id, "", reason, Usage(0, 0, 0, 0), Timings(waited_ms, 0.0, 0.0, 0.0))
