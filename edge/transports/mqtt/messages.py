"""The messages on an MQTT connection, and the interface of its listener."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

CONTENT_TYPE = "application/json"

Token = tuple[int, int]
"""A delivery to acknowledge: the number of its connection, from 1, and its packet identifier."""


class Received(NamedTuple):
    """A message from the broker.

    `duplicate`: the DUP flag. `expiry_s`: its remaining Message Expiry. `token` is None at QoS 0.
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
    """A message to publish. `correlation` and `response_topic` are sent only with MQTT 5."""

    topic: str
    payload: str
    qos: int = 1
    retain: bool = False
    correlation: bytes | None = None
    response_topic: str | None = None

    @property
    def size(self) -> int:
        """Its characters and bytes, about its size in memory."""
        texts = len(self.topic) + len(self.payload) + len(self.response_topic or "")
        return texts + len(self.correlation or b"")


class Listener(Protocol):
    """Called for the events of a connection, in its thread. No method may block."""

    def connected(self) -> None:
        """A connection was made: subscribe now."""

    def subscribed(self) -> None:
        """The broker has accepted the subscriptions."""

    def disconnected(self) -> None:
        """The connection has ended."""

    def received(self, message: Received) -> None:
        """A message has arrived; `acknowledge(message.token)` acknowledges it."""

    def tick(self) -> None:
        """Called while connected: after each batch of messages, and at least every TICK_S seconds."""
