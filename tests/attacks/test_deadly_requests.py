"""Requests that end the daemon: they and their client pay for it, not the bundle and not the neighbours."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from edge.bundles.installation import install
from edge.bundles.record import read_record
from edge.bundles.store import BundleStore
from edge.protocol.messages import Failure, Final, parse_answer
from edge.requests.crashes import SUSPEND_AFTER
from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, wait_for
from tests.support.mqtt_load import MqttLoad

LONG = 1000  # tokens: work on it still goes on when the kill comes


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    """Two installed bundles, so that there is one to fall back to."""
    store = BundleStore(tmp_path / "bundles" / "current")
    for name in ("gemma4-one-kv-head", "gemma4-two-kv-heads"):
        store.activate(install(store, bundles.small_bundle(name, "int8", context=4096), None).name)
    return store


@pytest.fixture
def daemon(tmp_path: Path, mosquitto: Mosquitto, store: BundleStore) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path, store.link, f"queue = 16\n[mqtt]\nport = {mosquitto.port}\n")
    yield daemon
    daemon.close()


def restart(daemon: DaemonProcess) -> None:
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait(WAIT_S)
    daemon.start()


def test_kills_during_requests_with_fresh_ids_are_charged_to_their_client_only(
    daemon: DaemonProcess, mosquitto: Mosquitto, store: BundleStore
) -> None:
    links = store.current, store.previous
    daemon.start()
    deadly = MqttLoad(mosquitto, repeats=False, client="deadly")
    neighbour = MqttLoad(mosquitto, repeats=False, client="neighbour")
    for number in range(SUSPEND_AFTER):
        name = f"deadly{number}"
        deadly.ask(name, LONG, stream=True)
        wait_for(partial(deadly.partials.get, name))
        neighbour.ask(f"n{number}", 3)
        restart(daemon)
    wait_for(lambda: neighbour.satisfied and deadly.satisfied)
    assert all(isinstance(parse_answer(answer), Final) for answer in neighbour.answers.values())
    deadly.ask("one-more", 3)
    wait_for(lambda: deadly.satisfied)
    refusal = parse_answer(deadly.answers["one-more"])
    assert isinstance(refusal, Failure)
    assert (refusal.code, 0 < (refusal.retry_after_ms or 0) <= 600_000) == ("unavailable", True)
    neighbour.ask("last", 3)
    wait_for(lambda: neighbour.satisfied)
    assert isinstance(parse_answer(neighbour.answers["last"]), Final)
    assert (store.current, store.previous) == links
    assert read_record(store.directory).failures == ()
    assert daemon.stop() == 0
    for load in (deadly, neighbour):
        assert (load.copies, load.others) == (0, [])
        load.close()
    assert "Traceback" not in daemon.log.read_text()
