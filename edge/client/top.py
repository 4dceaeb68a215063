"""`edge-ask top`: the state of all nodes of a broker, live on a terminal, until q or Ctrl-C.

A node has one line, and one more for each problem. The screen is redrawn when a node publishes something, at
most a few times a second. Lines are cut to the width of the terminal, and untrusted input can't control it.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from edge.client.nodes import Nodes
from edge.endpoints import Broker
from edge.protocol.strict_json import printable

REDRAW_S = 0.25  # between two screens, at least
CLOCK_S = 1.0  # between two screens, at most
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # alternate screen without cursor, and back
HOME, TO_LINE_END, TO_SCREEN_END = "\x1b[H", "\x1b[K", "\x1b[J"
REVERSED, PLAIN = "\x1b[7m", "\x1b[m"
NAME_COLUMNS = 8  # at least


def top(broker: Broker, node: str | None) -> None:
    """Show all nodes, or one `node`; stdin and stdout must be terminals.

    Raises TransportError if a TLS file can't be used.
    """
    with Nodes(broker, node) as nodes, _screen():
        while not _wants_to_quit(nodes):
            size = shutil.get_terminal_size()
            title = nodes.problem or f"broker {broker.address}"
            _draw(render(title, nodes.states, size.columns, size.lines), size.lines)


def _wants_to_quit(nodes: Nodes) -> bool:
    """Wait for news to show and return False; return True as soon as the user wants to quit."""
    started, news = time.monotonic(), False
    try:
        while time.monotonic() - started < (REDRAW_S if news else CLOCK_S):
            news = nodes.wait(0.05) or news
            if select.select([sys.stdin], [], [], 0)[0] and os.read(sys.stdin.fileno(), 1) in b"qQ":
                return True
    except KeyboardInterrupt:
        return True
    return False


@contextmanager
def _screen() -> Iterator[None]:
    """Use the whole terminal, without line buffering, and restore it at the end."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    sys.stdout.write(ENTER)
    try:
        yield
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)


def _draw(lines: list[str], rows: int) -> None:
    """Replace the content of the screen; the second line is a heading."""
    shown = [f"{REVERSED}{line}{PLAIN}" if number == 1 else line for number, line in enumerate(lines)]
    rest = f"\n{TO_SCREEN_END}" if len(lines) < rows else ""
    sys.stdout.write(HOME + "\n".join(TO_LINE_END + line for line in shown) + rest)
    sys.stdout.flush()


def render(title: str, states: Mapping[str, Mapping[str, Any]], columns: int, rows: int) -> list[str]:
    """Return at most `rows` lines to show, each of at most `columns` printable ASCII characters."""
    online = sum(state.get("state") == "online" for state in states.values())
    nodes = "1 node" if len(states) == 1 else f"{len(states)} nodes"
    summary = f"{nodes}, {online} online  {time.strftime('%H:%M:%S')}  q: quit"
    room = max(columns - len(summary) - 2, 0)
    others = sum(column.width + 1 for column in _COLUMNS)
    width = max(NAME_COLUMNS, min(max(map(len, states), default=0), columns - others))
    heading = "NODE".ljust(width) + "".join(f" {column.title:{column.form}}" for column in _COLUMNS)
    lines = [f"{_plain(title, room):{room}}  {summary}", heading]
    for name, state in sorted(states.items()):
        lines += _node(_plain(name, width).ljust(width), state)
    if len(lines) > rows:
        lines[rows - 1 :] = [f"... {len(lines) - rows + 1} more lines; --node shows one node"]
    return [
        line[:columns].ljust(columns) if number == 1 else line[:columns] for number, line in enumerate(lines)
    ]


def _node(name: str, state: Mapping[str, Any]) -> Iterator[str]:
    """Write a node's line, and one for each problem."""
    cells = (f"{_plain(column.show(state), column.width):{column.form}}" for column in _COLUMNS)
    yield " ".join((name, *cells))
    for key, label in _PROBLEMS.items():
        value = state.get(key)
        if value and state.get("state") == "online":
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"  {label}: {_plain(shown, 1000)}"


def _plain(text: str, limit: int) -> str:
    """Cut to `limit` characters, all of them printable ASCII."""
    return printable(text, len(text))[1:-1][:limit]


class _Column(NamedTuple):
    """A column: title, alignment, width, and the function that formats a node's value."""

    title: str
    align: str
    width: int
    show: Callable[[Mapping[str, Any]], str]

    @property
    def form(self) -> str:
        """The format specification of the cells."""
        return f"{self.align}{self.width}"


def _state(node: Mapping[str, Any]) -> str:
    state = str(node.get("state", "?"))
    return ("working" if node.get("working") else "idle") if state == "online" else state


def _value(key: str, form: str, scale: float = 1) -> Callable[[Mapping[str, Any]], str]:
    """Make a function that formats a value of an online node, or a dash if it is unknown."""

    def show(state: Mapping[str, Any]) -> str:
        value = state.get(key)
        if value is None or state.get("state") != "online":
            return "-"
        return form.format(value / scale) if isinstance(value, (int, float)) else str(value)

    return show


_COLUMNS = (
    _Column("STATE", "<", 7, _state),
    _Column("WAIT", ">", 4, _value("queue", "{:.0f}")),
    _Column("DONE", ">", 6, _value("answered", "{:.0f}")),
    _Column("FAIL", ">", 5, _value("failed", "{:.0f}")),
    _Column("TOK/S", ">", 6, _value("tokens_per_s", "{:.1f}")),
    _Column("FIRST", ">", 6, _value("first_token_ms", "{:.2f}s", 1000)),
    _Column("MIB", ">", 5, _value("memory_mib", "{:.0f}")),
    _Column("TEMP", ">", 4, _value("temperature_c", "{:.0f}C")),
    _Column("BUNDLE", "<", 12, lambda state: str(state.get("bundle", "-"))),
)
_PROBLEMS = {"throttling": "throttled", "last_error": "last error", "journal": "journal"}
