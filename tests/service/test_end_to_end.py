"""200 successive requests over each transport to a daemon with a real decoder: one final answer each."""

import json
import os
import queue
import select
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge.protocol.framing import FrameDecoder, encode
from edge.protocol.messages import MAX_REQUEST_BYTES, Request
from tests.conftest import Field
from tests.support.counterparts import WAIT_S

COUNT = 200
WARM_UP = 50
MAX_GROWTH = 4 * 1024 * 1024  # of anonymous memory, bytes
LONGER = 1500  # tokens: seconds of work
PROPERTIES: Any = Properties  # paho leaves its constructor untyped


class Sensor(Protocol):
    """A sensor on one of the transports."""

    def ask(self, payload: bytes) -> None:
        """Send a request, valid or not."""

    def cancel(self, name: str) -> None:
        """Cancel a request."""

    def receive(self, wait_s: float) -> dict[str, Any] | None:
        """The next frame or message."""

    def close(self) -> None:
        """Disconnect."""


class OverMqtt:
    """A sensor with paho."""

    def __init__(self, field: Field) -> None:
        self._received: queue.Queue[dict[str, Any]] = queue.Queue()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self._client.on_message = lambda _client, _data, message: self._received.put(
            json.loads(message.payload)
        )
        self._client.connect("127.0.0.1", field.mosquitto.port)
        self._client.loop_start()
        self._reply: Properties = PROPERTIES(PacketTypes.PUBLISH)
        self._reply.ResponseTopic = "edge/v1/pump/reply/many"
        self._client.subscribe("edge/v1/pump/reply/many", 1)

    def ask(self, payload: bytes) -> None:
        self._client.publish("edge/v1/pump/request", payload, 1, properties=self._reply)

    def cancel(self, name: str) -> None:
        self._client.publish("edge/v1/pump/cancel", json.dumps({"id": name}), 1, properties=self._reply)

    def receive(self, wait_s: float) -> dict[str, Any] | None:
        try:
            return self._received.get(timeout=wait_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class OverSerial:
    """A sensor on the far end of the line."""

    def __init__(self, field: Field) -> None:
        self._file = os.open(field.ptys.far, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        self._decoder = FrameDecoder(10**6)
        self._received: list[dict[str, Any]] = []

    def ask(self, payload: bytes) -> None:
        self._write(encode(payload.decode("ascii")))

    def cancel(self, name: str) -> None:
        self.ask(json.dumps({"type": "cancel", "id": name}).encode())

    def receive(self, wait_s: float) -> dict[str, Any] | None:
        if not self._received and select.select([self._file], [], [], wait_s)[0]:
            for item in self._decoder.feed(os.read(self._file, 65536)):
                assert isinstance(item, str), item
                self._received.append(json.loads(item))
        return self._received.pop(0) if self._received else None

    def close(self) -> None:
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        while data:
            select.select([], [self._file], [], WAIT_S)
            data = data[os.write(self._file, data) :]


@pytest.fixture(params=[OverMqtt, OverSerial])
def sensor(request: pytest.FixtureRequest, served: Field) -> Iterator[Sensor]:
    sensor: Sensor = request.param(served)
    yield sensor
    sensor.close()


def good(name: str, **fields: Any) -> bytes:
    return Request(name, "The pump says 12 bar.", **{"max_tokens": 12, **fields}).to_json().encode()


def complete_answers(sensor: Sensor, count: int) -> list[dict[str, Any]]:
    """The next `count` finals and errors."""
    answers: list[dict[str, Any]] = []
    until = time.monotonic() + WAIT_S
    while len(answers) < count:
        assert time.monotonic() < until, answers
        message = sensor.receive(0.1)
        if message is not None and message["type"] in ("final", "error"):
            answers.append(message)
    return answers


def ask_one(sensor: Sensor, number: int) -> str:
    """Send the request with this number and return its final or error."""
    name = f"r{number}"
    kind = ("good", "sampled", "malformed", "unknown", "oversized", "cancelled", "expired", "silent")[
        number % 8
    ]
    payloads = {
        "good": good(name),
        "sampled": good(name, temperature=1.0, seed=number),
        "malformed": b'{"id":"' + name.encode() + b'","prompt":',
        "unknown": b'{"id":"' + name.encode() + b'","promt":"x"}',
        "oversized": good(name)[:-1] + b',"stop":"' + b"x" * (MAX_REQUEST_BYTES + 1) + b'"}',
        "cancelled": good(name, max_tokens=LONGER, stream=True),
        "expired": good(name, max_tokens=LONGER, deadline_ms=30),
        "silent": good(name, stream=False),
    }
    sensor.ask(payloads[kind])
    if kind == "cancelled":
        sensor.cancel(name)
    (answer,) = complete_answers(sensor, 1)
    ended = str(answer.get("finish_reason") or answer["code"])
    assert answer["id"] in (name, None if ended == "bad_request" else name)
    return f"{kind} {ended}"


def test_each_of_200_requests_gets_exactly_one_final_answer_and_memory_does_not_grow(
    sensor: Sensor, served: Field
) -> None:
    ended: Counter[str] = Counter()
    for number in range(WARM_UP):
        ended[ask_one(sensor, number)] += 1
    before = served.daemon.memory()
    for number in range(WARM_UP, COUNT):
        ended[ask_one(sensor, number)] += 1
    grown = served.daemon.memory() - before
    while (message := sensor.receive(0.5)) is not None:
        assert message["type"] not in ("final", "error"), f"a second answer: {message}"
    assert ended == {
        "good length": 25,
        "sampled length": 25,
        "malformed bad_request": 25,
        "unknown bad_request": 25,
        "oversized bad_request": 25,
        "cancelled cancelled": 25,
        "expired deadline": 25,
        "silent length": 25,
    }
    assert grown < MAX_GROWTH


def test_each_request_of_a_burst_gets_one_answer_and_busy_beyond_the_queue(sensor: Sensor) -> None:
    for number in range(40):
        sensor.ask(good(f"b{number}", stream=False))
    answers = complete_answers(sensor, 40)
    assert sorted(answer["id"] for answer in answers) == sorted(f"b{number}" for number in range(40))
    assert {answer.get("code", "final") for answer in answers} == {"final", "busy"}
    assert all(answer["retry_after_ms"] > 0 for answer in answers if answer["type"] == "error")


def test_partials_add_up_to_the_final_text(sensor: Sensor) -> None:
    sensor.ask(good("parts", max_tokens=400))
    text = ""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        message = sensor.receive(0.1)
        if message is not None and message["type"] == "partial":
            text += message["text"]
        elif message is not None and message["type"] == "final":
            assert message["text"].startswith(text)
            assert text
            return
    raise AssertionError("no final came")
