"""Real counterparts for tests: a private mosquitto, and pairs of ptys that socat wires."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge.config import Broker

WAIT_S = 30


def wait_for(what: Callable[[], object]) -> None:
    """Wait until `what()` is true; fails after WAIT_S."""
    until = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses."""
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
            "user root" if os.geteuid() == 0 else "",
        ]
        config.write_text("\n".join([*fixed, *self.lines]) + "\n")
        program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        self.process = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL)
        wait_for(self._answers)

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
        """Take both ports away, as if the cable came out."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(WAIT_S)
            self.process = None
