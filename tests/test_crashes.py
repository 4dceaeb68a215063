"""Daemon and broker killed under load: every request is answered once, and none is lost."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundles
import pytest
from counterparts import WAIT_S, DaemonProcess, Mosquitto, PtyPair, wait_for
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge.config import SerialConfig
from edge.links import SerialLink
from edge.messages import Answer, Failure, Final, Partial, Request, parse_answer

REPLY = "edge/v1/pump/reply/load"
STATUS = "edge/v1/pump/status"
OUTSTANDING = 6
PROPERTIES: Any = Properties  # paho leaves its constructor untyped


class MqttLoad:
    """A client that does as docs/protocol.md says: it takes the first last answer to an id that it waits for.

    It keeps some requests on their way. With `repeats` it sends what is not answered again whenever it is
    connected and the node says that it is online. `copies` counts what came of answers that it had already.
    """

    def __init__(self, broker: Mosquitto, repeats: bool) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, bytes] = {}
        self.copies = 0
        self.others: list[bytes] = []  # last answers that are not those there were already
        self.online = self.connections = 0
        self._waiting: dict[str, Request] = {}
        self._repeats = repeats
        self._lock = threading.Lock()
        self._chance = random.Random(5)
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self._client.on_message = self._heard
        self._client.on_connect = self._connected
        self._client.on_subscribe = self._subscribed
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        wait_for(lambda: self.online)

    def fill(self) -> None:
        while len(self._waiting) < OUTSTANDING:
            self.ask(f"m{len(self.asked)}", self._chance.randint(1, 300))

    def ask(self, name: str, max_tokens: int) -> None:
        request = Request(name, "Pump?", max_tokens=max_tokens, stream=False)
        with self._lock:
            self._waiting[name] = request
        self.asked.append(name)
        self._send(request)

    @property
    def satisfied(self) -> bool:
        return not self._waiting

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _send(self, request: Request) -> None:
        properties = PROPERTIES(PacketTypes.PUBLISH)
        properties.ResponseTopic = REPLY
        properties.CorrelationData = request.id.encode()
        self._client.publish("edge/v1/pump/request", request.to_json(), 1, properties=properties)

    def _connected(self, *_: Any) -> None:
        self._client.subscribe([(REPLY, 1), (STATUS, 1)])

    def _subscribed(self, *_: Any) -> None:
        self.connections += 1

    def _heard(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        payload = bytes(message.payload)
        if message.topic == STATUS:
            self._status(json.loads(payload)["state"])
            return
        answer = parse_answer(payload)
        assert answer.id is not None
        assert message.properties is not None
        correlation: bytes = message.properties.CorrelationData  # type: ignore[attr-defined]
        assert correlation == answer.id.encode()
        with self._lock:
            if self._waiting.pop(answer.id, None) is not None:
                self.answers[answer.id] = payload
            elif self.answers[answer.id] == payload:
                self.copies += 1
            else:
                self.others.append(payload)

    def _status(self, state: str) -> None:
        if state != "online":
            return
        self.online += 1
        with self._lock:
            again = list(self._waiting.values()) if self._repeats else []
        for request in again:
            self._send(request)


class SerialLoad(threading.Thread):
    """Asks one question after the other over a serial line until it is told to stop."""

    def __init__(self, port: Path) -> None:
        super().__init__()
        self.answers: list[list[Answer]] = []
        self.stopping = threading.Event()
        self._link = SerialLink(SerialConfig(str(port), 115_200, "none", lenient=False))

    def run(self) -> None:
        while not self.stopping.is_set():
            request = Request(f"s{len(self.answers)}", "Pump?", max_tokens=100, stream=False)
            self.answers.append(list(self._link.ask(request, WAIT_S)))
        self._link.close()


@pytest.fixture
def daemon(tmp_path: Path, mosquitto: Mosquitto, ptys: PtyPair) -> Iterator[DaemonProcess]:
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=4096)
    config = f'queue = 16\ndrain_s = 60\n[mqtt]\nport = {mosquitto.port}\n[[serial]]\nport = "{ptys.near}"\n'
    daemon = DaemonProcess(tmp_path, bundle, config)
    yield daemon
    daemon.close()


def keep_busy(load: MqttLoad, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        load.fill()
        time.sleep(0.01)


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_daemon_that_is_killed_under_load_loses_no_request_and_answers_none_twice(
    daemon: DaemonProcess, mosquitto: Mosquitto, ptys: PtyPair, kills: int
) -> None:
    chance = random.Random(kills)
    daemon.start()
    load, line = MqttLoad(mosquitto, repeats=False), SerialLoad(ptys.far)
    line.start()
    for _ in range(kills):
        keep_busy(load, chance.uniform(0.05, 1.0))
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait(WAIT_S)
        daemon.start()
    line.stopping.set()
    wait_for(lambda: load.satisfied)
    line.join(WAIT_S)
    assert not line.is_alive()
    assert daemon.stop() == 0
    load.close()
    assert len(line.answers) > 1
    for found in line.answers:
        assert [answer for answer in found if isinstance(answer, Partial)] == []
    # As QoS 1 has it, a copy comes where the kill was quicker than the broker's acknowledgement.
    assert load.copies <= 2 * kills
    one_answer_each("daemon", kills, load, [answer for found in line.answers for answer in found])
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_a_broker_that_is_killed_under_load_costs_no_request(
    daemon: DaemonProcess, mosquitto: Mosquitto, kills: int
) -> None:
    chance = random.Random(kills)
    daemon.start()
    load = MqttLoad(mosquitto, repeats=True)
    for _ in range(kills):
        keep_busy(load, chance.uniform(0.05, 1.0))
        online, connections = load.online, load.connections
        mosquitto.stop(kill=True)
        mosquitto.start()
        wait_until_back(load, online, connections)
    wait_for(lambda: load.satisfied)
    assert daemon.stop() == 0
    load.close()
    one_answer_each("broker", kills, load, [])
    assert "Traceback" not in daemon.log.read_text()


def wait_until_back(load: MqttLoad, online: int, connections: int) -> None:
    """Wait until client and node have met again at the broker."""
    wait_for(lambda: load.online > online and load.connections > connections)


def one_answer_each(killed: str, kills: int, load: MqttLoad, others: list[Answer]) -> None:
    """Each request has one last answer, whatever copies came, and that is a good one or says why not."""
    assert len(load.asked) > kills
    assert sorted(load.answers) == sorted(load.asked)
    assert load.others == []
    answers = [*map(parse_answer, load.answers.values()), *others]
    kinds = Counter(answer.code if isinstance(answer, Failure) else "final" for answer in answers)
    print(f"{killed} killed {kills} times: {dict(kinds)}; {load.copies} copies were ignored")
    assert set(kinds) <= {"final", "internal"}  # internal: work on it was killed twice
    assert all(isinstance(answer, Final) or "2 times" in getattr(answer, "message", "") for answer in answers)


def test_an_answer_waits_for_a_broker_that_is_away_longer_than_the_daemon(
    daemon: DaemonProcess, mosquitto: Mosquitto
) -> None:
    daemon.start()
    load = MqttLoad(mosquitto, repeats=False)
    load.ask("long", max_tokens=2000)
    wait_for(lambda: mosquitto.retained("edge/v1/pump/health")["working"])
    mosquitto.stop(kill=True)
    assert daemon.stop() == 0  # it answers first
    mosquitto.start()
    wait_for(lambda: load.connections == 2)
    daemon.start()
    load.ask("next", max_tokens=1)
    wait_for(lambda: load.satisfied)
    assert (load.copies, load.others) == (0, [])
    answer = parse_answer(load.answers["long"])
    assert isinstance(answer, Final)
    assert answer.usage.generated > 1000
    assert "of an earlier run: 0 requests to answer, 1 answers to send" in daemon.log.read_text()
    load.close()
