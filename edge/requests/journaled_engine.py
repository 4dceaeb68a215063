"""The engine with a journal: each request is answered once, across crashes, restarts and duplicates.

A request is written to the journal before it is queued, and its answer before it is handed out. A duplicate
gets the answer of the first. `resume` continues after an earlier run: unanswered requests are queued
again, requests during which the daemon crashed twice get an error, and undelivered answers are delivered. The
next run also answers requests for which a stopping engine had no time.

Refusals (`busy`, `unavailable`) are not recorded, so the same request can be sent again. `submit` can wait
for the disk once for each accepted request; `sync` does so for several.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto
from typing import Protocol

from edge.errors import RequestError, TransportError
from edge.protocol.messages import Answer, Failure, Partial, Request, parse_answer, parse_request
from edge.requests.crashes import SUSPEND_AFTER
from edge.requests.engine import REFUSALS, Engine, Sink
from edge.requests.journal import Accepted, Answered, Conflict, InProgress, Journal, Poisoned, Unfinished

log = logging.getLogger(__name__)

CONFLICT_MS = 1000  # suggested wait before a request with an id in use is sent again
LONGEST_S = 86_400  # the longest deadline, even after the clock was set back


class Verdict(Enum):
    """The decision of `JournaledEngine.submit` about a request."""

    ACCEPTED = auto()
    """It is new. Its sink gets the partials and then one final or failure."""
    IN_PROGRESS = auto()
    """A duplicate of a request in progress, or of one whose answer is being delivered by the first sink. This
    sink gets nothing."""
    REPEATED = auto()
    """A duplicate of an answered request. Its sink has been given the journal's answer."""
    DELIVERED = auto()
    """A redelivery of a request whose client has the answer. Its sink gets nothing."""
    REFUSED = auto()
    """Its sink has been given a failure, which is not in the journal."""


class Origin(Protocol):
    """The source of requests and destination of answers: a transport, or the routes."""

    def sink(self, client: str, request_id: str, note: str) -> Sink:
        """Make a sink for a request of an earlier run, from the `note` passed to `submit`."""


class JournaledEngine:
    """Accepts requests. `client` is the namespace of the ids: a response topic, a port or a route."""

    def __init__(self, engine: Engine, journal: Journal) -> None:
        self._engine, self._journal = engine, journal

    def refusal(self, client: str, request_id: str) -> Failure | None:
        """Return the failure for any request with this id; None if only `submit` can decide.

        It needs only the id, so a flood of requests costs little.
        """
        if self._journal.may_know(_key(client, request_id)):
            return None
        return self._refusal(client, request_id)

    def submit(
        self,
        client: str,
        request: Request,
        sink: Sink,
        note: str = "",
        redelivered: bool = False,
        durable: bool = True,
    ) -> Verdict:
        """Answer `request` through `sink`, and return the decision about it.

        Two requests are the same if client, id and content (without `deadline_ms`) are equal. Different
        content under the id of an unanswered request is refused with `busy`.

        The Origin needs `note` to send the answer in a later run. `redelivered` means that the transport
        sends the request again, not the client. Unless `durable`, an accepted request is on the disk after
        the next `sync`; an answer always is before it is handed out.
        """
        key = _key(client, request.id)
        try:
            known = self._find_or_accept(client, request, note, durable)
        except RequestError as error:
            sink(Failure(request.id, error.code, str(error), error.retry_after_ms or CONFLICT_MS))
            return Verdict.REFUSED
        match known:
            case Accepted():
                self._work(client, request, sink)
                verdict = Verdict.ACCEPTED
            case InProgress():
                verdict = Verdict.IN_PROGRESS
            case Answered(_, published) if redelivered:
                verdict = Verdict.DELIVERED if published else Verdict.IN_PROGRESS
            case Answered(answer, _):
                sink(_kept(request.id, answer))
                verdict = Verdict.REPEATED
            case Poisoned(starts):
                self._keeping(key, sink)(_poisoned(request.id, starts))
                verdict = Verdict.REPEATED
        return verdict

    def _find_or_accept(
        self, client: str, request: Request, note: str, durable: bool
    ) -> Accepted | InProgress | Answered | Poisoned:
        """Look up a request in the journal, or add it. Raises RequestError if it is refused."""
        key, raw = _key(client, request.id), _raw(request)
        known = self._journal.find(key, raw)
        if known is None:
            refusal = self._refusal(client, request.id)
            if refusal is not None:
                raise RequestError(refusal.code, refusal.message, refusal.retry_after_ms)
            known = self._journal.accept(key, raw, note, _deadline(request), durable)
        if isinstance(known, Conflict):
            said = f"id {request.id} belongs to another request, which has no answer yet; use another id"
            raise RequestError("busy", said, CONFLICT_MS)
        return known

    def sync(self) -> None:
        """Wait until all accepted requests are on the disk."""
        self._journal.sync()

    def cancel(self, client: str, request_id: str) -> bool:
        """Cancel a request; False if there is none with this id."""
        return self._engine.cancel(client, request_id)

    def delivered(self, client: str, request_id: str) -> None:
        """Note that the client has the final or error."""
        self._journal.published(_key(client, request_id))

    def resume(self, origin_of: Callable[[str], Origin | None]) -> None:
        """Continue the work of earlier runs. `origin_of` returns the Origin of a client, or None.

        Called once, before any `submit`.
        """
        left = self._journal.unfinished()
        waiting = self._journal.unpublished()
        for entry in waiting:
            sink = _sink(origin_of, entry.key, entry.source)
            if sink is None:
                log.warning(
                    "the answer to %s is dropped: its response topic, port or route is gone", entry.key
                )
                self._journal.published(entry.key)
            else:
                sink(_kept(_parts(entry.key)[1], entry.answer))
        for unfinished in left:
            self._resume(unfinished, origin_of)
        if left or waiting:
            log.info("of an earlier run: %d requests to answer, %d answers to send", len(left), len(waiting))

    def _refusal(self, client: str, request_id: str) -> Failure | None:
        left_s = self._journal.suspended_s(client)
        if left_s:
            return Failure(request_id, "unavailable", _suspended(left_s), round(left_s * 1000))
        return self._engine.refusal(client, request_id)

    def _resume(self, entry: Unfinished, origin_of: Callable[[str], Origin | None]) -> None:
        client, name = _parts(entry.key)
        sink = _sink(origin_of, entry.key, entry.source)
        if sink is None:
            log.warning("request %s is dropped: its response topic, port or route is gone", entry.key)
            self._journal.forget(entry.key)
            return
        if entry.request is None:
            self._keeping(entry.key, sink)(_damaged(name, "request"))
            return
        if entry.poisoned:
            log.error("request %s: the daemon crashed %d times during it", entry.key, entry.starts)
            self._keeping(entry.key, sink)(_poisoned(name, entry.starts))
            return
        left_s = self._journal.suspended_s(client)
        if left_s:
            log.error("request %s is not tried: %s", entry.key, _suspended(left_s))
            self._keeping(entry.key, sink)(Failure(name, "internal", _suspended(left_s)))
            return
        try:
            request = replace(parse_request(entry.request), stream=False)  # partials have been sent already
        except RequestError as error:  # it was written by another version
            self._keeping(entry.key, sink)(Failure(name, error.code, str(error)))
            return
        if entry.deadline is not None:
            left_ms = round(max(0.0, min(entry.deadline - time.time(), LONGEST_S)) * 1000)
            if left_ms <= 0:
                said = "the deadline passed while the daemon was not running"
                self._keeping(entry.key, sink)(Failure(name, "expired", said))
                return
            request = replace(request, deadline_ms=left_ms)
        self._work(client, request, sink, resumed=True)

    def _work(self, client: str, request: Request, sink: Sink, resumed: bool = False) -> None:
        key = _key(client, request.id)
        self._engine.submit(
            client, request, self._keeping(key, sink), lambda: self._journal.started(key), resumed
        )

    def _keeping(self, key: str, sink: Sink) -> Sink:
        """Make a sink that writes the final or error to the journal before it passes it on."""

        def keep(answer: Answer) -> None:
            if isinstance(answer, Failure) and answer.code in REFUSALS:
                if answer.code == "unavailable" and self._journal.lasting:
                    log.info("request %s: the next run will answer it", key)
                    return
                self._journal.forget(key)
            elif not isinstance(answer, Partial):
                self._journal.answered(key, answer.to_json().encode())
            sink(answer)

        return keep


def _key(client: str, request_id: str) -> str:
    """Return a request's key in the journal; an id has no spaces."""
    return f"{client} {request_id}"


def _parts(key: str) -> tuple[str, str]:
    client, _, request_id = key.rpartition(" ")
    return client, request_id


def _raw(request: Request) -> bytes:
    """Encode a request without its deadline, so duplicates have equal bytes."""
    return replace(request, deadline_ms=None).to_json().encode()


def _deadline(request: Request) -> float | None:
    return None if request.deadline_ms is None else time.time() + request.deadline_ms / 1000


def _sink(origin_of: Callable[[str], Origin | None], key: str, note: str) -> Sink | None:
    """Make the sink for an answer to a request of an earlier run; logs why and returns None if it can't."""
    client, name = _parts(key)
    origin = origin_of(client)
    if origin is None:
        log.warning("%s: its origin is no longer configured", key)
        return None
    try:
        return origin.sink(client, name, note)
    except Exception:  # one bad record must not prevent the start of the daemon
        log.exception("%s: the note about its origin is damaged or of another version", key)
        return None


def _kept(name: str, answer: bytes) -> Answer:
    """Read an answer from the journal; a damaged one becomes an error."""
    try:
        stored = parse_answer(answer)
    except TransportError:
        stored = None
    return stored if stored is not None and stored.id == name else _damaged(name, "answer")


def _damaged(name: str, what: str) -> Failure:
    log.error("request %s: the %s in the journal is damaged", name, what)
    said = f"the {what} in the daemon's journal is damaged; send the request again with a new id"
    return Failure(name, "internal", said)


def _poisoned(request_id: str, starts: int) -> Failure:
    said = f"the daemon crashed {starts} times during this request; it is not tried again"
    return Failure(request_id, "internal", said)


def _suspended(left_s: float) -> str:
    return (
        f"the daemon crashed {SUSPEND_AFTER} times in an hour during requests of this client;"
        f" new ones are accepted in {math.ceil(left_s)} s"
    )
