"""Requests over MQTT: passes payloads to the engine and publishes the answers.

Requests arrive on `.../request`, cancellations on `.../cancel` (QoS 1). The answers go to the Response Topic
or, for clients of MQTT 3.1.1, to the request's `reply_to`. Message Expiry is a deadline.

On `.../request/<user>` and `.../cancel/<user>`, the broker's access list guarantees the user. Such a request
is answered only below `.../reply/<user>/`; such a cancellation applies only to requests answered there.

Acknowledgements are sent when answers are complete, not in the order of arrival that MQTT 5, 4.6 requires. A
refusal must not wait behind a long answer, and brokers match acknowledgements by packet identifier.

Finals and errors use QoS 1, so after a lost connection or a crash a client can get one twice, with the same
id. QoS 2 would not prevent that, since packet identifiers do not survive a crash on both sides.
"""

from __future__ import annotations

import base64
import logging
from dataclasses import replace
from functools import partial
from typing import TypeGuard

from edge.errors import RequestError
from edge.logs import RepeatedLog
from edge.protocol.checks import FieldError, mapping
from edge.protocol.messages import Answer, Failure, Final, Partial, PeekedRequest, Request, peek_request
from edge.protocol.request_fields import request_id, response_topic
from edge.protocol.strict_json import StrictJsonError, loads, printable
from edge.protocol.topics import ROOT, NodeTopics
from edge.requests.engine import REFUSALS, Sink
from edge.requests.journaled_engine import JournaledEngine, Verdict
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.deliveries import Deliveries, Delivery
from edge.transports.mqtt.messages import Received

log = logging.getLogger(__name__)

CLIENT = "mqtt:"  # followed by the response topic: the namespace of ids
MAX_CANCEL_BYTES = 4096


class MqttRequests:
    """Requests, cancellations and answers of one node. Response topics start with one of `prefixes`."""

    def __init__(
        self,
        connection: MqttConnection,
        topics: NodeTopics,
        prefixes: tuple[str, ...],
        engine: JournaledEngine,
    ) -> None:
        self._connection, self._topics, self._engine = connection, topics, engine
        self._prefixes = (topics.reply, *prefixes)
        self._deliveries = Deliveries(connection)
        self._ignored, self._unanswerable = RepeatedLog(log), RepeatedLog(log)
        self._dropped, self._refused = RepeatedLog(log), RepeatedLog(log)
        self.answering = 0
        """Finals and errors that the broker has not acknowledged."""

    @property
    def unconfirmed(self) -> int:
        """Requests whose final or error the broker has not acknowledged, or that have none yet."""
        return len(self._deliveries)

    def sink(self, client: str, request_id: str, note: str) -> Sink:
        """Make a sink for a request of an earlier run; called before the connection starts."""
        correlation = base64.b64decode(note) if note else None
        delivery = Delivery(client.removeprefix(CLIENT), request_id, correlation)
        self._deliveries.accept(delivery)
        return partial(self._sink, delivery)

    def received(self, message: Received) -> None:
        """Handle a message on one of the topics for requests and cancellations."""
        kind, _, user = message.topic.removeprefix(f"{self._topics.base}/").partition("/")
        prefixes = (self._topics.of_user(user).reply,) if user else self._prefixes
        if kind == "request":
            self._request(message, prefixes)
        else:
            self._cancel(message, prefixes)

    def _request(self, message: Received, prefixes: tuple[str, ...]) -> None:
        peeked = peek_request(message.payload)
        reply = message.response_topic or peeked.reply_to
        if not self._may_answer(reply, prefixes):
            self._drop(message, reply, prefixes)
            return
        delivery = Delivery.of(message, reply, peeked.id)
        if message.duplicate and self._deliveries.redelivered(delivery):
            return
        match self._submit(delivery, peeked, message):
            case Verdict.ACCEPTED:
                self._deliveries.accept(delivery)
            case Verdict.IN_PROGRESS:
                self._deliveries.repeated(delivery)
            case Verdict.REPEATED:
                self._deliveries.answer(delivery, journaled=True)
            case Verdict.REFUSED:
                self._deliveries.answer(delivery, journaled=False)
            case Verdict.DELIVERED:
                self._connection.acknowledge(delivery.token)

    def _cancel(self, message: Received, prefixes: tuple[str, ...]) -> None:
        """Cancel the request of this id that has the same response topic as the cancellation."""
        try:
            data = mapping("cancel", loads(message.payload, MAX_CANCEL_BYTES), ("id", "reply_to"), ("id",))
            name = request_id("id", data["id"])
            reply = message.response_topic or response_topic("reply_to", data.get("reply_to"))
        except (StrictJsonError, FieldError) as error:
            self._ignored.warning(
                "%s: ignored: %s; the request's id and response topic are needed", message.topic, error
            )
        else:
            if reply.startswith(prefixes):
                self._engine.cancel(_client(reply), name)
        self._connection.acknowledge(message.token)

    def _submit(self, delivery: Delivery, peeked: PeekedRequest, message: Received) -> Verdict:
        """Submit a request to the engine; a refused request is answered at once."""
        client, sink = _client(delivery.reply), partial(self._sink, delivery)
        refusal = None if peeked.id is None else self._engine.refusal(client, peeked.id)
        if refusal is not None:  # before the other fields are checked: a flood of requests must cost little
            sink(refusal)
            return Verdict.REFUSED
        note = base64.b64encode(delivery.correlation).decode() if delivery.correlation else ""
        try:
            request = _with_expiry(peeked.parse(), message.expiry_s)
            return self._engine.submit(client, request, sink, note, message.duplicate, durable=False)
        except RequestError as error:
            sink(Failure(peeked.id, error.code, str(error), error.retry_after_ms))
        except Exception:
            log.exception("request %s could not be accepted", peeked.id)
            sink(Failure(peeked.id, "internal", "the daemon failed; see its log"))
        return Verdict.REFUSED

    def _sink(self, delivery: Delivery, answer: Answer) -> None:
        """Send an answer, from any thread."""
        self._connection.post(partial(self._send, delivery, answer))

    def _send(self, delivery: Delivery, answer: Answer) -> None:
        if isinstance(answer, Partial):
            self._connection.publish(delivery.answer(answer, qos=0))
            return
        keep = delivery.journaled and not _is_refusal(answer)  # the journal limits their number
        done = partial(self._sent, delivery, answer)
        if self._connection.publish(delivery.answer(answer), keep, done):
            self.answering += 1
        else:
            self._dropped.warning(
                "%s: too many messages wait for the broker; a refusal is dropped", self._topics.base
            )
            self._deliveries.finish(delivery)  # otherwise the broker soon stops sending (Receive Maximum)

    def _sent(self, delivery: Delivery, answer: Answer, refused: str | None) -> None:
        """Handle the broker's acknowledgement of a final or error; a refused one can become `too_long`."""
        self.answering -= 1
        if refused:
            said = printable(delivery.reply, 200)
            self._refused.warning("%s: the broker refuses an answer: %s", said, refused)
            size = self._connection.packet_bytes(delivery.answer(answer))
            limit = self._connection.max_packet_bytes
            if isinstance(answer, Final) and size > limit:
                why = f"the answer takes {size} bytes, the broker accepts {limit}; ask for fewer tokens"
                self._send(delivery, Failure(answer.id, "too_long", why))
                return
        if not delivery.journaled or _is_refusal(answer):
            self._deliveries.remember(delivery)
        if self._deliveries.finish(delivery) and delivery.journaled and delivery.id is not None:
            self._engine.delivered(_client(delivery.reply), delivery.id)

    def _drop(self, message: Received, reply: str | None, prefixes: tuple[str, ...]) -> None:
        why = (
            "names no response topic" if reply is None else f"has the response topic {printable(reply, 200)}"
        )
        allowed = ", ".join(f"{prefix}#" for prefix in prefixes)
        self._unanswerable.warning("%s: a request %s; allowed are %s", message.topic, why, allowed)
        self._connection.acknowledge(message.token)

    def _may_answer(self, topic: str | None, prefixes: tuple[str, ...]) -> TypeGuard[str]:
        """Whether a topic is allowed for answers: it has an allowed prefix and belongs to no other node."""
        if topic is None or not topic.startswith(prefixes):
            return False
        try:
            response_topic("response topic", topic)
        except FieldError:
            return False
        return topic.startswith(self._topics.reply) or not topic.startswith((f"{ROOT}/", "$"))


def _is_refusal(answer: Answer) -> bool:
    return isinstance(answer, Failure) and answer.code in REFUSALS


def _client(reply: str) -> str:
    """Return the engine's client for a response topic."""
    return CLIENT + reply


def _with_expiry(request: Request, expiry_s: int | None) -> Request:
    """Limit the deadline to the remaining Message Expiry."""
    if expiry_s is None:
        return request
    limit = max(1, expiry_s * 1000)
    return replace(request, deadline_ms=min(limit, request.deadline_ms or limit))
