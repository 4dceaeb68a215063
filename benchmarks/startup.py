"""Start-up and memory of the programs as users run them: `edge-daemon run` and `edge-ask --bundle`."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tty
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import click

from benchmarks.processes import PATIENCE_S, Memory, memory_of
from benchmarks.tasks import Task
from edge.protocol.framing import Damaged, FrameDecoder, encode
from edge.protocol.messages import Failure, Final, Request, parse_answer
from edge.protocol.strict_json import loads

MAX_LINE_BYTES = 1 << 20
ACK_S = 2.0
"""A request that is not acknowledged for so long is sent again."""


def program(name: str) -> str:
    """A console script of this environment."""
    return str(Path(sys.executable).with_name(name))


class Daemon:
    """A running `edge-daemon` with a serial port of its own (a pty) and us in systemd's place.

    `ready_s`: seconds from the start of the process to its READY=1.
    """

    def __init__(self, bundle: Path, cache: Path, threads: int, context: int) -> None:
        """Start it and wait until it is ready. Raises ClickException with the end of its log if it ends."""
        self._directory = tempfile.TemporaryDirectory(prefix="edge-bench-")
        directory = Path(self._directory.name)
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self._log = (directory / "log").open("w+")
        (directory / "edge.toml").write_text(
            f'node = "bench"\nbundle = "{bundle}"\ncache_directory = "{cache}"\n'
            f'state_directory = "{directory}/state"\nthreads = {threads}\ncontext = {context}\n'
            f'[[serial]]\nport = "{os.ttyname(self._slave)}"\n'
        )
        command = [program("edge-daemon"), "run", "--config", str(directory / "edge.toml")]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.bind(f"{directory}/notify")
            notices.settimeout(0.5)
            environment = {**os.environ, "NOTIFY_SOCKET": f"{directory}/notify"}
            started = time.perf_counter()
            self._process = subprocess.Popen(command, stderr=self._log, env=environment)
            while "READY=1" not in self._notice(notices).split("\n"):
                if self._process.poll() is not None or time.perf_counter() - started > PATIENCE_S:
                    self._log.seek(0)
                    raise click.ClickException(f"edge-daemon is not ready: {self._log.read()[-300:]}")
            self.ready_s = time.perf_counter() - started

    @staticmethod
    def _notice(notices: socket.socket) -> str:
        try:
            return notices.recv(4096).decode()
        except TimeoutError:
            return ""

    def ask(self, request: Request) -> Final:
        """Send a request over the serial line and wait for its final answer."""
        return ask_over(self._master, request)

    def memory(self) -> Memory:
        """The daemon's memory."""
        return memory_of(self._process.pid)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)
        os.close(self._master)
        os.close(self._slave)
        self._log.close()
        self._directory.cleanup()


def ask_over(line: int, request: Request) -> Final:
    """Send a request over a serial line, an open file descriptor, and wait for its final answer.

    A port discards what arrives before it is open, so the request is sent again after each `hello` and `nak`,
    and when there is no `ack` in time (docs/protocol.md). Raises ClickException for an error or silence.
    """
    frame = b"\n" + encode(request.to_json())
    data, acknowledged = frame, False
    decoder = FrameDecoder(MAX_LINE_BYTES)
    sent = time.monotonic()
    until = sent + PATIENCE_S
    while time.monotonic() < until:
        readable, writable, _ = select.select([line], [line] if data else [], [], 0.5)
        if writable:
            data = data[os.write(line, data[:1024]) :]
            sent = time.monotonic()
        for text in decoder.feed(os.read(line, 65536)) if readable else ():
            kind = "nak" if isinstance(text, Damaged) else loads(text, MAX_LINE_BYTES)["type"]
            acknowledged = kind == "ack" or (acknowledged and kind not in ("hello", "nak"))
            if kind in ("hello", "nak"):
                data = frame
            elif isinstance(text, str) and kind in ("final", "error"):
                return _final(text)
        if not (data or acknowledged) and time.monotonic() - sent > ACK_S:
            data = frame
    raise click.ClickException(f"edge-daemon: no answer in {PATIENCE_S} s")


def _final(text: str) -> Final:
    answer = parse_answer(text)
    if isinstance(answer, Final):
        return answer
    assert isinstance(answer, Failure)
    raise click.ClickException(f"edge-daemon: {answer.code}: {answer.message}")


def filled_memory(daemon: Daemon, context: int) -> Memory:
    """Memory of a daemon after a request that fills its context, with an answer of up to 64 tokens."""
    final = daemon.ask(Request("fill", prompt=text_of(context - 64), max_tokens=context))
    used = final.usage.prompt + final.usage.generated
    if used < 0.9 * context:
        raise click.ClickException(f"the context of {context} tokens was not filled, only {used}")
    return daemon.memory()


def text_of(tokens: int) -> str:
    """Text of about so many tokens of Gemma's vocabulary."""
    words = ("pressure", "temperature", "flow", "level", "current", "valve", "motor", "bearing", "tank")
    return "".join(f" {words[i % len(words)]} {i % 10}" for i in range(tokens // 3))


def first_text_s(command: Sequence[str], environment: dict[str, str]) -> float:
    """Seconds from the start of a program to the first line it prints (it must be one, and succeed)."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment}
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        taken = time.perf_counter() - started
        if process.wait(PATIENCE_S) or not line:
            raise click.ClickException(f"{command[0]}: {process.stderr.read().decode()[-300:]}")
    return taken


def ask_command(bundle: Path, task: Task) -> list[str]:
    """`edge-ask` for one token of an answer."""
    system = ["--system", task.system] if task.system else []
    command = [program("edge-ask"), "--bundle", str(bundle), "--max-tokens", "1", "--json"]
    return [*command, *system, task.user]
