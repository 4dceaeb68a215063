"""The MQTT transport with a real mosquitto: each request is answered once, despite network faults."""

import json
import queue
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import publish
from paho.mqtt.client import Client, MQTTMessage, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge.client.links import MqttLink
from edge.config import MqttConfig
from edge.endpoints import Broker
from edge.errors import TransportError
from edge.protocol.messages import MAX_REQUEST_BYTES, Answer, Failure, Final, Partial, Request, parse_answer
from edge.requests.engine import Engine
from edge.requests.journal import Journal
from edge.requests.journaled_engine import JournaledEngine
from edge.transports.mqtt import stream
from edge.transports.mqtt.transport import MqttTransport
from tests.support.counterparts import WAIT_S, Mosquitto, free_port, wait_for
from tests.support.scripted_broker import ScriptedBroker
from tests.support.speller import Speller

REPLY = "edge/v1/pump/reply/sensor"
REQUEST = "edge/v1/pump/request"
CANCEL = "edge/v1/pump/cancel"


@dataclass
class Sensor:
    """A client as a sensor's author would write it with paho."""

    client: Client
    messages: "queue.Queue[MQTTMessage]" = field(default_factory=queue.Queue)

    def ask(self, payload: str | bytes, topic: str = REQUEST, **properties: Any) -> None:
        self.client.publish(topic, payload, qos=1, properties=_properties(properties)).wait_for_publish(
            WAIT_S
        )

    def receive(self) -> tuple[str, Answer]:
        message = self.messages.get(timeout=WAIT_S)
        return message.topic, parse_answer(bytes(message.payload))

    def last(self) -> Answer:
        """The next final or error."""
        while isinstance(answer := self.receive()[1], Partial):
            pass
        return answer

    def final(self) -> Final:
        answer = self.last()
        assert isinstance(answer, Final), answer
        return answer

    def failure(self) -> Failure:
        answer = self.last()
        assert isinstance(answer, Failure), answer
        return answer


def _properties(values: dict[str, Any]) -> Properties | None:
    if not values:
        return None
    properties: Properties = PROPERTIES(PacketTypes.PUBLISH)
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


PROPERTIES: Any = Properties  # paho leaves its constructor untyped
Connect = Callable[..., Sensor]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Make clients of a broker that subscribe to topics."""
    clients = []

    def make(broker: Mosquitto, *topics: str, protocol: MQTTProtocolVersion = MQTTv5) -> Sensor:
        sensor = Sensor(Client(CallbackAPIVersion.VERSION2, protocol=protocol))
        ready: queue.Queue[bool] = queue.Queue()
        sensor.client.on_message = lambda _client, _data, message: sensor.messages.put(message)
        sensor.client.on_subscribe = lambda *_: ready.put(True)
        sensor.client.connect("127.0.0.1", broker.port)
        sensor.client.loop_start()
        clients.append(sensor.client)
        for topic in topics:
            sensor.client.subscribe(topic, 1)
            assert ready.get(timeout=WAIT_S)
        return sensor

    yield make
    for client in clients:
        client.disconnect()
        client.loop_stop()


@pytest.fixture
def sensor(connect: Connect, mosquitto: Mosquitto) -> Sensor:
    """A client that receives answers at REPLY."""
    return connect(mosquitto, REPLY)


@dataclass
class Node:
    """A transport with an engine and a Speller behind it."""

    speller: Speller
    engine: Engine
    transport: MqttTransport

    @classmethod
    def start(cls, broker: Broker, prefixes: tuple[str, ...] = (), session_expiry_s: int = 60) -> "Node":
        speller = Speller()
        engine = Engine(speller, queue_length=3, partial_interval_s=0)
        transport = MqttTransport(
            MqttConfig(broker, session_expiry_s, prefixes),
            "pump",
            JournaledEngine(engine, Journal(None)),
            lambda: {"version": "1"},
            lambda: {"queue": engine.waiting},
        )
        engine.start()
        transport.start()
        return cls(speller, engine, transport)

    def stop(self) -> None:
        self.speller.gate.set()
        self.engine.stop(WAIT_S)
        self.transport.stop(WAIT_S)
        assert not self.transport.connection.alive


@pytest.fixture
def node(mosquitto: Mosquitto) -> Iterator[Node]:
    """A node that is online."""
    node = Node.start(mosquitto.broker, ("sensors/", "edge/"))
    wait_for(lambda: node.transport.online)
    yield node
    node.stop()


def request(name: str, prompt: str = "abc def", **fields: Any) -> str:
    return Request(name, prompt, **fields).to_json()


def test_a_request_gets_partials_and_one_final_with_its_correlation_data(node: Node, sensor: Sensor) -> None:
    sensor.ask(request("a"), ResponseTopic=REPLY, CorrelationData=b"\x00\x07")
    messages = [sensor.messages.get(timeout=WAIT_S) for _ in range(3)]
    answers = [parse_answer(bytes(message.payload)) for message in messages]
    assert answers[:2] == [Partial("a", 0, "cba "), Partial("a", 1, "fed ")]
    assert isinstance(answers[2], Final)
    assert answers[2].text == "cba fed "
    assert [message.qos for message in messages] == [0, 0, 1]
    assert {getattr(message.properties, "CorrelationData", None) for message in messages} == {b"\x00\x07"}


@pytest.mark.parametrize("topic", ["sensors/7/answer", REPLY])
def test_a_3_1_1_client_names_reply_to_in_the_request(
    node: Node, connect: Connect, mosquitto: Mosquitto, topic: str
) -> None:
    sensor = connect(mosquitto, topic, protocol=MQTTv311)
    sensor.ask(request("a", reply_to=topic))
    assert sensor.final().text == "cba fed "
    sensor.ask(json.dumps({"id": "b", "reply_to": topic}))
    assert sensor.failure().code == "bad_request"


@pytest.mark.parametrize(
    "payload",
    [b"{", b"\xff\xfe", '{"id":"a","prompt":"x","max_token":1}', request("a", "x" * MAX_REQUEST_BYTES)],
)
def test_a_malformed_or_oversized_request_is_answered_with_bad_request(
    node: Node, sensor: Sensor, payload: str | bytes
) -> None:
    sensor.ask(payload, ResponseTopic=REPLY)
    sensor.ask(payload, ResponseTopic=REPLY)
    assert [sensor.failure().code, sensor.failure().code] == ["bad_request", "bad_request"]


@pytest.mark.parametrize(
    "reply",
    [
        "elsewhere/x",
        "edge/v1/other/request",
        REQUEST,
        CANCEL,
        "edge/v1/pump/status",
        "edge/v1/other/reply/x",
        "$x",
    ],
)
def test_no_answer_goes_to_a_response_topic_without_an_allowed_prefix(
    node: Node, connect: Connect, mosquitto: Mosquitto, reply: str, caplog: pytest.LogCaptureFixture
) -> None:
    sensor = connect(mosquitto, "elsewhere/#", "edge/v1/other/#", REPLY)
    sensor.ask(request("a"), ResponseTopic=reply)
    sensor.ask(request("b"), ResponseTopic=REPLY)
    assert sensor.final().id == "b"
    assert sensor.messages.empty()
    assert node.speller.asked == ["b"]
    assert "allowed are edge/v1/pump/reply/#, sensors/#" in caplog.text


def test_a_request_without_a_response_topic_is_dropped_and_not_redelivered(
    node: Node, sensor: Sensor, mosquitto: Mosquitto
) -> None:
    sensor.ask(request("a"))
    sensor.ask(request("b"), ResponseTopic=REPLY)
    assert sensor.final().id == "b"
    assert node.speller.asked == ["b"]


@pytest.mark.parametrize("name", ["\x01", "\x7f", "\x85", "\ufffe", "\ufdd0", "/" * 220])
def test_nothing_is_published_to_a_topic_that_would_end_the_connection(
    node: Node, sensor: Sensor, name: str
) -> None:
    sensor.ask(request("a", reply_to=f"edge/v1/pump/reply/{name}"))
    sensor.ask(request("b"), ResponseTopic=REPLY)
    assert sensor.final().id == "b"
    assert node.speller.asked == ["b"]


def test_a_request_can_have_any_property_and_character_of_mqtt(
    node: Node, connect: Connect, mosquitto: Mosquitto
) -> None:
    topic = f"{REPLY}/\ufeff" + "/" * 90
    sensor = connect(mosquitto, topic)
    sensor.ask(
        request("a", stream=False),
        ResponseTopic=topic,
        CorrelationData=b"\x00" * 200,
        MessageExpiryInterval=60,
        PayloadFormatIndicator=1,
        ContentType="\ufeffapplication/json",
        UserProperty=[("made with", "\ufeffa text editor"), ("", "")],
    )
    answer = sensor.messages.get(timeout=WAIT_S)
    assert (answer.topic, json.loads(answer.payload)["text"]) == (topic, "cba fed ")
    assert vars(answer.properties)["CorrelationData"] == b"\x00" * 200


def test_a_retained_request_is_ignored(mosquitto: Mosquitto, sensor: Sensor) -> None:
    sensor.client.publish(
        REQUEST, request("old"), qos=1, retain=True, properties=_properties({"ResponseTopic": REPLY})
    ).wait_for_publish(WAIT_S)
    node = Node.start(mosquitto.broker)
    wait_for(lambda: node.transport.online)
    sensor.ask(request("new"), ResponseTopic=REPLY)
    assert sensor.final().id == "new"
    assert node.speller.asked == ["new"]
    node.stop()


def test_message_expiry_is_a_deadline(node: Node, sensor: Sensor) -> None:
    node.speller.gate.clear()
    sensor.ask(request("a"), ResponseTopic=REPLY, MessageExpiryInterval=1)
    assert sensor.final().finish_reason == "deadline"


def test_a_duplicate_of_an_answered_request_gets_the_same_answer_again(node: Node, sensor: Sensor) -> None:
    for _ in range(2):
        sensor.ask(request("a", stream=False), ResponseTopic=REPLY)
        assert sensor.final().text == "cba fed "
    assert node.speller.asked == ["a"]


def test_another_request_under_an_unanswered_id_is_busy(node: Node, sensor: Sensor) -> None:
    node.speller.gate.clear()
    sensor.ask(request("a", "first", stream=False), ResponseTopic=REPLY)
    node.speller.wait_until_held()
    sensor.ask(request("a", "second", stream=False), ResponseTopic=REPLY, CorrelationData=b"2")
    message = sensor.messages.get(timeout=WAIT_S)
    refusal = parse_answer(bytes(message.payload))
    assert isinstance(refusal, Failure)
    assert (refusal.id, refusal.code, refusal.retry_after_ms) == ("a", "busy", 1000)
    assert vars(message.properties)["CorrelationData"] == b"2"
    sensor.ask(request("a", "first", stream=False, deadline_ms=60_000), ResponseTopic=REPLY)
    node.speller.gate.set()
    assert sensor.final().text == "tsrif "
    sensor.ask(request("a", "second", stream=False), ResponseTopic=REPLY)
    texts = [sensor.final().text]
    if texts == ["tsrif "]:  # the duplicate came after the answer, and got it from the journal
        texts = [sensor.final().text]
    assert texts == ["dnoces "]
    wait_for(lambda: node.transport.unconfirmed == 0)
    assert sensor.messages.empty()


def test_a_full_queue_answers_busy_at_once(node: Node, sensor: Sensor) -> None:
    node.speller.gate.clear()
    sensor.ask(request("held"), ResponseTopic=REPLY)
    node.speller.wait_until_held()
    for name in ("a", "b", "c", "d"):
        sensor.ask(request(name), ResponseTopic=REPLY)
    failure = sensor.failure()
    assert (failure.id, failure.code) == ("d", "busy")
    node.speller.gate.set()
    assert [sensor.final().id for _ in range(4)] == ["held", "a", "b", "c"]


def test_only_the_client_of_a_request_can_cancel_it(node: Node, sensor: Sensor) -> None:
    node.speller.gate.clear()
    sensor.ask(request("a"), ResponseTopic=REPLY)
    node.speller.wait_until_held()
    sensor.ask('{"id":"a"}', CANCEL, ResponseTopic="sensors/other")
    sensor.ask('{"id":"a"}', CANCEL)
    sensor.ask("nonsense", CANCEL, ResponseTopic=REPLY)
    sensor.ask(request("b"), ResponseTopic=REPLY)
    wait_for(lambda: node.engine.waiting == 1)
    sensor.ask('{"id":"b"}', CANCEL, ResponseTopic=REPLY)
    assert (sensor.final().id, node.engine.working) == ("b", True)
    sensor.ask(json.dumps({"id": "a", "reply_to": REPLY}), CANCEL)
    final = sensor.final()
    assert (final.id, final.finish_reason) == ("a", "cancelled")


def test_a_users_topics_reach_only_requests_with_that_users_response_topics(
    node: Node, connect: Connect, mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    alice = "edge/v1/pump/reply/alice/1"
    sensor = connect(mosquitto, alice, "edge/v1/pump/reply/mallory/#")
    node.speller.gate.clear()
    sensor.ask(request("a", reply_to=alice), f"{REQUEST}/alice")
    node.speller.wait_until_held()
    cancellation = json.dumps({"id": "a", "reply_to": alice})
    sensor.ask(request("b", reply_to=alice), f"{REQUEST}/mallory")
    sensor.ask(request("c", reply_to="edge/v1/pump/reply/alicex/1"), f"{REQUEST}/alice")
    sensor.ask(cancellation, f"{CANCEL}/mallory")
    sensor.ask(request("d", stream=False, reply_to="edge/v1/pump/reply/mallory/1"), f"{REQUEST}/mallory")
    wait_for(lambda: node.engine.waiting == 1)
    assert node.engine.working
    sensor.ask(cancellation, f"{CANCEL}/alice")
    assert sensor.final().finish_reason == "cancelled"
    node.speller.gate.set()
    assert sensor.final().id == "d"
    assert node.speller.asked == ["a", "d"]
    assert "allowed are edge/v1/pump/reply/mallory/#" in caplog.text


def test_many_duplicates_of_a_request_do_not_delay_others(node: Node, sensor: Sensor) -> None:
    node.speller.gate.clear()
    for _ in range(40):  # mosquitto allows 20 in flight without an acknowledgement
        sensor.ask(request("a", stream=False), ResponseTopic=REPLY)
    sensor.ask(request("b", stream=False), ResponseTopic=REPLY)
    wait_for(lambda: node.engine.waiting == 1)
    node.speller.gate.set()
    assert [sensor.final().id, sensor.final().id] == ["a", "b"]
    assert node.speller.asked == ["a", "b"]


def test_with_a_full_queue_known_requests_are_answered_and_others_refused_by_id(
    node: Node, sensor: Sensor
) -> None:
    sensor.ask(request("a", stream=False), ResponseTopic=REPLY)
    first = sensor.final()
    node.speller.gate.clear()
    sensor.ask(request("b"), ResponseTopic=REPLY)
    node.speller.wait_until_held()
    for name in "cde":
        sensor.ask(request(name), ResponseTopic=REPLY)
    wait_for(lambda: node.engine.waiting == 3)
    sensor.ask(request("a", stream=False), ResponseTopic=REPLY)
    assert sensor.last() == first
    sensor.ask('{"id":"x","propmt":"misspelt"}', ResponseTopic=REPLY)
    assert (sensor.failure().code, node.engine.waiting) == ("busy", 3)
    sensor.ask('{"id":"y y"}', ResponseTopic=REPLY)
    assert sensor.failure().code == "bad_request"
    node.speller.gate.set()


def test_status_is_retained_and_the_last_will_is_offline(mosquitto: Mosquitto, connect: Connect) -> None:
    node = Node.start(mosquitto.broker)
    wait_for(lambda: node.transport.online)
    watcher = connect(mosquitto, "edge/v1/pump/status", "edge/v1/pump/health")
    seen: dict[str, Any] = {}
    while len(seen) < 2:
        message = watcher.messages.get(timeout=WAIT_S)
        seen[message.topic] = (json.loads(message.payload), message.retain)
    assert seen["edge/v1/pump/status"] == (
        {"state": "online", "user_topics": True, "version": "1"},
        True,
    )
    assert seen["edge/v1/pump/health"][0] == {"queue": 0}
    node.stop()
    while (message := watcher.messages.get(timeout=WAIT_S)).topic != "edge/v1/pump/status":
        pass
    assert json.loads(message.payload)["state"] == "offline"


def test_a_request_sent_while_the_node_is_offline_is_answered_later(
    mosquitto: Mosquitto, sensor: Sensor
) -> None:
    first = Node.start(mosquitto.broker)
    wait_for(lambda: first.transport.online)
    first.stop()
    sensor.ask(request("a"), ResponseTopic=REPLY)
    second = Node.start(mosquitto.broker)
    assert sensor.final().id == "a"
    second.stop()


@pytest.mark.parametrize("kill", [False, True])
def test_a_restart_of_the_broker_neither_loses_nor_repeats_an_answer(
    node: Node, mosquitto: Mosquitto, connect: Connect, kill: bool
) -> None:
    sensor = connect(mosquitto)
    node.speller.gate.clear()
    for name in ("a", "b"):
        sensor.ask(request(name, stream=False), ResponseTopic=REPLY)
    node.speller.wait_until_held()
    time.sleep(1.5)  # until the broker has saved its sessions, as configured
    mosquitto.stop(kill)
    node.speller.gate.set()
    wait_for(lambda: node.engine.answered == 2)
    mosquitto.start()
    wait_for(lambda: node.transport.online)
    again = connect(mosquitto, REPLY)
    again.ask(request("c", stream=False), ResponseTopic=REPLY)
    received = []
    while "c" not in received:
        received.append(again.final().id)
    assert len(received) == len(set(received))
    assert node.speller.asked == ["a", "b", "c"]


def test_a_lost_connection_causes_no_second_answer_to_a_redelivery(
    node: Node, sensor: Sensor, mosquitto: Mosquitto
) -> None:
    node.speller.gate.clear()
    sensor.ask(request("a"), ResponseTopic=REPLY)
    node.speller.wait_until_held()
    for _ in range(2):
        cut_connection(node)
        wait_for(lambda: node.transport.online)
    node.speller.gate.set()
    assert sensor.final().id == "a"
    wait_for(lambda: node.transport.unconfirmed == 0)
    cut_connection(node)
    wait_for(lambda: node.transport.online)
    sensor.ask(request("b"), ResponseTopic=REPLY)
    assert sensor.final().id == "b"
    assert sensor.messages.empty()
    assert node.speller.asked == ["a", "b"]


def publish_packet(payload: str, identifier: int, duplicate: bool) -> bytes:
    """A request of QoS 1 as a broker of MQTT 3.1.1 delivers it."""
    body = (
        len(REQUEST).to_bytes(2, "big") + REQUEST.encode() + identifier.to_bytes(2, "big") + payload.encode()
    )
    head, more = len(body) & 0x7F | 0x80, len(body) >> 7
    return bytes([0x32 | duplicate << 3, head, more]) + body


@pytest.fixture
def scripted_node() -> Iterator[tuple[ScriptedBroker, Node]]:
    """A node at a broker that delivers what the test sends, over MQTT 3.1.1."""
    broker = ScriptedBroker(knows_5=False)
    broker.acknowledges = True
    node = Node.start(broker.broker)
    wait_for(lambda: node.transport.online)
    yield broker, node
    node.stop()
    broker.close()


def answers(broker: ScriptedBroker) -> list[Answer]:
    """Finals and errors that the broker has received."""
    return [parse_answer(one.body) for one in broker.published if one.topic == REPLY]


def test_a_redelivery_with_the_id_of_an_answered_request_and_other_content_is_answered(
    scripted_node: tuple[ScriptedBroker, Node],
) -> None:
    broker, _ = scripted_node
    broker.say(publish_packet(request("1", "abc", stream=False, reply_to=REPLY), 1, False))
    wait_for(lambda: broker.acknowledged == [1])
    broker.say(publish_packet(request("1", "other", stream=False, reply_to=REPLY), 2, True))
    wait_for(lambda: broker.acknowledged == [1, 2])
    assert [getattr(answer, "text", "") for answer in answers(broker)] == ["cba ", "rehto "]


@pytest.mark.parametrize(
    "payload",
    [request("1", "abc", stream=False, reply_to=REPLY), json.dumps({"id": "1", "reply_to": REPLY})],
)
def test_a_redelivery_of_an_answered_request_is_acknowledged_and_not_answered_again(
    scripted_node: tuple[ScriptedBroker, Node], payload: str
) -> None:
    broker, _ = scripted_node
    broker.say(publish_packet(payload, 1, False))
    wait_for(lambda: broker.acknowledged == [1])
    broker.say(publish_packet(payload, 2, True))
    wait_for(lambda: broker.acknowledged == [1, 2])
    assert len(answers(broker)) == 1


def test_after_a_reconnect_the_redelivery_is_acknowledged_after_the_final(
    scripted_node: tuple[ScriptedBroker, Node],
) -> None:
    broker, node = scripted_node
    node.speller.gate.clear()
    payload = request("1", "abc", stream=False, reply_to=REPLY)
    broker.say(publish_packet(payload, 1, False))
    node.speller.wait_until_held()
    connections = broker.connections
    broker.drop()
    wait_for(lambda: broker.connections > connections and node.transport.online)
    broker.say(publish_packet(payload, 9, True))
    broker.say(publish_packet(request("2", "x", reply_to="elsewhere"), 10, False))
    wait_for(lambda: broker.acknowledged == [10])
    node.speller.gate.set()
    wait_for(lambda: broker.acknowledged == [10, 9])
    assert len(answers(broker)) == 1
    assert node.speller.asked == ["1"]


def test_two_nodes_with_one_name_reconnect_at_growing_intervals(
    mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [Node.start(mosquitto.broker) for _ in range(2)]
    time.sleep(5)
    lost = [record.getMessage() for record in caplog.records if "was lost" in record.getMessage()]
    assert 2 <= len(lost) <= 7, lost  # after 0.5, 1, 2, ... s each
    assert "has another node the same name?" in lost[-1]
    for node in nodes:
        node.stop()


def cut_connection(node: Node) -> None:
    """Shut the transport's socket as a network would."""
    node.transport.connection.shut_down()
    wait_for(lambda: not node.transport.online)


def test_an_exception_while_accepting_a_request_is_answered_and_ends_no_thread(
    node: Node, sensor: Sensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(node.engine, "submit", lambda *_: 1 // 0)
        sensor.ask(request("a"), ResponseTopic=REPLY)
        assert sensor.failure().code == "internal"
    sensor.ask(request("b"), ResponseTopic=REPLY)
    assert sensor.final().id == "b"


def test_an_unreachable_broker_is_logged_once_and_retried(
    mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    mosquitto.stop()
    node = Node.start(mosquitto.broker)
    wait_for(lambda: node.transport.connection.problem)
    time.sleep(1.5)  # at least one more attempt
    assert caplog.text.count(f"broker 127.0.0.1:{mosquitto.port}: can't be reached") == 1
    mosquitto.start()
    wait_for(lambda: node.transport.online)
    node.stop()


def test_a_problem_of_both_connections_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker(port=free_port())
    transport = MqttTransport(
        MqttConfig(broker, 60, ()),
        "pump",
        JournaledEngine(Engine(Speller(), queue_length=3), Journal(None)),
        dict,
        dict,
        NoRoutes(),
    )
    transport.start()
    wait_for(lambda: all(connection.problem for connection in transport.connections.values()))
    transport.stop(WAIT_S)
    assert len(transport.connections) == 2
    assert caplog.text.count("can't be reached") == 1


class NoRoutes:
    """Routes that read one topic and do nothing with it."""

    asking = frozenset[str]()
    displayed = ()
    filters = ("sensors/#",)

    def listen(self, on: bool) -> None:
        pass

    def reading(self, topic: str, payload: bytes) -> None:
        pass


def test_a_refused_first_connection_is_not_logged_as_retried(
    tmp_path: Path, start_mosquitto: Callable[..., Mosquitto], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "passwords").touch(mode=0o600)
    broker = start_mosquitto("allow_anonymous false", f"password_file {tmp_path / 'passwords'}").broker
    node = Node.start(broker)
    wait_for(lambda: node.transport.connection.refused)
    why = f"broker {broker.address}: it refuses the connection: Not authorized; "
    assert (
        node.transport.connection.refused
        == f"{why}check the user name, the password and the broker's access list"
    )
    assert "Trying again" not in caplog.text
    node.stop()


def test_a_missing_tls_file_is_named() -> None:
    with pytest.raises(
        TransportError, match=r"broker 127\.0\.0\.1:8883: a TLS file can't be used: .*No such file"
    ):
        Node.start(Broker(port=8883, tls=True, ca_file=Path("/nowhere/ca.pem")))


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """An authority, a server's and a client's certificate, made by the script that we ship."""
    script = Path(__file__).parents[2] / "firmware_configs" / "mosquitto" / "make-certificates"
    directory = tmp_path / "certificates"
    subprocess.run([script, directory, "127.0.0.1"], check=True, capture_output=True)
    subprocess.run([script, directory, "--client", "pump"], check=True, capture_output=True)
    return directory


def test_tls_with_a_client_certificate(
    certificates: Path, start_mosquitto: Callable[..., Mosquitto], connect: Connect
) -> None:
    port = free_port()
    plain = start_mosquitto(
        "allow_anonymous true",
        f"listener {port} 127.0.0.1",
        f"cafile {certificates}/ca.crt",
        f"certfile {certificates}/server.crt",
        f"keyfile {certificates}/server.key",
        "require_certificate true",
    )
    authority, certificate, key = (certificates / name for name in ("ca.crt", "pump.crt", "pump.key"))
    node = Node.start(Broker("127.0.0.1", port, True, authority, certificate, key))
    wait_for(lambda: node.transport.online)
    sensor = connect(plain, REPLY)
    sensor.ask(request("a", "x" * 200_000, stream=False), ResponseTopic=REPLY)  # many TLS records
    sensor.ask(request("b", stream=False), ResponseTopic=REPLY)
    assert [len(sensor.final().text), sensor.final().text] == [200_001, "cba fed "]
    node.stop()


# After a failed handshake paho leaves the socket to be closed by its reference count.
handshake_fails = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@handshake_fails
def test_an_untrusted_broker_is_refused(
    certificates: Path, start_mosquitto: Callable[..., Mosquitto]
) -> None:
    port = free_port()
    start_mosquitto(
        "allow_anonymous true",
        f"listener {port} 127.0.0.1",
        f"certfile {certificates}/server.crt",
        f"keyfile {certificates}/server.key",
    )
    node = Node.start(Broker("127.0.0.1", port, tls=True))
    wait_for(lambda: node.transport.connection.problem)
    assert "its certificate is not trusted" in str(node.transport.connection.problem)
    assert not node.transport.online
    node.stop()


@handshake_fails
def test_tls_to_a_port_without_it_is_reported(mosquitto: Mosquitto) -> None:
    node = Node.start(Broker("127.0.0.1", mosquitto.port, tls=True))
    wait_for(lambda: node.transport.connection.problem)
    assert f"broker 127.0.0.1:{mosquitto.port}: " in str(node.transport.connection.problem)
    node.stop()


@handshake_fails
def test_a_silent_tls_handshake_times_out_and_its_thread_does_not_count_as_hung(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "HANDSHAKE_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = Node.start(Broker("127.0.0.1", silent.getsockname()[1], tls=True, keepalive_s=600))
        connection = node.transport.connection
        wait_for(lambda: connection.progress > 0)
        before = connection.progress
        wait_for(lambda: connection.progress > before)
        assert connection.problem is None
        wait_for(lambda: connection.problem)
        assert "timed out" in str(connection.problem)
        node.stop()


def test_a_final_too_large_for_the_broker_is_replaced_by_a_typed_error(
    start_mosquitto: Callable[..., Mosquitto], connect: Connect
) -> None:
    broker = start_mosquitto("allow_anonymous true", "max_packet_size 2000")
    node = Node.start(broker.broker)
    wait_for(lambda: node.transport.online)
    sensor = connect(broker, REPLY)
    sensor.ask(request("a", "x" * 1800, stream=False), ResponseTopic=REPLY)
    assert sensor.failure().code == "too_long"
    node.stop()


@pytest.fixture
def ask_as(mosquitto: Mosquitto) -> Iterator[Callable[..., MqttLink]]:
    """Make links as edge-ask does."""
    links = []

    def make(broker: Mosquitto, username: str | None = None) -> MqttLink:
        links.append(MqttLink(Broker(port=broker.port, username=username), "pump"))
        return links[-1]

    yield make
    for link in links:
        link.close()


def test_a_user_of_any_name_is_answered(
    node: Node, mosquitto: Mosquitto, ask_as: Callable[..., MqttLink]
) -> None:
    link = ask_as(mosquitto, "me+you/#")
    assert [answer.id for answer in link.ask(Request("a", "abc", stream=False), WAIT_S)] == ["a"]


@pytest.mark.parametrize("plain", [False, True])
def test_edge_ask_uses_its_users_topics_if_the_access_list_has_them(
    start_mosquitto: Callable[..., Mosquitto], tmp_path: Path, ask_as: Callable[..., MqttLink], plain: bool
) -> None:
    own = "" if plain else "/%u"
    (tmp_path / "acl").write_text(
        f"topic read #\ntopic write edge/v1/pump/status\ntopic write edge/v1/pump/reply/#\n"
        f"pattern read edge/v1/+/status\npattern read edge/v1/+/reply/%u/#\n"
        f"pattern write edge/v1/+/request{own}\n"
    )
    broker = start_mosquitto("allow_anonymous true", f"acl_file {tmp_path / 'acl'}")
    node = Node.start(broker.broker)
    wait_for(lambda: node.transport.online)
    link = ask_as(broker, "alice")
    assert [answer.id for answer in link.ask(Request("a", "abc", stream=False), WAIT_S)] == ["a"]
    node.stop()


def test_a_client_without_permission_to_publish_gets_an_error(
    start_mosquitto: Callable[..., Mosquitto], tmp_path: Path, ask_as: Callable[..., MqttLink]
) -> None:
    (tmp_path / "acl").write_text("topic read #\ntopic write edge/v1/pump/status\n")
    broker = start_mosquitto("allow_anonymous true", f"acl_file {tmp_path / 'acl'}")
    publish.single("edge/v1/pump/status", '{"state":"online"}', 1, True, port=broker.port)
    with pytest.raises(TransportError, match=": it refuses the request: Not authorized"):
        list(ask_as(broker).ask(Request("a", "abc"), WAIT_S))
