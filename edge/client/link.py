"""A connection from a client to a model: `ask` sends a request and yields partials and the final or error.

`cancel`, from another thread, makes the end come soon. `ask` raises TransportError if the connection fails
or `patience_s` seconds have passed.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Protocol, TypeVar

from edge.errors import TransportError
from edge.protocol.messages import Answer, Request

POLL_S = 0.5  # between two checks of a connection

T = TypeVar("T")


class Link(Protocol):
    """A connection to a model."""

    def ask(self, request: Request, patience_s: float | None) -> Iterator[Answer]:
        """Send `request`; yield Partials and then its Final or Failure."""

    def cancel(self, request_id: str) -> bool:
        """Cancel the request; False if it has not been sent."""

    def close(self) -> None:
        """Release the connection, the port or the model."""


def next_event(events: queue.Queue[T], until: float) -> T | None:
    """Wait POLL_S for an event. Raises TransportError if it is later than `until` (monotonic seconds)."""
    if time.monotonic() > until:
        raise TransportError("no answer in time; the daemon is busy or stuck, see its log")
    try:
        return events.get(timeout=POLL_S)
    except queue.Empty:
        return None


def until_s(patience_s: float | None) -> float:
    """Give the end of `patience_s` in monotonic seconds; infinity for None."""
    return float("inf") if patience_s is None else time.monotonic() + patience_s
