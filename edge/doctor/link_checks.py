"""The doctor's checks of what the configuration names: bundle, secrets, serial ports and broker."""

from __future__ import annotations

import grp
import os
import shlex
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from edge.board import Board
from edge.bundles.bundle import MANIFEST, Bundle, file_digest, read_manifest
from edge.bundles.record import read_record
from edge.bundles.signing import TrustedKeys
from edge.bundles.store import BundleStore
from edge.config import Config
from edge.doctor.finding import Finding
from edge.endpoints import Broker
from edge.errors import BundleError, ConfigError, TransportError
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.messages import Received

MB = 1_000_000
BROKER_WAIT_S = 5.0
VERSION_WAIT_S = 2.0  # some brokers do not publish it


def check_bundle(config: Config) -> Iterator[Finding]:
    """Whether every byte of the bundle matches the manifest, and a trusted key has signed it."""
    try:
        (config.bundle / MANIFEST).stat()
    except PermissionError:
        yield Finding(
            "bundle", "unknown", f"{config.bundle}: only root can read it", "sudo edge-daemon doctor"
        )
        return
    except OSError:
        pass  # reported below
    try:
        manifest = read_manifest(config.bundle)
        if config.bundle_key_file is not None:
            TrustedKeys(config.bundle_key_file).check(config.bundle)
        Bundle(config.bundle, manifest, file_digest(config.bundle / MANIFEST)).verify()
    except (BundleError, ConfigError) as error:
        by_hand = config.bundle.is_dir() and not config.bundle.is_symlink()
        install = "sudo edge-daemon bundle install BUNDLE, then activate it"
        fix = f"copy a converted bundle to {config.bundle}" if by_hand else install
        yield Finding("bundle", "problem", str(error), fix)
        return
    size = sum(entry.size for entry in manifest.files.values())
    message = f"{manifest.architecture.family} {manifest.recipe}, {size // MB} MB, intact"
    yield Finding("bundle", "ok", message)


def check_store(config: Config) -> Iterator[Finding]:
    """Whether a bundle was refused or failed recently, and which one is there to fall back to."""
    if not config.bundle.is_symlink():
        return
    store = BundleStore(config.bundle)
    record, current = read_record(store.directory), str(store.current)
    failures = record.recent(current)
    if failures:
        message = f"{current} failed {len(failures)} times in the last hour: {failures[-1].why}"
        yield Finding("bundle", "problem", message, "sudo edge-daemon bundle rollback")
    elif record.trouble is not None:
        yield Finding("bundle", "warning", record.trouble, "convert it again, or activate another one")
    else:
        yield Finding("bundle", "ok", f"{current}; fallback: {store.previous or 'none'}")


def check_secrets(config: Config) -> Iterator[Finding]:
    """Whether other users of the board can read the broker's password or the client's private key."""
    if config.mqtt is None:
        return
    for path in (config.mqtt.password_path, config.mqtt.broker.key_file):
        if path is None or not path.exists():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            message = f"every user can read or change {path} (mode {mode:o})"
            yield Finding("secrets", "warning", message, f"sudo chmod o= {shlex.quote(str(path))}")
        else:
            yield Finding("secrets", "ok", f"{path} (mode {mode:o})")


def check_serial(board: Board, config: Config) -> Iterator[Finding]:
    """Whether each port exists, is free, and can be opened by the unit's group."""
    for entry in config.serial:
        port = Path(entry.port)
        name = port.resolve().name
        if not port.exists():
            message = f"{port} does not exist; existing ports: {', '.join(_ports()) or 'none'}"
            yield Finding(
                "serial", "problem", message, "plug the board in, or correct port in the configuration"
            )
            continue
        mode = port.stat()
        group = _group_name(mode.st_gid)
        if not stat.S_ISCHR(mode.st_mode):
            yield Finding(
                "serial", "problem", f"{port} is not a serial port", "correct port in the configuration"
            )
        elif is_console(name, board.consoles):
            yield Finding(
                "serial",
                "problem",
                f"{port} is the kernel's console, which writes its messages to it",
                "sudo raspi-config nonint do_serial_cons 1 && sudo reboot",
            )
        elif not _may_be_opened(port, mode.st_mode, group):
            yield Finding(
                "serial",
                "problem",
                f"{port} has group {group} and mode {stat.S_IMODE(mode.st_mode):o}, not dialout and 660",
                "sudo cp /usr/share/edge-gemma/udev/65-edge-gemma.rules /etc/udev/rules.d/ && "
                "sudo udevadm control --reload && sudo udevadm trigger",
            )
        else:
            yield Finding("serial", "ok", f"{port} ({group})")


def is_console(name: str, consoles: tuple[str, ...]) -> bool:
    """Whether the port `name` is the kernel's console; a Pi's serial0 is its ttyAMA0 or ttyS0."""
    return name in consoles or ("serial0" in consoles and name in ("ttyAMA0", "ttyS0"))


def _may_be_opened(port: Path, mode: int, group: str) -> bool:
    """Whether the unit, which is in the group dialout, or this user can open the port."""
    return (group == "dialout" and mode & 0o060 == 0o060) or os.access(port, os.R_OK | os.W_OK)


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _ports() -> list[str]:
    patterns = ("ttyUSB*", "ttyACM*", "ttyAMA*", "serial[0-9]", "edge/*")
    return sorted(str(path) for pattern in patterns for path in Path("/dev").glob(pattern))


class _Listener:
    """Waits for the retained version of the broker."""

    def __init__(self) -> None:
        self.connection: MqttConnection | None = None
        self.online = threading.Event()
        self.told = threading.Event()
        self.version = ""

    def connected(self) -> None:
        """Subscribe to the version."""
        self.online.set()
        if self.connection is not None:
            self.connection.subscribe("$SYS/broker/version", retained=True)

    def received(self, message: Received) -> None:
        """Store the version."""
        self.version = message.payload.decode(errors="replace")
        self.told.set()

    def subscribed(self) -> None:
        """Nothing to do."""

    def disconnected(self) -> None:
        """Nothing to do."""

    def tick(self) -> None:
        """Nothing to do."""


def check_broker(config: Config) -> Iterator[Finding]:
    """Whether the broker answers and accepts the node, and its version."""
    if config.mqtt is None:
        return
    broker = config.mqtt.broker
    listener = _Listener()
    try:
        connection = MqttConnection(broker, f"edge-{config.node}-doctor", listener, session_expiry_s=0)
    except TransportError as error:
        yield Finding(
            "broker", "problem", str(error), "correct ca_file, certificate_file or key_file in [mqtt]"
        )
        return
    listener.connection = connection
    connection.start()
    try:
        online = listener.online.wait(BROKER_WAIT_S)
        listener.told.wait(VERSION_WAIT_S if online else 0)
    finally:
        connection.stop(BROKER_WAIT_S)
    yield _broker_finding(broker, listener, connection) if not online else _version_finding(broker, listener)


def _broker_finding(broker: Broker, listener: _Listener, connection: MqttConnection) -> Finding:
    if connection.refused:
        message = f"{broker.address} refuses the connection: {connection.refused}"
        return Finding("broker", "problem", message, "correct username and password_file in [mqtt]")
    message = f"{broker.address}: {connection.problem or 'no answer'}"
    local = broker.host in ("localhost", "127.0.0.1", "::1")
    fix = "sudo apt install mosquitto" if local else f"ping {broker.host}, and check its firewall"
    return Finding("broker", "problem", message, fix)


def _version_finding(broker: Broker, listener: _Listener) -> Finding:
    version = listener.version or "a broker that does not publish its version"
    old = version.startswith("mosquitto version 1.")
    message = f"{broker.address}: {version}" + (", which has MQTT 5 from 1.6 on" if old else "")
    return Finding(
        "broker", "warning" if old else "ok", message, "sudo apt upgrade mosquitto" if old else None
    )
