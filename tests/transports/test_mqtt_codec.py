"""MQTT packets: paho reads and writes the same properties; any bytes of a broker are read or refused."""

import contextlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers

from edge.transports.mqtt import codec
from edge.transports.mqtt.codec import V5, V311, MalformedPacket
from edge.transports.mqtt.messages import Outgoing

REPLY = "edge/v1/pump/reply/sensor"
PAHO: Any = Properties  # which has no types
PAHO_NUMBER: Any = VariableByteIntegers


def only(packet: bytes) -> tuple[int, bytes]:
    """First byte and body of bytes that are one packet."""
    buffer = bytearray(packet)
    (one,) = codec.split(buffer)
    assert not buffer
    return one


@pytest.mark.parametrize("correlation", [None, b"", b"x" * 300])
@pytest.mark.parametrize("response_topic", [None, REPLY])
def test_the_properties_of_a_publish_equal_those_that_paho_writes(
    correlation: bytes | None, response_topic: str | None
) -> None:
    message = Outgoing("t", "{}", correlation=correlation, response_topic=response_topic)
    expected = PAHO(PacketTypes.PUBLISH)
    expected.PayloadFormatIndicator, expected.ContentType = 1, "application/json"
    if correlation is not None:
        expected.CorrelationData = correlation
    if response_topic is not None:
        expected.ResponseTopic = response_topic
    _, body = only(codec.publish(message, V5, 7))
    assert body.startswith(b"\0\1t\0\7")
    assert body.endswith(b"{}")
    read, size = PAHO(PacketTypes.PUBLISH).unpack(body[5:])
    assert read.json() == expected.json()
    assert size == len(expected.pack())


def test_paho_reads_the_properties_of_a_connect() -> None:
    limits = {codec.RECEIVE_MAXIMUM: 7, codec.MAXIMUM_PACKET_SIZE: 1000}
    will = Outgoing("w", "gone", retain=True)
    first, body = only(codec.connect(V5, "me", 30, 60, "user", "password", will, limits))
    assert (first, body[:10]) == (0x10, b"\0\4MQTT\x05\xec\0\x1e")
    read, size = PAHO(PacketTypes.CONNECT).unpack(body[10:])
    assert (read.SessionExpiryInterval, read.ReceiveMaximum, read.MaximumPacketSize) == (60, 7, 1000)
    assert body[10 + size :].startswith(b"\0\2me")
    assert body.endswith(b"\0\1w\0\4gone\0\4user\0\x08password")


def test_packets_of_3_1_1_have_no_properties() -> None:
    assert codec.connect(V311, "me", 30, 0) == b"\x10\x0e\0\4MQTT\x04\x02\0\x1e\0\2me"
    assert codec.publish(Outgoing("t", "{}", correlation=b"c"), V311, 7) == b"\x32\x07\0\1t\0\7{}"
    assert codec.subscribe(V311, 5, [("a", 1), ("b", 0)], False) == b"\x82\x0a\0\5\0\1a\1\0\1b\0"
    assert codec.disconnect(V311, 0x81) == b"\xe0\0"


def sized(content: bytes) -> bytes:
    return len(content).to_bytes(2, "big") + content


def number(value: int) -> bytes:
    return bytes(PAHO_NUMBER.encode(value))


texts = st.text(max_size=200).map(str.encode)  # with U+FEFF, which MQTT 5 allows and paho refuses
properties = st.one_of(  # MQTT 5, 3.3.2.3
    st.tuples(st.just(0x01), st.binary(min_size=1, max_size=1)),
    st.tuples(st.just(0x02), st.binary(min_size=4, max_size=4)),
    st.tuples(st.just(0x03), texts.map(sized)),
    st.tuples(st.just(0x08), texts.map(sized)),
    st.tuples(st.just(0x09), st.binary(max_size=300).map(sized)),
    st.tuples(st.just(0x0B), st.integers(1, 268_435_455).map(number)),
    st.tuples(st.just(0x23), st.binary(min_size=2, max_size=2)),
    st.tuples(st.just(0x26), st.tuples(texts, texts).map(lambda pair: b"".join(map(sized, pair)))),
)


@given(
    topic=texts,
    payload=st.binary(max_size=300),
    named=st.lists(properties, max_size=8),
    flags=st.tuples(st.booleans(), st.sampled_from([0, 1]), st.booleans()),
    packet_id=st.binary(min_size=2, max_size=2),
)
def test_any_publish_is_read_with_its_properties_in_any_order(
    topic: bytes,
    payload: bytes,
    named: list[tuple[int, bytes]],
    flags: tuple[bool, int, bool],
    packet_id: bytes,
) -> None:
    duplicate, qos, retained = flags
    content = b"".join(bytes([identifier]) + value for identifier, value in named)
    packet = sized(topic) + (packet_id if qos else b"") + number(len(content)) + content + payload
    message = codec.read_publish(0x30 | duplicate << 3 | qos << 1 | retained, packet, V5, generation=3)
    last = dict(named)
    assert (message.topic.encode(), message.payload) == (topic, payload)
    assert (message.duplicate, message.retained) == (duplicate, retained)
    assert message.token == ((3, int.from_bytes(packet_id, "big")) if qos else None)
    assert message.response_topic == (last[0x08][2:].decode() if 0x08 in last else None)
    assert message.correlation == (last[0x09][2:] if 0x09 in last else None)
    assert message.expiry_s == (int.from_bytes(last[0x02], "big") if 0x02 in last else None)


@given(st.text(max_size=100), st.text(max_size=400), st.integers(1, 0xFFFF), st.sampled_from([V5, V311]))
def test_a_publish_round_trips(topic: str, payload: str, identifier: int, version: int) -> None:
    first, body = only(codec.publish(Outgoing(topic, payload), version, identifier, duplicate=True))
    message = codec.read_publish(first, body, version, 1)
    assert (message.topic, message.payload.decode()) == (topic, payload)
    assert (message.token, message.duplicate) == ((1, identifier), True)


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=200)), max_size=6), st.data())
def test_packets_are_found_in_any_segmentation(packets: list[tuple[int, bytes]], data: st.DataObject) -> None:
    stream = b"".join(bytes([first]) + number(len(body)) + body for first, body in packets)
    buffer = bytearray()
    found: list[tuple[int, bytes]] = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        buffer += stream[:cut]
        stream = stream[cut:]
        found.extend(codec.split(buffer))
    assert found == packets
    assert not buffer


@pytest.mark.parametrize("stream", [b"\x30\xff\xff\xff\xff\x01", b"\x30\x80\x80\x80\x80"])
def test_a_length_of_more_than_four_bytes_is_malformed(stream: bytes) -> None:
    with pytest.raises(MalformedPacket, match="longer than four bytes"):
        list(codec.split(bytearray(stream)))


def test_a_packet_over_the_limit_is_malformed_before_it_has_arrived() -> None:
    with pytest.raises(MalformedPacket, match="it has 204 bytes, 100 are allowed"):
        list(codec.split(bytearray(b"\x30\xc9\x01"), 100))


@given(st.binary(max_size=60), st.integers(0x30, 0x3F), st.sampled_from([V5, V311]))
@example(b"\0\1\xff\0\1\0", 0x32, V5)  # a topic that is not UTF-8
def test_a_damaged_packet_is_read_or_raises_malformed_packet(body: bytes, first: int, version: int) -> None:
    for read in (
        lambda: codec.read_publish(first, body, version, 1),
        lambda: codec.read_connack(body),
        lambda: codec.read_puback(body),
        lambda: codec.read_suback(body, version),
    ):
        with contextlib.suppress(MalformedPacket):
            read()
    codec.read_disconnect(body)
    codec.publish_identifier(first, body)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\0\0\0", 0),
        (b"\0\x87\0", 0x87),
        (b"\0\1", 0x84),
        (b"\0\5", 0x87),
        (b"\0\x09", 0x89),
        (b"\0\x8a\0", 0x8A),
    ],
)
def test_a_connack_of_either_version_has_a_reason_of_mqtt_5(body: bytes, reason: int) -> None:
    assert codec.read_connack(body).reason == reason
