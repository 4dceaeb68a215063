"""Routes in a running daemon: readings over MQTT and serial give events at once and answers later."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import socket
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from edge.client.links import MqttLink
from edge.endpoints import SerialConfig
from edge.protocol.framing import Damaged
from edge.protocol.messages import Final, Request
from edge.requests.engine import Engine, Sink
from edge.requests.journal import Journal
from edge.requests.journaled_engine import JournaledEngine, Verdict
from edge.routes.config import parse_routes
from edge.routes.router import Known
from edge.service import route_runner
from edge.service.route_runner import RouteRunner
from edge.transports.mqtt.readings import MqttReadings
from edge.transports.serial.port import SerialPort
from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, PtyPair, edge_command, wait_for
from tests.support.speller import Speller

ROUTE = """
[[route]]
name = "freezers"
topics = ["sensors/+/temperature", "sensors/+/door", "sensors/left/+"]
event_topic = "alarms/{sensor}"
answer_topic = "explanations/{sensor}"
[route.trigger]
when = "last > `-15`"
min_interval_s = 0
[route.ask]
instructions = "You watch freezers."
question = "Freezer {sensor}, {reason}: {statistics}."
max_tokens = 400
[route.ask.schema]
type = "object"
properties = { urgent = { type = "boolean" } }
required = ["urgent"]
additionalProperties = false
"""
LONG = '{"id":"long","prompt":"Pump?","max_tokens":4000,"stream":false,"reply_to":"edge/v1/pump/reply/x"}'


class House:
    """Sensors on the broker, and a subscriber to the topics of the routes."""

    def __init__(self, broker: Mosquitto) -> None:
        self.received: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self._client.on_message = self._on_message
        ready: queue.Queue[bool] = queue.Queue()
        self._client.on_subscribe = lambda *_: ready.put(True)
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        self._client.subscribe([("alarms/#", 1), ("explanations/#", 1)])
        assert ready.get(timeout=WAIT_S)

    def publish(self, topic: str, payload: str) -> None:
        self._client.publish(topic, payload, 1).wait_for_publish(WAIT_S)

    def receive(self) -> tuple[str, dict[str, Any]]:
        return self.received.get(timeout=WAIT_S)

    def _on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        self.received.put((message.topic, json.loads(message.payload)))

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def daemon(tmp_path: Path, mosquitto: Mosquitto, ptys: PtyPair) -> Iterator[DaemonProcess]:
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=4096)
    config = f'[mqtt]\nport = {mosquitto.port}\n[[serial]]\nport = "{ptys.near}"\n{ROUTE}'
    daemon = DaemonProcess(tmp_path, bundle, config)
    daemon.start()
    wait_for(lambda: mosquitto.retained("edge/v1/pump/status")["state"] == "online")
    yield daemon
    daemon.close()


@pytest.fixture
def house(mosquitto: Mosquitto) -> Iterator[House]:
    house = House(mosquitto)
    yield house
    house.close()


def test_a_condition_is_published_at_once_and_explained_according_to_the_schema(
    daemon: DaemonProcess, house: House
) -> None:
    house.publish("sensors/left/temperature", "-18")
    house.publish("sensors/left/temperature", "-12.5")
    topic, event = house.receive()
    assert (topic, event["event"], event["statistics"]["last"]) == ("alarms/left", "condition", -12.5)
    assert event["statistics"]["count"] == 2
    topic, said = house.receive()
    assert (topic, said["route"], said["sensor"], said["reason"]) == (
        "explanations/left",
        "freezers",
        "left",
        "condition",
    )
    assert set(said["answer"]) == {"urgent"}
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


def test_an_alarm_does_not_wait_for_the_model(
    daemon: DaemonProcess, house: House, mosquitto: Mosquitto
) -> None:
    house.publish("edge/v1/pump/request", LONG)
    wait_for(lambda: mosquitto.retained("edge/v1/pump/health")["working"])
    house.publish("sensors/left/temperature", "-12")
    topic, _ = house.receive()
    working = mosquitto.retained("edge/v1/pump/health")["working"]
    assert (topic, working) == ("alarms/left", True)
    house.publish("edge/v1/pump/cancel", '{"id":"long","reply_to":"edge/v1/pump/reply/x"}')
    assert house.receive()[0] == "explanations/left"


@pytest.fixture
def flood(daemon: DaemonProcess, mosquitto: Mosquitto) -> Iterator[None]:
    """A sensor that repeats itself as fast as the broker takes it."""
    sensor = socket.create_connection(("127.0.0.1", mosquitto.port))
    sensor.sendall(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x00\x00\x04wild")
    assert sensor.recv(4) == b"\x20\x02\x00\x00"
    topic = b"sensors/wild/temperature"
    reading = bytes([0x30, 5 + len(topic), 0, len(topic)]) + topic + b"-20"

    def repeat() -> None:
        with contextlib.suppress(OSError):
            while True:
                sensor.sendall(100 * reading)

    thread = threading.Thread(target=repeat)
    thread.start()
    wait_for(lambda: "readings arrive too fast" in daemon.log.read_text())
    yield
    sensor.shutdown(socket.SHUT_RDWR)
    thread.join(WAIT_S)
    sensor.close()


@pytest.mark.usefixtures("flood")
def test_a_sensor_that_repeats_endlessly_does_not_delay_requests(
    daemon: DaemonProcess, mosquitto: Mosquitto
) -> None:
    memory = daemon.memory()
    for number in range(5):
        with contextlib.closing(MqttLink(mosquitto.broker, "pump")) as link:
            *_, last = link.ask(Request(f"r{number}", "Pump?", max_tokens=4, stream=False), 5)
        assert isinstance(last, Final)
    assert daemon.memory() - memory < 8 * 1024 * 1024
    assert daemon.log.read_text().count("readings arrive too fast") == 1


def test_readings_can_arrive_over_a_serial_line(daemon: DaemonProcess, house: House, ptys: PtyPair) -> None:
    board = Board(ptys.far)
    board.port.send('{"type":"reading","topic":"sensors/cellar/temperature","payload":-3.5}')
    assert house.receive()[0] == "alarms/cellar"
    assert house.receive()[0] == "explanations/cellar"
    board.port.send('{"type":"reading","topic":"sensors/+","payload":1}')
    assert "reading.topic is not a topic" in board.receive("error")["message"]
    board.port.stop(WAIT_S)


def test_without_a_broker_routes_write_to_the_serial_ports(tmp_path: Path, ptys: PtyPair) -> None:
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=4096)
    daemon = DaemonProcess(tmp_path, bundle, f'[[serial]]\nport = "{ptys.near}"\n{ROUTE}')
    daemon.start()
    board = Board(ptys.far)
    board.port.send('{"type":"hello"}')
    board.receive("hello")
    board.port.send('{"type":"reading","topic":"sensors/cellar/temperature","payload":-3.5}')
    event, answer = board.receive("message"), board.receive("message")
    assert (event["topic"], event["payload"]["event"]) == ("alarms/cellar", "condition")
    assert (answer["topic"], set(answer["payload"]["answer"])) == ("explanations/cellar", {"urgent"})
    board.port.stop(WAIT_S)
    assert daemon.stop() == 0
    daemon.close()


def test_a_question_survives_a_killed_daemon(
    daemon: DaemonProcess, house: House, mosquitto: Mosquitto
) -> None:
    house.publish("edge/v1/pump/request", LONG)
    wait_for(lambda: mosquitto.retained("edge/v1/pump/health")["working"])
    house.publish("sensors/left/temperature", "-12")
    assert house.receive()[0] == "alarms/left"
    wait_for(lambda: mosquitto.retained("edge/v1/pump/health")["queue"] == 1)
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait(WAIT_S)
    daemon.start()
    topic, said = house.receive()
    assert (topic, said["sensor"], set(said["answer"])) == ("explanations/left", "left", {"urgent"})


def test_a_reading_without_a_number_is_logged_once(daemon: DaemonProcess, house: House) -> None:
    for payload in ("open", "open", "-12"):
        house.publish("sensors/left/door", payload)
    assert house.receive()[0] == "alarms/left"
    assert daemon.log.read_text().count("a reading on 'sensors/left/door' is ignored: not a number") == 1


class Board:
    """A microcontroller at the far end of the line."""

    def __init__(self, port: Path) -> None:
        self._lines: queue.Queue[str | Damaged] = queue.Queue()
        self.port = SerialPort(
            SerialConfig(str(port), 115_200, "none", lenient=False), 65536, lambda: None, self._lines.put
        )
        self.port.start()
        wait_for(lambda: self.port.is_open)

    def receive(self, kind: str) -> dict[str, Any]:
        while True:
            line = self._lines.get(timeout=WAIT_S)
            if isinstance(line, str) and (frame := json.loads(line))["type"] == kind:
                found: dict[str, Any] = frame
                return found


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        edge_command("daemon", *arguments), capture_output=True, text=True, timeout=WAIT_S, check=False
    )


def test_routes_can_be_tried_with_a_recording(tmp_path: Path) -> None:
    config, recording = tmp_path / "edge.toml", tmp_path / "readings.txt"
    config.write_text(f'bundle = "b"\n[mqtt]\n{ROUTE}')
    recording.write_text(
        "1700000000 sensors/left/temperature -18\n"
        "1700000060.5 sensors/left/temperature -12\n"
        "1700000061 sensors/left/door ajar\n"
    )
    done = command("routes", "test", "--config", str(config), str(recording))
    assert done.returncode == 0, done.stderr
    event, question, _, _, prompt, ignored = done.stdout.splitlines()
    assert event.startswith('2023-11-14 22:14:20.500 event    alarms/left {"route":"freezers"')
    assert question.endswith(
        "question sensors/left/temperature by route freezers, condition; answer to explanations/left"
    )
    assert prompt.startswith("    Freezer left, condition: 2 readings in 60.5 s, minimum -18")
    assert ignored.endswith("ignored  sensors/left/door by route freezers: not a number: 'ajar'")
    recording.write_text("soon sensors/left/temperature -18\n")
    done = command("routes", "test", "--config", str(config), str(recording))
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {recording}:1: 'soon sensors/left/temperature -18' is not")


def test_the_doctor_reports_problems_and_sets_its_exit_code(tmp_path: Path, mosquitto: Mosquitto) -> None:
    config = tmp_path / "edge.toml"
    config.write_text(f'bundle = "nowhere"\nstate_directory = "s"\n[mqtt]\nport = {mosquitto.port}\n')
    done = command("doctor", "--config", str(config))
    assert done.returncode == 1
    assert f"problem  bundle   {tmp_path}/nowhere/manifest.json" in done.stdout
    assert "fix: sudo edge-daemon bundle install BUNDLE, then activate it" in done.stdout
    done = command("doctor", "--json", "--config", str(config))
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["problems"] >= 1
    broker = next(finding for finding in found["findings"] if finding["check"] == "broker")
    assert (broker["state"], "mosquitto version" in broker["said"]) == ("ok", True)
    config.write_text("bundel = 1\n")
    done = command("doctor", "--config", str(config))
    assert (done.returncode, done.stderr.startswith(f"Error: {config}:1: unknown key bundel")) == (5, True)


def test_a_sensor_that_repeats_occupies_only_a_share_of_the_queue() -> None:
    published: list[str] = []
    routes = parse_routes(tomllib.loads(ROUTE)["route"])
    journaled = JournaledEngine(Engine(Speller(), queue_length=1), Journal(None))
    runner = RouteRunner(routes, True, journaled, lambda topic, _payload, _delivered: published.append(topic))
    for _ in range(5000):
        runner.reading("sensors/wild/temperature", b"-20")
    runner.reading("sensors/left/temperature", b"-10")
    runner.start()
    wait_for(lambda: published)
    runner.stop(WAIT_S)
    assert published == ["alarms/left"]


def test_a_silence_is_published_in_time_while_readings_always_arrive() -> None:
    table = tomllib.loads(ROUTE)["route"][0] | {"trigger": {"when": "last > `-15`", "silence_s": 1}}
    del table["ask"], table["answer_topic"]
    values, said = itertools.cycle([b"-10", b"-20"]), queue.Queue[str]()
    ends = time.monotonic() + WAIT_S / 3

    def publish(topic: str, _payload: str, _delivered: object) -> None:
        if topic == "alarms/left":
            said.put(topic)
        elif said.empty() and time.monotonic() < ends:  # each of these starts or ends the condition
            runner.reading("sensors/wild/temperature", next(values))

    journaled = JournaledEngine(Engine(Speller(), queue_length=1), Journal(None))
    runner = RouteRunner(parse_routes([table]), True, journaled, publish)
    runner.reading("sensors/left/temperature", b"-20")
    runner.reading("sensors/wild/temperature", next(values))
    runner.start()
    said.get(timeout=WAIT_S)
    assert time.monotonic() < ends
    runner.stop(WAIT_S)


SILENT = """
[[route]]
name = "silent"
topics = ["sensors/+/temperature"]
event_topic = "alarms/{sensor}"
[route.trigger]
silence_s = 1
"""


def silent_runner(said: queue.Queue[str], memory: Path | None = None) -> RouteRunner:
    """A runner of SILENT; the events that it publishes go to `said`."""
    journaled = JournaledEngine(Engine(Speller(), queue_length=1), Journal(None))
    routes = parse_routes(tomllib.loads(SILENT)["route"])
    said_by = lambda _topic, payload, _delivered: said.put(json.loads(payload)["event"])  # noqa: E731
    return RouteRunner(routes, True, journaled, said_by, memory=memory)


def test_a_broker_outage_is_not_reported_as_a_silent_sensor(mosquitto: Mosquitto) -> None:
    said, ready = queue.Queue[str](), threading.Event()
    runner = silent_runner(said)
    connection = MqttReadings(mosquitto.broker, "r", runner, "edge/v1/", ready.set).connection
    runner.start()
    connection.start()
    assert ready.wait(WAIT_S)
    runner.reading("sensors/left/temperature", b"-20")
    mosquitto.stop()
    wait_for(lambda: not connection.connected)
    time.sleep(1.5)
    assert said.empty()
    mosquitto.start()
    assert said.get(timeout=WAIT_S) == "silence"
    connection.stop(WAIT_S)
    runner.stop(WAIT_S)


def test_the_silence_of_a_sensor_from_an_earlier_run_is_reported(
    tmp_path: Path, mosquitto: Mosquitto, house: House
) -> None:
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=4096)
    daemon = DaemonProcess(tmp_path, bundle, f"[mqtt]\nport = {mosquitto.port}\n{ROUTE}{SILENT}")
    daemon.start()
    wait_for(lambda: mosquitto.retained("edge/v1/pump/status")["state"] == "online")
    house.publish("sensors/left/temperature", "-20")
    assert house.receive()[1]["event"] == "silence"
    assert daemon.stop() == 0
    daemon.start()
    topic, event = house.receive()
    assert (topic, event["event"], event["statistics"]) == ("alarms/left", "silence", None)
    house.publish("sensors/left/temperature", "-20")
    assert house.receive()[1]["event"] == "back"
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()
    daemon.close()


@pytest.mark.parametrize("content", [b"", b"{", b'{"sensors":[{"route":1}]}', b"[]", b"\xff"])
def test_unreadable_sensor_records_are_replaced(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "sensors.json"
    memory.write_bytes(content)
    said = queue.Queue[str]()
    monkeypatch.setattr(route_runner, "KEEP_S", 0)
    monkeypatch.setattr(route_runner, "TICK_S", 0.05)
    runner = silent_runner(said, memory)
    runner.start()
    runner.reading("sensors/left/temperature", b"-20")
    assert said.get(timeout=WAIT_S) == "silence"

    def kept() -> bool:
        runner.keep()
        return b"silent_since" in memory.read_bytes()

    wait_for(kept)
    runner.stop(WAIT_S)
    (known,) = json.loads(memory.read_bytes())["sensors"]
    assert Known(**known) == Known("silent", "sensors/left/temperature", False, known["silent_since"])
    assert known["silent_since"] <= time.time()


def test_sensor_records_that_cannot_be_written_are_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, memory = queue.Queue[str](), tmp_path / "nowhere" / "sensors.json"
    monkeypatch.setattr(route_runner, "KEEP_S", 0)
    monkeypatch.setattr(route_runner, "TICK_S", 0.05)
    runner = silent_runner(said, memory)
    runner.start()
    runner.reading("sensors/left/temperature", b"-20")
    assert said.get(timeout=WAIT_S) == "silence"
    for _ in range(2):
        known = runner._known
        wait_for(lambda known=known: runner._known is not known)  # type: ignore[misc]
        runner.keep()
    assert caplog.text.count("sensors.json: No such file or directory; until that is fixed") == 1
    memory.parent.mkdir()

    def kept() -> bool:
        runner.keep()
        return memory.exists()

    wait_for(kept)
    runner.stop(WAIT_S)
    assert b"silent_since" in memory.read_bytes()


@pytest.mark.parametrize("room", [1000, 0])
def test_an_alarm_does_not_wait_for_a_blocked_disk(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said, disk = queue.Queue[str](), threading.Event()
    journaled = JournaledEngine(Engine(Speller(), queue_length=1), Journal(None))
    take = journaled.submit
    asked: list[str] = []

    def submit(client: str, request: Request, sink: Sink, note: str) -> Verdict:
        disk.wait(WAIT_S)
        asked.append(request.id)
        return take(client, request, sink, note)

    monkeypatch.setattr(journaled, "submit", submit)
    monkeypatch.setattr(route_runner, "MAX_QUESTIONS", room)
    monkeypatch.setattr(route_runner, "LATER_MS", 200)
    routes = parse_routes(tomllib.loads(ROUTE)["route"])
    runner = RouteRunner(routes, True, journaled, lambda topic, _payload, _delivered: said.put(topic))
    runner.start()
    for sensor in ("left", "right"):
        runner.reading(f"sensors/{sensor}/temperature", b"-10")
        assert said.get(timeout=WAIT_S / 3) == f"alarms/{sensor}"
    assert runner.alive
    assert runner._questions.qsize() <= room
    disk.set()
    monkeypatch.undo()
    monkeypatch.setattr(journaled, "submit", submit)
    wait_for(lambda: len(asked) == 2)  # questions that did not fit are submitted later
    runner.stop(WAIT_S)
