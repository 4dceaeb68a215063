"""Faults around a daemon: unplugged cables, a hung thread, full disks, wrong clocks; it still answers."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import publish

from edge.client.links import MqttLink, SerialLink
from edge.endpoints import SerialConfig
from edge.errors import TransportError
from edge.protocol.framing import Damaged, FrameDecoder
from edge.protocol.messages import Answer, Final, Request
from edge.protocol.strict_json import loads
from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, PtyPair, edge_command, wait_for

REOPENED_S = 2.0
WATCHDOG_S = 8.0
LONG = 4000  # tokens, seconds of work
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))

Make = Callable[..., DaemonProcess]


@pytest.fixture(scope="module")
def bundle() -> Path:
    return bundles.small_bundle("gemma4-two-kv-heads", "int8", context=4096)


@pytest.fixture
def make(tmp_path: Path, bundle: Path, mosquitto: Mosquitto, ptys: PtyPair) -> Iterator[Make]:
    """Prepare a daemon on a broker and a port."""
    daemons = []

    def make_one(**environment: str) -> DaemonProcess:
        config = f'[mqtt]\nport = {mosquitto.port}\n[[serial]]\nport = "{ptys.near}"\n'
        daemons.append(DaemonProcess(tmp_path, bundle, config, **environment))
        return daemons[-1]

    yield make_one
    for daemon in daemons:
        daemon.close()


def pid_of(daemon: DaemonProcess) -> int:
    assert daemon.process is not None
    return daemon.process.pid


def ask(broker: Mosquitto, name: str, **fields: Any) -> Answer:
    """Ask over MQTT and return the final answer or error."""
    link = MqttLink(broker.broker, "pump")
    try:
        return list(link.ask(Request(name, "Pump?", stream=False, **fields), WAIT_S))[-1]
    finally:
        link.close()


def answered(broker: Mosquitto, name: str) -> None:
    answer = ask(broker, name, max_tokens=4, deadline_ms=20_000)
    assert isinstance(answer, Final), answer
    assert answer.finish_reason == "length"


def health(broker: Mosquitto) -> dict[str, Any]:
    found: dict[str, Any] = broker.retained("edge/v1/pump/health")
    return found


def doctor(daemon: DaemonProcess, environment: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """The problems that the doctor finds, by check."""
    command = edge_command("daemon", "doctor", "--json", "--config", str(daemon.directory / "edge.toml"))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    found: dict[str, list[str]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        if finding["state"] == "problem":
            assert finding["mend"]
            found.setdefault(finding["check"], []).append(finding["said"])
    return found


def hello(port: Path) -> None:
    """Wait for the daemon's `hello` at the far end of a cable."""
    file = os.open(port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    decoder = FrameDecoder(10**6)
    heard: list[str | Damaged] = []

    def greeted() -> bool:
        try:
            heard.extend(decoder.feed(os.read(file, 65536)))
        except BlockingIOError:
            return False
        return any(isinstance(frame, str) and loads(frame, 10**6)["type"] == "hello" for frame in heard)

    wait_for(greeted)
    os.close(file)


@pytest.mark.parametrize("times", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_a_cable_that_is_plugged_in_again_works_and_leaks_nothing(
    make: Make, ptys: PtyPair, times: int
) -> None:
    daemon = make()
    daemon.start()
    hello(ptys.far)
    descriptors = Path(f"/proc/{pid_of(daemon)}/fd")
    before, took = len(os.listdir(descriptors)), []
    for _ in range(times):
        ptys.unplug()
        ptys.plug()
        plugged = time.monotonic()
        hello(ptys.far)
        took.append(time.monotonic() - plugged)
    print(f"{times} times: back within {max(took):.2f} s, {sorted(took)[times // 2]:.2f} s in the middle")
    assert max(took) < REOPENED_S
    assert len(os.listdir(descriptors)) == before
    assert daemon.stop() == 0


class HeldThread:
    """The busiest thread of a process, stopped by ptrace(2) as if a card or a lock never answered.

    It is stopped where it does not hold Python's lock. Ends with the process.
    """

    SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17
    ALL_THREADS = 0x40000000  # __WALL of waitpid(2)

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.argtypes = [ctypes.c_long] * 4
        while True:
            self.thread = self._busiest()
            self._ptrace(self.SEIZE)
            self._ptrace(self.INTERRUPT)
            os.waitpid(self.thread, self.ALL_THREADS)
            if self._others_run():
                return
            self._ptrace(self.DETACH)

    def reap(self) -> None:
        """Reap the thread, without which the process can't end."""
        while os.waitpid(self.thread, self.ALL_THREADS)[0] != self.thread:
            pass

    def _ptrace(self, request: int) -> None:
        if self._libc.ptrace(request, self.thread, 0, 0) == 0:
            return
        reason = os.strerror(ctypes.get_errno())
        if request == self.SEIZE:
            pytest.skip(f"a thread can't be held here: {reason}")
        raise OSError(reason)

    def _busiest(self) -> int:
        before = self._ticks()
        time.sleep(0.3)  # long enough to see who works
        now = self._ticks()
        return max(now, key=lambda thread: now[thread] - before.get(thread, 0))

    def _ticks(self) -> dict[int, int]:
        threads = Path(f"/proc/{self._pid}/task").iterdir()
        return {int(t.name): int((t / "stat").read_text().rpartition(")")[2].split()[11]) for t in threads}

    def _others_run(self) -> bool:
        """Whether the main thread, which looks around twice a second, still does.

        A thread that waits for Python's lock looks for it two hundred times a second.
        """
        before = self._switches()
        time.sleep(2)
        return 0 < self._switches() - before < 50

    def _switches(self) -> int:
        lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


class Asking(threading.Thread):
    """Asks a long question over a serial line and waits across a restart of the daemon."""

    def __init__(self, port: Path) -> None:
        super().__init__()
        self._link = SerialLink(SerialConfig(str(port), 115_200, "none", lenient=False))
        self.answers: list[Answer | TransportError] = []
        self.start()

    def run(self) -> None:
        try:
            self.answers.extend(
                self._link.ask(Request("long", "Pump?", max_tokens=LONG, stream=False), 4 * WAIT_S)
            )
        except TransportError as error:
            self.answers.append(error)
        self._link.close()


def silence(daemon: DaemonProcess) -> None:
    """Wait, as systemd does, until no WATCHDOG=1 has come for WATCHDOG_S."""
    heard = time.monotonic()
    while time.monotonic() - heard < WATCHDOG_S:
        if daemon.next_notice() == "WATCHDOG=1":
            heard = time.monotonic()


@pytest.mark.slow
def test_a_daemon_whose_decoder_hangs_is_restarted_by_the_watchdog_and_answers(
    make: Make, mosquitto: Mosquitto, ptys: PtyPair
) -> None:
    daemon = make(WATCHDOG_USEC=str(int(WATCHDOG_S * 1e6)))
    daemon.start()
    daemon.notice("WATCHDOG=1")
    asking = Asking(ptys.far)
    wait_for(lambda: health(mosquitto)["working"])
    held = HeldThread(pid_of(daemon))
    silence(daemon)
    assert mosquitto.retained("edge/v1/pump/status")["state"] == "online"
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGABRT)  # as systemd does
    held.reap()
    assert daemon.end() == -signal.SIGABRT
    log = daemon.log.read_text()
    assert "no progress: decoder; systemd restarts the daemon if that goes on" in log
    assert "Fatal Python error: Aborted" in log
    daemon.start()
    asking.join(4 * WAIT_S)
    (answer,) = asking.answers
    assert isinstance(answer, Final), answer
    assert answer.usage.generated > 1000
    assert daemon.stop() == 0


def lives(daemon: DaemonProcess, seconds: float) -> bool:
    """Whether the daemon feeds the watchdog in time for so many seconds."""
    heard = start = time.monotonic()
    while time.monotonic() - start < seconds:
        if daemon.next_notice() == "WATCHDOG=1":
            heard = time.monotonic()
        if time.monotonic() - heard > WATCHDOG_S:
            return False
    return True


@pytest.mark.slow
def test_a_broker_that_is_silent_in_a_tls_handshake_does_not_starve_the_watchdog(
    tmp_path: Path, bundle: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = f"[mqtt]\nport = {silent.getsockname()[1]}\ntls = true\nkeepalive_s = 60\n"
        daemon = DaemonProcess(tmp_path, bundle, config, WATCHDOG_USEC=str(int(WATCHDOG_S * 1e6)))
        with contextlib.closing(daemon):
            daemon.start()
            assert lives(daemon, 1.5 * WATCHDOG_S)
            assert daemon.stop() == 0


@pytest.mark.slow
def test_name_servers_that_do_not_answer_do_not_starve_the_watchdog(tmp_path: Path, bundle: Path) -> None:
    names = tmp_path / "resolv.conf"
    names.write_text("nameserver 127.0.9.1\nsearch lan\n")
    route = '[[route]]\nname = "r"\ntopics = ["t"]\nevent_topic = "e"\n[route.trigger]\nsilence_s = 600\n'
    config = f'[mqtt]\nhost = "broker.lan"\n{route}'
    daemon = DaemonProcess(tmp_path, bundle, config, WATCHDOG_USEC=str(int(WATCHDOG_S * 1e6)))
    daemon.within = ("unshare", "-m", "sh", "-c", f'mount --bind {names} /etc/resolv.conf && exec "$@"', "sh")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent, contextlib.closing(daemon):
        silent.bind(("127.0.9.1", 53))
        daemon.start()
        assert lives(daemon, 30)  # a look-up takes 20 s
        assert daemon.stop() == 0
    assert "broker.lan:1883: can't be reached: " in daemon.log.read_text()


class Disk:
    """A small file system in a file, mounted at `place`."""

    def __init__(self, place: Path, megabytes: int) -> None:
        self._place = place
        place.mkdir()
        image = place.with_suffix(".image")
        image.touch()
        os.truncate(image, megabytes << 20)
        self._run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image))
        self._run("mount", "-o", "loop,errors=remount-ro", str(image), str(place))

    def fill(self) -> None:
        with (self._place / "filler").open("ab", buffering=0) as file:
            for size in (65536, 1):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        (self._place / "filler").unlink()

    def fail(self) -> None:
        """Report an error to the kernel, which then makes the file system read-only."""
        device = os.stat(self._place).st_dev
        name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
        with contextlib.suppress(OSError):  # it says that the disk is read-only now
            Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("1")

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", str(self._place)], check=False)

    @staticmethod
    def _run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[list[Disk]]:
    """The disks of state and cache."""
    if os.geteuid() != 0:
        pytest.skip("mounting a disk needs root")
    made: list[Disk] = []
    try:
        made += [Disk(tmp_path / "state", 4)]
        made += [Disk(tmp_path / "cache", 16)]
        yield made
    finally:
        for disk in made:
            disk.remove()


@pytest.mark.parametrize("state", ["full", "failed"])
@pytest.mark.parametrize(
    "when",
    ["while it runs", pytest.param("before it starts", marks=pytest.mark.slow), "before it has ever started"],
)
def test_a_disk_that_is_full_or_has_failed_stops_no_answer_and_is_reported(
    make: Make, mosquitto: Mosquitto, disks: list[Disk], state: str, when: str
) -> None:
    daemon = make()
    if when != "before it has ever started":
        daemon.start()
        answered(mosquitto, "before")
    if when == "before it starts":
        assert daemon.stop() == 0
    for disk in disks:
        disk.fill() if state == "full" else disk.fail()
    if when != "while it runs":
        daemon.start()
    for number in range(3):
        answered(mosquitto, f"after-{number}")
    wait_for(lambda: health(mosquitto)["journal"])
    assert health(mosquitto)["journal"].endswith("records are kept in memory only: free or repair the disk")
    log = daemon.log.read_text()
    assert health(mosquitto)["journal"] in log
    assert ("can't store packed weights" in log) == (when == "before it has ever started")
    problems = doctor(daemon)["disk"]
    assert len(problems) == len(disks)
    assert all((" 0 MB free" if state == "full" else "read-only") in problem for problem in problems)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.slow
def test_the_journal_returns_to_a_disk_that_was_full(
    make: Make, mosquitto: Mosquitto, disks: list[Disk]
) -> None:
    daemon = make()
    daemon.start()
    disks[0].fill()
    answered(mosquitto, "a")
    wait_for(lambda: health(mosquitto)["journal"])
    disks[0].free()
    until = time.monotonic() + 120  # it tries once a minute
    while health(mosquitto)["journal"]:
        assert time.monotonic() < until
        answered(mosquitto, f"b-{time.monotonic_ns()}")
    assert "journal.sqlite: on the disk again" in daemon.log.read_text()
    first = ask(mosquitto, "a", max_tokens=4, deadline_ms=20_000)
    assert isinstance(first, Final)
    assert daemon.stop() == 0


class Clock:
    """The time of day of a daemon, which can jump; its monotonic clock does not, as on a board."""

    def __init__(self, file: Path) -> None:
        if not FAKETIME:
            pytest.skip("libfaketime is not installed")
        self._file = file
        self.jump("+0")
        self.environment = {
            "LD_PRELOAD": str(FAKETIME[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, offset: str) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(offset + "\n")
        new.replace(self._file)


def test_a_clock_that_jumps_by_years_affects_no_answer_and_is_reported(
    make: Make, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    clock = Clock(tmp_path / "offset")
    daemon = make(WATCHDOG_USEC=str(int(WATCHDOG_S * 1e6)), **clock.environment)
    daemon.start()
    for number, offset in enumerate(("+0", "-3650d", "+3650d", "+0")):
        clock.jump(offset)
        answered(mosquitto, f"short-{number}")
        asked = time.monotonic()
        answer = ask(mosquitto, f"long-{number}", max_tokens=LONG, deadline_ms=500)
        assert isinstance(answer, Final), answer
        assert answer.finish_reason == "deadline"
        assert time.monotonic() - asked > 0.4
        daemon.notice("WATCHDOG=1")
        until = time.monotonic() + WAIT_S
        while daemon.log.read_text().count("the clock was set") < number:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert "the clock was set back by 3650 days" in daemon.log.read_text()
    clock.jump("-3650d")
    (said,) = doctor(daemon, clock.environment)["clock"]
    assert said.startswith("the year is 20")
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offset", "kind", "code"), [("-3650d", "final", ""), ("+3650d", "error", "expired")]
)
def test_a_request_from_before_a_crash_is_answered_by_a_clock_behind_and_expired_by_one_ahead(
    make: Make, mosquitto: Mosquitto, tmp_path: Path, offset: str, kind: str, code: str
) -> None:
    clock = Clock(tmp_path / "offset")
    daemon = make(**clock.environment)
    daemon.start()
    wait_for(lambda: mosquitto.retained("edge/v1/pump/status")["state"] == "online")
    reply = "edge/v1/pump/reply/late"
    request = Request("late", "Pump?", max_tokens=LONG, deadline_ms=60_000, stream=False, reply_to=reply)
    publish.single("edge/v1/pump/request", request.to_json(), qos=1, port=mosquitto.port)
    wait_for(lambda: health(mosquitto)["working"])
    assert daemon.process is not None
    daemon.process.kill()
    daemon.end()
    clock.jump(offset)
    answers: list[dict[str, Any]] = []
    hearing = threading.Thread(target=lambda: answers.append(mosquitto.retained(reply)))
    hearing.start()
    daemon.start()
    hearing.join(2 * WAIT_S)
    assert [(answer["type"], answer.get("code", "")) for answer in answers] == [(kind, code)]
    assert daemon.stop() == 0
