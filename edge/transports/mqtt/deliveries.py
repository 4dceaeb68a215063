"""Requests whose last answer is not at the broker yet, and which packet to acknowledge when it is.

A request is acknowledged when the broker has acknowledged its last answer, so neither a crash nor a lost
connection loses one. Meanwhile the broker may deliver it again, over a new connection: then it is that
delivery that is acknowledged in the end. Whether a request is a repeat is not decided here but by
`JournaledEngine.submit`; only refusals, which the journal does not know, are recognised by their content.
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
    """A request on its way: where its answers go, and what to acknowledge after the last one.

    `id` is None where the request has none. `content` tells the request from others of its id; it is None for
    one of an earlier run. `journaled`: the journal knows the request, or its answer.
    """

    reply: str
    id: str | None
    correlation: bytes | None
    token: Token | None = None
    content: int | None = None
    journaled: bool = True

    @classmethod
    def of(cls, message: Received, reply: str, request_id: str | None) -> Delivery:
        """Make that of a message whose answers go to `reply`."""
        return cls(reply, request_id, message.correlation, message.token, hash(message.payload))

    def answer(self, answer: Answer, qos: int = 1) -> Outgoing:
        """Make the message that carries an answer."""
        return Outgoing(self.reply, answer.to_json(), qos, correlation=self.correlation)

    @property
    def request(self) -> tuple[str, str | None]:
        """What names the request."""
        return self.reply, self.id

    @property
    def packet(self) -> tuple[str, str | None, int | None]:
        """What names the message, whatever packet it comes in."""
        return self.reply, self.id, self.content


class Deliveries:
    """The deliveries of one connection; used in its thread."""

    def __init__(self, connection: MqttConnection) -> None:
        self._connection = connection
        self._accepted: dict[tuple[str, str | None], Delivery] = {}
        self._answering: dict[tuple[str, str | None, int | None], Delivery] = {}  # refusals and repeats
        self._refused: OrderedDict[tuple[str, str | None, int | None], None] = OrderedDict()

    def __len__(self) -> int:
        """Give the number of requests whose last answer the broker has not acknowledged."""
        return len(self._accepted) + len(self._answering)

    def accept(self, delivery: Delivery) -> None:
        """Take in a request that is being worked on."""
        self._accepted[delivery.request] = delivery

    def answer(self, delivery: Delivery, journaled: bool) -> None:
        """Take in a request that has got its answer at once."""
        delivery.journaled = journaled
        self._answering[delivery.packet] = delivery

    def redelivered(self, delivery: Delivery) -> bool:
        """Whether this is a request that was refused, or is just getting its answer; then that is all."""
        first = self._answering.get(delivery.packet)
        if first is not None:
            self._replace(first, delivery.token)
        elif delivery.packet in self._refused:
            self._connection.acknowledge(delivery.token)
        return first is not None or delivery.packet in self._refused

    def repeated(self, delivery: Delivery) -> None:
        """Take in a repeat of a request that is being worked on."""
        first = self._accepted.get(delivery.request)
        if first is None:
            self._connection.acknowledge(delivery.token)
        else:
            self._replace(first, delivery.token)

    def finish(self, delivery: Delivery) -> bool:
        """Acknowledge a request whose last answer is out; False if another has taken its place meanwhile."""
        self._connection.acknowledge(delivery.token)
        return self.forget(delivery)

    def remember(self, delivery: Delivery) -> None:
        """Recognise a redelivery of this refused request from now on."""
        self._refused[delivery.packet] = None
        while len(self._refused) > REMEMBERED:
            self._refused.popitem(last=False)

    def forget(self, delivery: Delivery) -> bool:
        """Take a delivery out without an acknowledgement, so that the broker delivers it again."""
        if self._accepted.get(delivery.request) is delivery:
            return self._accepted.pop(delivery.request) is delivery
        if self._answering.get(delivery.packet) is delivery:
            return self._answering.pop(delivery.packet) is delivery
        return False

    def _replace(self, first: Delivery, token: Token | None) -> None:
        """Acknowledge a repeat now, so that it holds up nobody, unless the first one can't be any more."""
        if self._connection.can_acknowledge(first.token):
            self._connection.acknowledge(token)
        else:
            first.token = token
