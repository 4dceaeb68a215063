"""A broker that does what mosquitto can't be made to: small limits, no acknowledgements, no MQTT 5."""

import socket
import threading
from dataclasses import dataclass
from typing import Any

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge.endpoints import Broker
from tests.support.counterparts import WAIT_S, wait_for

PROPERTIES: Any = Properties  # paho leaves its constructor untyped
CONNECT, PUBLISH, PUBACK, SUBSCRIBE, PINGREQ, DISCONNECT = 0x10, 0x30, 0x40, 0x80, 0xC0, 0xE0
REFUSED_VERSION = b"\x20\x02\x00\x01"  # CONNACK of MQTT 3.1.1: unacceptable protocol version


@dataclass
class Published:
    """A PUBLISH of QoS 1 that came over connection number `connection`."""

    connection: int
    identifier: int
    again: bool
    topic: str
    body: bytes


class ScriptedBroker:
    """Serves one client at a time. `limits` are properties of its CONNACK; it acknowledges on demand."""

    def __init__(self, knows_5: bool = True, **limits: Any) -> None:
        self.limits, self.knows_5 = limits, knows_5
        self.versions: list[int] = []
        self.asked: list[Any] = []  # properties of each CONNECT of MQTT 5
        self.published: list[Published] = []
        self.acknowledged: list[int] = []  # packet identifiers of what we published
        self.disconnects: list[bytes] = []  # the body of each DISCONNECT
        self.pings = 0
        self.answers_pings = self.keeps_sessions = True
        self.refuses = 0  # connections, for a reason
        self.acknowledges = False  # automatically, except on the forbidden topic
        self.forbidden = ""  # a topic that it ends the connection for
        self.granted = 1  # reason code of each SUBACK: the granted QoS or a refusal
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def broker(self) -> Broker:
        return Broker(port=self._listener.getsockname()[1])

    @property
    def connections(self) -> int:
        return len(self._connections)

    def outstanding(self, connection: int, topic: str) -> list[Published]:
        """What came over a connection, which must be the only thing there, as nothing is acknowledged."""
        return [one for one in self.published if (one.connection, one.topic) == (connection, topic)]

    def acknowledge(self, published: Published) -> None:
        self._connections[published.connection].sendall(b"\x40\x02" + published.identifier.to_bytes(2, "big"))

    def say(self, packet: bytes) -> None:
        """Send a packet over the last connection."""
        self._connections[-1].sendall(packet)

    def drop(self) -> None:
        """End the connection."""
        self._connections[-1].shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            connection.close()
        self._thread.join(WAIT_S)

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            self._connections.append(connection)
            with connection.makefile("rb") as stream:
                try:
                    self._talk(len(self._connections) - 1, connection, stream)
                except OSError:
                    continue

    def _talk(self, number: int, connection: socket.socket, stream: Any) -> None:
        while first := stream.read(1):
            length, shift = 0, 0
            while (byte := stream.read(1)[0]) & 0x80:
                length, shift = length | (byte & 0x7F) << shift, shift + 7
            body = stream.read(length | byte << shift)
            kind = first[0] & 0xF0
            if kind == CONNECT:
                connection.sendall(self._connack(body))
            elif kind == SUBSCRIBE & 0xF0:
                five = self.versions[-1] == 5
                topics = self._topics(body, five)
                answer = body[:2] + (b"\x00" if five else b"") + bytes([self.granted]) * topics
                connection.sendall(bytes([0x90, len(answer)]) + answer)
            elif kind == PINGREQ:
                self.pings += 1
                if self.answers_pings:
                    connection.sendall(b"\xd0\x00")
            elif kind == PUBACK:
                self.acknowledged.append(int.from_bytes(body[:2], "big"))
            elif kind == DISCONNECT:
                self.disconnects.append(body)
            elif kind == PUBLISH and first[0] & 0x06:
                end = 2 + int.from_bytes(body[:2], "big")
                identifier = int.from_bytes(body[end : end + 2], "big")
                topic = body[2:end].decode()
                if topic == self.forbidden:
                    connection.sendall(b"\xe0\x01\x87")
                    connection.shutdown(socket.SHUT_RDWR)
                    return
                self.published.append(
                    Published(number, identifier, bool(first[0] & 8), topic, body[end + 2 :])
                )
                if self.acknowledges:
                    self.acknowledge(self.published[-1])

    def _connack(self, body: bytes) -> bytes:
        self.versions.append(body[6])
        if body[6] != 5:
            return b"\x20\x02\x00\x00"
        if not self.knows_5:
            return REFUSED_VERSION
        asked = PROPERTIES(PacketTypes.CONNECT)
        asked.unpack(body[10:])
        self.asked.append(asked)
        properties = PROPERTIES(PacketTypes.CONNACK)
        for name, value in self.limits.items():
            setattr(properties, name, value)
        packed: bytes = bytes(
            [self.keeps_sessions and len(self.asked) > 1 and not self.refuses, self.refuses]
        )
        packed += properties.pack()
        return bytes([0x20, len(packed)]) + packed

    @staticmethod
    def _topics(body: bytes, five: bool) -> int:
        at, count = 2, 0
        if five:
            at += PROPERTIES(PacketTypes.SUBSCRIBE).unpack(body[2:])[1]
        while at < len(body):
            at, count = at + 2 + int.from_bytes(body[at : at + 2], "big") + 1, count + 1
        return count


def wait_until_published(broker: ScriptedBroker, count: int, connection: int, topic: str) -> list[Published]:
    """Wait for `count` messages on a topic."""
    wait_for(lambda: len(broker.outstanding(connection, topic)) >= count)
    return broker.outstanding(connection, topic)
