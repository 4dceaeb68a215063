"""A way from a client to a model: `ask` sends a request and yields its answers until the last one.

`cancel`, from another thread, makes that one come soon. `ask` raises TransportError if the way is blocked, or
if `patience_s` seconds have passed.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Protocol, TypeVar

from edge.errors import TransportError
from edge.protocol.messages import Answer, Request

POLL_S = 0.5  # between two looks at the state of a connection

T = TypeVar("T")


class Link(Protocol):
    """A way to a model."""

    def ask(self, request: Request, patience_s: float | None) -> Iterator[Answer]:
        """Send `request`; yield Partials and then its Final or Failure."""

    def cancel(self, request_id: str) -> None:
        """Ask for the request to be cancelled."""

    def close(self) -> None:
        """Release the connection, the port or the model."""


def next_event(events: queue.Queue[T], until: float) -> T | None:
    """Wait POLL_S for an event. Raises TransportError if it is later than `until` (monotonic seconds)."""
    if time.monotonic() > until:
        raise TransportError("no answer came in time; the daemon may be busy or stuck, look at its log")
    try:
        return events.get(timeout=POLL_S)
    except queue.Empty:
        return None


def until_s(patience_s: float | None) -> float:
    """When patience ends, in monotonic seconds."""
    return float("inf") if patience_s is None else time.monotonic() + patience_s
