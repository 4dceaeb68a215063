"""Damage to any file that the daemon writes: it starts, answers as before, and loses nothing."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.wire import Attacker, no_traceback
from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto
from tests.support.real_bundle import real_bundle

REPLY = "edge/v1/pump/reply/witness/"
SYSTEM = "You watch the pumps of a waterworks. Answer in one sentence. Say so when you do not know. " * 3
FORM = {
    "type": "json_schema",
    "json_schema": {"schema": {"type": "object", "properties": {"ok": {"type": "boolean"}}}},
}
QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "Pump 3 reports 9.5 bar.", "max_tokens": 12},
    {"prompt": SYSTEM + "9 bar?", "max_tokens": 8},
    {"prompt": SYSTEM + "7 bar?", "max_tokens": 8},  # what both begin with is kept on the disk
    {"prompt": "Is it good?", "max_tokens": 16, "response_format": FORM},
]
ROUTE = """
[[route]]
name = "pumps"
topics = ["sensors/+/pressure"]
event_topic = "alarms/{sensor}"
[route.trigger]
silence_s = 600
"""


def flip(raw: bytearray, chance: random.Random) -> None:
    """A flipped bit, as a worn card has it."""
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)


def high_bit(raw: bytearray, chance: random.Random) -> None:
    """A byte that is not ASCII."""
    raw[chance.randrange(len(raw))] |= 0x80


def noise(raw: bytearray, chance: random.Random) -> None:
    """A few random bytes in one place."""
    at = chance.randrange(len(raw))
    raw[at : at + 16] = chance.randbytes(min(16, len(raw) - at))


def zeros(raw: bytearray, chance: random.Random) -> None:
    """A block of zeros, as a power cut leaves."""
    at = chance.randrange(len(raw)) // 512 * 512
    raw[at : at + 4096] = bytes(len(raw[at : at + 4096]))


def cut(raw: bytearray, chance: random.Random) -> None:
    """An end that is missing."""
    del raw[chance.randrange(len(raw)) :]


def grow(raw: bytearray, chance: random.Random) -> None:
    """An end that does not belong there."""
    raw += chance.randbytes(chance.randint(1, 5000))


def empty(raw: bytearray, _chance: random.Random) -> None:
    """A file without content."""
    raw.clear()


DAMAGES = (flip, high_bit, noise, zeros, cut, grow, empty)
Damage = Callable[[bytearray, random.Random], None]


class Node:
    """A daemon with a store, a route and a broker, and a client that knows what it answers when unharmed."""

    def __init__(self, directory: Path, bundle: Path, broker: Mosquitto) -> None:
        self.directory, self.broker = directory, broker
        store = directory / "bundles"
        store.mkdir()
        (store / "good").symlink_to(bundle)
        (store / "current").symlink_to("good")
        config = f"queue = 16\n[mqtt]\nport = {broker.port}\n{ROUTE}"
        self.daemon = DaemonProcess(directory, store / "current", config)
        self.client = Attacker(broker.port, "witness", REPLY + "#", "edge/v1/pump/status")
        self.asked = 0
        self.expected: list[str] = []

    def start(self) -> None:
        self.daemon.start()

    def stop(self, kill: bool) -> None:
        if kill:
            assert self.daemon.process is not None
            self.daemon.process.kill()
            self.daemon.process.wait(WAIT_S)
        else:
            assert self.daemon.stop() == 0

    def ask(self) -> list[str]:
        """Ask all questions, without waiting; each as another client, since one may be blamed for kills."""
        names = []
        for question in QUESTIONS:
            self.asked += 1
            names.append(f"q{self.asked}")
            self.client.ask(REPLY + names[-1], id=names[-1], **question)
        return names

    def answers(self, names: list[str]) -> list[str]:
        """The texts of the answers."""
        answers = [self.client.answer(name, timeout_s=4 * WAIT_S) for name in names]
        assert all(answer["type"] == "final" for answer in answers), answers
        return [answer["text"] for answer in answers]

    def learn(self) -> None:
        """Have it write all its files; remember what it answers."""
        self.start()
        while self.client.heard.get(timeout=WAIT_S).content.get("state") != "online":
            pass
        self.client.publish("sensors/a/pressure", b"9.5")
        self.expected = self.answers(self.ask())
        assert self.answers(self.ask()) == self.expected
        self.stop(kill=False)

    def files(self) -> list[Path]:
        """What the daemon has written, the record in the store among it."""
        roots = [self.directory / "cache", self.directory / "state", self.directory / "bundles"]
        found = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
        return [path for path in found if not path.is_relative_to(self.directory / "bundles" / "good")]

    def close(self) -> None:
        self.client.close()
        self.daemon.close()


def damage(path: Path, how: Damage, chance: random.Random) -> None:
    """Damage a file where it lies; its times stay, as they do on a card that forgets."""
    status, raw = path.stat(), bytearray(path.read_bytes())
    if raw:
        how(raw, chance)
    with path.open("r+b") as file:
        file.write(raw)
        file.truncate()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def node(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[Node]:
    node = Node(tmp_path, bundles.small_bundle("gemma4-two-kv-heads", "int8", context=2048), mosquitto)
    try:
        node.learn()
        yield node
    finally:
        node.close()


def restarted(node: Node, path: Path, how: Damage, chance: random.Random) -> None:
    """Damage a file between two runs, and hold the next run to what is promised."""
    before = f"{how.__name__} in {path.relative_to(node.directory)}"
    damage(path, how, chance)
    try:
        node.start()
        assert node.answers(node.ask()) == node.expected, before
    except AssertionError as error:
        raise AssertionError(f"{before}: {error}\n{node.daemon.log.read_text()[-2000:]}") from None


def test_every_file_that_the_daemon_writes_can_be_damaged(node: Node) -> None:
    """One byte of each file, by turns one that is no longer UTF-8."""
    suffixes = {path.suffix for path in node.files()}
    assert {
        ".stamp",
        ".verified",
        ".tested",
        ".vocabulary",
        ".xnnpack",
        ".kv",
        ".sqlite",
        ".json",
    } <= suffixes
    chance = random.Random(12)
    for path in node.files():
        restarted(node, path, flip if path.suffix in (".vocabulary", ".xnnpack", ".kv") else high_bit, chance)
        node.stop(kill=False)
    no_traceback(node.daemon)


def property_of_restarts(node: Node, restarts: int, seed: int) -> None:
    """Kill or stop the daemon with requests on their way, damage any file, start it; so many times.

    A request that the daemon has taken from the broker is acknowledged when its answer is out. So each of
    them is answered, whatever became of the journal: the broker delivers again what is not acknowledged.
    """
    chance = random.Random(seed)
    node.start()
    for number in range(restarts):
        under_way = node.ask() if chance.random() < 0.7 else []
        time.sleep(chance.uniform(0, 0.1))
        node.stop(kill=chance.random() < 0.7)
        path, how = chance.choice(node.files()), chance.choice(DAMAGES)
        before = f"restart {number}: {how.__name__} in {path.relative_to(node.directory)}"
        damage(path, how, chance)
        try:
            node.start()
            if under_way:
                assert node.answers(under_way) == node.expected
            assert node.answers(node.ask()) == node.expected
        except AssertionError as error:
            raise AssertionError(f"{before}: {error}\n{node.daemon.log.read_text()[-3000:]}") from None
    node.stop(kill=False)
    no_traceback(node.daemon)
    print(f"{restarts} restarts with damage, {node.asked} requests: all answered as before")


@pytest.mark.parametrize("restarts", [6, pytest.param(500, marks=pytest.mark.slow)])
def test_after_damage_to_any_file_it_starts_answers_as_before_and_loses_nothing(
    node: Node, restarts: int
) -> None:
    property_of_restarts(node, restarts, seed=restarts)


@pytest.mark.slow
def test_the_real_model_survives_damage_to_any_file(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with contextlib.closing(Node(tmp_path, real_bundle(), mosquitto)) as node:
        node.learn()
        property_of_restarts(node, 40, seed=270)
