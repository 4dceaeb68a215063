"""The doctor's checks of what the daemon reaches out to: its bundle, serial ports and broker."""

from __future__ import annotations

import grp
import os
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

MB = 1024 * 1024
BROKER_WAIT_S = 5.0
VERSION_WAIT_S = 2.0  # some brokers tell it to nobody


def check_bundle(config: Config) -> Iterator[Finding]:
    """Whether every byte of the bundle is what the manifest says, and who has signed that."""
    try:
        (config.bundle / MANIFEST).stat()
    except PermissionError:
        yield Finding("bundle", "unknown", f"{config.bundle}: only root may look", "sudo edge-daemon doctor")
        return
    except OSError:
        pass  # said below
    try:
        manifest = read_manifest(config.bundle)
        if config.bundle_key_file is not None:
            TrustedKeys(config.bundle_key_file).check(config.bundle)
        Bundle(config.bundle, manifest, file_digest(config.bundle / MANIFEST)).verify()
    except (BundleError, ConfigError) as error:
        by_hand = config.bundle.is_dir() and not config.bundle.is_symlink()
        install = "sudo edge-daemon bundle install BUNDLE, then activate it"
        mend = f"copy a converted bundle to {config.bundle}" if by_hand else install
        yield Finding("bundle", "problem", str(error), mend)
        return
    size = sum(entry.size for entry in manifest.files.values())
    said = f"{manifest.architecture.family} {manifest.recipe}, {size // MB} MB, whole"
    yield Finding("bundle", "ok", said)


def check_store(config: Config) -> Iterator[Finding]:
    """Whether bundles were refused or given up lately, and what there is to fall back to."""
    if not config.bundle.is_symlink():
        return
    store = BundleStore(config.bundle)
    record, current = read_record(store.directory), str(store.current)
    failures = record.recent(current)
    if failures:
        said = f"{current} failed {len(failures)} times in the last hour: {failures[-1].why}"
        yield Finding("bundle", "problem", said, "sudo edge-daemon bundle rollback")
    elif record.trouble is not None:
        yield Finding("bundle", "warning", record.trouble, "convert it again, or activate another one")
    else:
        yield Finding("bundle", "ok", f"{current}; to fall back to: {store.previous or 'none'}")


def check_serial(board: Board, config: Config) -> Iterator[Finding]:
    """Whether each port is there, free, and open to the group that the unit runs in."""
    for entry in config.serial:
        port = Path(entry.port)
        name = port.resolve().name
        if not port.exists():
            said = f"{port} is not there; ports that are: {', '.join(_ports()) or 'none'}"
            yield Finding(
                "serial", "problem", said, "plug the board in, or correct port in the configuration"
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
                f"{port} is the kernel's console: its messages disturb the line",
                "sudo raspi-config nonint do_serial_cons 1 && sudo reboot",
            )
        elif not _may_be_opened(port, mode.st_mode, group):
            yield Finding(
                "serial",
                "problem",
                f"{port} is of {group} with mode {stat.S_IMODE(mode.st_mode):o}, not of dialout with 660",
                "sudo cp /usr/share/edge-gemma/udev/65-edge-gemma.rules /etc/udev/rules.d/ && "
                "sudo udevadm control --reload && sudo udevadm trigger",
            )
        else:
            yield Finding("serial", "ok", f"{port} ({group})")


def is_console(name: str, consoles: tuple[str, ...]) -> bool:
    """Whether the kernel talks on the port `name`; a Pi's serial0 is its ttyAMA0 or ttyS0."""
    return name in consoles or ("serial0" in consoles and name in ("ttyAMA0", "ttyS0"))


def _may_be_opened(port: Path, mode: int, group: str) -> bool:
    """By the unit, which is in the group dialout, or by whoever runs this."""
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
    """Waits for the broker's retained version."""

    def __init__(self) -> None:
        self.connection: MqttConnection | None = None
        self.online = threading.Event()
        self.told = threading.Event()
        self.version = ""

    def connected(self) -> None:
        """Ask for the version."""
        self.online.set()
        if self.connection is not None:
            self.connection.subscribe("$SYS/broker/version", retained=True)

    def received(self, message: Received) -> None:
        """Keep the version."""
        self.version = message.payload.decode(errors="replace")
        self.told.set()

    def subscribed(self) -> None:
        """Nothing to do."""

    def disconnected(self) -> None:
        """Nothing to do."""

    def published(self, number: int, refused: str | None) -> None:
        """Nothing to do."""

    def tick(self) -> None:
        """Nothing to do."""


def check_broker(config: Config) -> Iterator[Finding]:
    """Whether the broker answers, lets the node in, and what it is."""
    if config.mqtt is None:
        return
    broker = config.mqtt.broker
    listener = _Listener()
    try:
        connection = MqttConnection(broker, f"edge-{config.node}-doctor", listener, session_expiry_s=0)
    except TransportError as error:
        yield Finding("broker", "problem", str(error), "correct the file's name in [mqtt]")
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
        said = f"{broker.address} refuses: {connection.refused}"
        return Finding("broker", "problem", said, "correct username and password_file in [mqtt]")
    said = f"{broker.address}: {connection.problem or 'no answer'}"
    local = broker.host in ("localhost", "127.0.0.1", "::1")
    mend = "sudo apt install mosquitto" if local else f"ping {broker.host}, and look at its firewall"
    return Finding("broker", "problem", said, mend)


def _version_finding(broker: Broker, listener: _Listener) -> Finding:
    version = listener.version or "a broker that does not tell its version"
    old = version.startswith("mosquitto version 1.")
    said = f"{broker.address}: {version}" + (", without MQTT 5 before 1.6" if old else "")
    return Finding("broker", "warning" if old else "ok", said, "sudo apt upgrade mosquitto" if old else None)
