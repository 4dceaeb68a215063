"""Requests whose final or error has not reached the broker yet, and the packets to acknowledge then.

A request is acknowledged when the broker has acknowledged its final or error, so neither a crash nor a lost
connection loses one. Meanwhile the broker can redeliver it on a new connection; then the new delivery
is the one to acknowledge. `JournaledEngine.submit` decides what is a duplicate. Only redeliveries of refused
requests, which are not in the journal, are recognised here, by their content.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from edge.protocol.messages import Answer
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.messages import Outgoing, Received, Token

REMEMBERED = 512  # refused requests whose redelivery is recognised


@dataclass(eq=False)
class Delivery:
    """A request in progress: the topic for its answers, and the packet to acknowledge afterwards.

    `id` is None if the request has none. `content` is a hash of the payload, None for a request of an
    earlier run. `journaled`: the request or its answer is in the journal.
    """

    reply: str
    id: str | None
    correlation: bytes | None
    token: Token | None = None
    content: int | None = None
    journaled: bool = True

    @classmethod
    def of(cls, message: Received, reply: str, request_id: str | None) -> Delivery:
        """Return the delivery of a message whose answers go to `reply`."""
        return cls(reply, request_id, message.correlation, message.token, hash(message.payload))

    def answer(self, answer: Answer, qos: int = 1) -> Outgoing:
        """Return the message that carries an answer."""
        return Outgoing(self.reply, answer.to_json(), qos, correlation=self.correlation)

    @property
    def request(self) -> tuple[str, str | None]:
        """The key of the request."""
        return self.reply, self.id

    @property
    def packet(self) -> tuple[str, str | None, int | None]:
        """The key of the message, the same for each redelivery."""
        return self.reply, self.id, self.content


class Deliveries:
    """The deliveries of one connection; used in its thread."""

    def __init__(self, connection: MqttConnection) -> None:
        self._connection = connection
        self._accepted: dict[tuple[str, str | None], Delivery] = {}
        self._answering: dict[tuple[str, str | None, int | None], Delivery] = {}  # refusals and repeats
        self._refused: OrderedDict[tuple[str, str | None, int | None], None] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of requests whose final or error the broker has not acknowledged."""
        return len(self._accepted) + len(self._answering)

    def accept(self, delivery: Delivery) -> None:
        """Add an accepted request."""
        self._accepted[delivery.request] = delivery

    def answer(self, delivery: Delivery, journaled: bool) -> None:
        """Add a request that was answered at once."""
        delivery.journaled = journaled
        self._answering[delivery.packet] = delivery

    def redelivered(self, delivery: Delivery) -> bool:
        """Handle a message that was refused before or is being answered; False if it is neither."""
        first = self._answering.get(delivery.packet)
        if first is not None:
            self._replace(first, delivery.token)
        elif delivery.packet in self._refused:
            self._connection.acknowledge(delivery.token)
        return first is not None or delivery.packet in self._refused

    def repeated(self, delivery: Delivery) -> None:
        """Handle a duplicate of a request in progress."""
        first = self._accepted.get(delivery.request)
        if first is None:
            self._connection.acknowledge(delivery.token)
        else:
            self._replace(first, delivery.token)

    def finish(self, delivery: Delivery) -> bool:
        """Acknowledge an answered request; False if another request has replaced it meanwhile."""
        self._connection.acknowledge(delivery.token)
        return self.forget(delivery)

    def remember(self, delivery: Delivery) -> None:
        """Recognise a redelivery of this refused request from now on."""
        self._refused[delivery.packet] = None
        while len(self._refused) > REMEMBERED:
            self._refused.popitem(last=False)

    def forget(self, delivery: Delivery) -> bool:
        """Remove a delivery; False if it is not there."""
        if self._accepted.get(delivery.request) is delivery:
            return self._accepted.pop(delivery.request) is delivery
        if self._answering.get(delivery.packet) is delivery:
            return self._answering.pop(delivery.packet) is delivery
        return False

    def _replace(self, first: Delivery, token: Token | None) -> None:
        """Acknowledge a duplicate now, unless the first delivery can no longer be acknowledged."""
        if self._connection.can_acknowledge(first.token):
            self._connection.acknowledge(token)
        else:
            first.token = token
