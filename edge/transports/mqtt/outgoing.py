"""Messages of QoS 1 on their way to the broker, without a socket.

A message waits, is handed out as many at a time as the broker takes without an acknowledgement (its Receive
Maximum, 4.9), and leaves the queue with its acknowledgement. A connection that ends puts back what was not
acknowledged, in order and with its packet identifier (4.4).

A message that the broker ends the connection for would do so again over each new connection. So after such an
end the messages that were on their way are suspects, sent one at a time; the one that does it again is given
up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edge.transports.mqtt.messages import Outgoing

MAX_INFLIGHT = 20  # messages without an acknowledgement, if the broker takes so many
MAX_QUEUED = 4096  # messages that wait: more than the requests that a broker sends at a time
MAX_QUEUED_BYTES = 8 * 1024 * 1024  # of them: a refusal carries Correlation Data of its client's choice

Done = Callable[[str | None], None]
"""Called once with None when the broker has a message, or with why it never will."""


@dataclass(eq=False)
class Entry:
    """A message in the queue; `identifier` is 0 until it is handed out for the first time."""

    message: Outgoing
    done: Done | None
    identifier: int = 0
    duplicate: bool = False  # handed out before, over an earlier connection

    def finish(self, refused: str | None) -> None:
        """Report what became of the message."""
        if self.done is not None:
            self.done(refused)


class OutgoingQueue:
    """The queue of one session. It is used in one thread."""

    def __init__(self) -> None:
        self._waiting: deque[Entry] = deque()
        self._inflight: dict[int, Entry] = {}  # by packet identifier, oldest first
        self._bytes = 0  # of all that wait or are on their way
        self._suspects = 0  # the first so many of all
        self._window = MAX_INFLIGHT
        self._identifiers: set[int] = set()  # of messages in the queue
        self._last_identifier = 0

    @property
    def waiting(self) -> bool:
        """Whether there is anything that has not been sent over this connection."""
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
        """Note that a connection was made, and how many messages its broker takes at a time."""
        self._window = min(MAX_INFLIGHT, receive_maximum)

    def next(self) -> Entry | None:
        """Hand out the next message, or None if there is none or the broker takes no more now."""
        if not self._waiting or len(self._inflight) >= (1 if self._suspects else self._window):
            return None
        entry = self._waiting.popleft()
        if not entry.identifier:
            entry.identifier = self.new_identifier()
            self._identifiers.add(entry.identifier)
        self._inflight[entry.identifier] = entry
        return entry

    def acknowledged(self, identifier: int) -> Entry | None:
        """Take out the message that was acknowledged or can't be sent; None if there is none."""
        entry = self._inflight.pop(identifier, None)
        if entry is not None:
            self._bytes -= entry.message.size
            self._identifiers.discard(identifier)
            self._suspects = max(0, self._suspects - 1)
        return entry

    def closed(self, blamed: bool) -> list[Entry]:
        """Put back what was on its way over a connection that has ended; return what is given up.

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
        """Let all messages be sent as new ones: the broker has no session of ours."""
        for entry in self._waiting:
            entry.identifier, entry.duplicate = 0, False
        self._identifiers.clear()

    def new_identifier(self) -> int:
        """Give a packet identifier, 1 to 65535, that no message in the queue has."""
        while True:
            self._last_identifier = self._last_identifier % 0xFFFF + 1
            if self._last_identifier not in self._identifiers:
                return self._last_identifier
