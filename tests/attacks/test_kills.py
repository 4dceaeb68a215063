"""Daemon and broker killed a thousand times: no request is lost, and no kill is charged to the bundle."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage

from edge.bundles.installation import install
from edge.bundles.record import read_record
from edge.bundles.store import BundleStore
from edge.protocol.messages import Failure, Final, parse_answer
from tests.attacks.wire import no_traceback
from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, wait_for
from tests.support.mqtt_load import OUTSTANDING, STATUS, MqttLoad, keep_busy, wait_until_back

REUSED = 0.3  # of the requests have the id and the content of an earlier one


class ForgetfulLoad(MqttLoad):
    """Asks new questions and, under the same ids, old ones again; notes answers that differ."""

    def __init__(self, broker: Mosquitto) -> None:
        self._lengths: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        self._choice = random.Random(13)
        self.different: list[str] = []
        super().__init__(broker, repeats=True)

    def fill(self) -> None:
        while len(self._waiting) < OUTSTANDING:
            old = [name for name in self.answers if name not in self._waiting]
            if old and self._choice.random() < REUSED:
                name = self._choice.choice(old)
            else:
                name = f"k{len(self._lengths)}"
                self._lengths[name] = self._choice.randint(1, 200)
            self.ask(name, self._lengths[name])

    def _heard(self, client: Client, data: Any, message: MQTTMessage) -> None:
        if message.topic != STATUS:
            answer = parse_answer(bytes(message.payload))
            if isinstance(answer, Final) and self._texts.setdefault(answer.id, answer.text) != answer.text:
                self.different.append(answer.id)
        super()._heard(client, data, message)


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """Two installed bundles, so that there is one to fall back to."""
    store = BundleStore(tmp_path / "bundles" / "current")
    for name in ("gemma4-one-kv-head", "gemma4-two-kv-heads"):
        store.activate(install(store, bundles.small_bundle(name, "int8", context=4096), None).name)
    return store


@pytest.fixture
def daemon(tmp_path: Path, mosquitto: Mosquitto, store: BundleStore) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(
        tmp_path, store.link, f"queue = 16\ndrain_s = 60\n[mqtt]\nport = {mosquitto.port}\n"
    )
    yield daemon
    daemon.close()


@pytest.mark.parametrize(
    ("kills", "seed"), [(4, 0), *(pytest.param(250, seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_kills_of_daemon_and_broker_lose_no_request_and_leave_the_bundle(
    daemon: DaemonProcess, mosquitto: Mosquitto, store: BundleStore, kills: int, seed: int
) -> None:
    links, chance, killed = (store.current, store.previous), random.Random(seed), Counter[str]()
    daemon.start()
    load = ForgetfulLoad(mosquitto)
    for number in range(kills):
        keep_busy(load, chance.uniform(0.02, 0.5))
        what = (
            ("daemon", "broker")[number % 2]
            if kills < 10
            else chance.choice(("daemon", "daemon", "broker", "both"))
        )
        killed[what] += 1
        online, connections = load.online, load.connections
        if what != "broker":
            assert daemon.process is not None
            daemon.process.kill()
            daemon.process.wait(WAIT_S)
        if what != "daemon":
            mosquitto.stop(kill=True)
            mosquitto.start()
        if what != "broker":
            daemon.start()
        if what != "daemon":
            wait_until_back(load, online, connections)
    wait_for(lambda: load.satisfied)
    assert daemon.stop() == 0
    load.close()
    kinds = Counter(
        answer.code if isinstance(answer, Failure) else "final"
        for answer in map(parse_answer, load.answers.values())
    )
    print(f"{dict(killed)}: {len(load.asked)} requests, {dict(kinds)}, {load.copies} copies")
    assert set(load.answers) == set(load.asked)
    assert (load.others, load.different) == ([], [])
    assert set(kinds) <= {"final", "internal", "unavailable"}
    charged = kinds["internal"] + kinds["unavailable"]  # at least two kills each came during work on it
    assert 2 * charged <= killed["daemon"] + killed["both"]
    assert (store.current, store.previous) == links
    assert read_record(store.directory).failures == ()
    no_traceback(daemon)
