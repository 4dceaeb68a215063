"""A client that keeps a node busy over MQTT, and a check that each request was answered once."""

import json
import random
import re
import threading
import time
from collections import Counter
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge.protocol.messages import Answer, Failure, Final, Partial, Request, parse_answer
from tests.support.counterparts import Mosquitto, wait_for

REPLY = "edge/v1/pump/reply/load"
STATUS = "edge/v1/pump/status"
OUTSTANDING = 6
PROPERTIES: Any = Properties  # paho leaves its constructor untyped


class MqttLoad:
    """Clients that do as docs/protocol.md says: they take the first final answer to an id that they wait for.

    They keep some requests outstanding. With `repeats` they send unanswered requests again whenever they are
    connected and the node is online. `copies` counts copies of answers that had come before. Each request has
    a response topic of its own, as if each came from another client, unless `client` names the only one.
    """

    def __init__(self, broker: Mosquitto, repeats: bool, client: str | None = None) -> None:
        self.partials: Counter[str] = Counter()
        self._name = client
        self.asked: list[str] = []
        self.answers: dict[str, bytes] = {}
        self.copies = 0
        self.others: list[bytes] = []  # finals and errors that differ from the first answer
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

    def ask(self, name: str, max_tokens: int, stream: bool = False) -> None:
        request = Request(name, "Pump?", max_tokens=max_tokens, stream=stream)
        with self._lock:
            self._waiting[name] = request
        self.asked.append(name)
        self._send(request)

    def wait_for_more(self, answers: int) -> None:
        """Wait until this number of further requests is answered."""
        wanted = len(self.answers) + answers
        wait_for(lambda: len(self.answers) >= wanted)

    @property
    def satisfied(self) -> bool:
        return not self._waiting

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _send(self, request: Request) -> None:
        properties = PROPERTIES(PacketTypes.PUBLISH)
        properties.ResponseTopic = f"{REPLY}/{self._name or request.id}"
        properties.CorrelationData = request.id.encode()
        self._client.publish("edge/v1/pump/request", request.to_json(), 1, properties=properties)

    def _connected(self, *_: Any) -> None:
        self._client.subscribe([(f"{REPLY}/{self._name or '+'}", 1), (STATUS, 1)])

    def _subscribed(self, *_: Any) -> None:
        self.connections += 1

    def _heard(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        payload = bytes(message.payload)
        if message.topic == STATUS:
            self._status(json.loads(payload)["state"])
            return
        answer = parse_answer(payload)
        assert answer.id is not None
        assert getattr(message.properties, "CorrelationData", None) == answer.id.encode()
        if isinstance(answer, Partial):
            self.partials[answer.id] += 1
            return
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


def keep_busy(load: MqttLoad, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        load.fill()
        time.sleep(0.01)


def wait_until_back(load: MqttLoad, online: int, connections: int) -> None:
    """Wait until client and node are connected to the broker again."""
    wait_for(lambda: load.online > online and load.connections > connections)


def one_answer_each(what: str, load: MqttLoad, others: list[Answer]) -> None:
    """Check that each request has one final or error, apart from copies, and that the error is allowed."""
    assert sorted(load.answers) == sorted(load.asked)
    assert load.others == []
    answers = [*map(parse_answer, load.answers.values()), *others]
    kinds = Counter(answer.code if isinstance(answer, Failure) else "final" for answer in answers)
    print(f"{what}: {dict(kinds)}; {load.copies} copies were ignored")
    assert set(kinds) <= {"final", "internal", "unavailable"}
    for answer in answers:  # work on it was killed twice, or work on three of its client
        assert isinstance(answer, Final) or re.search("crashed [23] times", getattr(answer, "message", ""))
