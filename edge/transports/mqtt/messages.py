"""What goes over an MQTT connection in either direction, and who is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

CONTENT_TYPE = "application/json"

Token = tuple[int, int]
"""A delivery to acknowledge: the connection it came over, counted from 1, and its packet identifier."""


class Received(NamedTuple):
    """A message from the broker.

    `duplicate`: the DUP flag. `expiry_s`: the rest of its Message Expiry. `token` is None at QoS 0.
    """

    topic: str
    payload: bytes
    retained: bool
    duplicate: bool
    response_topic: str | None
    correlation: bytes | None
    expiry_s: int | None
    token: Token | None


@dataclass(frozen=True)
class Outgoing:
    """A message to publish. `correlation` and `response_topic` are sent where MQTT 5 is spoken."""

    topic: str
    payload: str
    qos: int = 1
    retain: bool = False
    correlation: bytes | None = None
    response_topic: str | None = None

    @property
    def size(self) -> int:
        """Characters and bytes that it holds, about what it takes in memory."""
        texts = len(self.topic) + len(self.payload) + len(self.response_topic or "")
        return texts + len(self.correlation or b"")


class Listener(Protocol):
    """What happens on a connection, told in its thread. No method may block."""

    def connected(self) -> None:
        """A connection was made: subscribe now."""

    def subscribed(self) -> None:
        """The broker has accepted the subscriptions."""

    def disconnected(self) -> None:
        """The connection has ended."""

    def received(self, message: Received) -> None:
        """A message came; `acknowledge(message.token)` acknowledges it."""

    def tick(self) -> None:
        """Called while connected: after each batch of messages, and at least every TICK_S seconds."""
