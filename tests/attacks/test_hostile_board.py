"""A board that is short of something, or that others use too: limits, modes, signals, a second daemon."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attacks.wire import Attacker, no_traceback
from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, edge_command

REPLY = "edge/v1/pump/reply/board"


@pytest.fixture
def daemon(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[DaemonProcess]:
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=2048)
    with contextlib.closing(DaemonProcess(tmp_path, bundle, f"[mqtt]\nport = {mosquitto.port}\n")) as daemon:
        yield daemon
        if daemon.process is not None and daemon.process.poll() is None:
            assert daemon.stop() == 0
        no_traceback(daemon)


def is_answered(broker: Mosquitto, **fields: object) -> None:
    broker.retained("edge/v1/pump/status")
    with contextlib.closing(Attacker(broker.port, "board", REPLY)) as client:
        name = f"b{random.getrandbits(64)}"
        client.ask(REPLY, id=name, **fields)
        answer = client.answer(name, timeout_s=4 * WAIT_S)
        assert answer["type"] == "final", answer


def ready_or_ended(daemon: DaemonProcess) -> bool:
    """Wait until the daemon is ready (True) or has ended."""
    assert daemon.process is not None
    until = time.monotonic() + 2 * WAIT_S
    while daemon.process.poll() is None:
        assert time.monotonic() < until
        with contextlib.suppress(AssertionError):
            if "READY=1" in daemon.next_notice().split("\n"):
                return True
    return False


@pytest.mark.parametrize(
    "megabytes", [300, 600, *(pytest.param(n, marks=pytest.mark.slow) for n in (450, 800, 1000))]
)
def test_a_limit_on_address_space_is_served_or_explained(
    daemon: DaemonProcess, mosquitto: Mosquitto, megabytes: int
) -> None:
    """As under `ulimit -v`: no abort, no traceback; either answers come or one line says what to do."""
    daemon.within = ("sh", "-c", f'ulimit -v {megabytes * 1000}; exec "$@"', "sh")
    daemon.start(wait=False)
    if ready_or_ended(daemon):
        is_answered(mosquitto, max_tokens=20)
        return
    assert daemon.process is not None
    log = daemon.log.read_text()
    assert daemon.process.returncode > 0, log
    assert "Traceback" not in log, log
    assert log.splitlines()[-1].startswith("Error: "), log


def test_state_and_cache_are_nobody_elses_to_read(daemon: DaemonProcess, mosquitto: Mosquitto) -> None:
    """Questions, answers and what sensors say are in there; a daemon outside its unit has a umask of 022."""
    daemon.within = ("sh", "-c", 'umask 022; exec "$@"', "sh")
    daemon.start()
    is_answered(mosquitto)
    for root in (daemon.directory / "state", daemon.directory / "cache"):
        for path in (root, *root.rglob("*")):
            assert path.stat().st_mode & 0o077 == 0, f"{path} has mode {path.stat().st_mode:o}"


def test_a_second_daemon_on_the_same_state_is_refused_and_the_first_answers_on(
    daemon: DaemonProcess, mosquitto: Mosquitto
) -> None:
    daemon.start()
    command = edge_command("daemon", "run", "--config", str(daemon.directory / "edge.toml"))
    second = subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT_S, check=False)
    assert second.returncode == 1, second.stderr
    assert "another process" in second.stderr.splitlines()[-1], second.stderr
    is_answered(mosquitto)


@pytest.mark.parametrize("times", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_stop_at_any_moment_of_a_start_ends_it_and_the_next_start_works(
    daemon: DaemonProcess, mosquitto: Mosquitto, times: int
) -> None:
    daemon.start()
    assert daemon.stop() == 0
    chance = random.Random(times)
    for _ in range(times):
        daemon.start(wait=False)
        time.sleep(chance.uniform(0, 1.0))
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.end() in (0, 143, -signal.SIGTERM), daemon.log.read_text()[-2000:]
    daemon.start()
    is_answered(mosquitto)


def folder(path: Path, _precious: Path) -> None:
    path.mkdir()


def fifo(path: Path, _precious: Path) -> None:
    os.mkfifo(path)


def link(path: Path, precious: Path) -> None:
    path.symlink_to(precious)


def dead_link(path: Path, _precious: Path) -> None:
    path.symlink_to("/nonexistent/file")


@pytest.mark.parametrize(
    "put",
    [fifo, link, *(pytest.param(put, marks=pytest.mark.slow) for put in (folder, dead_link))],
    ids=lambda put: put.__name__,
)
def test_something_else_in_the_place_of_a_file_is_no_obstacle(
    daemon: DaemonProcess, mosquitto: Mosquitto, put: Callable[[Path, Path], None]
) -> None:
    daemon.start()
    is_answered(mosquitto)
    assert daemon.stop() == 0
    precious = daemon.directory / "precious"
    precious.write_text("precious")
    for root in (daemon.directory / "cache", daemon.directory / "state"):
        for path in [path for path in root.rglob("*") if path.is_file()]:
            path.unlink()
            put(path, precious)
    daemon.start()
    is_answered(mosquitto)
    assert precious.read_text() == "precious"
