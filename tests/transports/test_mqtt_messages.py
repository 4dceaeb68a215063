"""PUBLISH packets: what is written is what paho reads, and what anyone may send is read."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers

from edge.transports.mqtt.messages import Outgoing, Received

REPLY = "edge/v1/pump/reply/sensor"
PAHO: Any = Properties  # which has no types
PAHO_NUMBER: Any = VariableByteIntegers


@pytest.mark.parametrize("correlation", [None, b"", b"x" * 300])
@pytest.mark.parametrize("response_topic", [None, REPLY])
def test_properties_are_packed_as_paho_does(correlation: bytes | None, response_topic: str | None) -> None:
    message = Outgoing("t", "{}", correlation=correlation, response_topic=response_topic)
    expected = PAHO(PacketTypes.PUBLISH)
    expected.PayloadFormatIndicator, expected.ContentType = 1, "application/json"
    if correlation is not None:
        expected.CorrelationData = correlation
    if response_topic is not None:
        expected.ResponseTopic = response_topic
    read, _ = PAHO(PacketTypes.PUBLISH).unpack(message.properties().pack())
    assert read.json() == expected.json()
    assert len(message.properties().pack()) == len(expected.pack())


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
    repeated, qos, retained = flags
    content = b"".join(bytes([identifier]) + value for identifier, value in named)
    packet = sized(topic) + (packet_id if qos else b"") + number(len(content)) + content + payload
    found = Received.read(0x30 | repeated << 3 | qos << 1 | retained, packet, five=True, generation=3)
    last = dict(named)
    assert (found.topic.encode(), found.payload) == (topic, payload)
    assert (found.repeated, found.retained) == (repeated, retained)
    assert found.token == ((3, int.from_bytes(packet_id, "big")) if qos else None)
    assert found.response_topic == (last[0x08][2:].decode() if 0x08 in last else None)
    assert found.correlation == (last[0x09][2:] if 0x09 in last else None)
    assert found.expiry_s == (int.from_bytes(last[0x02], "big") if 0x02 in last else None)


@given(st.binary(max_size=60), st.integers(0x30, 0x3F), st.booleans())
def test_of_a_damaged_publish_a_lookup_error_is_the_worst(packet: bytes, first: int, five: bool) -> None:
    with contextlib.suppress(LookupError):
        Received.read(first, packet, five, generation=1)
