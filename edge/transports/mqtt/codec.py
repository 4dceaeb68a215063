"""Encodes the MQTT packets that a client sends, and decodes those that a broker sends. No I/O.

Versions 5 (OASIS, 2019) and 3.1.1 (2014); section numbers are those of MQTT 5. Only what this project uses is
implemented: no QoS 2, no topic aliases, no enhanced authentication. The structure of a broker's packets is
checked; any error in it raises MalformedPacket and nothing else. Invalid UTF-8 in strings is decoded with
replacement characters, because not every broker checks what its clients publish.

No library fits (docs/architecture.md): paho reads sockets itself and ends the connection for
valid packets; mqtt5 panics on invalid UTF-8, refuses unknown reason codes and does not speak 3.1.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from edge.transports.mqtt.messages import CONTENT_TYPE, Outgoing, Received

V5, V311 = 5, 4  # protocol levels of CONNECT (3.1.2.2)

# Packet types, in the first byte (2.1.2).
CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 0x10, 0x20, 0x30, 0x40, 0x80, 0x90
PINGREQ, PINGRESP, DISCONNECT = 0xC0, 0xD0, 0xE0

# Properties (2.2.2.2) that the code names.
FORMAT_INDICATOR, EXPIRY, TYPE, RESPONSE_TOPIC, CORRELATION = 0x01, 0x02, 0x03, 0x08, 0x09
SESSION_EXPIRY, SERVER_KEEP_ALIVE, SERVER_REFERENCE = 0x11, 0x13, 0x1C
RECEIVE_MAXIMUM, MAXIMUM_PACKET_SIZE = 0x21, 0x27
# The encoding of each property: a number of bytes, a number of strings, or a variable-length integer.
_FIXED = {
    **dict.fromkeys((FORMAT_INDICATOR, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A), 1),
    **dict.fromkeys((SERVER_KEEP_ALIVE, RECEIVE_MAXIMUM, 0x22, 0x23), 2),
    **dict.fromkeys((EXPIRY, SESSION_EXPIRY, 0x18, MAXIMUM_PACKET_SIZE), 4),
}
_STRINGS = {
    **dict.fromkeys((TYPE, RESPONSE_TOPIC, CORRELATION, 0x12, 0x15, 0x16, 0x1A, SERVER_REFERENCE, 0x1F), 1),
    0x26: 2,  # a user property
}
_NUMBERS = (0x0B,)

NO_LIMIT = 2**28 - 1  # the longest packet that MQTT allows

# Return codes of a CONNACK of 3.1.1 (its 3.2.2.3) as reason codes of MQTT 5.
_REASONS_311 = {0: 0x00, 1: 0x84, 2: 0x85, 3: 0x88, 4: 0x86, 5: 0x87}


class MalformedPacket(ValueError):
    """A packet does not have the structure that MQTT requires; the message names the place."""


class Connack(NamedTuple):
    """The broker's reply to CONNECT: 0 or the reason for a refusal, and the broker's limits (3.2)."""

    session_present: bool
    reason: int
    properties: Mapping[int, bytes]

    def number(self, identifier: int, default: int) -> int:
        """Give the value of a numeric property."""
        value = self.properties.get(identifier)
        return default if value is None else int.from_bytes(value, "big")

    def text(self, identifier: int) -> str | None:
        """Give the value of a text property."""
        value = self.properties.get(identifier)
        return None if value is None else value.decode(errors="replace")


class Acknowledgement(NamedTuple):
    """PUBACK or SUBACK: the packet that it acknowledges, and its reason codes (3.4, 3.9)."""

    identifier: int
    reasons: bytes


def split(buffer: bytearray, limit: int = NO_LIMIT) -> Iterator[tuple[int, bytes]]:
    """Yield first byte and body of each complete packet; then remove these packets from `buffer`.

    Raises MalformedPacket if the length of a packet is invalid (2.1.4) or more than `limit`, our Maximum
    Packet Size.
    """
    start, size = 0, len(buffer)
    try:
        while size - start >= 2:
            length, at = buffer[start + 1], start + 2
            if length & 0x80:
                header = bytes(buffer[start + 1 : start + 5])
                if len(header) < 4 and all(byte & 0x80 for byte in header):
                    return
                length, used = _number(header, 0)
                at = start + 1 + used
            if at - start + length > limit:
                raise MalformedPacket(f"it has {at - start + length} bytes, {limit} are allowed")
            if size - at < length:
                return
            first, start = buffer[start], at + length
            yield first, bytes(buffer[at:start])
    finally:
        del buffer[:start]


def read_publish(first: int, body: bytes, version: int, generation: int) -> Received:
    """Read a PUBLISH (3.3) received on connection number `generation`.

    Raises MalformedPacket.
    """
    topic, at = _string(body, 0)
    token = None
    if first & 0x06:
        token, at = (generation, int.from_bytes(body[at : at + 2], "big")), at + 2
    if at > len(body):
        raise MalformedPacket("PUBLISH: no packet identifier")
    properties, at = _properties(body, at) if version == V5 else ({}, at)
    reply, expiry = properties.get(RESPONSE_TOPIC), properties.get(EXPIRY)
    return Received(
        topic.decode(errors="replace"),
        body[at:],
        bool(first & 0x01),
        bool(first & 0x08),
        None if reply is None else reply.decode(errors="replace"),
        properties.get(CORRELATION),
        None if expiry is None else int.from_bytes(expiry, "big"),
        token,
    )


def publish_identifier(first: int, body: bytes) -> int | None:
    """Return the packet identifier of a malformed PUBLISH, so that it can be acknowledged."""
    at = 2 + int.from_bytes(body[:2], "big")
    return int.from_bytes(body[at : at + 2], "big") if first & 0x06 and at + 2 <= len(body) else None


def read_connack(body: bytes) -> Connack:
    """Read a CONNACK of either version. One of 3.1.1 has two bytes, even in reply to version 5.

    Raises MalformedPacket.
    """
    if len(body) < 2:
        raise MalformedPacket("CONNACK: too short")
    if len(body) == 2:
        return Connack(bool(body[0] & 1), _REASONS_311.get(body[1], body[1] | 0x80), {})
    return Connack(bool(body[0] & 1), body[1], _properties(body, 2)[0])


def read_puback(body: bytes) -> Acknowledgement:
    """Read a PUBACK; a missing reason code means success. Raises MalformedPacket."""
    if len(body) < 2:
        raise MalformedPacket("PUBACK: no packet identifier")
    return Acknowledgement(int.from_bytes(body[:2], "big"), body[2:3] or b"\0")


def read_suback(body: bytes, version: int) -> Acknowledgement:
    """Read a SUBACK: one reason code for each filter. Raises MalformedPacket."""
    if len(body) < 2:
        raise MalformedPacket("SUBACK: no packet identifier")
    at = _properties(body, 2)[1] if version == V5 else 2
    return Acknowledgement(int.from_bytes(body[:2], "big"), body[at:])


def read_disconnect(body: bytes) -> int:
    """Read the reason code of a DISCONNECT (3.14); it is optional."""
    return body[0] if body else 0


def connect(
    version: int,
    client_id: str,
    keepalive_s: int,
    session_expiry_s: int,
    username: str | None = None,
    password: str | None = None,
    will: Outgoing | None = None,
    limits: Mapping[int, int] | None = None,
) -> bytes:
    """Write a CONNECT (3.1); a session of 0 seconds is a clean start.

    `limits` are our Receive Maximum and Maximum Packet Size.
    """
    flags = 0x02 if session_expiry_s == 0 else 0
    properties = {SESSION_EXPIRY: session_expiry_s, **(limits or {})}
    body = _properties_of(version, b"".join(_fixed(key, value) for key, value in properties.items()))
    body += _text(client_id)
    if will is not None:
        flags |= 0x04 | will.qos << 3 | will.retain << 5
        body += _properties_of(version, _FORMAT_AND_TYPE) + _text(will.topic) + _text(will.payload)
    if username is not None:
        flags |= 0x80
        body += _text(username)
    if password is not None:
        flags |= 0x40
        body += _text(password)
    return _packet(CONNECT, _text("MQTT") + bytes([version, flags]) + _two(keepalive_s) + body)


def publish(message: Outgoing, version: int, identifier: int = 0, duplicate: bool = False) -> bytes:
    """Write a PUBLISH (3.3); `identifier` is its packet identifier at QoS 1."""
    first = PUBLISH | duplicate << 3 | message.qos << 1 | message.retain
    body = _text(message.topic) + (_two(identifier) if message.qos else b"")
    if version == V5:
        properties = _FORMAT_AND_TYPE
        if message.correlation is not None:
            properties += bytes([CORRELATION]) + _sized(message.correlation)
        if message.response_topic is not None:
            properties += bytes([RESPONSE_TOPIC]) + _text(message.response_topic)
        body += _properties_of(version, properties)
    return _packet(first, body + message.payload.encode())


def puback(identifier: int) -> bytes:
    """Write a PUBACK (3.4) of success."""
    return b"\x40\x02" + _two(identifier)


def subscribe(version: int, identifier: int, filters: Sequence[tuple[str, int]], retained: bool) -> bytes:
    """Write a SUBSCRIBE (3.8) to pairs of filter and QoS.

    Retained messages are sent only on request; a 3.1.1 broker always sends them.
    """
    handling = 0 if retained or version == V311 else 0x20  # Retain Handling: do not send
    body = _two(identifier) + _properties_of(version, b"")
    for topic_filter, qos in filters:
        body += _text(topic_filter) + bytes([qos | handling])
    return _packet(SUBSCRIBE | 0x02, body)


def pingreq() -> bytes:
    """Write a PINGREQ (3.12)."""
    return bytes([PINGREQ, 0])


def disconnect(version: int, reason: int = 0) -> bytes:
    """Write a DISCONNECT (3.14); version 3.1.1 has no reasons."""
    return bytes([DISCONNECT, 1, reason]) if reason and version == V5 else bytes([DISCONNECT, 0])


def _properties(body: bytes, at: int) -> tuple[dict[int, bytes], int]:
    """Read the properties at an offset: their bytes by identifier, and the offset of their end.

    User properties are skipped.
    """
    found: dict[int, bytes] = {}
    length, at = _number(body, at)
    end = at + length
    if end > len(body):
        raise MalformedPacket("properties: longer than the packet")
    while at < end:
        identifier = body[at]
        start, at = at + 1, at + 1
        if identifier in _FIXED:
            at += _FIXED[identifier]
        elif identifier in _STRINGS:
            for _ in range(_STRINGS[identifier]):
                start = at + 2
                at = start + int.from_bytes(body[at:start], "big")
        elif identifier in _NUMBERS:
            at = _number(body, at)[1]
        else:
            raise MalformedPacket(f"property {identifier:#04x} is unknown")
        found[identifier] = body[start:at]
    if at != end:
        raise MalformedPacket("properties: the last one is cut off")
    return found, end


def _number(body: bytes, at: int) -> tuple[int, int]:
    """Read a Variable Byte Integer (1.5.5); return it and the offset of its end."""
    value = 0
    for shift, byte in zip((0, 7, 14, 21), body[at : at + 4], strict=False):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + shift // 7 + 1
    raise MalformedPacket("a length is cut off or longer than four bytes")


def _string(body: bytes, at: int) -> tuple[bytes, int]:
    end = at + 2 + int.from_bytes(body[at : at + 2], "big")
    if at + 2 > len(body) or end > len(body):
        raise MalformedPacket("a string is longer than the packet")
    return body[at + 2 : end], end


def _packet(first: int, body: bytes) -> bytes:
    return bytes([first]) + _variable(len(body)) + body


def _variable(value: int) -> bytes:
    """Write a Variable Byte Integer. Raises ValueError above the maximum (1.5.5)."""
    if value > NO_LIMIT:
        raise ValueError(f"a packet of {value} bytes; MQTT allows {NO_LIMIT}")
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _properties_of(version: int, content: bytes) -> bytes:
    """Write properties with their length; 3.1.1 has none."""
    return _variable(len(content)) + content if version == V5 else b""


def _two(value: int) -> bytes:
    return value.to_bytes(2, "big")


def _sized(content: bytes) -> bytes:
    return _two(len(content)) + content


def _text(content: str) -> bytes:
    return _sized(content.encode())


def _fixed(identifier: int, value: int) -> bytes:
    return bytes([identifier]) + value.to_bytes(_FIXED[identifier], "big")


_FORMAT_AND_TYPE = bytes([FORMAT_INDICATOR, 1, TYPE]) + _text(CONTENT_TYPE)  # UTF-8 text, JSON
