"""Fixtures of the transports' tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from counterparts import Mosquitto, PtyPair


@pytest.fixture
def start_mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Start brokers with lines of configuration of their own."""
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
    """A running broker that lets everybody in."""
    return start_mosquitto("allow_anonymous true")


@pytest.fixture
def ptys(tmp_path: Path) -> Iterator[PtyPair]:
    """A wired pair of ports."""
    pair = PtyPair(tmp_path / "near", tmp_path / "far")
    pair.plug()
    yield pair
    pair.unplug()
