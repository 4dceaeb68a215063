"""Limits of the broker and our own, with a broker that acknowledges only on demand or lacks MQTT 5."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from edge.transports.mqtt import connection as mqtt_connection
from edge.transports.mqtt import outgoing
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.messages import Outgoing, Received
from tests.support.counterparts import WAIT_S, wait_for
from tests.support.scripted_broker import ScriptedBroker, wait_until_published

TOPIC = "edge/v1/pump/reply/x"


class Listener:
    """Records the callbacks of the connection."""

    def __init__(self) -> None:
        self.subscriptions: Callable[[], None] = lambda: None
        self.online = False
        self.done: dict[int, str | None] = {}
        self.received_messages: list[Received] = []

    def connected(self) -> None:
        self.subscriptions()

    def subscribed(self) -> None:
        self.online = True

    def disconnected(self) -> None:
        self.online = False

    def received(self, message: Received) -> None:
        self.received_messages.append(message)

    def tick(self) -> None:
        pass


class Client:
    """A connection to a broker, and the listener to its callbacks."""

    def __init__(self, broker: ScriptedBroker, session_expiry_s: int = 60) -> None:
        self.listener = Listener()
        self.connection = MqttConnection(broker.broker, "edge-pump", self.listener, session_expiry_s)
        self._count = 0
        self.listener.subscriptions = lambda: self.connection.subscribe("a", "b")

    def publish(self, *payloads: str, keep: bool = False) -> list[int | None]:
        """Publish as a listener would, in the connection's thread, and return the numbers."""
        numbers = self.post(*(Outgoing(TOPIC, payload) for payload in payloads), keep=keep)
        wait_for(lambda: len(numbers) == len(payloads))
        return numbers

    def post(self, *messages: Outgoing, keep: bool = False) -> list[int | None]:
        """Publish in the connection's thread; the listener's `done` then has the result of each message."""
        numbers: list[int | None] = []

        def publish() -> None:
            for message in messages:
                self._count += 1
                done = partial(self.listener.done.__setitem__, self._count)
                numbers.append(self._count if self.connection.publish(message, keep, done) else None)

        self.connection.post(publish)
        return numbers


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedBroker]]:
    brokers: list[ScriptedBroker] = []

    def make(**how: Any) -> ScriptedBroker:
        brokers.append(ScriptedBroker(**how))
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.close()


@pytest.fixture
def begin() -> Iterator[Callable[[ScriptedBroker], Client]]:
    """Starts a client without waiting for its connection."""
    clients: list[Client] = []

    def make(broker: ScriptedBroker) -> Client:
        clients.append(Client(broker))
        clients[-1].connection.start()
        return clients[-1]

    yield make
    for client in clients:
        client.connection.stop(0.1)
        client.connection._thread.join(WAIT_S)
        assert not client.connection.alive


@pytest.fixture
def connect(begin: "Connect") -> "Connect":
    """Starts a client and waits until it is online."""

    def make(broker: ScriptedBroker) -> Client:
        client = begin(broker)
        wait_for(lambda: client.listener.online)
        return client

    return make


Scripted = Callable[..., ScriptedBroker]
Connect = Callable[[ScriptedBroker], Client]


def wait_until_told(client: Client, count: int) -> None:
    """Wait until `count` messages are acknowledged or refused."""
    wait_for(lambda: len(client.listener.done) == count)


def test_no_more_messages_are_in_flight_than_the_broker_accepts(scripted: Scripted, connect: Connect) -> None:
    broker = scripted(ReceiveMaximum=3)
    client = connect(broker)
    numbers = client.publish(*map(str, range(10)))
    for done in range(10):
        sent = wait_until_published(broker, min(done + 3, 10), 0, TOPIC)
        time.sleep(0.02)  # for one more, which must not come
        assert len(broker.outstanding(0, TOPIC)) == min(done + 3, 10)
        broker.acknowledge(sent[done])
        wait_until_told(client, done + 1)
    assert client.listener.done == dict.fromkeys(numbers)
    assert [one.body[-1:] for one in broker.published] == [b"%d" % number for number in range(10)]


def test_a_lower_receive_maximum_after_a_restart_is_honoured_and_everything_arrives(
    scripted: Scripted, connect: Connect
) -> None:
    broker = scripted(ReceiveMaximum=5)
    client = connect(broker)
    client.publish(*map(str, range(7)))
    wait_until_published(broker, 5, 0, TOPIC)
    broker.limits = {"ReceiveMaximum": 2}
    broker.drop()
    wait_for(lambda: broker.connections == 2 and client.listener.online)
    last = 1
    for done in range(7):
        sent = wait_until_published(broker, min(done + 2, 7), last, TOPIC)
        time.sleep(0.02)
        assert len(broker.outstanding(last, TOPIC)) == min(done + 2, 7)
        broker.acknowledge(sent[done])
    wait_for(lambda: len(client.listener.done) == 7)
    assert [one.body[-1:] for one in broker.outstanding(last, TOPIC)] == [b"%d" % each for each in range(7)]
    assert [one.again for one in broker.outstanding(last, TOPIC)] == [True] * 5 + [False] * 2


def test_our_own_limits_are_announced(scripted: Scripted, connect: Connect) -> None:
    broker = scripted()
    connect(broker)
    (asked,) = broker.asked
    assert asked.MaximumPacketSize == mqtt_connection.MAX_PACKET_BYTES
    assert asked.ReceiveMaximum == mqtt_connection.RECEIVE_MAXIMUM
    assert asked.SessionExpiryInterval == 60


def test_a_packet_that_is_too_large_is_not_sent_and_delays_nothing(
    scripted: Scripted, connect: Connect
) -> None:
    broker = scripted(MaximumPacketSize=200)
    client = connect(broker)
    large, small = client.publish("x" * 200, "y")
    (sent,) = wait_until_published(broker, 1, 0, TOPIC)
    assert sent.body.endswith(b"y")
    broker.acknowledge(sent)
    wait_for(lambda: len(client.listener.done) == 2)
    assert client.listener.done[small or 0] is None
    assert client.listener.done[large or 0] == "its packet has 249 bytes, 200 are allowed"


def test_waiting_messages_are_bounded_except_those_that_must_not_be_dropped(
    scripted: Scripted, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "MAX_QUEUED", 2)
    broker = scripted(ReceiveMaximum=1)
    client = connect(broker)
    assert None not in client.publish("0")
    wait_until_published(broker, 1, 0, TOPIC)
    assert [number is None for number in client.publish("1", "2", "3", "4")] == [False, False, True, True]
    assert None not in client.publish("5", keep=True)
    for done in range(4):
        broker.acknowledge(wait_until_published(broker, done + 1, 0, TOPIC)[done])
    wait_for(lambda: len(client.listener.done) == 4)
    assert [one.body[-1:] for one in broker.outstanding(0, TOPIC)] == [b"0", b"1", b"2", b"5"]


def test_messages_published_before_the_first_connection_wait_for_it(scripted: Scripted) -> None:
    broker = scripted()
    client = Client(broker)
    client.post(Outgoing(TOPIC, "early"))
    client.connection.start()
    (sent,) = wait_until_published(broker, 1, 0, TOPIC)
    broker.acknowledge(sent)
    wait_for(lambda: client.listener.done)
    client.connection.stop(WAIT_S)


def test_mqtt_3_1_1_is_used_with_a_broker_without_mqtt_5(scripted: Scripted, connect: Connect) -> None:
    broker = scripted(knows_5=False)
    client = connect(broker)
    assert broker.versions == [5, 4]
    client.publish("hello")
    (sent,) = wait_until_published(broker, 1, 1, TOPIC)
    assert sent.body == b"hello"
    broker.acknowledge(sent)
    wait_for(lambda: client.listener.done)
    broker.drop()
    wait_for(lambda: broker.versions == [5, 4, 4])
    assert client.connection.refused is None


def test_the_servers_keep_alive_is_honoured(scripted: Scripted, connect: Connect) -> None:
    broker = scripted(ServerKeepAlive=1)  # ours is 30 s
    connect(broker)
    wait_for(lambda: broker.pings >= 2)
    assert broker.connections == 1


@pytest.mark.parametrize(
    ("packet", "said"),
    [
        (
            b"\xe0\x01\x8e",
            "another client took over this session; give each node its own name. Trying again.",
        ),
        (
            b"\xe0\x02\x8e\x00",
            "another client took over this session; give each node its own name. Trying again.",
        ),
        (b"\xe0\x01\x87", "the connection was lost (Not authorized)"),
        (b"\xe0\x09\x9d\x07\x1c\x00\x04else", "the connection was lost (Server moved)"),
        (b"\xe0\x00", "the connection was lost (Normal disconnection)"),
    ],
)
def test_the_reason_of_a_disconnect_is_logged(
    scripted: Scripted, connect: Connect, packet: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker = scripted()
    client = connect(broker)
    broker.say(packet)
    wait_for(lambda: not client.listener.online)
    assert said in caplog.text


def test_a_refused_subscription_is_retried(
    scripted: Scripted, begin: Connect, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_connection, "RESUBSCRIBE_S", 0.1)
    broker = scripted()
    broker.granted = 0x87
    client = begin(broker)
    wait_for(lambda: client.connection.problem)
    assert "it refuses a subscription: Not authorized; check its access list. Trying again." in caplog.text
    broker.granted = 1
    wait_for(lambda: client.listener.online)
    assert client.connection.problem is None
    assert broker.connections == 1


def test_messages_that_end_the_connection_are_dropped_and_the_others_arrive(
    scripted: Scripted, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    broker = scripted()
    client = connect(broker)
    broker.acknowledges, broker.forbidden = True, "edge/v1/pump/reply/no"
    topics = [TOPIC, broker.forbidden, TOPIC, broker.forbidden, TOPIC, TOPIC]
    numbers = client.post(*(Outgoing(topic, str(at)) for at, topic in enumerate(topics)))
    wait_until_told(client, len(topics))
    refused = "it ended the connection: Not authorized"
    said = [client.listener.done[number or 0] for number in numbers]
    assert said == [None, refused, None, refused, None, None]
    assert "the connection was lost (Not authorized)" in caplog.text
    client.publish("more")
    wait_until_told(client, len(topics) + 1)


@pytest.mark.parametrize("reason", [0x88, 0x89, 0x97, 0x9F])
def test_a_broker_that_refuses_connections_temporarily_is_retried(
    scripted: Scripted, begin: Connect, reason: int, caplog: pytest.LogCaptureFixture
) -> None:
    broker = scripted()
    broker.refuses = reason
    client = begin(broker)
    wait_for(lambda: client.connection.problem)
    assert "it may be starting or have too many clients. Trying again." in caplog.text
    broker.refuses = 0
    wait_for(lambda: client.listener.online)
    assert (client.connection.refused, client.connection.problem) == (None, None)


@pytest.mark.parametrize(
    ("reason", "limits", "said"),
    [
        (0x85, {}, "Client identifier not valid; it must accept the client identifier edge-pump"),
        (0x87, {}, "Not authorized; check the user name, the password and the broker's access list"),
        (0x9A, {}, "Retain not supported; it must accept retained messages and QoS 1"),
        (0x9D, {"ServerReference": "other:1883"}, "Server moved; it names another broker: 'other:1883'"),
    ],
)
def test_a_refused_connection_is_reported_with_reason_and_fix(
    scripted: Scripted, begin: Connect, reason: int, limits: dict[str, Any], said: str
) -> None:
    broker = scripted(**limits)
    broker.refuses = reason
    client = begin(broker)
    wait_for(lambda: client.connection.refused)
    assert str(client.connection.refused).endswith(said)


def malformed(payload: bytes) -> bytes:
    """A PUBLISH of QoS 1 whose properties are longer than the packet."""
    body = b"\0\1a" + b"\0\7" + b"\x7f" + payload
    return bytes([0x32, len(body)]) + body


def test_a_malformed_message_is_acknowledged_and_logged_in_one_line(
    scripted: Scripted, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    broker = scripted()
    client = connect(broker)
    broker.say(malformed(b"x") * 3)
    broker.say(b"\x30\x04\0\1b\0")  # well formed, of QoS 0
    wait_for(lambda: client.listener.received_messages)
    wait_for(lambda: broker.acknowledged == [7, 7, 7])
    assert [message.topic for message in client.listener.received_messages] == ["b"]
    assert "Traceback" not in caplog.text
    assert caplog.text.count("a malformed message is dropped: properties: longer than the packet") == 1
    assert broker.connections == 1


@pytest.mark.parametrize(
    "packet",
    [
        b"\x40\x01\0",  # PUBACK without an identifier
        b"\x90\x02\0",  # SUBACK: cut off
        b"\x90\x01\0",
        b"\xf0\x00",  # AUTH, not requested
        b"\x62\x02\0\1",  # PUBREL, of QoS 2
        b"\x30\xff\xff\xff\xff\x7f",  # a length of five bytes
        b"\x30\xff\xff\xff\x7f",  # 256 MiB
        b"\x00\x00",
    ],
)
def test_a_malformed_packet_is_logged_in_one_line_and_causes_a_reconnect(
    scripted: Scripted, connect: Connect, packet: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    broker = scripted()
    client = connect(broker)
    broker.say(packet + bytes(2))
    wait_for(lambda: broker.connections == 2 and client.listener.online)
    assert "Traceback" not in caplog.text
    assert "the connection was lost (the broker sent a malformed packet: " in caplog.text
    assert broker.disconnects == [b"\x81"]


def test_a_connection_without_a_ping_response_is_closed(
    scripted: Scripted, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    broker = scripted(ServerKeepAlive=1)
    broker.answers_pings = False
    connect(broker)
    wait_for(lambda: broker.connections == 2)
    assert "the connection was lost (no answer to PINGREQ)" in caplog.text


def test_in_a_new_session_unacknowledged_messages_are_sent_as_new_ones(
    scripted: Scripted, connect: Connect
) -> None:
    broker = scripted()
    broker.keeps_sessions = False
    client = connect(broker)
    client.publish("0", "1")
    wait_until_published(broker, 2, 0, TOPIC)
    broker.drop()
    sent = wait_until_published(broker, 2, 1, TOPIC)
    assert [(one.body[-1:], one.again) for one in sent] == [(b"0", False), (b"1", False)]
