"""Real counterparts for tests: a private mosquitto, wired pairs of ptys, the daemon as a process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paho.mqtt import subscribe

from edge.endpoints import Broker

WAIT_S = 30


def wait_for(what: Callable[[], object]) -> None:
    """Wait until `what()` is true; fails after WAIT_S."""
    until = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def free_port() -> int:
    """A free TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


@dataclass
class Mosquitto:
    """A broker of our own on a free port; it keeps its files in `directory`, `lines` configure it."""

    directory: Path
    lines: tuple[str, ...]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def broker(self) -> Broker:
        """The address of the broker."""
        return Broker(port=self.port)

    def start(self) -> None:
        """Start the broker and wait until it answers."""
        config = self.directory / "mosquitto.conf"
        fixed = [
            f"listener {self.port} 127.0.0.1",
            "persistence true",
            f"persistence_location {self.directory}/",
            "autosave_interval 1",
            "autosave_on_changes true",
            "log_dest none",
            "set_tcp_nodelay true",
            "user root" if os.geteuid() == 0 else "",
        ]
        config.write_text("\n".join([*fixed, *self.lines]) + "\n")
        program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        self.process = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL)
        wait_for(self._answers)

    def retained(self, topic: str) -> Any:
        """Wait for a retained message and return its JSON content."""
        simple: Any = subscribe.simple  # paho leaves it untyped
        return json.loads(simple(topic, port=self.port).payload)

    def stop(self, kill: bool = False) -> None:
        """Stop the broker; with `kill` it can't save anything."""
        if self.process is not None:
            (self.process.kill if kill else self.process.terminate)()
            self.process.wait(WAIT_S)
            self.process = None

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "mosquitto did not start"
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


@dataclass
class PtyPair:
    """Two serial ports, wired to each other by socat."""

    near: Path
    far: Path
    process: subprocess.Popen[bytes] | None = None

    def plug(self) -> None:
        """Wire the ports and wait until both are there."""
        ends = [f"pty,raw,echo=0,link={end}" for end in (self.near, self.far)]
        self.process = subprocess.Popen(["socat", *ends], stderr=subprocess.DEVNULL)
        wait_for(lambda: self.near.exists() and self.far.exists())

    def unplug(self) -> None:
        """Remove both ports, as if the cable were unplugged; data in transit is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_S)
            self.process = None
            for end in (self.near, self.far):
                end.unlink(missing_ok=True)


def edge_command(name: str, *arguments: str) -> list[str]:
    """The command line of `edge-daemon` or `edge-ask` in this interpreter."""
    return [
        sys.executable,
        "-X",
        "faulthandler",
        "-c",
        f"import sys; sys.argv[0] = 'edge-{name}'; from edge.cli.entry import {name}; {name}()",
        *arguments,
    ]


class DaemonProcess:
    """`edge-daemon run`, with us in systemd's place. `config` is TOML after the directories.

    `within` is a command that runs it somewhere else, such as a network namespace.
    """

    def __init__(self, directory: Path, bundle: Path, config: str, **environment: str) -> None:
        self.directory = directory
        self.log = directory / "daemon.log"
        self._file = directory / "edge.toml"
        self._file.write_text(
            f'node = "pump"\nbundle = "{bundle}"\ncache_directory = "{directory}/cache"\n'
            f'state_directory = "{directory}/state"\nthreads = 1\n{config}'
        )
        self.within: tuple[str, ...] = ()
        self._notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notices.bind(str(directory / "notify"))
        self._notices.settimeout(0.2)
        self._environment = {**os.environ, "NOTIFY_SOCKET": str(directory / "notify"), **environment}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str, wait: bool = True) -> None:
        """Start the daemon, and wait until it is ready."""
        with self.log.open("ab") as log:
            command = [*self.within, *edge_command("daemon", "run", "--config", str(self._file), *options)]
            self.process = subprocess.Popen(command, stderr=log, env=self._environment)
        if wait:
            self.notice("READY=1")

    def notice(self, state: str) -> str:
        """Wait for a notification with this state; returns the whole notification."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            notice = self.next_notice()
            if state in notice.split("\n"):
                return notice
        raise AssertionError(f"no {state} came")

    def next_notice(self) -> str:
        """The next notification of the daemon; empty if there is none for a moment."""
        try:
            return self._notices.recv(4096).decode()
        except TimeoutError:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            return ""

    def end(self) -> int:
        """Wait until the daemon has ended; returns its exit status. One that hangs shows where."""
        assert self.process is not None
        try:
            return self.process.wait(2 * WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait(WAIT_S)
            raise AssertionError(f"the daemon hangs: {self.log.read_text()}") from None

    def stop(self) -> int:
        """Stop the daemon as systemd would; returns its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.end()

    def close(self) -> None:
        """End the process if it is still running."""
        self._notices.close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_S)

    def memory(self) -> int:
        """Anonymous memory in bytes (RssAnon)."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))
