"""edge-ask top on a real pseudo-terminal: what it shows, how it is left, and that it leaves no trace."""

import os
import pty
import re
import select
import signal
import subprocess
import termios
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import publish

from edge.client.top import ENTER, HOME, LEAVE, picture
from tests.conftest import Field
from tests.protocol.test_messages import json_values
from tests.support.counterparts import WAIT_S, edge_command, free_port, wait_for

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """`edge-ask top` on a terminal of 80 columns and 24 lines."""

    def __init__(self, *options: str) -> None:
        self._ours, self._theirs = pty.openpty()
        termios.tcsetwinsize(self._theirs, (24, 80))
        self._before = termios.tcgetattr(self._theirs)
        heeds_ctrl_c = "env", "--default-signal=INT"  # also if these tests run in the background of a shell
        command = [*heeds_ctrl_c, *edge_command("ask", "top", *options)]
        self.process = subprocess.Popen(command, stdin=self._theirs, stdout=self._theirs, stderr=self._theirs)
        self.output = ""

    def screen(self) -> list[str]:
        """The lines of the last whole picture."""
        while select.select([self._ours], [], [], 0.05)[0]:
            self.output += os.read(self._ours, 65536).decode()
        pictures = self.output.split(HOME)[1:]
        whole = [each for each in pictures if "\x1b[J" in each]
        return ESCAPES.sub("", whole[-1].partition("\x1b[J")[0]).split("\r\n") if whole else []

    @property
    def pictures(self) -> int:
        """How many were drawn until now."""
        return self.output.count(HOME)

    def row(self, name: str) -> str:
        """The line of a node, once it is there."""
        wait_for(lambda: any(line.startswith(f"{name} ") for line in self.screen()))
        return next(line for line in self.screen() if line.startswith(f"{name} "))

    def press(self, key: bytes) -> None:
        os.write(self._ours, key)

    def left(self) -> int:
        """Wait until it has ended; the terminal is as it was before."""
        code = self.process.wait(WAIT_S)
        self.screen()
        assert self.output.startswith(ENTER)
        assert self.output.endswith(LEAVE)
        assert termios.tcgetattr(self._theirs) == self._before
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_S)
        os.close(self._ours)
        os.close(self._theirs)


@pytest.fixture
def terminal(served: Field) -> Iterator[Terminal]:
    terminal = Terminal("--port", str(served.mosquitto.port))
    yield terminal
    terminal.close()


def test_nodes_are_shown_and_shown_anew_when_they_say_something(terminal: Terminal, served: Field) -> None:
    port = served.mosquitto.port
    wait_for(lambda: re.match(r"pump +idle +0 +0 +0 +- +- +\d+ ", terminal.row("pump")))
    title, heading, *_ = terminal.screen()
    assert title.startswith(f"broker 127.0.0.1:{port}")
    assert "1 node, 1 online" in title
    assert heading.split()[:4] == ["NODE", "STATE", "WAIT", "DONE"]
    publish.single("edge/v1/tank/status", '{"state":"offline"}', qos=1, port=port)
    assert terminal.row("tank").split()[:3] == ["tank", "offline", "-"]
    subprocess.run(
        edge_command("ask", "--port", str(port), "--node", "pump", "--max-tokens", "9", "x"), check=True
    )
    wait_for(lambda: terminal.row("pump").split()[3] != "0")
    assert re.search(r" \d+\.\d +\d\.\d\ds ", terminal.row("pump"))
    assert [line for line in terminal.screen() if len(line) > 80] == []
    terminal.press(b"q")
    assert terminal.left() == 0


def test_ctrl_c_leaves_too(terminal: Terminal) -> None:
    terminal.row("pump")
    terminal.press(b"x")  # any other key changes nothing
    shown = terminal.pictures
    wait_for(lambda: terminal.screen() and terminal.pictures > shown + 1)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.left() == 0


def test_a_broker_that_is_not_there_is_said_and_waited_for() -> None:
    terminal = Terminal("--port", str(free_port()))
    wait_for(lambda: "can't be reached" in "".join(terminal.screen()[:1]))
    terminal.press(b"q")
    assert terminal.left() == 0
    terminal.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "top needs a terminal; use --status"),
        (["--json"], "has no --json; use --status --json"),
        (["--serial", "/dev/x"], "top works with a broker only"),
    ],
)
def test_without_a_terminal_or_a_broker_it_says_what_to_use(options: list[str], said: str) -> None:
    done = subprocess.run(
        edge_command("ask", "top", *options),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr


SHOWN = ("state", "queue", "answered", "tokens_per_s", "throttling", "last_error", "bundle")
states: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {}, optional={key: st.just("online") | json_values for key in SHOWN}
)


@given(st.dictionaries(st.text(max_size=30), states, max_size=9), st.integers(20, 200), st.integers(3, 30))
def test_whatever_nodes_say_the_picture_fits_and_is_plain(
    found: dict[str, dict[str, Any]], columns: int, rows: int
) -> None:
    lines = picture("broker", found, columns, rows)
    assert len(lines) <= rows
    assert all(len(line) <= columns and line.isascii() and line.isprintable() for line in lines)


def test_what_is_wrong_with_a_node_stands_below_it_and_what_does_not_fit_is_counted() -> None:
    well = {"state": "online", "queue": 0, "tokens_per_s": 11.25, "first_token_ms": 840, "temperature_c": 61}
    ill = well | {
        "throttling": ["throttled", "under-voltage"],
        "last_error": "busy: \x1b[2J8 wait",
        "working": True,
    }
    lines = picture("broker b:1883", {"a": well, "b": ill}, 80, 24)
    assert lines[0].startswith("broker b:1883  ")
    assert lines[2].split() == ["a", "idle", "0", "-", "-", "11.2", "0.84s", "-", "61C", "-"]
    assert lines[3].split()[:2] == ["b", "working"]
    assert lines[4:] == ["  held back: throttled, under-voltage", "  last error: busy: \\x1b[2J8 wait"]
    assert picture("x", {"a": well, "b": ill}, 80, 4)[3] == "... 3 more lines; --node shows one node"
