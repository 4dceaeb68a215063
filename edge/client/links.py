"""Connections to a daemon over MQTT and over a serial port; each is a `Link` of `edge.client.link`."""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edge.client.link import next_event, until_s
from edge.endpoints import Broker, SerialConfig
from edge.errors import TransportError
from edge.protocol.framing import Damaged
from edge.protocol.messages import Answer, Partial, Request, parse_answer
from edge.protocol.strict_json import StrictJsonError, dumps, loads
from edge.protocol.topics import STATUS_OF_ALL, NodeTopics, node_of
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.messages import Outgoing, Received
from edge.transports.serial.port import SerialPort

CONNECT_S = 10.0  # for a broker or a port to answer
STATUS_S = 2.0  # for the retained status of a node to arrive
OTHERS_S = 0.3  # for those of other nodes, after the first
LOST_S = 30.0  # for a lost broker, node or port to come back
REMIND_S = 10.0  # after which a request is sent again over serial, in case its answer was lost
ACK_S = (0.4, 0.8, 1.6, 3.2, 3.2)  # for an acknowledgement of each attempt over serial, as in EZSP's ASH
MAX_LINE_BYTES = 1024 * 1024  # of an answer


class MqttLink:
    """A client of a broker. `node` None means the only node that is online."""

    def __init__(self, broker: Broker, node: str | None) -> None:
        """Prepare a connection. Raises TransportError if a TLS file can't be used."""
        self._broker, self._node = broker, node
        self._events: queue.Queue[str | Received] = queue.Queue()
        self._reply = ""
        self._refused: str | None = None
        self._user_topics: set[str] = set()  # nodes with topics for each user
        self._topics: NodeTopics | None = None  # for requests and cancellations
        self._connection = MqttConnection(
            broker, f"edge-ask-{uuid.uuid4().hex[:12]}", self, session_expiry_s=0
        )
        self._connection.start()

    def ask(self, request: Request, patience_s: float | None = None) -> Iterator[Answer]:
        """Send `request` to the node and yield its answers.

        It is sent again after a new connection and when the node comes back; a duplicate is harmless.
        """
        until = until_s(patience_s)
        node = self._find_node()
        user = self._broker.username or "anonymous"  # lets a broker's access list keep users apart
        user = user.translate({ord("+"): "_", ord("#"): "_"})  # not allowed in topics
        plain = self._topics = NodeTopics(node)
        self._reply = f"{plain.reply}{user}/{uuid.uuid4().hex}"
        if user == self._broker.username and "/" not in user and node in self._user_topics:
            self._topics = plain.of_user(user)
        self._connection.post(lambda: self._connection.subscribe(self._reply))
        payload = replace(request, reply_to=self._reply).to_json()
        self._publish(self._topics.request, payload)
        there, heard = True, time.monotonic()
        while True:
            event = next_event(self._events, until)
            if there and self._connection.connected:
                heard = time.monotonic()
            if self._refused and self._topics is not plain:  # the access list has no topics for users
                self._topics, self._refused, event = plain, None, "back"
            self._give_up(node, there, time.monotonic() - heard)
            if event == "back":
                self._publish(self._topics.request, payload)
            elif isinstance(event, Received) and event.topic == self._reply:
                answer = parse_answer(event.payload)
                yield answer
                if not isinstance(answer, Partial):
                    return
            elif isinstance(event, Received) and _state(event)[0] == node:
                there = _state(event)[1] == "online"
                if there:  # it may have missed the request
                    self._publish(self._topics.request, payload)

    def cancel(self, request_id: str) -> bool:
        """Publish a cancellation; False if no request has been sent."""
        if self._topics is None:
            return False
        self._publish(self._topics.cancel, dumps({"id": request_id, "reply_to": self._reply}))
        return True

    def _give_up(self, node: str, there: bool, silent_s: float) -> None:
        """Raise TransportError if the broker refuses messages, or broker or node were away for too long."""
        if self._refused:
            raise TransportError(f"broker {self._broker.address}: it refuses the request: {self._refused}")
        problem = self._connection.problem
        if problem and (self._connection.connected or silent_s > LOST_S):
            raise TransportError(problem)
        if not there and silent_s > LOST_S:
            raise TransportError(f"node {node} went offline; ask again when it is back")

    def close(self) -> None:
        """Disconnect."""
        self._connection.stop(CONNECT_S)

    def _publish(self, topic: str, payload: str) -> None:
        message = Outgoing(topic, payload, response_topic=self._reply)
        self._connection.post(lambda: self._handle(message))

    def _handle(self, message: Outgoing) -> None:
        self._connection.publish(message, done=self._published)

    def _published(self, refused: str | None) -> None:
        """Note a refusal; that a request has arrived is known from its answer."""
        self._refused = refused or self._refused

    def _find_node(self) -> str:
        """Wait for the connection and for the node's status. Raises TransportError."""
        until = time.monotonic() + CONNECT_S
        states: dict[str, str] = {}
        while time.monotonic() < until:
            problem = self._connection.problem
            if problem:
                raise TransportError(problem)
            try:
                event = self._events.get(timeout=0.05)
            except queue.Empty:
                continue
            if event == "subscribed":
                until = min(until, time.monotonic() + STATUS_S)
            elif isinstance(event, Received):
                states.update([_state(event)])
                if _content(event).get("user_topics") is True:
                    self._user_topics.add(node_of(event.topic))
                until = min(until, time.monotonic() + OTHERS_S) if self._node is None else until
                if self._node is not None and states.get(self._node) == "online":
                    return self._node
        return self._choose(states)

    def _choose(self, states: dict[str, str]) -> str:
        """Return the only node online. Raises TransportError without exactly one, or for a named node."""
        online = sorted(name for name, state in states.items() if state == "online")
        if self._node is None and len(online) == 1:
            return online[0]
        at = f"at broker {self._broker.address}"
        known = f"online: {', '.join(online)}" if online else "none is online"
        if not self._connection.connected:
            raise TransportError(f"broker {self._broker.address}: no answer in {CONNECT_S:.0f} s")
        if self._node is None:
            raise TransportError(f"which node {at}? {known}; name one with --node, or start edge-daemon")
        raise TransportError(f"node {self._node} {at} is {states.get(self._node, 'not known')}; {known}")

    # The connection calls these in its own thread.

    def connected(self) -> None:
        """Subscribe to the status of all nodes and to the answers."""
        self._connection.subscribe(STATUS_OF_ALL, *([self._reply] if self._reply else []), retained=True)
        if self._reply:
            self._events.put("back")

    def subscribed(self) -> None:
        """Queue it for `ask`."""
        self._events.put("subscribed")

    def disconnected(self) -> None:
        """Do nothing: the connection comes back."""

    def received(self, message: Received) -> None:
        """Queue it for `ask`."""
        self._events.put(message)
        self._connection.acknowledge(message.token)

    def tick(self) -> None:
        """Do nothing."""


def _state(message: Received) -> tuple[str, str]:
    """Return name and state of the node that a status message is about."""
    content = _content(message)
    return (node_of(message.topic), str(content.get("state"))) if content else ("", "")


def _content(message: Received) -> dict[str, Any]:
    """Return the content of a status message; nothing of one that can't be read."""
    try:
        return loads(message.payload, 65536)
    except StrictJsonError:
        return {}


class SerialLink:
    """A client on a serial line."""

    def __init__(self, config: SerialConfig) -> None:
        """Open the port. Raises TransportError."""
        self._lines: queue.Queue[str | Damaged] = queue.Queue()
        self._port = SerialPort(config, MAX_LINE_BYTES, lambda: None, self._lines.put)
        self._port.start()
        until = time.monotonic() + CONNECT_S
        while not self._port.is_open:
            if self._port.problem or time.monotonic() > until:
                self._port.stop(1)
                raise TransportError(
                    (self._port.problem or f"port {config.port}: can't be opened").rstrip(".")
                )
            time.sleep(0.01)

    def ask(self, request: Request, patience_s: float | None = None) -> Iterator[Answer]:
        """Send `request` until it is acknowledged, and yield its answers.

        It is sent again from time to time, because its answer may have been lost: a duplicate gets it again.
        """
        until = until_s(patience_s)
        self._send_until_acknowledged(request)
        sent = heard = time.monotonic()
        while True:
            line = next_event(self._lines, until)
            now = time.monotonic()
            heard = heard if line is None else now
            self._give_up(now - heard)
            if isinstance(line, Damaged) or _type_of(line) == "hello" or now - sent > REMIND_S:
                self._port.send(request.to_json())
                sent = now
            if (answer := _answer(line, request.id)) is not None:
                yield answer
                if not isinstance(answer, Partial):
                    return

    def _give_up(self, silent_s: float) -> None:
        """Raise TransportError if the daemon or the port has been away for too long."""
        if silent_s > LOST_S:
            message = f"nothing received for {silent_s:.0f} s; is edge-daemon running?"
            raise TransportError(self._port.problem or f"port {self._port.name}: {message}")

    def cancel(self, request_id: str) -> bool:
        """Send a cancellation."""
        self._port.send(dumps({"type": "cancel", "id": request_id}))
        return True

    def close(self) -> None:
        """Close the port."""
        self._port.stop(1)

    def _send_until_acknowledged(self, request: Request) -> None:
        """Send the request, and again after `nak` or silence. Raises TransportError."""
        for wait_s in ACK_S:
            self._port.send(request.to_json())
            until = time.monotonic() + wait_s
            while (left := until - time.monotonic()) > 0:
                try:
                    line = self._lines.get(timeout=left)
                except queue.Empty:
                    break
                if isinstance(line, Damaged) or _type_of(line) == "nak":
                    break
                if _type_of(line) in ("ack", "error"):
                    if _type_of(line) == "error":
                        self._lines.put(line)
                    return
        name = self._port.name
        raise TransportError(
            f"port {name}: no acknowledgement; is edge-daemon running, at the same baud rate?"
        )


def _type_of(line: str | Damaged | None) -> str:
    try:
        return str(loads(line, MAX_LINE_BYTES).get("type")) if isinstance(line, str) else ""
    except StrictJsonError:
        return ""


def _answer(line: str | Damaged | None, request_id: str) -> Answer | None:
    """Parse the answer in a line; None if it is not an answer to this request."""
    if not isinstance(line, str) or _type_of(line) not in ("partial", "final", "error"):
        return None
    answer = parse_answer(line)
    return answer if answer.id in (request_id, None) else None
