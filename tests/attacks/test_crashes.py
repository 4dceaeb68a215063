"""Daemon and broker killed under load: every request is answered once, and none is lost."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.client.links import SerialLink
from edge.endpoints import SerialConfig
from edge.errors import TransportError
from edge.protocol.messages import Answer, Failure, Final, Partial, Request, parse_answer
from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, PtyPair, wait_for
from tests.support.mqtt_load import MqttLoad, keep_busy, one_answer_each, wait_until_back


class SerialLoad(threading.Thread):
    """Asks one question after the other over a serial line, each until it is answered."""

    def __init__(self, port: Path) -> None:
        super().__init__()
        self.answers: list[list[Answer]] = []
        self.stopping = threading.Event()
        self._link = SerialLink(SerialConfig(str(port), 115_200, "none", lenient=False))

    def run(self) -> None:
        while not self.stopping.is_set():
            request = Request(f"s{len(self.answers)}", "Pump?", max_tokens=100, stream=False)
            try:
                self.answers.append(list(self._link.ask(request, WAIT_S)))
            except TransportError:  # the daemon was killed again before it could say that it had it
                continue
            if isinstance(self.answers[-1][-1], Failure):  # several kills have hit its requests
                self.stopping.wait(1)
        self._link.close()


@pytest.fixture
def daemon(tmp_path: Path, mosquitto: Mosquitto, ptys: PtyPair) -> Iterator[DaemonProcess]:
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=4096)
    config = f'queue = 16\ndrain_s = 60\n[mqtt]\nport = {mosquitto.port}\n[[serial]]\nport = "{ptys.near}"\n'
    daemon = DaemonProcess(tmp_path, bundle, config)
    yield daemon
    daemon.close()


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
    wait_for(lambda: len(line.answers) > 1)  # on a busy machine each of few kills may have come before one
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
    one_answer_each(
        f"daemon killed {kills} times", load, [answer for found in line.answers for answer in found]
    )
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
    one_answer_each(f"broker killed {kills} times", load, [])
    assert "Traceback" not in daemon.log.read_text()


def test_an_answer_waits_for_a_broker_that_is_away_longer_than_the_daemon(
    daemon: DaemonProcess, mosquitto: Mosquitto
) -> None:
    daemon.start()
    load = MqttLoad(mosquitto, repeats=False)
    load.ask("long", max_tokens=1500, stream=True)
    wait_for(lambda: load.partials["long"])
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
