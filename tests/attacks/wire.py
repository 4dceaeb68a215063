"""MQTT 5 on bare sockets, for attackers: a client and a broker that send any byte at any time.

Written from the specification and independent of the code under attack and of paho-mqtt, so that neither's
ideas of what can be sent limit an attack.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.support.counterparts import WAIT_S, DaemonProcess

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9
PINGREQ, PINGRESP, DISCONNECT = 12, 13, 14
EXPIRY, RESPONSE_TOPIC, CORRELATION, USER = 2, 8, 9, 38  # property identifiers, MQTT 5, 2.2.2.2


def number(value: int) -> bytes:
    """A Variable Byte Integer (MQTT 5, 1.5.5)."""
    encoded = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        encoded.append(low | 0x80 if value else low)
        if not value:
            return bytes(encoded)


def text(value: str | bytes) -> bytes:
    """A string or binary value with its length in two bytes."""
    raw = value.encode() if isinstance(value, str) else value
    return len(raw).to_bytes(2, "big") + raw


def packet(kind: int, flags: int, body: bytes) -> bytes:
    """A whole control packet."""
    return bytes([kind << 4 | flags]) + number(len(body)) + body


def publish(
    topic: str | bytes,
    payload: bytes,
    *,
    identifier: int = 1,
    flags: int = 0x02,
    reply: str | bytes | None = None,
    correlation: bytes | None = None,
    expiry_s: int | None = None,
    more: bytes = b"",
) -> bytes:
    """A PUBLISH packet; `flags` are those of its first byte (DUP 8, QoS 1 2, RETAIN 1), `more` properties."""
    properties = more
    if reply is not None:
        properties += bytes([RESPONSE_TOPIC]) + text(reply)
    if correlation is not None:
        properties += bytes([CORRELATION]) + text(correlation)
    if expiry_s is not None:
        properties += bytes([EXPIRY]) + expiry_s.to_bytes(4, "big")
    head = text(topic) + (identifier.to_bytes(2, "big") if flags & 0x06 else b"")
    return packet(PUBLISH, flags, head + number(len(properties)) + properties + payload)


@dataclass(frozen=True)
class Message:
    """A PUBLISH that arrived."""

    topic: str
    payload: bytes
    correlation: bytes | None
    retained: bool

    @property
    def content(self) -> dict[str, Any]:
        """Its JSON."""
        content: dict[str, Any] = json.loads(self.payload)
        return content


def packets(stream: socket.socket) -> Iterator[tuple[int, bytes]]:
    """First byte and body of each packet of a connection, until it ends."""
    buffer = bytearray()
    with contextlib.suppress(OSError):
        while received := stream.recv(1 << 16):
            buffer += received
            while (end := _whole(buffer)) is not None:
                start, stop = end
                whole = buffer[0], bytes(buffer[start:stop])
                del buffer[:stop]
                yield whole


def _whole(buffer: bytearray) -> tuple[int, int] | None:
    """Where the body of the first packet starts and ends; None if it is not all there."""
    length = shift = 0
    for at in range(1, min(len(buffer), 5)):
        length |= (buffer[at] & 0x7F) << shift
        shift += 7
        if buffer[at] < 0x80:
            return (at + 1, at + 1 + length) if len(buffer) >= at + 1 + length else None
    return None


def read_publish(first: int, body: bytes) -> tuple[Message, int]:
    """Read a PUBLISH of MQTT 5 and its packet identifier (0 at QoS 0)."""
    end = 2 + int.from_bytes(body[:2], "big")
    topic, identifier = body[2:end].decode(), 0
    if first & 0x06:
        identifier, end = int.from_bytes(body[end : end + 2], "big"), end + 2
    length, end = _number_at(body, end)
    properties, payload = body[end : end + length], body[end + length :]
    correlation, at = None, 0
    while at < length:
        kind, at = properties[at], at + 1
        if kind in (0x01, 0x02, 0x23):
            at += {0x01: 1, 0x02: 4, 0x23: 2}[kind]
        elif kind == 0x0B:
            at = _number_at(properties, at)[1]
        else:
            for _ in range(2 if kind == USER else 1):
                size = int.from_bytes(properties[at : at + 2], "big")
                value, at = properties[at + 2 : at + 2 + size], at + 2 + size
            correlation = value if kind == CORRELATION else correlation
    return Message(topic, payload, correlation, bool(first & 1)), identifier


def _number_at(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (raw[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if raw[at - 1] < 0x80:
            return value, at


class Attacker:
    """A client at a real broker. `heard` gets every message on the topics that it subscribed to."""

    def __init__(self, port: int, name: str, *topics: str) -> None:
        self.heard: queue.Queue[Message] = queue.Queue()
        self.connected = True
        self._passed: list[Message] = []  # finals and errors that nobody has asked for yet
        self._identifier = 0
        self._sending = threading.Lock()
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(
            packet(CONNECT, 0, text("MQTT") + b"\x05\x02" + (60).to_bytes(2, "big") + b"\0" + text(name))
        )
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._subscribed = threading.Event()
        self._thread.start()
        if topics:
            filters = b"".join(text(topic) + b"\x01" for topic in topics)
            self._socket.sendall(packet(SUBSCRIBE, 2, b"\0\1\0" + filters))
            assert self._subscribed.wait(WAIT_S)

    def send(self, raw: bytes) -> None:
        """Send bytes as they are; a broker that has ended the connection is no matter."""
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(raw)

    def publish(self, topic: str, payload: bytes, **options: Any) -> None:
        """Publish at QoS 1 without waiting."""
        self._identifier = self._identifier % 65_000 + 1
        self.send(publish(topic, payload, identifier=self._identifier, **options))

    def ask(self, reply: str, **fields: Any) -> None:
        """Publish a request to the node `pump`."""
        request = {"id": "x", "max_tokens": 4, "stream": False} | fields
        if "messages" not in fields:
            request.setdefault("prompt", "Pump?")
        self.publish("edge/v1/pump/request", json.dumps(request).encode(), reply=reply)

    def answer(self, name: str, topic: str | None = None, timeout_s: float = WAIT_S) -> dict[str, Any]:
        """Wait for the final or error with the id `name`, which may come before or after others."""
        until = time.monotonic() + timeout_s
        while True:
            for message in self._passed:
                content = message.content
                if topic in (None, message.topic) and content["id"] == name:
                    self._passed.remove(message)
                    return content
            message = self.heard.get(timeout=max(0.01, until - time.monotonic()))
            if message.content.get("type") in ("final", "error"):
                self._passed.append(message)

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(WAIT_S)

    def _read(self) -> None:
        for first, body in packets(self._socket):
            if first >> 4 == PUBLISH:
                message, identifier = read_publish(first, body)
                if identifier:
                    self.send(packet(PUBACK, 0, identifier.to_bytes(2, "big")))
                self.heard.put(message)
            elif first >> 4 == SUBACK:
                self._subscribed.set()
        self.connected = False


@dataclass
class Script:
    """What a hostile broker does in place of the right thing."""

    connack: bytes = packet(CONNACK, 0, b"\0\0\0")
    suback: Callable[[bytes, int], bytes] = field(
        default=lambda head, topics: packet(SUBACK, 0, head + b"\0" + b"\1" * topics)
    )
    acknowledges: bool = True


class HostileBroker:
    """A broker for one node: it serves every connection as `script` says, and sends what it is told to."""

    def __init__(self) -> None:
        self.script = Script()
        self.heard: queue.Queue[Message] = queue.Queue()
        self.acknowledged: queue.Queue[int] = queue.Queue()
        self.connections = 0
        self._subscribed, self._sending = threading.Event(), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._current: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._listener.getsockname()[1]
        return port

    def wait_for_node(self) -> None:
        """Wait until a node has subscribed over the present connection."""
        assert self._subscribed.wait(2 * WAIT_S), "no node has subscribed"

    def send(self, raw: bytes) -> None:
        """Send bytes over the present connection."""
        connection = self._current
        if connection is not None:
            with self._sending, contextlib.suppress(OSError):
                connection.sendall(raw)

    def drop(self) -> None:
        """End the present connection."""
        connection = self._current
        if connection is not None:
            self._subscribed.clear()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        self._thread.join(WAIT_S)

    def answer(self, name: str, timeout_s: float = WAIT_S) -> dict[str, Any]:
        """Wait for the final or error with the id `name`."""
        until = time.monotonic() + timeout_s
        while True:
            content = self.heard.get(timeout=max(0.01, until - time.monotonic())).content
            if content.get("id") == name and content.get("type") in ("final", "error"):
                return content

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            self.connections += 1
            self._current = connection
            with connection:
                for first, body in packets(connection):
                    self._take(first, body)
            self._subscribed.clear()

    def _take(self, first: int, body: bytes) -> None:
        kind = first >> 4
        if kind == CONNECT:
            self.send(self.script.connack)
        elif kind == SUBSCRIBE:
            self.send(self.script.suback(body[:2], _topics(body)))
            self._subscribed.set()
        elif kind == PINGREQ:
            self.send(packet(PINGRESP, 0, b""))
        elif kind == PUBACK:
            self.acknowledged.put(int.from_bytes(body[:2], "big"))
        elif kind == PUBLISH:
            message, identifier = read_publish(first, body)
            if identifier and self.script.acknowledges:
                self.send(packet(PUBACK, 0, identifier.to_bytes(2, "big")))
            self.heard.put(message)


def _topics(body: bytes) -> int:
    """How many topic filters a SUBSCRIBE has."""
    length, at = _number_at(body, 2)
    at, count = at + length, 0
    while at < len(body):
        at, count = at + 3 + int.from_bytes(body[at : at + 2], "big"), count + 1
    return count


def no_traceback(daemon: DaemonProcess) -> None:
    """Fail with the first traceback in the log, if there is one: what a peer sends is no surprise."""
    before, found, after = daemon.log.read_text().partition("Traceback")
    assert not found, before[-500:] + found + after[:4000]
