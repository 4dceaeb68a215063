"""The daemon as a process: its notifications to systemd, how it stops, and how it reports errors."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge.client.links import MqttLink, SerialLink
from edge.endpoints import Broker, SerialConfig
from edge.errors import TransportError
from edge.protocol.messages import Answer, Final, Partial, Request
from edge.requests.engine import Engine
from edge.service.systemd import Watchdog, notify, watchdog_s
from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, PtyPair, wait_for
from tests.support.speller import Speller

LONG = Request("long", "Pump?", max_tokens=1200)  # about a second of work

Make = Callable[..., DaemonProcess]


@pytest.fixture(scope="module")
def bundle() -> Path:
    return bundles.small_bundle("gemma4-two-kv-heads", "int8", context=4096)


@pytest.fixture
def make(tmp_path: Path, bundle: Path) -> Iterator[Make]:
    """Prepare daemons; those still running are stopped after the test."""
    daemons: list[DaemonProcess] = []

    def make_one(config: str, bundle: Path = bundle, **environment: str) -> DaemonProcess:
        directory = tmp_path / f"daemon-{len(daemons)}"
        directory.mkdir()
        daemons.append(DaemonProcess(directory, bundle, config, **environment))
        return daemons[-1]

    yield make_one
    for daemon in daemons:
        daemon.close()


def mqtt(broker: Mosquitto) -> str:
    return f"[mqtt]\nport = {broker.port}\n"


def status(broker: Mosquitto) -> dict[str, str]:
    found: dict[str, str] = broker.retained("edge/v1/pump/status")
    return found


class Asking(threading.Thread):
    """A request sent in the background."""

    def __init__(self, broker: Mosquitto, request: Request) -> None:
        super().__init__()
        self._broker, self._request = broker, request
        self.answers: list[Answer | TransportError] = []
        self.in_work = threading.Event()
        self.start()

    def run(self) -> None:
        link = MqttLink(Broker(port=self._broker.port), "pump")
        try:
            for answer in link.ask(self._request, WAIT_S):
                self.in_work.set()
                if not isinstance(answer, Partial):
                    self.answers.append(answer)
        except TransportError as error:
            self.answers.append(error)
        link.close()

    def final(self) -> Final:
        self.join(WAIT_S)
        (answer,) = self.answers
        assert isinstance(answer, Final), answer
        return answer


def test_systemd_and_the_broker_are_notified_of_ready_and_stopping(make: Make, mosquitto: Mosquitto) -> None:
    daemon = make(mqtt(mosquitto))
    daemon.start(wait=False)
    assert "STATUS=Answering as pump" in daemon.notice("READY=1")
    wait_for(lambda: status(mosquitto)["state"] == "online")
    said = status(mosquitto)
    assert (said["model"], len(said["bundle"])) == ("gemma4", 12)
    assert daemon.stop() == 0
    daemon.notice("STOPPING=1")
    assert status(mosquitto)["state"] == "offline"
    assert "Traceback" not in daemon.log.read_text()


def test_the_last_will_marks_a_killed_daemon_offline(make: Make, mosquitto: Mosquitto) -> None:
    daemon = make(mqtt(mosquitto))
    daemon.start()
    wait_for(lambda: status(mosquitto)["state"] == "online")
    daemon.close()
    wait_for(lambda: status(mosquitto) == {"state": "offline"})  # the will has no other field


def test_broker_and_serial_ports_are_served_together(make: Make, mosquitto: Mosquitto, ptys: PtyPair) -> None:
    daemon = make(f'{mqtt(mosquitto)}[[serial]]\nport = "/dev/nothing"\n[[serial]]\nport = "{ptys.near}"\n')
    daemon.start()
    request = Request("a", "Pump?", max_tokens=4, stream=False)
    over_mqtt = Asking(mosquitto, request).final()
    link = SerialLink(SerialConfig(str(ptys.far), 115_200, "none", lenient=False))
    (over_serial,) = link.ask(request, WAIT_S)
    link.close()
    assert isinstance(over_serial, Final)
    assert over_serial.text == over_mqtt.text
    assert daemon.log.read_text().count("port /dev/nothing: it does not exist") == 1
    assert daemon.stop() == 0


def test_running_and_waiting_requests_finish_after_sigterm(make: Make, mosquitto: Mosquitto) -> None:
    daemon = make(f"log_payloads = true\n{mqtt(mosquitto)}")
    daemon.start()
    running = Asking(mosquitto, LONG)
    assert running.in_work.wait(WAIT_S)
    waiting = Asking(mosquitto, Request("next", "Pump?", max_tokens=4, stream=False))
    wait_for(lambda: "id=next request=" in daemon.log.read_text())
    assert daemon.stop() == 0
    assert running.final().usage.generated > 1000
    assert waiting.final().usage.generated == 4


def test_the_stop_timeout_is_extended_to_the_drain_time(make: Make, mosquitto: Mosquitto) -> None:
    daemon = make(f"drain_s = 300\n{mqtt(mosquitto)}")  # the unit's TimeoutStopSec is 45
    daemon.start()
    assert daemon.stop() == 0
    said = dict(line.split("=", 1) for line in daemon.notice("STOPPING=1").splitlines())
    assert 300e6 < int(said["EXTEND_TIMEOUT_USEC"]) < 400e6


def test_a_stop_waits_no_longer_than_drain_s(make: Make, mosquitto: Mosquitto) -> None:
    daemon = make(f"drain_s = 0\n{mqtt(mosquitto)}")
    daemon.start()
    running = Asking(mosquitto, LONG)
    assert running.in_work.wait(WAIT_S)
    assert daemon.stop() == 0
    assert running.answers == []
    daemon.start()  # answers the request that was interrupted
    assert running.final().usage.generated > 1000
    assert daemon.stop() == 0


def test_a_second_signal_ends_the_daemon_at_once(make: Make, mosquitto: Mosquitto) -> None:
    daemon = make(mqtt(mosquitto))
    daemon.start()
    asking = Asking(mosquitto, LONG)
    assert asking.in_work.wait(WAIT_S)
    assert daemon.process is not None
    daemon.process.terminate()
    daemon.notice("STOPPING=1")
    assert daemon.stop() == -signal.SIGTERM
    assert asking.answers == []
    daemon.start()
    assert asking.final().usage.generated > 1000


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ("[mqtt]\nprot = 1883\n", 5, "edge.toml:7: unknown key mqtt.prot; allowed: host, port"),
        ('[mqtt]\ntls = true\nca_file = "/nowhere"\n', 6, "a TLS file can't be used"),
    ],
)
def test_a_wrong_configuration_ends_the_daemon_with_one_line(
    make: Make, config: str, code: int, said: str
) -> None:
    daemon = make(config)
    daemon.start(wait=False)
    assert daemon.end() == code
    assert said in daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


def test_a_bundle_that_is_missing_or_damaged_is_named(
    make: Make, mosquitto: Mosquitto, bundle: Path, tmp_path: Path
) -> None:
    damaged = bundles.copy_of(bundle, tmp_path / "damaged")
    content = bytearray((damaged / "decoder.tflite").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "decoder.tflite").write_bytes(content)
    for place, said in ((tmp_path / "nowhere", "manifest.json"), (damaged, "decoder.tflite: its SHA-256")):
        daemon = make(mqtt(mosquitto), place)
        daemon.start(wait=False)
        assert daemon.end() == 3
        (line,) = daemon.log.read_text().splitlines()
        assert line.startswith(f"Error: {place}")
        assert said in line


def test_a_bundle_too_large_for_the_board_is_refused_unless_forced(
    make: Make, mosquitto: Mosquitto, bundle: Path, tmp_path: Path
) -> None:
    large = bundles.copy_of(bundle, tmp_path / "large")
    manifest = json.loads((large / "manifest.json").read_text())
    manifest["quantization"]["bytes_per_token"] = 10**15
    (large / "manifest.json").write_text(json.dumps(manifest))
    daemon = make(mqtt(mosquitto), large)
    daemon.start(wait=False)
    assert daemon.end() == 3
    (line,) = daemon.log.read_text().splitlines()
    assert line.startswith(f"Error: {large}: needs 1,000,000,")
    daemon.start("--force")
    assert daemon.stop() == 0


def test_a_refused_password_ends_the_daemon(
    make: Make, start_mosquitto: Callable[..., Mosquitto], tmp_path: Path
) -> None:
    (tmp_path / "passwords").touch(mode=0o600)
    broker = start_mosquitto("allow_anonymous false", f"password_file {tmp_path / 'passwords'}")
    daemon = make(mqtt(broker))
    daemon.start(wait=False)
    assert daemon.end() == 6
    log = daemon.log.read_text()
    assert log.splitlines()[-1] == (
        f"Error: broker 127.0.0.1:{broker.port}: it refuses the connection: Not authorized; "
        "check the user name, the password and the broker's access list"
    )
    assert "Trying again" not in log


def test_a_daemon_with_a_watchdog_sends_keepalives(make: Make, mosquitto: Mosquitto) -> None:
    daemon = make(mqtt(mosquitto), WATCHDOG_USEC="8000000")
    daemon.start()
    for _ in range(2):
        daemon.notice("WATCHDOG=1")
    assert daemon.stop() == 0


def test_the_log_reports_requests_without_their_content(make: Make, mosquitto: Mosquitto) -> None:
    daemon = make(mqtt(mosquitto))
    daemon.start()
    answered = Asking(mosquitto, Request("good", "Secret?", max_tokens=3, stream=False)).final()
    refused = Asking(mosquitto, Request("bad", "Secret? " * 5000, stream=False))
    refused.join(WAIT_S)
    assert daemon.stop() == 0
    log = daemon.log.read_text()
    assert re.search(
        r" INFO answered id=good client=\S+edge/v1/pump/reply/\S+ finish=length prompt=\d+ ", log
    )
    assert " WARNING failed id=bad client=" in log
    assert " code=too_long: " in log
    assert "Secret" not in log
    assert answered.text.strip() not in log


def test_log_lines_have_priorities_if_journald_reads_them(make: Make, mosquitto: Mosquitto) -> None:
    daemon = make(mqtt(mosquitto), JOURNAL_STREAM="1:2")
    daemon.start()
    assert daemon.stop() == 0
    assert "<6>SIGTERM: stopping\n" in daemon.log.read_text()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket where systemd would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def drain(systemd: socket.socket) -> bytes:
    """All notifications sent to systemd so far."""
    received = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            received += systemd.recv(100)
    return received


def test_the_watchdog_is_not_fed_while_the_decoder_hangs(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    speller, hung = Speller(), threading.Event()
    monkeypatch.setattr(speller, "step", lambda _word: hung.wait(WAIT_S))
    engine = Engine(speller, queue_length=1)
    engine.start()
    watchdog = Watchdog({"decoder": engine})
    assert watchdog.check()
    assert systemd.recv(100) == b"WATCHDOG=1"
    wait_for(lambda: engine.progress > 1)
    assert watchdog.check()
    engine.submit("test", Request("a", "abc"), lambda _answer: None)
    wait_for(lambda: speller.asked)
    wait_for(lambda: not watchdog.check())
    with caplog.at_level(logging.WARNING):
        assert not watchdog.check()
    assert "no progress: decoder" in caplog.text
    received = drain(systemd)
    assert not watchdog.check()
    assert drain(systemd) == b""
    assert received.replace(b"WATCHDOG=1", b"") == b""
    hung.set()
    wait_for(watchdog.check)
    engine.stop(WAIT_S)


@dataclass
class Counted:
    """A watched component whose progress the test sets."""

    progress: float = 0
    alive: bool = True


def test_the_watchdog_requires_progress_of_every_component(systemd: socket.socket) -> None:
    decoder, mqtt = Counted(), Counted()
    watchdog = Watchdog({"decoder": decoder, "mqtt": mqtt})
    assert watchdog.check()
    mqtt.progress += 1
    assert not watchdog.check()
    decoder.progress += 1
    assert not watchdog.check()
    decoder.progress = mqtt.progress = 5
    assert watchdog.check()


def test_a_full_notification_socket_does_not_block(
    systemd: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    while "systemd could not be notified of WATCHDOG=1" not in caplog.text:
        notify("WATCHDOG=1")
    assert drain(systemd).startswith(b"WATCHDOG=1")


def test_a_missing_notification_socket_is_only_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    notify("READY=1")
    assert "systemd could not be notified of READY=1: No such file or directory" in caplog.text
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")


@pytest.mark.parametrize(
    ("microseconds", "owner", "seconds"),
    [("60000000", None, 60.0), ("60000000", "1", None), ("0", None, None), ("x", None, None)],
)
def test_the_watchdog_interval_comes_from_systemd(
    monkeypatch: pytest.MonkeyPatch, microseconds: str, owner: str | None, seconds: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.setenv("WATCHDOG_PID", owner or str(os.getpid()))
    assert watchdog_s() == seconds


def test_no_heavy_module_is_imported_before_the_configuration_is_read() -> None:
    code = "import sys, edge.cli.daemon, edge.config; print('numpy' in sys.modules or 'ssl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
