"""The peers of a daemon in a soak: clients with all types of requests, sensors, and a subscriber."""

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from edge.client.link import Link
from edge.protocol.messages import Answer, Failure, Final, Message, Partial, Request
from tests.support.counterparts import WAIT_S, Mosquitto

PAUSE_S = (0.2, 2.0)  # of a client, between two requests
HASTE = 10  # pauses are so much shorter in the warm-up: what is bounded is to reach its bounds
CONTEXT = 2048
NEW_WORDS = 8  # in a free text: the tokenizer's memory of words is full before the warm-up is over
SYSTEM = "You watch the pumps of a waterworks. Answer in one sentence, and say when you do not know. " * 2
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"state": {"enum": ["good", "worn", "broken"]}, "urgent": {"type": "boolean"}},
    "required": ["state", "urgent"],
}


class Subscriber:
    """Receives all messages of the daemon at the broker, and counts finals and errors of each request."""

    def __init__(self, broker: Mosquitto) -> None:
        self.answers: Counter[str] = Counter()
        self.events = 0
        self.explanations: Counter[str] = Counter()
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self.client.on_message = self._received
        subscribed = threading.Event()
        self.client.on_subscribe = lambda *_: subscribed.set()
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        self.client.subscribe([("edge/v1/pump/reply/#", 1), ("alarms/#", 1), ("explanations/#", 1)])
        assert subscribed.wait(WAIT_S)

    def _received(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        content = json.loads(message.payload)
        if message.topic.startswith("alarms/"):
            self.events += content["event"] == "condition"
        elif message.topic.startswith("explanations/"):
            self.explanations[content["request"]] += 1
        elif content["type"] != "partial":
            self.answers[f"{message.topic} {content['id']}"] += 1

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Worker(threading.Thread):
    """Repeats an action, with pauses, until it is stopped."""

    def __init__(self, work: Callable[[], None], pause_s: Callable[[], float]) -> None:
        super().__init__()
        self._work, self._pause_s, self._stopping = work, pause_s, threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(self._pause_s()):
            self._work()

    def stop(self) -> None:
        self._stopping.set()
        self.join(2 * WAIT_S)
        assert not self.is_alive()


class Sensors:
    """Three pumps, whose pressure rises above its limit now and then."""

    def __init__(self, subscriber: Subscriber, chance: random.Random) -> None:
        self._subscriber, self._chance = subscriber, chance

    def read(self) -> None:
        for pump in ("north", "south", "west"):
            bar = 9.0 if self._chance.random() < 0.05 else 5.0
            bar += round(self._chance.random(), 2)
            self._subscriber.client.publish(f"sensors/{pump}/pressure", str(bar))


@dataclass
class SoakClient:
    """A client that sends all types of requests and knows the valid answers to each."""

    name: str
    open: Callable[[], Link]
    chance: random.Random
    warm_until: float
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    asked: int = 0
    talk: tuple[Message, ...] = ()

    def pause_s(self) -> float:
        """How long to wait before the next question."""
        haste = HASTE if time.monotonic() < self.warm_until else 1
        return self.chance.uniform(*PAUSE_S) / haste

    def ask(self) -> None:
        """Send one request."""
        kind = self.chance.choice(list(KINDS))
        make, allowed = KINDS[kind]
        self.asked += 1
        request = make(self, f"{self.name}{self.asked}")
        answers = self._answers(request, kind == "cancelled")
        last = [answer for answer in answers if not isinstance(answer, Partial)]
        said = [answer.code if isinstance(answer, Failure) else answer.finish_reason for answer in last]
        self.outcomes[f"{kind}: {'+'.join(said)}"] += 1
        if len(said) != 1 or said[0] not in allowed:
            self.wrong.append(f"{request.to_json()} was answered {last}")
        elif isinstance(last[0], Final):
            self._look_at(kind, request, last[0])

    def _look_at(self, kind: str, request: Request, answer: Final) -> None:
        if kind == "conversation":
            self.talk = (*request.messages, Message("assistant", answer.text))
        elif kind == "schema" and set(json.loads(answer.text)) != set(SCHEMA["required"]):
            self.wrong.append(f"{answer.text} does not follow the schema")

    def _answers(self, request: Request, cancel: bool) -> list[Answer]:
        found = []
        with contextlib.closing(self.open()) as link:
            for answer in link.ask(request, WAIT_S):
                found.append(answer)
                if cancel and isinstance(answer, Partial):
                    link.cancel(request.id)
        return found

    def free_text(self, name: str) -> Request:
        """A request with words that were not used before, such as part numbers."""
        parts = " ".join(f"{self.chance.getrandbits(40):x}" for _ in range(NEW_WORDS))
        prompt = f"Parts {parts}: the pump runs at {self.chance.randint(1, 99)} bar because"
        return Request(name, prompt, max_tokens=self.chance.randint(1, 40), stream=self.chance.random() < 0.5)

    def schema(self, name: str) -> Request:
        form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
        question = Message("user", f"{self.chance.randint(1, 99)} bar?")
        messages = (Message("system", SYSTEM), question)
        return Request(name, messages=messages, max_tokens=60, stream=False, response_format=form)

    def conversation(self, name: str) -> Request:
        before = self.talk if 0 < len(self.talk) < 9 else (Message("system", SYSTEM),)
        question = Message("user", f"And at {self.chance.randint(1, 99)} bar?")
        return Request(name, messages=(*before, question), max_tokens=20, stream=False)

    def long(self, name: str) -> Request:
        return Request(name, "Tell me all about pumps.", max_tokens=1500)

    def full(self, name: str) -> Request:
        """A request that fills up to the whole context: a digit is a token."""
        digits = self.chance.choices("0123456789", k=self.chance.randint(1, CONTEXT - 50))
        return Request(name, "".join(digits), max_tokens=40, stream=False)

    def late(self, name: str) -> Request:
        return Request(name, "Tell me all about valves.", max_tokens=1500, stream=False, deadline_ms=100)

    def bad(self, name: str) -> Request:
        return Request(name, "Pump?", max_tokens=0)


KINDS: dict[str, tuple[Callable[[SoakClient, str], Request], tuple[str, ...]]] = {
    "free text": (SoakClient.free_text, ("stop", "length")),
    "schema": (SoakClient.schema, ("stop",)),
    "conversation": (SoakClient.conversation, ("stop", "length")),
    "full": (SoakClient.full, ("stop", "length")),
    "cancelled": (SoakClient.long, ("cancelled", "stop", "length")),
    "late": (SoakClient.late, ("deadline", "expired", "stop", "length")),
    "bad": (SoakClient.bad, ("bad_request",)),
}
