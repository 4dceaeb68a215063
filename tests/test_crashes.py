"""The daemon killed under load: every request is answered once, over MQTT and serial, and none is lost."""

import random
import threading
import time
from collections import Counter, defaultdict
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
OUTSTANDING = 6
PROPERTIES: Any = Properties  # paho leaves its constructor untyped


class MqttLoad:
    """Keeps some requests on their way and remembers every last answer to each."""

    def __init__(self, broker: Mosquitto) -> None:
        self.asked: list[str] = []
        self.payloads: dict[str, list[bytes]] = defaultdict(list)
        self._chance = random.Random(5)
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self._client.on_message = self._heard
        subscribed = threading.Event()
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        self._client.subscribe(REPLY, 1)
        assert subscribed.wait(WAIT_S)

    def fill(self) -> None:
        while len(self.asked) - len(self.payloads) < OUTSTANDING:
            self.ask(f"m{len(self.asked)}", self._chance.randint(1, 300))

    def ask(self, name: str, max_tokens: int) -> None:
        request = Request(name, "Pump?", max_tokens=max_tokens, stream=False)
        properties = PROPERTIES(PacketTypes.PUBLISH)
        properties.ResponseTopic = REPLY
        properties.CorrelationData = name.encode()
        self._client.publish("edge/v1/pump/request", request.to_json(), 1, properties=properties)
        self.asked.append(name)

    def _heard(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        payload = bytes(message.payload)
        answer = parse_answer(payload)
        assert answer.id is not None
        assert message.properties is not None
        correlation: bytes = message.properties.CorrelationData  # type: ignore[attr-defined]
        assert correlation == answer.id.encode()
        self.payloads[answer.id].append(payload)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


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
    config = f'queue = 16\n[mqtt]\nport = {mosquitto.port}\n[[serial]]\nport = "{ptys.near}"\n'
    daemon = DaemonProcess(tmp_path, bundle, config)
    yield daemon
    daemon.close()


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_daemon_that_is_killed_under_load_loses_no_request_and_answers_none_twice(
    daemon: DaemonProcess, mosquitto: Mosquitto, ptys: PtyPair, kills: int
) -> None:
    chance = random.Random(kills)
    daemon.start()
    wait_for(lambda: mosquitto.retained("edge/v1/pump/status")["state"] == "online")
    load, line = MqttLoad(mosquitto), SerialLoad(ptys.far)
    line.start()
    for _ in range(kills):
        until = time.monotonic() + chance.uniform(0.05, 1.0)
        while time.monotonic() < until:
            load.fill()
            time.sleep(0.01)
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait(WAIT_S)
        daemon.start()
    line.stopping.set()
    wait_for(lambda: len(load.payloads) == len(load.asked))
    line.join(WAIT_S)
    assert not line.is_alive()
    assert daemon.stop() == 0
    load.close()
    one_answer_each(load, line, kills)
    assert "Traceback" not in daemon.log.read_text()


def test_an_answer_waits_for_a_broker_that_is_away_longer_than_the_daemon(
    daemon: DaemonProcess, mosquitto: Mosquitto
) -> None:
    daemon.start()
    wait_for(lambda: mosquitto.retained("edge/v1/pump/status")["state"] == "online")
    load = MqttLoad(mosquitto)
    load.ask("long", max_tokens=4000)
    wait_for(lambda: mosquitto.retained("edge/v1/pump/health")["working"])
    load.close()
    mosquitto.stop(kill=True)
    assert daemon.stop() == 0  # it answers first
    mosquitto.start()
    load = MqttLoad(mosquitto)
    daemon.start()
    load.ask("next", max_tokens=1)
    wait_for(lambda: load.payloads["next"])
    assert [len(load.payloads[name]) for name in ("long", "next")] == [1, 1]
    answer = parse_answer(load.payloads["long"][0])
    assert isinstance(answer, Final)
    assert answer.usage.generated > 1000
    assert "of an earlier run: 0 requests to answer, 1 answers to send" in daemon.log.read_text()
    load.close()


def one_answer_each(load: MqttLoad, line: SerialLoad, kills: int) -> None:
    """A copy may come again, as QoS 1 has it, but only of the same answer, and only around a kill."""
    assert len(load.asked) > kills
    assert len(line.answers) > 1
    assert {name for name, copies in load.payloads.items() if len(set(copies)) != 1} == set()
    copies = sum(len(copies) - 1 for copies in load.payloads.values())
    assert copies <= 2 * kills
    answers = [parse_answer(copies[0]) for copies in load.payloads.values()]
    for found in line.answers:
        assert [type(answer) for answer in found if isinstance(answer, Partial)] == []
        answers.extend(found)
    kinds = Counter(answer.code if isinstance(answer, Failure) else "final" for answer in answers)
    print(f"{kills} kills: {dict(kinds)}, {copies} copies")
    assert set(kinds) <= {"final", "internal"}  # internal: work on it was killed twice
    assert all(isinstance(answer, Final) or "2 times" in getattr(answer, "message", "") for answer in answers)
