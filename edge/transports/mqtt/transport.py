"""Requests and answers over MQTT 5 request/response; MQTT 3.1.1 clients name `reply_to` in the request.

Topics of a node: `edge/v1/<node>/request` and `.../cancel` (QoS 1), retained `.../status` with a Last Will
and `.../health`, and `.../reply/...` for whoever has no response topic of its own. Message Expiry is a
deadline.

A request is acknowledged when the broker has acknowledged its final answer, so neither a crash nor a lost
connection loses one. Redelivery of a request that is being worked on, or whose answer is out, is recognised
by its response topic and id; across runs it is the journal that does. Acknowledgements are sent as answers
come, not in the order of arrival that MQTT 5, 4.6 wants: a refusal must not wait behind a long answer, and
brokers go by the packet identifier.

Answers are QoS 1, so one may come twice around a lost connection or a crash; it is the same one, and its id
tells. QoS 2 would not change that: its packet identifiers would have to survive a crash on both sides.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard

from edge.config import MqttConfig
from edge.errors import RequestError
from edge.protocol.checks import FieldError, mapping
from edge.protocol.messages import Answer, Failure, Final, Partial, Request, peek_request
from edge.protocol.request_fields import request_id, response_topic
from edge.protocol.strict_json import StrictJsonError, dumps, loads, printable
from edge.protocol.topics import ROOT, NodeTopics
from edge.requests.engine import REFUSALS, Sink
from edge.requests.journaled_engine import JournaledEngine, Verdict
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.home_assistant import HomeAssistant
from edge.transports.mqtt.messages import Outgoing, Received, Token
from edge.transports.mqtt.readings import MqttReadings
from edge.transports.routes import Routes

log = logging.getLogger(__name__)

CLIENT = "mqtt:"  # and the response topic: the name space of ids
REMEMBERED = 512  # answered requests whose redelivery is recognised
HEALTH_CHANGED_S, HEALTH_SAME_S = 1.0, 60.0  # health is published at most, and at least, this often


@dataclass(eq=False)
class _Delivery:
    """A request on its way: where its answers go, what to acknowledge then, and a hash of what was asked."""

    reply: str
    correlation: bytes | None
    token: Token | None = None
    content: int | None = None

    @classmethod
    def of(cls, message: Received, reply: str) -> _Delivery:
        """Make that of a message whose answers go to `reply`."""
        return cls(reply, message.correlation, message.token, hash(message.payload))

    def message(self, answer: Answer, qos: int = 1) -> Outgoing:
        return Outgoing(self.reply, answer.to_json(), qos, correlation=self.correlation)


class MqttTransport:
    """Serves one node on one broker. `status` gives what the retained status says, `health` the health."""

    def __init__(
        self,
        config: MqttConfig,
        node: str,
        engine: JournaledEngine,
        status: Callable[[], Mapping[str, Any]],
        health: Callable[[], Mapping[str, Any]],
        routes: Routes | None = None,
    ) -> None:
        """Prepare the transport. Raises TransportError if a TLS file can't be used."""
        self._base = NodeTopics(node).base
        self._prefixes = (f"{self._base}/reply/", *config.reply_prefixes)
        self._engine = engine
        self._status = status
        self._health = health
        self._subscribed, self._deaf = False, routes is not None
        self._health_said, self._health_at = "", float("-inf")
        self._home: HomeAssistant | None = None
        if config.discovery_prefix is not None:
            answering = routes.answering if routes else ()
            self._home = HomeAssistant(config.discovery_prefix, node, self._base, status, answering)
        self._deliveries: dict[tuple[str, str], _Delivery] = {}
        self._publishing: dict[int, Callable[[str | None], None]] = {}
        self._answered: OrderedDict[tuple[str, str], None] = OrderedDict()
        will = Outgoing(f"{self._base}/status", dumps({"state": "offline"}), retain=True)
        name = f"edge-{node}"
        self.connection = MqttConnection(config.broker, name, self, config.session_expiry_s, will)
        self.connections = {"mqtt": self.connection}
        if routes is not None:
            heard = partial(self.connection.post, self._readings_heard)
            readings = MqttReadings(config.broker, f"{name}-readings", routes, f"{ROOT}/", heard)
            self.connections["mqtt readings"] = readings.connection

    def start(self) -> None:
        """Start the threads of the connections."""
        for connection in self.connections.values():
            connection.start()

    @property
    def online(self) -> bool:
        """Whether requests are heard, and readings have been since the start."""
        return self._subscribed and not self._deaf

    @property
    def unconfirmed(self) -> int:
        """How many requests have no last answer yet that the broker has acknowledged."""
        return len(self._deliveries)

    def stop(self, timeout_s: float) -> None:
        """Send the answers there are, say `offline`, disconnect; at most about `timeout_s` seconds."""
        until = time.monotonic() + timeout_s
        handed_over = threading.Event()  # what was posted before is then being published
        self.connection.post(handed_over.set)
        pause = threading.Event()  # waits also where time.sleep refuses to, after a jump of the clock
        while self.connection.connected and time.monotonic() < until:
            if handed_over.is_set() and not self._publishing:
                break
            pause.wait(0.02)
        self.connection.post(partial(self._tell, self._state("offline")))
        for connection in self.connections.values():
            connection.stop(timeout_s)

    def sink(self, client: str, request_id: str, note: str) -> Sink:
        """Make a sink for a request of an earlier run; to be called before the start."""
        key = (client.removeprefix(CLIENT), request_id)
        self._deliveries[key] = delivery = _Delivery(key[0], base64.b64decode(note) if note else None)
        return partial(self._sink, key, delivery)

    def publish(self, topic: str, payload: str, delivered: Callable[[], None] | None) -> None:
        """Publish what a route says, from any thread; `delivered` is called when the broker has it.

        Without it the message is dropped if too many wait for the broker already.
        """
        self.connection.post(lambda: self._publish(topic, payload, delivered))

    def show(self, route: str, payload: str) -> None:
        """Show the answer of a route in Home Assistant, from any thread."""
        if self._home is not None:
            message = self._home.answer(route, payload)
            self.connection.post(partial(self._tell, message))

    def announce(self) -> None:
        """Publish the status again, from any thread, because it has changed."""
        self.connection.post(self._say_online)

    # What follows is called in the connection's thread only.

    def connected(self) -> None:
        """Subscribe to requests, and to Home Assistant's birth, at QoS 0."""
        births = () if self._home is None else (self._home.birth_topic,)
        self.connection.subscribe(f"{self._base}/request", f"{self._base}/cancel", at_most_once=births)

    def subscribed(self) -> None:
        """Tell the world that requests are heard, if readings are."""
        self._subscribed = True
        self._say_online()

    def disconnected(self) -> None:
        """Note that nothing is heard until the next connection."""
        self._engine.sync()
        self._subscribed = False

    def received(self, message: Received) -> None:
        """Take a request, a cancellation, or Home Assistant's word that it has started."""
        if self._home is not None and message.topic == self._home.birth_topic:
            if message.payload == b"online":
                self._introduce()
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
        else:
            self.connection.acknowledge(message.token)  # a subscription that the session kept

    def _readings_heard(self) -> None:
        if self._deaf:  # said once: clients that hear it ask again
            self._deaf = False
            self._say_online()

    def _introduce(self) -> None:
        """Tell Home Assistant what there is to see."""
        if self._home is not None:
            self.connection.publish(self._home.device())

    def _publish(self, topic: str, payload: str, delivered: Callable[[], None] | None) -> None:
        def done(refused: str | None) -> None:
            if refused:
                log.warning("%s: the broker does not take it: %s", printable(topic, 200), refused)
            if delivered is not None:
                delivered()

        if not self._confirmed(Outgoing(topic, payload), done, keep=delivered is not None):
            log.error("%s: too many messages wait for the broker; one is dropped", printable(topic, 200))

    def _confirmed(self, message: Outgoing, done: Callable[[str | None], None], keep: bool) -> bool:
        """Publish a message and call `done` when that is over; False if there was no room for it."""
        number = self.connection.publish(message, keep)
        if number is not None:
            self._publishing[number] = done
        return number is not None

    def published(self, number: int, refused: str | None) -> None:
        """Do what is to be done when the broker has a message, or will never take it."""
        done = self._publishing.pop(number, None)
        if done is not None:
            done(refused)

    def _sent(self, key: tuple[str, str], delivery: _Delivery, answer: Answer, refused: str | None) -> None:
        """Note that the last answer of a request is out; one that is too large becomes an error."""
        if refused:
            log.warning("%s: the broker does not take an answer: %s", printable(delivery.reply, 200), refused)
            size, most = delivery.message(answer).packet_bytes, self.connection.max_packet_bytes
            if isinstance(answer, Final) and size > most:
                said = f"the answer takes {size} bytes, the broker at most {most}; ask for fewer tokens"
                self._send(key, delivery, Failure(answer.id, "too_long", said), keep=True)
                return
        if self._deliveries.get(key) is delivery:  # else its id has been given to another request
            del self._deliveries[key]
            self._engine.delivered(_client(delivery.reply), key[1])
        self._finish(key, delivery)

    def _finish(self, key: tuple[str, str], delivery: _Delivery) -> None:
        """Acknowledge a request that is done."""
        self.connection.acknowledge(delivery.token)
        self._answered[key] = None
        while len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)

    def tick(self) -> None:
        """Have what was taken on written to the disk; publish health when it has changed, or now and then."""
        self._engine.sync()
        age = time.monotonic() - self._health_at
        if age < HEALTH_CHANGED_S:
            return
        said = dumps(self._health())
        if said != self._health_said or age >= HEALTH_SAME_S:
            self.connection.publish(Outgoing(f"{self._base}/health", said, retain=True))
            self._health_said, self._health_at = said, time.monotonic()

    def _request(self, message: Received) -> None:
        if self._refused(message):
            return
        request: Request | None = None
        refusal: Failure | None = None
        repeat = False
        peeked = peek_request(message.payload)
        try:
            request = peeked.parse()
            name = request.id
            repeat = self._is_repeat(message, request)
        except RequestError as error:
            refusal = Failure(peeked.id, error.code, str(error), error.retry_after_ms)
            name = _refused_name(message)
        reply = message.response_topic or peeked.reply_to
        if not self._may_answer(reply):
            self._drop(message, reply)
            return
        key = (reply, name)
        if repeat or (refusal is not None and key in self._deliveries):
            self._repeat(self._deliveries[key], message.token)
            return
        if message.repeated and key in self._answered:
            self.connection.acknowledge(message.token)
            return
        delivery = self._deliveries[key] = _Delivery.of(message, reply)
        if refusal is not None:
            self._send(key, delivery, refusal, keep=False)
        elif request is not None:
            self._submit(key, delivery, _with_expiry(request, message.expiry_s), message.repeated)

    def _refused(self, message: Received) -> bool:
        """Refuse a request that there is no room for, before anything but its id is looked at."""
        peeked = peek_request(message.payload) if self._engine.full else None
        if peeked is None or peeked.id is None:
            return False
        name, reply = peeked.id, message.response_topic or peeked.reply_to
        key = (reply or "", name)
        if key in self._deliveries or key in self._answered or not self._may_answer(reply):
            return False
        refusal = self._engine.refusal(_client(reply), name)
        if refusal is not None:
            delivery = self._deliveries[key] = _Delivery.of(message, reply)
            self._send(key, delivery, refusal, keep=False)
        return refusal is not None

    def _is_repeat(self, message: Received, request: Request) -> bool:
        """Whether a request is on its way already. Raises RequestError if another one of its id is."""
        reply = message.response_topic or request.reply_to or ""
        first = self._deliveries.get((reply, request.id))
        if first is None:
            return False
        return first.content == hash(message.payload) or self._engine.repeats(_client(reply), request)

    def _repeat(self, delivery: _Delivery, token: Token | None) -> None:
        """Acknowledge a repeat now, so that it holds up nobody, unless the first one can't be any more."""
        if self.connection.pending(delivery.token):
            self.connection.acknowledge(token)
        else:
            delivery.token = token

    def _submit(self, key: tuple[str, str], delivery: _Delivery, request: Request, repeated: bool) -> None:
        note = base64.b64encode(delivery.correlation).decode() if delivery.correlation else ""
        sink = partial(self._sink, key, delivery)
        try:
            client = _client(delivery.reply)
            verdict = self._engine.submit(client, request, sink, note, repeated, durable=False)
            if verdict is Verdict.DELIVERED:
                self._finish(key, self._deliveries.pop(key))
        except Exception:
            log.exception("request %s could not be taken on", request.id)
            failure = Failure(request.id, "internal", "the daemon failed; its log says why")
            self._send(key, delivery, failure, keep=False)

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
        kept = not (isinstance(answer, Failure) and answer.code in REFUSALS)  # the journal bounds those
        self.connection.post(lambda: self._send(key, delivery, answer, kept))

    def _send(self, key: tuple[str, str], delivery: _Delivery, answer: Answer, keep: bool) -> None:
        if isinstance(answer, Partial):
            self.connection.publish(delivery.message(answer, qos=0))
        elif not self._confirmed(delivery.message(answer), partial(self._sent, key, delivery, answer), keep):
            log.error("%s: too many messages wait for the broker; a refusal is dropped", self._base)
            # It is not acknowledged, so that the broker delivers it once more.
            self._deliveries.pop(key, None)

    def _tell(self, message: Outgoing) -> None:
        self.connection.publish(message)

    def _say_online(self) -> None:
        if self.online:
            self.connection.publish(self._state("online"))
            self._introduce()
            self._health_said = ""

    def _state(self, state: str) -> Outgoing:
        return Outgoing(f"{self._base}/status", dumps({"state": state, **self._status()}), retain=True)


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
