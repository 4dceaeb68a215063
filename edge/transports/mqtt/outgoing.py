"""The queue of QoS 1 messages to the broker. No I/O.

At most Receive Maximum (4.9) messages are sent without an acknowledgement. A message leaves the queue when it
is acknowledged. When a connection ends, unacknowledged messages return to the front of the queue, in order
and with their packet identifiers (4.4).

If a broker ends the connection because of a message, it would do so on each new connection. After such an
end, the unacknowledged messages are suspects and are sent one at a time. The one that ends the connection
again is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edge.transports.mqtt.messages import Outgoing

MAX_INFLIGHT = 20  # messages without an acknowledgement, if the broker allows that many
MAX_QUEUED = 4096  # waiting messages: more than the requests that a broker sends at a time
MAX_QUEUED_BYTES = 8 * 1024 * 1024  # of them: a refusal carries Correlation Data of its client's choice

Done = Callable[[str | None], None]
"""Called once: with None when the broker has the message, or with the reason why it can't be delivered."""


@dataclass(eq=False)
class Entry:
    """A message in the queue; `identifier` is 0 until it is handed out for the first time."""

    message: Outgoing
    done: Done | None
    identifier: int = 0
    duplicate: bool = False  # sent before, on an earlier connection

    def finish(self, refused: str | None) -> None:
        """Report the outcome of the message."""
        if self.done is not None:
            self.done(refused)


class OutgoingQueue:
    """The queue of one session. It is used in one thread."""

    def __init__(self) -> None:
        self._waiting: deque[Entry] = deque()
        self._inflight: dict[int, Entry] = {}  # by packet identifier, oldest first
        self._bytes = 0  # of all waiting and unacknowledged messages
        self._suspects = 0  # the number of suspects, at the front of the queue
        self._window = MAX_INFLIGHT
        self._identifiers: set[int] = set()  # of messages in the queue
        self._last_identifier = 0

    @property
    def waiting(self) -> bool:
        """Whether any message has not been sent on this connection."""
        return bool(self._waiting)

    @property
    def suspicious(self) -> bool:
        """Whether the broker may have ended the last connection for one of the messages."""
        return self._suspects > 0

    def add(self, message: Outgoing, done: Done | None, keep: bool) -> bool:
        """Queue a message; False if it is dropped because too many wait, which `keep` prevents."""
        size = message.size
        full = len(self._waiting) >= MAX_QUEUED or self._bytes + size > MAX_QUEUED_BYTES
        if full and not keep:
            return False
        self._bytes += size
        self._waiting.append(Entry(message, done))
        return True

    def opened(self, receive_maximum: int) -> None:
        """Record a new connection and its Receive Maximum."""
        self._window = min(MAX_INFLIGHT, receive_maximum)

    def next(self) -> Entry | None:
        """Hand out the next message, or None if there is none or Receive Maximum is reached."""
        if not self._waiting or len(self._inflight) >= (1 if self._suspects else self._window):
            return None
        entry = self._waiting.popleft()
        if not entry.identifier:
            entry.identifier = self.new_identifier()
            self._identifiers.add(entry.identifier)
        self._inflight[entry.identifier] = entry
        return entry

    def acknowledged(self, identifier: int) -> Entry | None:
        """Remove a message that was acknowledged or can't be sent; None if it is not in the queue."""
        entry = self._inflight.pop(identifier, None)
        if entry is not None:
            self._bytes -= entry.message.size
            self._identifiers.discard(identifier)
            self._suspects = max(0, self._suspects - 1)
        return entry

    def closed(self, blamed: bool) -> list[Entry]:
        """Put unacknowledged messages back after a connection has ended; return those to drop.

        `blamed` means that the broker ended it because of a message.
        """
        returned, self._inflight = list(self._inflight.values()), {}
        given_up = returned if blamed and self._suspects else []
        if given_up:
            self._suspects -= len(given_up)
            self._bytes -= sum(entry.message.size for entry in given_up)
            self._identifiers.difference_update(entry.identifier for entry in given_up)
        else:
            for entry in returned:
                entry.duplicate = True
            self._waiting.extendleft(reversed(returned))
            self._suspects = max(self._suspects, len(returned) if blamed else 0)
        return given_up

    def forget_session(self) -> None:
        """Send all messages as new ones, because the broker has no session of ours."""
        for entry in self._waiting:
            entry.identifier, entry.duplicate = 0, False
        self._identifiers.clear()

    def new_identifier(self) -> int:
        """Return a packet identifier, 1 to 65535, that no message in the queue has."""
        while True:
            self._last_identifier = self._last_identifier % 0xFFFF + 1
            if self._last_identifier not in self._identifiers:
                return self._last_identifier
