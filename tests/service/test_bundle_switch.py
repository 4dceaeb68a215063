"""The daemon and its bundle store: a switch loses no request; a bad bundle is refused or rolled back."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from converters.golden import record_golden
from edge.board import Board
from edge.bundles.bundle import DECODER, MANIFEST, read_manifest
from edge.bundles.installation import install
from edge.bundles.record import DaemonRecord, daemon_lives, read_record
from edge.bundles.store import BundleStore
from edge.config import load
from edge.errors import BundleError
from edge.files import write_atomically
from edge.protocol.messages import Answer, Final, Request, parse_answer
from edge.requests.engine import Engine
from edge.runtime.weight_cache import PackedWeights
from edge.service import bundle_keeper
from edge.service.bundle_keeper import StoreKeeper
from tests.attacks.test_crashes import SerialLoad
from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, PtyPair, edge_command, wait_for
from tests.support.mqtt_load import MqttLoad

TEXT = "The hut stands on a shoulder of the hill, where the wind does not reach it with its full strength."


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two bundles with recordings for the self-test."""
    made = {}
    for name in ("gemma4-two-kv-heads", "gemma4-one-kv-head"):
        small = bundles.small_bundle(name, "int8", context=4096)
        made[name] = bundles.copy_of(small, tmp_path_factory.mktemp("bundles") / name)
        record_golden(made[name], TEXT, bundles.cache_directory())
    return made


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "bundles" / "current")


@pytest.fixture
def names(store: BundleStore, good: dict[str, Path]) -> tuple[str, str]:
    """Two installed bundles; the first is current, the second previous."""
    first, second = (install(store, directory, None).name for directory in good.values())
    store.activate(second)
    store.activate(first)
    return first, second


@pytest.fixture
def wrong(store: BundleStore, names: tuple[str, str], good: dict[str, Path], tmp_path: Path) -> str:
    """A third bundle: its files are intact, but its model does not reproduce the recording."""
    directory = bundles.copy_of(good["gemma4-one-kv-head"], tmp_path / "wrong")
    manifest = read_manifest(directory)
    assert manifest.golden is not None
    other = replace(manifest, golden=replace(manifest.golden, loss=manifest.golden.loss + 0.5))
    write_atomically(directory / MANIFEST, other.to_json().encode())
    return install(store, directory, None).name


@pytest.fixture
def daemon(
    tmp_path: Path, store: BundleStore, mosquitto: Mosquitto, ptys: PtyPair
) -> Iterator[DaemonProcess]:
    config = f'queue = 16\n[mqtt]\nport = {mosquitto.port}\n[[serial]]\nport = "{ptys.near}"\n'
    daemon = DaemonProcess(tmp_path, store.link, config)
    yield daemon
    daemon.close()


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = edge_command("daemon", "bundle", *arguments, "--config", str(tmp_path / "edge.toml"))
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=2 * WAIT_S)


def online_with(mosquitto: Mosquitto, name: str) -> None:
    wanted = {"state": "online", "model": "gemma4", "bundle": name, "context": 4096}
    wait_for(lambda: wanted.items() <= mosquitto.retained("edge/v1/pump/status").items())


def test_a_switch_under_load_answers_every_request_once(
    daemon: DaemonProcess,
    mosquitto: Mosquitto,
    ptys: PtyPair,
    store: BundleStore,
    names: tuple[str, str],
    tmp_path: Path,
) -> None:
    first, second = names
    daemon.start()
    online_with(mosquitto, first)
    mqtt, line = MqttLoad(mosquitto, repeats=False), SerialLoad(ptys.far)
    line.start()
    switching = threading.Event()

    def keep_asking() -> None:
        while not switching.is_set():
            mqtt.fill()
            time.sleep(0.01)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    for arguments in (["activate", second[:6]], ["rollback"], ["rollback"]):
        mqtt.wait_for_more(4)
        done = command(tmp_path, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{store.current}: the daemon now uses it\n"
    switching.set()
    asking.join(WAIT_S)
    line.stopping.set()
    wait_for(lambda: mqtt.satisfied)
    line.join(WAIT_S)
    online_with(mosquitto, second)
    assert (store.current, store.previous) == (second, first)
    assert daemon.stop() == 0
    mqtt.close()
    answers = [*([parse_answer(payload)] for payload in mqtt.answers.values()), *line.answers]
    assert all(isinstance(answer, Final) for (answer,) in answers)
    assert (mqtt.copies, mqtt.others) == (0, [])
    counts = f"{len(mqtt.answers)} requests over MQTT, {len(line.answers)} over serial"
    print(f"3 switches, {counts}: one answer each")
    log = daemon.log.read_text()
    assert log.count(f"bundle {second} has replaced {first}") == 2
    assert "Traceback" not in log


def test_a_bundle_that_fails_its_self_test_is_refused_and_the_old_one_continues(
    daemon: DaemonProcess,
    mosquitto: Mosquitto,
    store: BundleStore,
    names: tuple[str, str],
    wrong: str,
    tmp_path: Path,
) -> None:
    first, second = names
    daemon.start()
    online_with(mosquitto, first)
    load = MqttLoad(mosquitto, repeats=False)
    load.ask("before", 300)
    done = command(tmp_path, "activate", wrong)
    load.ask("after", 3)
    assert done.returncode == 3
    assert f"bundle {wrong} is refused: " in done.stderr
    assert "the self-test failed: the loss over its text is" in done.stderr
    assert (store.current, store.previous) == (first, second)
    wait_for(lambda: load.satisfied)
    load.close()
    online_with(mosquitto, first)
    wait_for(lambda: "is refused" in str(mosquitto.retained("edge/v1/pump/health")["last_error"]))
    listed = json.loads(command(tmp_path, "list", "--json").stdout)
    assert "is refused" in listed["trouble"]
    states = [(each["name"], each["state"], each["running"]) for each in listed["bundles"]]
    assert states == [(first, "current", True), (second, "previous", False), (wrong, None, False)]
    assert daemon.stop() == 0


def test_a_bundle_that_fails_to_start_three_times_is_rolled_back(
    daemon: DaemonProcess,
    mosquitto: Mosquitto,
    store: BundleStore,
    names: tuple[str, str],
    wrong: str,
    tmp_path: Path,
) -> None:
    first, _ = names
    done = command_without_daemon(daemon, tmp_path, "activate", wrong)
    assert done.stdout == f"{wrong}: no daemon is running; the next start uses it\n"
    for _ in range(2):
        daemon.start(wait=False)
        assert daemon.end() == 3
        assert store.current == wrong
    daemon.start()
    assert (store.current, store.previous) == (first, None)
    said = f"bundle {wrong} has failed 3 times in an hour"
    wait_for(lambda: said in str(mosquitto.retained("edge/v1/pump/health")["last_error"]))
    assert daemon.stop() == 0
    daemon.start()
    assert read_record(store.directory).running == first
    wait_for(lambda: said in str(mosquitto.retained("edge/v1/pump/health")["last_error"]))


def command_without_daemon(
    _config_written_by: DaemonProcess, tmp_path: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return command(tmp_path, *arguments)


def kill_while_loading(daemon: DaemonProcess, store: BundleStore, failures: int) -> None:
    """Kill a daemon with a count of `failures` while it loads its bundle; repeat if the kill was too late."""

    def loading() -> bool:
        record = read_record(store.directory)
        return record.begun is not None and len(record.failures) == failures

    def too_late() -> bool:
        return daemon.log.read_text().count(" answers with ") > misses

    daemon.log.touch()
    misses = daemon.log.read_text().count(" answers with ")
    while True:
        daemon.start(wait=False)
        assert daemon.process is not None
        wait_for(lambda: loading() or too_late())
        daemon.process.kill()
        daemon.process.wait(WAIT_S)
        if loading():
            return
        misses += 1


def test_a_bundle_whose_loading_is_killed_three_times_is_rolled_back(
    daemon: DaemonProcess, mosquitto: Mosquitto, store: BundleStore, names: tuple[str, str]
) -> None:
    first, second = names
    store.activate(second)
    for failures in range(3):
        assert store.current == second
        kill_while_loading(daemon, store, failures)
    daemon.start()
    assert (store.current, store.previous) == (first, None)
    said = "failure 3 of 3 in an hour: the daemon was killed or crashed while it loaded the bundle"
    assert said in daemon.log.read_text()
    online_with(mosquitto, first)
    assert daemon.stop() == 0


@pytest.mark.parametrize(("crashed_in_work", "failures"), [(True, 0), (False, 1)])
def test_a_crash_while_a_request_is_in_work_is_not_charged_to_the_bundle(
    tmp_path: Path, store: BundleStore, names: tuple[str, str], crashed_in_work: bool, failures: int
) -> None:
    record = DaemonRecord(store.directory)
    record.change(begun=names[1])
    record.close()
    running = RunningKeeper(tmp_path, store, crashed_in_work)
    assert len(read_record(store.directory).failures) == failures
    running.end()


class RunningKeeper:
    """A keeper with an engine, in this process."""

    def __init__(self, tmp_path: Path, store: BundleStore, crashed_in_work: bool = False) -> None:
        config = tmp_path / "edge.toml"
        config.write_text(
            f'bundle = "{store.link}"\ncache_directory = "cache"\nthreads = 1\n'
            'state_directory = "state"\n[[serial]]\nport = "/dev/nothing"\n'
        )
        self.keeper = StoreKeeper(load(config), Board(), force=False)
        self.engine = Engine(self.keeper.open(crashed_in_work), queue_length=8)
        self.switches = 0
        self.keeper.attach(self.engine, self._switched)
        self.engine.start()
        self.answers: list[Answer] = []

    def ask(self, name: str, tokens: int) -> None:
        self.engine.submit("", Request(name, "Pump?", max_tokens=tokens, stream=False), self.answers.append)

    def text(self, name: str) -> str:
        self.ask(name, 8)
        wait_for(lambda: any(answer.id == name for answer in self.answers))
        (found,) = [answer for answer in self.answers if answer.id == name]
        assert isinstance(found, Final), found
        return found.text

    def look_until(self, what: Callable[[], object]) -> None:
        def looked() -> object:
            self.keeper.poll()
            return what()

        wait_for(looked)

    def end(self) -> None:
        self.engine.stop(WAIT_S)
        self.keeper.close()

    def _switched(self) -> None:
        self.switches += 1


@pytest.fixture
def running(tmp_path: Path, store: BundleStore, names: tuple[str, str]) -> Iterator[RunningKeeper]:
    running = RunningKeeper(tmp_path, store)
    yield running
    running.end()


def test_packed_weights_damaged_while_in_use_are_repacked_between_requests(
    running: RunningKeeper, tmp_path: Path
) -> None:
    before = running.text("before")
    (packed,) = (tmp_path / "cache").glob("*.xnnpack")
    overwrite(packed, packed.stat().st_size // 4, os.urandom(packed.stat().st_size // 2))
    running.look_until(lambda: "damaged; they were packed again" in (running.engine.last_error or ""))
    assert running.text("after") == before
    assert PackedWeights(packed).check()


def overwrite(path: Path, at: int, content: bytes) -> None:
    """Change a file in place and preserve its times, as a bad card does."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("together", [True, False])
def test_requests_that_wait_during_a_switch_are_answered_by_the_new_bundle(
    running: RunningKeeper,
    store: BundleStore,
    names: tuple[str, str],
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bundle_keeper, "fit_together", lambda *_: together)
    before = running.text("before")
    running.ask("long", 500)
    wait_for(lambda: running.engine.working)
    store.activate(names[1])
    running.look_until(lambda: running.switches)
    assert len(running.answers) == 2
    after = running.text("after")
    assert after != before
    store.activate(names[0])
    running.look_until(lambda: running.switches == 2)
    assert running.text("again") == before


@pytest.mark.parametrize("together", [True, False])
def test_a_bundle_that_is_refused_leaves_the_old_one_in_place(
    running: RunningKeeper, store: BundleStore, wrong: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_keeper, "fit_together", lambda *_: together)
    before, old = running.text("before"), store.current
    store.activate(wrong)
    running.look_until(lambda: store.current == old)
    running.look_until(lambda: read_record(store.directory).begun is None)
    assert running.text("after") == before
    assert running.switches == 0
    assert "is refused" in str(running.engine.last_error)


def test_a_bundle_that_is_damaged_on_the_card_is_refused(
    running: RunningKeeper, store: BundleStore, names: tuple[str, str]
) -> None:
    decoder = store.path(names[1]) / DECODER
    content = bytearray(decoder.read_bytes())
    content[-1] ^= 1
    decoder.write_bytes(content)
    store.activate(names[1])
    running.look_until(lambda: store.current == names[0])
    assert "its SHA-256 is not the manifest's" in str(running.engine.last_error)


def test_the_daemon_ends_if_neither_bundle_can_be_loaded(
    running: RunningKeeper, store: BundleStore, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_keeper, "fit_together", lambda *_: False)
    assert store.current is not None
    (store.path(store.current) / DECODER).unlink()
    store.activate(wrong)
    with pytest.raises(BundleError, match=r"neither bundle .* nor .* can be loaded"):
        running.look_until(lambda: False)


def test_a_bundle_is_rolled_back_after_three_decoder_failures(
    running: RunningKeeper, store: BundleStore, names: tuple[str, str]
) -> None:
    first, second = names
    store.activate(second)
    running.look_until(lambda: running.switches)
    running.engine.decoder_failures += 2
    running.look_until(lambda: True)
    assert store.current == second
    running.engine.decoder_failures += 1
    running.look_until(lambda: running.switches == 2)
    assert (store.current, store.previous) == (first, None)
    assert f"bundle {second} has failed 3 times in an hour" in str(running.engine.last_error)
    assert read_record(store.directory).trouble is not None
    store.activate(second)  # activating it again allows three more attempts
    running.look_until(lambda: running.switches == 3)
    assert read_record(store.directory).trouble is None
    assert read_record(store.directory).failures == ()


def test_packed_weights_are_cached_for_two_bundles_only(
    running: RunningKeeper, store: BundleStore, names: tuple[str, str], tmp_path: Path
) -> None:
    foreign = tmp_path / "cache" / "0123456789abcdef01234567.xnnpack"
    foreign.touch()
    store.activate(names[1])
    running.look_until(lambda: running.switches)
    cached_files = set(foreign.parent.glob("*.xnnpack"))
    assert len(cached_files) == 2
    assert foreign not in cached_files


def test_clean_stops_and_crashes_before_a_restart_of_the_board_do_not_count(
    tmp_path: Path, store: BundleStore, names: tuple[str, str]
) -> None:
    store.activate(names[1])
    for _ in range(4):
        RunningKeeper(tmp_path, store).end()
    record = store.directory / "daemon.json"
    for _ in range(4):
        crashed = RunningKeeper(tmp_path, store)
        crashed.keeper._record.change(begun=names[1])
        left = record.read_text()
        crashed.end()
        record.write_text(left.replace(read_record(store.directory).boot, "another boot"))
    running = RunningKeeper(tmp_path, store)
    assert read_record(store.directory).failures == ()
    assert store.current == names[1]
    running.end()


def test_only_one_daemon_can_use_a_store(running: RunningKeeper, store: BundleStore, tmp_path: Path) -> None:
    assert daemon_lives(store.directory)
    with pytest.raises(Exception, match="another daemon uses this store"):
        RunningKeeper(tmp_path, store)
    running.keeper.close()
    assert not daemon_lives(store.directory)
