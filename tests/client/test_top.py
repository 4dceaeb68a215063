"""edge-ask top on a real pseudo-terminal: what it shows, and that it restores the terminal."""

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

from edge.client.top import ENTER, HOME, LEAVE, render
from tests.conftest import Field
from tests.protocol.test_messages import json_values
from tests.support.counterparts import WAIT_S, edge_command, free_port, wait_for

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """`edge-ask top` on a terminal of 80 columns and 24 lines."""

    def __init__(self, *options: str) -> None:
        self._master, self._slave = pty.openpty()
        termios.tcsetwinsize(self._slave, (24, 80))
        self._before = termios.tcgetattr(self._slave)
        default_sigint = "env", "--default-signal=INT"  # a shell's background job ignores it
        command = [*default_sigint, *edge_command("ask", "top", *options)]
        self.process = subprocess.Popen(command, stdin=self._slave, stdout=self._slave, stderr=self._slave)
        self.output = ""

    def screen(self) -> list[str]:
        """The lines of the last complete screen."""
        while select.select([self._master], [], [], 0.05)[0]:
            self.output += os.read(self._master, 65536).decode()
        drawn = self.output.split(HOME)[1:]
        whole = [each for each in drawn if "\x1b[J" in each]
        return ESCAPES.sub("", whole[-1].partition("\x1b[J")[0]).split("\r\n") if whole else []

    @property
    def screens(self) -> int:
        """How many screens were drawn so far."""
        return self.output.count(HOME)

    def row(self, name: str) -> str:
        """Wait for the line of a node."""
        wait_for(lambda: any(line.startswith(f"{name} ") for line in self.screen()))
        return next(line for line in self.screen() if line.startswith(f"{name} "))

    def press(self, key: bytes) -> None:
        os.write(self._master, key)

    def ended(self) -> int:
        """Wait for the end; the terminal must be restored."""
        code = self.process.wait(WAIT_S)
        self.screen()
        assert self.output.startswith(ENTER)
        assert self.output.endswith(LEAVE)
        assert termios.tcgetattr(self._slave) == self._before
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_S)
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def terminal(served: Field) -> Iterator[Terminal]:
    terminal = Terminal("--port", str(served.mosquitto.port))
    yield terminal
    terminal.close()


def test_nodes_are_shown_and_updated_when_they_publish(terminal: Terminal, served: Field) -> None:
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
    assert terminal.ended() == 0


def test_ctrl_c_quits_too(terminal: Terminal) -> None:
    terminal.row("pump")
    terminal.press(b"x")  # any other key changes nothing
    before = terminal.screens
    wait_for(lambda: terminal.screen() and terminal.screens > before + 1)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.ended() == 0


def test_a_missing_broker_is_reported_and_waited_for() -> None:
    terminal = Terminal("--port", str(free_port()))
    wait_for(lambda: "can't be reached" in "".join(terminal.screen()[:1]))
    terminal.press(b"q")
    assert terminal.ended() == 0
    terminal.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "top needs a terminal; use --status"),
        (["--json"], "has no --json; use --status --json"),
        (["--serial", "/dev/x"], "top works with a broker only"),
    ],
)
def test_without_a_terminal_or_a_broker_it_names_the_alternative(options: list[str], message: str) -> None:
    done = subprocess.run(
        edge_command("ask", "top", *options),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr


SHOWN = ("state", "queue", "answered", "tokens_per_s", "throttling", "last_error", "bundle")
node_states: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {}, optional={key: st.just("online") | json_values for key in SHOWN}
)


@given(
    st.dictionaries(st.text(max_size=30), node_states, max_size=9), st.integers(20, 200), st.integers(3, 30)
)
def test_any_state_fits_on_the_screen_as_plain_ascii(
    states: dict[str, dict[str, Any]], columns: int, rows: int
) -> None:
    lines = render("broker", states, columns, rows)
    assert len(lines) <= rows
    assert all(len(line) <= columns and line.isascii() and line.isprintable() for line in lines)


def test_problems_are_below_their_node_and_lines_that_do_not_fit_are_counted() -> None:
    well = {"state": "online", "queue": 0, "tokens_per_s": 11.25, "first_token_ms": 840, "temperature_c": 61}
    ill = well | {
        "throttling": ["throttled", "under-voltage"],
        "last_error": "busy: \x1b[2J8 wait",
        "working": True,
    }
    lines = render("broker b:1883", {"a": well, "b": ill}, 80, 24)
    assert lines[0].startswith("broker b:1883  ")
    assert lines[2].split() == ["a", "idle", "0", "-", "-", "11.2", "0.84s", "-", "61C", "-"]
    assert lines[3].split()[:2] == ["b", "working"]
    assert lines[4:] == ["  throttled: throttled, under-voltage", "  last error: busy: \\x1b[2J8 wait"]
    assert render("x", {"a": well, "b": ill}, 80, 4)[3] == "... 3 more lines; --node shows one node"
