"""What goes over an MQTT connection in either direction, and who is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

CONTENT_TYPE = "application/json"
# Of a PUBLISH, at most: type and length, length of the topic, packet identifier; length of the properties,
# format indicator, content type (MQTT 5, 3.3); each further property has three bytes beside its value.
HEADER_BYTES = 5 + 2 + 2 + 4 + 2 + 3 + len(CONTENT_TYPE)

# Identifiers of a PUBLISH's properties (MQTT 5, 2.2.2.2), and what their values are.
EXPIRY, RESPONSE_TOPIC, CORRELATION_DATA, SUBSCRIPTION = 0x02, 0x08, 0x09, 0x0B
_BYTES = {0x01: 1, EXPIRY: 4, 0x23: 2}  # so many
_STRINGS = {0x03: 1, RESPONSE_TOPIC: 1, CORRELATION_DATA: 1, 0x26: 2}  # so many, each with its length

Token = tuple[int, int]
_Properties: Any = Properties  # paho leaves its constructor untyped


def _property(identifier: int, value: bytes) -> bytes:
    return bytes([identifier]) + len(value).to_bytes(2, "big") + value


_FORMAT_AND_TYPE = b"\x01\x01" + _property(0x03, CONTENT_TYPE.encode())  # UTF-8, JSON


class _Packed:
    """Properties of a PUBLISH in the place of paho's, which take longer to make than all the rest."""

    packetType = PacketTypes.PUBLISH  # noqa: N815 (paho's name)

    def __init__(self, content: bytes) -> None:
        self._content = content

    def pack(self) -> bytes:
        """Give them as MQTT sends them: their length, then they."""
        length, left = b"", len(self._content)
        while left > 127:
            length, left = length + bytes([left & 127 | 128]), left >> 7
        return length + bytes([left]) + self._content


@dataclass(frozen=True)
class Received:
    """A message that arrived. `expiry_s`: the rest of its Message Expiry. `token` is None at QoS 0."""

    topic: str
    payload: bytes
    retained: bool
    repeated: bool
    response_topic: str | None
    correlation: bytes | None
    expiry_s: int | None
    token: Token | None

    @classmethod
    def read(cls, first: int, packet: bytes, five: bool, generation: int) -> Received:
        """Read a PUBLISH that came over connection number `generation`.

        `first` is its first byte, `packet` what follows its length; `five`: it is one of MQTT 5. Raises
        LookupError if it has properties that no PUBLISH has.
        """
        end = 2 + int.from_bytes(packet[:2], "big")
        topic = packet[2:end].decode(errors="replace")
        token = (generation, int.from_bytes(packet[end : end + 2], "big")) if first & 0x06 else None
        end += 2 if token else 0
        properties, end = _properties(packet, end) if five else ({}, end)
        reply, expiry = properties.get(RESPONSE_TOPIC), properties.get(EXPIRY)
        return cls(
            topic=topic,
            payload=packet[end:],
            retained=bool(first & 0x01),
            repeated=bool(first & 0x08),
            response_topic=None if reply is None else reply.decode(errors="replace"),
            correlation=properties.get(CORRELATION_DATA),
            expiry_s=None if expiry is None else int.from_bytes(expiry, "big"),
            token=token,
        )


def _properties(packet: bytes, at: int) -> tuple[dict[int, bytes], int]:
    """Read the properties that begin at a place in a PUBLISH; also says where they end.

    paho does not take U+FEFF in any of them, which MQTT 5 allows (1.5.4.3).
    """
    found: dict[int, bytes] = {}
    length, at = _number(packet, at)
    end = at + length
    while at < end:
        identifier = packet[at]
        start, at = at + 1, at + 1
        if identifier in _BYTES:
            at += _BYTES[identifier]
        elif identifier == SUBSCRIPTION:
            at = _number(packet, at)[1]
        else:
            for _ in range(_STRINGS[identifier]):
                start = at + 2
                at = start + int.from_bytes(packet[at:start], "big")
        found[identifier] = packet[start:at]
    return found, end


def _number(packet: bytes, at: int) -> tuple[int, int]:
    """Read a Variable Byte Integer (MQTT 5, 1.5.5); also says where it ends."""
    value = shift = 0
    while True:
        value |= (packet[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if packet[at - 1] < 0x80:
            return value, at


@dataclass(frozen=True)
class Outgoing:
    """A message to publish; `correlation` is sent as Correlation Data, where there are such (MQTT 5)."""

    topic: str
    payload: str
    qos: int = 1
    retain: bool = False
    correlation: bytes | None = None
    response_topic: str | None = None

    def properties(self) -> Any:
        """Make the properties that MQTT 5 sends with it, for paho."""
        packed = _FORMAT_AND_TYPE
        if self.correlation is not None:
            packed += _property(CORRELATION_DATA, self.correlation)
        if self.response_topic is not None:
            packed += _property(RESPONSE_TOPIC, self.response_topic.encode())
        return _Packed(packed)

    @property
    def packet_bytes(self) -> int:
        """The most that its packet takes."""
        texts = self.topic.encode(), (self.response_topic or "").encode(), self.payload.encode()
        return HEADER_BYTES + sum(map(len, texts)) + len(self.correlation or b"") + 2 * 3


class Listener(Protocol):
    """What happens on a connection, told in its thread."""

    def connected(self) -> None:
        """Subscriptions are to be made now, on every connection again."""

    def subscribed(self) -> None:
        """The broker has accepted the subscriptions."""

    def disconnected(self) -> None:
        """The connection has ended."""

    def received(self, message: Received) -> None:
        """A message came; it is acknowledged by `acknowledge(message.token)`."""

    def published(self, number: int, refused: str | None) -> None:
        """The broker has acknowledged a message of QoS 1, or will not take it for the reason given."""

    def tick(self) -> None:
        """Called while connected: when all that came at once was `received`, or after TICK_S seconds."""


def connect_properties(session_expiry_s: int, max_packet_bytes: int, receive_maximum: int) -> Properties:
    """Make the properties that MQTT 5 connects with."""
    properties: Properties = _Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = session_expiry_s
    properties.MaximumPacketSize = max_packet_bytes
    properties.ReceiveMaximum = receive_maximum
    return properties
