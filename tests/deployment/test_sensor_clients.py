"""The sensor-side clients with the daemon's own serial transport, over clean and noisy lines."""

from __future__ import annotations

import importlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import threading
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.endpoints import SerialConfig
from edge.protocol.framing import FrameDecoder, encode
from edge.requests.engine import Engine
from edge.requests.journal import Journal
from edge.requests.journaled_engine import JournaledEngine
from edge.transports.serial.transport import SerialTransport
from tests.support.counterparts import WAIT_S
from tests.support.speller import Speller

PROJECT = Path(__file__).parents[2]
CLIENTS = PROJECT / "firmware_configs" / "clients"
PYTHON_CLIENT = CLIENTS / "python"
SCRIPTS = Path(__file__).parents[1] / "clients"

sys.path.insert(0, str(PYTHON_CLIENT))
edge_client: Any = importlib.import_module("edge_client")


@dataclass
class Line:
    """A wire between two ptys on which bits flip and bytes vanish."""

    error_rate: float = 0.0
    chance: random.Random = field(default_factory=lambda: random.Random(11))
    damaged: int = 0

    def __post_init__(self) -> None:
        self.ends = [os.openpty(), os.openpty()]
        for _, slave in self.ends:
            tty.setraw(slave)
        self.daemon_port, self.sensor_port = (os.ttyname(slave) for _, slave in self.ends)
        self.received: list[bytes] = []  # from the sensor
        self._stopping = False
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    def _carry(self) -> None:
        masters = [master for master, _ in self.ends]
        while not self._stopping:
            for ready in select.select(masters, [], [], 0.05)[0]:
                data = os.read(ready, 4096)
                if ready == masters[1]:
                    self.received.append(data)
                os.write(masters[1 - masters.index(ready)], self._spoil(data))

    def _spoil(self, data: bytes) -> bytes:
        out = bytearray()
        for byte in data:
            dice = self.chance.random()
            if dice >= self.error_rate:
                out.append(byte)
                continue
            self.damaged += 1
            if dice < self.error_rate / 2:
                out.append(byte ^ 1 << self.chance.randrange(8))
        return bytes(out)

    def close(self) -> None:
        self._stopping = True
        self._thread.join(WAIT_S)
        for end in self.ends:
            for descriptor in end:
                os.close(descriptor)


@pytest.fixture
def line() -> Iterator[Line]:
    wire = Line()
    yield wire
    wire.close()


@dataclass
class Node:
    speller: Speller
    transport: SerialTransport
    engine: Engine

    def stop(self) -> None:
        self.engine.stop(WAIT_S)
        self.transport.stop(WAIT_S)


@pytest.fixture
def start_node() -> Iterator[Callable[[Line], Node]]:
    nodes: list[Node] = []

    def start(wire: Line) -> Node:
        speller = Speller()
        engine = Engine(speller, queue_length=4, partial_interval_s=0)
        config = SerialConfig(wire.daemon_port, 115_200, "none", lenient=False)
        journaled = JournaledEngine(engine, Journal(None))
        nodes.append(Node(speller, SerialTransport(config, "pump", journaled), engine))
        engine.start()
        nodes[-1].transport.start()
        return nodes[-1]

    yield start
    for node in nodes:
        node.stop()


@pytest.fixture(scope="session")
def arduino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Arduino client, compiled for this machine with every check that the compiler has."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("arduino") / "ask"
    flags = ["-std=c++11", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-fsanitize=undefined,address"]
    made = subprocess.run(
        [compiler, *flags, f"-I{CLIENTS / 'arduino'}", SCRIPTS / "ask.cpp", "-o", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return program


@pytest.fixture(params=["python", "micropython", "arduino"])
def ask(request: pytest.FixtureRequest) -> Callable[..., list[str]]:
    """Run a client with prompts; returns the lines it prints."""
    if request.param == "arduino":
        command = [str(request.getfixturevalue("arduino"))]
    elif request.param == "python":
        command = [sys.executable, str(SCRIPTS / "ask.py"), str(PYTHON_CLIENT)]
    else:
        if shutil.which("apt-get") is None:
            pytest.skip("MicroPython comes from Debian")
        command = [str(PROJECT / "scripts" / "micropython"), str(SCRIPTS / "ask.py"), str(PYTHON_CLIENT)]

    def run(port: str, *prompts: str) -> list[str]:
        environment = os.environ | {"ASAN_OPTIONS": "verify_asan_link_order=0"}
        result = subprocess.run(
            [*command, port, *prompts], capture_output=True, text=True, check=False, env=environment
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run


def test_requests_are_answered_one_after_the_other(
    line: Line, start_node: Callable[[Line], Node], ask: Callable[..., list[str]]
) -> None:
    node = start_node(line)
    assert ask(line.sensor_port, "abc def", "x") == ["text cba fed ", "text x "]
    first, second = node.speller.asked
    assert first != second


def test_non_ascii_text_is_transferred_in_both_directions(
    line: Line, start_node: Callable[[Line], Node], ask: Callable[..., list[str]]
) -> None:
    start_node(line)
    said = ask(line.sensor_port, 'warm: 21\u00a0°C "q\\" \u4e2d\U0001f600\t')
    assert said == ["text :mraw 12 C<b0> " + '"\\q" <1f600><4e2d> ']


def test_a_refusal_is_reported_by_its_code(
    line: Line, start_node: Callable[[Line], Node], ask: Callable[..., list[str]]
) -> None:
    start_node(line)
    assert ask(line.sensor_port, "LONG", "a") == ["error too_long", "text a "]


def test_an_answer_too_long_for_a_client_is_reported(
    line: Line, start_node: Callable[[Line], Node], ask: Callable[..., list[str]]
) -> None:
    start_node(line)
    assert ask(line.sensor_port, "MUCH", "a") == ["error too_long", "text a "]


@pytest.mark.slow
def test_a_missing_peer_is_detected(line: Line, ask: Callable[..., list[str]]) -> None:
    assert ask(line.sensor_port, "hello") == ["error unavailable"]


def test_every_request_is_answered_over_a_noisy_line(
    line: Line, start_node: Callable[[Line], Node], ask: Callable[..., list[str]]
) -> None:
    """With an error in every 400 bytes, about every third line is corrupt, in both directions."""
    line.error_rate = 1 / 400
    start_node(line)
    prompts = [f"word{number} {'a' * 40}" for number in range(20)]
    expected = [f"text {prompt.split()[0][::-1]} {'a' * 40} " for prompt in prompts]
    assert ask(line.sensor_port, *prompts) == expected
    assert line.damaged > 10


def test_a_reading_is_a_frame_with_topic_and_payload(line: Line, ask: Callable[..., list[str]]) -> None:
    assert ask(line.sensor_port, "@sensors/left/temperature -14.5", "@s/x 0.05") == []
    decoder = FrameDecoder(1024)
    frames: list[object] = []
    while len(frames) < 2:
        while line.received:
            frames += [json.loads(str(text)) for text in decoder.feed(line.received.pop(0))]
    assert frames == [
        {"type": "reading", "topic": "sensors/left/temperature", "payload": -14.5},
        {"type": "reading", "topic": "s/x", "payload": 0.05},
    ]


def test_a_restarted_daemon_gets_the_request_again(
    line: Line, start_node: Callable[[Line], Node], ask: Callable[..., list[str]]
) -> None:
    first = start_node(line)
    first.speller.gate.clear()
    said: list[str] = []
    client = threading.Thread(target=lambda: said.extend(ask(line.sensor_port, "abc")))
    client.start()
    first.speller.wait_until_held()
    first.transport.port.stop(0.1)  # as a crash would: nothing is answered
    second = start_node(line)
    client.join(WAIT_S)
    first.speller.gate.set()
    assert said == ["text cba "]
    assert second.speller.asked == first.speller.asked


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=40), max_size=3))
def test_client_and_daemon_encode_equal_frames(data: dict[str, str]) -> None:
    framed = edge_client.encode(data)
    (text,) = FrameDecoder(10_000).feed(framed)
    assert isinstance(text, str)
    assert json.loads(text) == data
    assert edge_client.decode(encode(text).strip()) == data


@given(st.binary(max_size=60))
def test_noise_is_not_decoded_as_a_frame(noise: bytes) -> None:
    assert edge_client.decode(noise) is None
