"""Settings of a test run, and fixtures that more than one folder uses."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The fixtures' matrices are so small that BLAS threads only wait for each other: calibrating one takes six
# times as long with two of them. Set before anything imports NumPy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests.support import scratch
from tests.support.counterparts import DaemonProcess, Mosquitto, PtyPair


def pytest_configure() -> None:
    """Make the directory that all workers of a run share."""
    scratch.share()


# On a busy machine a slow example is not a failure. `make test-all` takes the thorough profile.
BUSY: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fast", max_examples=40, **BUSY)
settings.register_profile("thorough", max_examples=300, **BUSY)
settings.load_profile("fast")


@pytest.fixture
def start_mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Start brokers with additional lines of configuration."""
    brokers: list[Mosquitto] = []

    def start(*lines: str) -> Mosquitto:
        directory = tmp_path / f"mosquitto-{len(brokers)}"
        directory.mkdir()
        brokers.append(Mosquitto(directory, lines))
        brokers[-1].start()
        return brokers[-1]

    yield start
    for broker in brokers:
        broker.stop()


@pytest.fixture
def mosquitto(start_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    """A running broker that accepts every client."""
    return start_mosquitto("allow_anonymous true")


@pytest.fixture
def ptys(tmp_path: Path) -> Iterator[PtyPair]:
    """A wired pair of ports."""
    pair = PtyPair(tmp_path / "near", tmp_path / "far")
    pair.plug()
    yield pair
    pair.unplug()


@dataclass
class Field:
    """A daemon with a small model, on a broker and a serial port."""

    daemon: DaemonProcess
    mosquitto: Mosquitto
    ptys: PtyPair
    bundle: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """A running daemon, one for all tests of a module."""
    from tests.support import bundles  # here, so that tests without a model need no converter

    directory = tmp_path_factory.mktemp("field")
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "float32", context=2048)
    mosquitto = Mosquitto(directory, ("allow_anonymous true",))
    ptys = PtyPair(directory / "near", directory / "far")
    config = f'queue = 4\n[mqtt]\nport = {mosquitto.port}\n[[serial]]\nport = "{ptys.near}"\n'
    daemon = DaemonProcess(directory, bundle, config)
    with contextlib.ExitStack() as stack:
        mosquitto.start()
        stack.callback(mosquitto.stop)
        ptys.plug()
        stack.callback(ptys.unplug)
        stack.callback(daemon.close)
        daemon.start()
        mosquitto.retained("edge/v1/pump/status")  # an earlier request would have no subscriber
        yield Field(daemon, mosquitto, ptys, bundle)
        assert daemon.stop() == 0
