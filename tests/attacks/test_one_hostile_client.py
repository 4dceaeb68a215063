"""One client of a real broker against a node: others are answered meanwhile, nothing grows, nothing leaks."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.wire import USER, Attacker, no_traceback, publish, text
from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, wait_for
from tests.support.real_bundle import real_bundle

REQUEST, CANCEL = "edge/v1/pump/request", "edge/v1/pump/cancel"
HERS, HIS = "edge/v1/pump/reply/her", "edge/v1/pump/reply/him"
MAX_GROWTH = 32 << 20
MAX_LINES = 40  # in the log, for an attack of hundreds of messages
CONFIG = """
queue = 4
[mqtt]
port = {port}
discovery_prefix = "homeassistant"
[[route]]
name = "pumps"
topics = ["sensors/#"]
event_topic = "alarms/{{sensor}}"
[route.trigger]
when = "last > `10`"
"""


class Node:
    """A daemon, its broker, and a neighbour who asks one question after the other."""

    def __init__(self, directory: Path, broker: Mosquitto) -> None:
        self.broker = broker
        bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=2048)
        self.daemon = DaemonProcess(directory, bundle, CONFIG.format(port=broker.port))
        self.daemon.start()
        broker.retained("edge/v1/pump/status")
        self.answered = 0
        self._stopping = threading.Event()
        self._client = Attacker(broker.port, "her", HERS)
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        self.goes_on()

    def goes_on(self) -> None:
        """Return when the neighbour has been answered to a question of later than now."""
        wanted = self.answered + 2
        wait_for(lambda: self.answered >= wanted or not self._thread.is_alive())
        assert self._thread.is_alive(), "the neighbour was not answered"

    def close(self) -> None:
        self.goes_on()
        self._stopping.set()
        self._thread.join(2 * WAIT_S)
        self._client.close()
        assert self.daemon.stop() == 0
        no_traceback(self.daemon)
        self.daemon.close()

    def log_lines(self) -> list[str]:
        """All lines but those about answers."""
        lines = self.daemon.log.read_text().splitlines()
        return [line for line in lines if " INFO answered " not in line]

    def _ask(self) -> None:
        while not self._stopping.is_set():
            name = f"n{self.answered}"
            while True:
                self._client.ask(HERS, id=name)
                answer = self._client.answer(name, HERS)
                if answer.get("code") != "busy":
                    break
                time.sleep(0.05)
            assert answer["type"] == "final", answer
            self.answered += 1


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("node")
    (directory / "broker").mkdir()
    often = ("autosave_on_changes false", "autosave_interval 600")  # or it writes its state for each message
    limits = ("max_queued_messages 20000", "max_inflight_messages 2000")
    broker = Mosquitto(directory / "broker", ("allow_anonymous true", *often, *limits))
    broker.start()
    node = Node(directory, broker)
    yield node
    node.close()
    broker.stop()


@pytest.fixture
def attacker(node: Node) -> Iterator[Attacker]:
    attacker = Attacker(node.broker.port, "him", HIS)
    yield attacker
    attacker.close()
    node.goes_on()


def marker(attacker: Attacker) -> None:
    """Return when all that the attacker sent before has been read by the node."""
    name = f"m{random.randrange(10**9)}"
    attacker.publish(REQUEST, json.dumps({"id": name}).encode(), reply=HIS)
    assert attacker.answer(name, HIS, 2 * WAIT_S)["code"] in ("bad_request", "busy")


JUNK: dict[str, Callable[[int], tuple[str, bytes, dict[str, Any]]]] = {
    "cancellations that are no JSON": lambda n: (CANCEL, b"\xff%d" % n, {"reply": HIS}),
    "cancellations of nothing": lambda n: (CANCEL, b'{"id":"x%d"}' % n, {"reply": HIS}),
    "requests without a response topic": lambda n: (REQUEST, b'{"id":"x%d","prompt":"x"}' % n, {}),
    "requests whose answers may not go there": lambda n: (
        REQUEST,
        b'{"id":"x%d","prompt":"x"}' % n,
        {"reply": f"elsewhere/{n}"},
    ),
    "requests in the name of another user": lambda n: (
        f"{REQUEST}/him",
        b'{"id":"x%d","prompt":"x"}' % n,
        {"reply": "edge/v1/pump/reply/her/x"},
    ),
    "requests that are no JSON": lambda n: (REQUEST, b"{%d" % n, {"reply": HIS}),
    "requests with a field of the wrong type": lambda n: (
        REQUEST,
        b'{"id":"x%d","prompt":%d}' % (n, n),
        {"reply": HIS},
    ),
    "retained requests": lambda n: (REQUEST, b'{"id":"x%d","prompt":"x"}' % n, {"flags": 0x03}),
    "births of Home Assistant": lambda n: ("homeassistant/status", b"online", {}),
    "readings that are no numbers": lambda n: (f"sensors/{n}", b"?%d" % n, {}),
    "a reading that goes up and down": lambda n: ("sensors/updown", b"%d" % (20 * (n % 2)), {}),
    "readings of ever other sensors": lambda n: (f"sensors/{n}", b"%d" % n, {}),
    "readings on a topic of 60,000 bytes": lambda n: (f"sensors/{n}/" + "x" * 60_000, b"1", {}),
    "user properties": lambda n: (
        REQUEST,
        b'{"id":"x%d","prompt":1}' % n,
        {"reply": HIS, "more": 400 * (bytes([USER]) + text(f"k{n}") + text("v" * 50))},
    ),
}


@pytest.mark.parametrize("case", JUNK)
def test_a_flood_of_junk_fills_neither_log_nor_memory(node: Node, attacker: Attacker, case: str) -> None:
    lines, before = len(node.log_lines()), node.daemon.memory()
    for index in range(600 if "60,000" not in case and "user" not in case else 200):
        topic, payload, options = JUNK[case](index)
        attacker.publish(topic, payload, **options)
    marker(attacker)
    node.goes_on()
    grown, logged = node.daemon.memory() - before, node.log_lines()[lines:]
    attacker.publish(REQUEST, b"", flags=0x03)  # so that nothing stays retained
    assert len(logged) < MAX_LINES, logged[:5]
    assert grown < MAX_GROWTH, f"{grown >> 20} MiB"


def test_refusals_with_large_correlation_data_fill_no_memory(node: Node, attacker: Attacker) -> None:
    before = peak = node.daemon.memory()
    for index in range(400):
        attacker.publish(REQUEST, b'{"id":"x%d"}' % index, reply=HIS, correlation=bytes(60_000))
        if index % 50 == 0:
            peak = max(peak, node.daemon.memory())
    marker(attacker)
    assert max(peak, node.daemon.memory()) - before < MAX_GROWTH


def test_readings_of_a_megabyte_fill_no_memory(node: Node, attacker: Attacker) -> None:
    before = peak = node.daemon.memory()
    payload = b"9" * 900_000
    for index in range(120):
        attacker.publish(f"sensors/large/{index}", payload, flags=0)
        peak = max(peak, node.daemon.memory())
    marker(attacker)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        peak = max(peak, node.daemon.memory())
    assert peak - before < MAX_GROWTH, f"{(peak - before) >> 20} MiB"


SECRET = "xyzzy"
TELLING: dict[str, dict[str, Any]] = {
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": SECRET}}}},
    "a keyword": {
        "response_format": {"type": "json_schema", "json_schema": {"schema": {SECRET: 1, "$ref": SECRET}}}
    },
    "an expression": {"response_format": {"type": "regex", "regex": f"({SECRET}"}},
    "a tool": {
        "tools": [{"function": {"name": "f", "parameters": {"properties": {SECRET: {"type": SECRET}}}}}]
    },
    "an unknown key": {SECRET: 1},
    "a role": {"messages": [{"role": SECRET, "content": "x"}]},
    "a long prompt": {"prompt": f"{SECRET} " * 5000},
}


@pytest.mark.parametrize("case", TELLING)
def test_what_a_client_asks_is_told_to_nobody_else(node: Node, attacker: Attacker, case: str) -> None:
    """Health is retained for everybody, and the log is read by whoever looks after the board."""
    name = f"t{random.randrange(10**9)}"
    attacker.ask(HIS, id=name, **TELLING[case])
    assert attacker.answer(name, HIS)["type"] == "error"
    node.goes_on()
    time.sleep(1.2)  # health is published once a second at most
    assert SECRET not in json.dumps(node.broker.retained("edge/v1/pump/health"))
    assert SECRET not in node.daemon.log.read_text()


@pytest.mark.slow
def test_nobody_is_told_what_others_have_asked(tmp_path: Path, mosquitto: Mosquitto) -> None:
    """`usage.cached` counts what the client itself has asked before, not what others have."""
    config = f"queue = 8\n[mqtt]\nport = {mosquitto.port}\n"
    with contextlib.closing(DaemonProcess(tmp_path, real_bundle(), config)) as daemon:
        daemon.start()
        mosquitto.retained("edge/v1/pump/status")
        her, him = Attacker(mosquitto.port, "her", HERS), Attacker(mosquitto.port, "him", HIS)
        code = "4711 opens the door of the pump house, the alarm is off at night, the key is under the mat. "
        for number in range(3):  # so that a snapshot of what they begin with is kept too
            her.ask(HERS, id=f"h{number}", prompt=code + f"Good {number}?")
            assert her.answer(f"h{number}")["type"] == "final"
        him.ask(HIS, id="guess", prompt=code + "Well?")
        guessed = him.answer("guess")["usage"]
        her.close()
        him.close()
        assert daemon.stop() == 0
    assert guessed["prompt"] > 20
    assert guessed["cached"] < 4, guessed


def test_a_client_can_not_cancel_what_another_has_asked_without_knowing_its_id(
    node: Node, attacker: Attacker
) -> None:
    """Ids are guessed a thousand times; the neighbour, whose ids can be guessed, is no example."""
    topic = "edge/v1/pump/reply/long"
    client = Attacker(node.broker.port, "long", topic)
    name = f"{random.getrandbits(128):032x}"
    client.ask(topic, id=name, max_tokens=800)
    for guess in range(1000):
        attacker.publish(CANCEL, b'{"id":"%d"}' % guess, reply=topic)
    answer = client.answer(name)
    client.close()
    assert answer.get("finish_reason") in ("stop", "length"), answer


def test_a_client_that_ends_in_the_middle_of_everything_harms_nobody(node: Node) -> None:
    whole = publish(REQUEST, b'{"id":"half","prompt":"Pump?","max_tokens":9}', reply=HIS)
    for length in range(1, len(whole), 7):
        client = Attacker(node.broker.port, f"half{length}")
        client.send(whole[:length])
        client.close()
    node.goes_on()
