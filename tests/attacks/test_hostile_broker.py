"""A broker that breaks the protocol: the node lives on and answers as soon as it can, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.wire import (
    CONNACK,
    PUBACK,
    PUBLISH,
    SUBACK,
    HostileBroker,
    Script,
    no_traceback,
    number,
    packet,
    publish,
    text,
)
from tests.support import bundles
from tests.support.counterparts import DaemonProcess

REQUEST, REPLY = "edge/v1/pump/request", "edge/v1/pump/reply/x"
MAX_GROWTH = 24 * 1024 * 1024

HEAD = text(REQUEST) + b"\0\7"
MALFORMED = {
    "an empty PUBLISH": packet(PUBLISH, 2, b""),
    "a topic that is longer than the packet": packet(PUBLISH, 2, b"\xff\xffedge"),
    "a topic that is not UTF-8": packet(PUBLISH, 2, text(b"edge/\xff\xfe/request") + b"\0\7\0{}"),
    "a topic with NUL": packet(PUBLISH, 2, text(b"edge/\0") + b"\0\7\0{}"),
    "no packet identifier": packet(PUBLISH, 2, text(REQUEST)),
    "packet identifier 0": packet(PUBLISH, 2, text(REQUEST) + b"\0\0\0{}"),
    "no properties": packet(PUBLISH, 2, HEAD),
    "properties that are longer than the packet": packet(PUBLISH, 2, HEAD + b"\x7f\x08\0\1x"),
    "a length of properties that never ends": packet(PUBLISH, 2, HEAD + b"\xff\xff\xff\xff\xff"),
    "an unknown property": packet(PUBLISH, 2, HEAD + b"\x02\x7f\x00{}"),
    "a property of CONNECT": packet(PUBLISH, 2, HEAD + b"\x03\x21\0\1{}"),
    "a response topic twice": publish(REQUEST, b"{}", more=b"\x08\0\1a\x08\0\1b"),
    "a response topic that is cut off": packet(PUBLISH, 2, HEAD + b"\x04\x08\x00\xff" + b"a"),
    "a response topic that is not UTF-8": publish(
        REQUEST, b"{}", reply=b"edge/v1/pump/reply/\xff\xfe\xed\xa0\x80"
    ),
    "a wildcard as response topic": publish(
        REQUEST, b'{"id":"w","prompt":"x"}', reply="edge/v1/pump/reply/#"
    ),
    "QoS 3": packet(PUBLISH, 6, HEAD + b"\0{}"),
    "QoS 2": packet(PUBLISH, 4, HEAD + b"\0{}"),
    "an unknown topic alias": packet(PUBLISH, 2, text("") + b"\0\7\3\x23\0\5{}"),
    "topic alias 0": packet(PUBLISH, 2, text("") + b"\0\7\3\x23\0\0{}"),
    "an acknowledgement of nothing": packet(PUBACK, 0, b"\x30\x39"),
    "an acknowledgement that is cut off": packet(PUBACK, 0, b"\x30"),
    "an acknowledgement without anything": packet(PUBACK, 0, b""),
    "an acknowledgement with an unknown reason": packet(PUBACK, 0, b"\x30\x39\xee\0"),
    "a SUBACK of nothing": packet(SUBACK, 0, b"\x30\x39\0\1"),
    "a SUBACK without anything": packet(SUBACK, 0, b""),
    "a second CONNACK": packet(CONNACK, 0, b"\0\0\0"),
    "a CONNECT": packet(1, 0, text("MQTT") + b"\5\2\0\0\0\0\0"),
    "a PUBREL of nothing": packet(6, 2, b"\x30\x39"),
    "a PUBREC of nothing": packet(5, 0, b"\x30\x39"),
    "a PUBCOMP of nothing": packet(7, 0, b"\x30\x39"),
    "a SUBSCRIBE": packet(8, 2, b"\0\1\0" + text("#") + b"\1"),
    "packet type 0": packet(0, 0, b""),
    "AUTH": packet(15, 0, b"\x18\0"),
    "a DISCONNECT with a strange reason": packet(14, 0, b"\xee"),
    "a DISCONNECT with properties that are cut off": packet(14, 0, b"\x8d\x7f\x1f"),
    "a DISCONNECT that names another server": packet(14, 0, b"\x9c\x06\x1c\0\3\x1b[2"),
    "a length that never ends": b"\x32\xff\xff\xff\xff\xff",
    "a PINGREQ": packet(12, 0, b""),
    "a PINGRESP with a body": packet(13, 0, b"x" * 200),
}
CONNACKS = {
    "nothing may be sent at once": b"\0\0\3\x21\0\0",
    "no packet may have a byte": b"\0\0\5\x27\0\0\0\0",
    "properties that are cut off": b"\0\0\x7f\x21",
    "a session that nobody has asked for": b"\xff\0\0",
    "nothing": b"",
}


@pytest.fixture
def broker() -> Iterator[HostileBroker]:
    broker = HostileBroker()
    yield broker
    broker.close()


@pytest.fixture
def daemon(tmp_path: Path, broker: HostileBroker) -> Iterator[DaemonProcess]:
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=2048)
    with contextlib.closing(DaemonProcess(tmp_path, bundle, f"[mqtt]\nport = {broker.port}\n")) as daemon:
        yield daemon
        assert daemon.stop() == 0
        no_traceback(daemon)
        assert "\x1b" not in daemon.log.read_text()


def request(name: str, **fields: object) -> bytes:
    return json.dumps({"id": name, "prompt": "Pump?", "max_tokens": 4, "stream": False} | fields).encode()


def is_answered(broker: HostileBroker, name: str) -> None:
    """Ask over whatever connection there is, again over the next one if it ends, until there is an answer."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        broker.wait_for_node()
        broker.send(publish(REQUEST, request(name), reply=REPLY, identifier=random.randint(100, 60_000)))
        with contextlib.suppress(Exception):
            assert broker.answer(name, 3)["type"] == "final"
            return
    raise AssertionError(f"no answer to {name}")


def test_malformed_packets_cost_a_connection_at_most(broker: HostileBroker, daemon: DaemonProcess) -> None:
    daemon.start()
    is_answered(broker, "first")
    before = daemon.memory()
    for malformed in MALFORMED.values():
        broker.wait_for_node()
        broker.send(malformed)
    broker.drop()  # what waits for the rest of a packet that never comes
    is_answered(broker, "last")
    assert daemon.memory() - before < MAX_GROWTH


@pytest.mark.slow
@pytest.mark.parametrize("case", MALFORMED)
def test_each_malformed_packet_is_survived(broker: HostileBroker, daemon: DaemonProcess, case: str) -> None:
    daemon.start()
    is_answered(broker, "first")
    broker.send(MALFORMED[case])
    time.sleep(
        0.2
    )  # a node that ends the connection for it does so now; one that waits for more has it dropped
    broker.drop()
    is_answered(broker, "last")


@pytest.mark.parametrize("case", CONNACKS)
def test_a_strange_connack_is_survived(broker: HostileBroker, daemon: DaemonProcess, case: str) -> None:
    broker.script = Script(connack=packet(CONNACK, 0, CONNACKS[case]))
    daemon.start()
    until = time.monotonic() + 10
    while not broker.connections and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)  # it has read the CONNACK by now, whatever it makes of it
    broker.script = Script()
    broker.drop()
    is_answered(broker, "last")


def test_noise_in_place_of_packets_is_survived(broker: HostileBroker, daemon: DaemonProcess) -> None:
    daemon.start()
    is_answered(broker, "first")
    chance = random.Random(12)
    for _ in range(5):  # each lost connection makes the node wait longer before the next
        broker.wait_for_node()
        broker.send(chance.randbytes(chance.randint(1, 300)))
        time.sleep(0.02)
        broker.drop()
    is_answered(broker, "last")


def test_a_packet_larger_than_the_node_allows_takes_no_memory(
    broker: HostileBroker, daemon: DaemonProcess
) -> None:
    """The node announces a Maximum Packet Size; a broker that sends 256 MB all the same fills no memory."""
    daemon.start()
    is_answered(broker, "first")
    before = peak = daemon.memory()
    broker.send(b"\x32" + number(268_435_455) + text(REQUEST) + b"\0\7\0")
    connections = broker.connections
    for _ in range(96):
        broker.send(bytes(1 << 20))
        peak = max(peak, daemon.memory())
        if broker.connections != connections:
            break
    broker.drop()
    is_answered(broker, "last")
    assert peak - before < MAX_GROWTH


def test_a_redelivery_with_other_content_is_answered(broker: HostileBroker, daemon: DaemonProcess) -> None:
    """Its id was used before for something else, and its first delivery was lost: it is not a repeat."""
    daemon.start()
    broker.wait_for_node()
    broker.send(publish(REQUEST, request("1"), reply=REPLY, identifier=1))
    assert broker.answer("1")["type"] == "final"
    broker.send(publish(REQUEST, request("1", max_tokens=7), reply=REPLY, identifier=2, flags=0x0A))
    answer = broker.answer("1")
    assert (answer["type"], answer["usage"]["generated"]) == ("final", 7)


def test_a_broker_that_acknowledges_nothing_fills_no_memory(
    broker: HostileBroker, daemon: DaemonProcess
) -> None:
    """Each refusal carries Correlation Data of the client's choice, and waits for the broker."""
    broker.script = Script(acknowledges=False)
    daemon.start()
    broker.wait_for_node()
    before = daemon.memory()
    for index in range(1500):
        malformed = b'{"id":"r%d"}' % index
        broker.send(publish(REQUEST, malformed, reply=REPLY, correlation=bytes(60_000), identifier=index + 1))
    broker.script = Script()
    time.sleep(1)
    peak = daemon.memory()
    broker.drop()
    is_answered(broker, "last")
    assert peak - before < MAX_GROWTH, (peak - before) >> 20


def test_refusals_that_can_not_be_sent_make_no_node_deaf(
    broker: HostileBroker, daemon: DaemonProcess
) -> None:
    """A broker stops at our Receive Maximum; so also a request whose refusal is lost is acknowledged."""
    broker.script = Script(acknowledges=False)
    daemon.start()
    broker.wait_for_node()
    for index in range(400):
        broker.send(
            publish(REQUEST, b'{"id":"r"}', reply=REPLY, correlation=bytes(60_000), identifier=index + 1)
        )
    acknowledged = {broker.acknowledged.get(timeout=30) for _ in range(200)}
    assert len(acknowledged) == 200
    broker.script = Script()
    broker.drop()
    is_answered(broker, "last")
