"""Requests and answers over MQTT 5 request/response; MQTT 3.1.1 clients name `reply_to` in the request.

Topics of a node: `edge/v1/<node>/request` and `.../cancel` (QoS 1), retained `.../status` with a Last Will
and `.../health`, and `.../reply/...` for whoever has no response topic of its own. Message Expiry is a
deadline.

A request is acknowledged when the broker has acknowledged its final answer, so neither a crash nor a lost
connection loses one. Redelivery of a request that is being worked on, or whose answer is out, is recognised
by its response topic and id; across runs it is the journal that does. Acknowledgements are sent as answers
come, not in the order of arrival that MQTT 5, 4.6 wants: a refusal must not wait behind a long answer, and
brokers go by the packet identifier.
"""

from __future__ import annotations

import base64
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeGuard

from edge.checks import FieldError, mapping
from edge.config import MqttConfig
from edge.engine import Sink
from edge.errors import RequestError
from edge.journaling import JournaledEngine
from edge.messages import Answer, Failure, Partial, Request, parse_request, salvage
from edge.request_fields import request_id, response_topic
from edge.route_runner import RouteRunner
from edge.strict_json import StrictJsonError, dumps, loads, printable
from edge.transports.mqtt_connection import MqttConnection, Outgoing, Received, Token

log = logging.getLogger(__name__)

ROOT = "edge/v1"
CLIENT = "mqtt:"  # and the response topic: the name space of ids
REMEMBERED = 512  # answered requests whose redelivery is recognised
HEALTH_CHANGED_S, HEALTH_SAME_S = 1.0, 60.0  # health is published at most, and at least, this often
OVERHEAD_BYTES = 128  # of a PUBLISH packet beside topic, payload and correlation data


@dataclass(eq=False)
class _Delivery:
    """A request on its way: where its answers go, and the deliveries to acknowledge then."""

    reply: str
    correlation: bytes | None
    tokens: list[Token | None] = field(default_factory=list)


class MqttTransport:
    """Serves one node on one broker. `describe` gives what the retained status says, `health` the health."""

    def __init__(
        self,
        config: MqttConfig,
        node: str,
        engine: JournaledEngine,
        status: Mapping[str, Any],
        health: Callable[[], Mapping[str, Any]],
        routes: RouteRunner | None = None,
    ) -> None:
        """Prepare the transport. Raises TransportError if a TLS file can't be used."""
        self._base = f"{ROOT}/{node}"
        self._prefixes = (f"{self._base}/reply/", *config.reply_prefixes)
        self._engine = engine
        self._status = dict(status)
        self._health = health
        self._routes = routes
        self._delivered: dict[int, Callable[[], None]] = {}
        self.online = False
        self._health_said, self._health_at = "", float("-inf")
        self._deliveries: dict[tuple[str, str], _Delivery] = {}
        self._publishing: dict[int, tuple[str, str]] = {}
        self._answered: OrderedDict[tuple[str, str], None] = OrderedDict()
        self.connection = MqttConnection(
            config.broker, f"edge-{node}", self, config.session_expiry_s, will=self._state("offline")
        )

    def start(self) -> None:
        """Start the connection's thread."""
        self.connection.start()

    @property
    def unconfirmed(self) -> int:
        """How many requests have no last answer yet that the broker has acknowledged."""
        return len(self._deliveries)

    def stop(self, timeout_s: float) -> None:
        """Wait until the answers are out, say `offline`, disconnect; at most about `timeout_s` seconds."""
        until = time.monotonic() + timeout_s
        while self.connection.connected and self.unconfirmed and time.monotonic() < until:
            time.sleep(0.02)
        self.connection.post(self._say_offline)
        self.connection.stop(timeout_s)

    def sink(self, client: str, request_id: str, note: str) -> Sink:
        """Make a sink for a request of an earlier run; to be called before the start."""
        key = (client.removeprefix(CLIENT), request_id)
        self._deliveries[key] = delivery = _Delivery(key[0], base64.b64decode(note) if note else None)
        return partial(self._sink, key, delivery)

    def publish(self, topic: str, payload: str, delivered: Callable[[], None]) -> None:
        """Publish what a route says, from any thread; `delivered` is called when the broker has it."""
        self.connection.post(lambda: self._publish(topic, payload, delivered))

    # What follows is called in the connection's thread only.

    def connected(self) -> None:
        """Subscribe to requests and, at QoS 0, to readings: those of an hour ago would be taken for new."""
        readings = self._routes.filters if self._routes else ()
        self.connection.subscribe(f"{self._base}/request", f"{self._base}/cancel", at_most_once=readings)

    def subscribed(self) -> None:
        """Tell the world that requests are heard."""
        self.connection.publish(self._state("online"))
        self._health_said = ""
        self.online = True

    def disconnected(self) -> None:
        """Note that nothing is heard until the next connection."""
        self.online = False

    def received(self, message: Received) -> None:
        """Take a request, a cancellation or a reading."""
        if not message.topic.startswith(f"{self._base}/"):
            self._reading(message)
        elif message.retained:
            log.warning(
                "%s: a retained request was ignored; publish it without the retain flag", message.topic
            )
            self.connection.acknowledge(message.token)
        elif message.topic == f"{self._base}/cancel":
            self._cancel(message)
            self.connection.acknowledge(message.token)
        elif message.topic == f"{self._base}/request":
            self._request(message)

    def _reading(self, message: Received) -> None:
        if self._routes is not None and not message.topic.startswith(f"{ROOT}/"):
            self._routes.reading(message.topic, message.payload)
        self.connection.acknowledge(message.token)

    def _publish(self, topic: str, payload: str, delivered: Callable[[], None]) -> None:
        mid = self.connection.publish(Outgoing(topic, payload))
        if mid is None:
            log.error("%s: too many messages wait for the broker; one is given up", printable(topic, 200))
        else:
            self._delivered[mid] = delivered

    def published(self, mid: int, refused: str | None) -> None:
        """The broker has an answer, or will never take it: the request is done."""
        self._delivered.pop(mid, lambda: None)()
        key = self._publishing.pop(mid, None)
        if key is None:
            return
        delivery = self._deliveries.pop(key)
        if refused:
            log.warning("%s: the broker refuses an answer: %s", printable(delivery.reply, 200), refused)
        self._engine.delivered(_client(delivery.reply), key[1])
        self._finish(key, delivery)

    def _finish(self, key: tuple[str, str], delivery: _Delivery) -> None:
        """Acknowledge a request that is done."""
        for token in delivery.tokens:
            self.connection.acknowledge(token)
        self._answered[key] = None
        while len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)

    def tick(self) -> None:
        """Publish health when it has changed, or has not been said for a while."""
        age = time.monotonic() - self._health_at
        if age < HEALTH_CHANGED_S:
            return
        said = dumps(self._health())
        if said != self._health_said or age >= HEALTH_SAME_S:
            self.connection.publish(Outgoing(f"{self._base}/health", said, retain=True))
            self._health_said, self._health_at = said, time.monotonic()

    def _request(self, message: Received) -> None:
        request: Request | None = None
        refusal: Failure | None = None
        try:
            request = parse_request(message.payload)
            name, reply_to = request.id, request.reply_to
        except RequestError as error:
            salvaged, reply_to = salvage(message.payload)
            refusal = Failure(salvaged, error.code, str(error))
            name = _refused_name(message)
        reply = message.response_topic or reply_to
        if not self._may_answer(reply):
            self._drop(message, reply)
            return
        key = (reply, name)
        if key in self._deliveries:
            self._deliveries[key].tokens.append(message.token)
            return
        if message.repeated and key in self._answered:
            self.connection.acknowledge(message.token)
            return
        delivery = self._deliveries[key] = _Delivery(reply, message.correlation, [message.token])
        if refusal is not None:
            self._send(key, delivery, refusal)
        elif request is not None:
            self._submit(key, delivery, _with_expiry(request, message.expiry_s), message.repeated)

    def _submit(self, key: tuple[str, str], delivery: _Delivery, request: Request, repeated: bool) -> None:
        note = base64.b64encode(delivery.correlation).decode() if delivery.correlation else ""
        sink = partial(self._sink, key, delivery)
        try:
            if not self._engine.submit(_client(delivery.reply), request, sink, note, repeated):
                self._finish(key, self._deliveries.pop(key))
        except Exception:
            log.exception("request %s could not be taken on", request.id)
            self._send(key, delivery, Failure(request.id, "internal", "the daemon failed; its log says why"))

    def _drop(self, message: Received, reply: str | None) -> None:
        why = "names no response topic" if reply is None else f"wants its answer at {printable(reply, 200)}"
        allowed = ", ".join(f"{prefix}#" for prefix in self._prefixes)
        log.warning("%s: a request %s; allowed are %s", message.topic, why, allowed)
        self.connection.acknowledge(message.token)

    def _may_answer(self, topic: str | None) -> TypeGuard[str]:
        """Whether answers may go to a topic: one on the allow-list, and never another node's own."""
        if topic is None or not topic.startswith(self._prefixes):
            return False
        try:
            response_topic("response topic", topic)
        except FieldError:
            return False
        return topic.startswith(f"{self._base}/reply/") or not topic.startswith((f"{ROOT}/", "$"))

    def _cancel(self, message: Received) -> None:
        """Cancel the request of this id that has the same response topic as the cancellation."""
        try:
            data = mapping("cancel", loads(message.payload, 4096), ("id", "reply_to"), ("id",))
            name = request_id("id", data["id"])
            reply = message.response_topic or response_topic("reply_to", data.get("reply_to"))
        except (StrictJsonError, FieldError) as error:
            log.warning(
                "%s: ignored: %s; the request's id and response topic are needed", message.topic, error
            )
            return
        self._engine.cancel(_client(reply), name)

    def _sink(self, key: tuple[str, str], delivery: _Delivery, answer: Answer) -> None:
        """Take an answer, in any thread."""
        self.connection.post(lambda: self._send(key, delivery, answer))

    def _send(self, key: tuple[str, str], delivery: _Delivery, answer: Answer) -> None:
        if isinstance(answer, Partial):
            self.connection.publish(
                Outgoing(delivery.reply, answer.to_json(), 0, correlation=delivery.correlation)
            )
            return
        payload = answer.to_json()
        room = self.connection.max_packet_bytes - OVERHEAD_BYTES - len(delivery.reply.encode())
        if len(payload) + len(delivery.correlation or b"") > room:
            said = (
                f"the answer has {len(payload)} bytes, the broker takes at most {room}; ask for fewer tokens"
            )
            payload = Failure(answer.id, "too_long", said).to_json()
        mid = self.connection.publish(Outgoing(delivery.reply, payload, correlation=delivery.correlation))
        if mid is None:  # not acknowledged, so it is delivered again after the next connection
            log.error(
                "%s: too many answers wait for the broker; one is given up", printable(delivery.reply, 200)
            )
            self._deliveries.pop(key, None)
        else:
            self._publishing[mid] = key

    def _say_offline(self) -> None:
        self.connection.publish(self._state("offline"))

    def _state(self, state: str) -> Outgoing:
        return Outgoing(f"{self._base}/status", dumps({"state": state, **self._status}), retain=True)


def _client(reply: str) -> str:
    """Give the name space of a response topic's ids."""
    return CLIENT + reply


def _with_expiry(request: Request, expiry_s: int | None) -> Request:
    """Let the rest of Message Expiry bound the deadline."""
    if expiry_s is None:
        return request
    limit = max(1, expiry_s * 1000)
    return replace(request, deadline_ms=min(limit, request.deadline_ms or limit))


def _refused_name(message: Received) -> str:
    """Make a name for a request without a usable id; the same on redelivery, and no id, as it has a space."""
    if message.token is None:
        return f"refused {time.monotonic_ns()}"
    return f"refused {message.token[1]} {hash(message.payload)}"
