"""A node and its broker in two network namespaces, and a network that delays, loses and fails."""

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import bundles
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, free_port
from tests.support.mqtt_load import MqttLoad, keep_busy, one_answer_each

pytestmark = pytest.mark.slow

TUN = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
MTU_BYTES = 1500
RECOVERED_S = 30


@dataclass
class Fault:
    """A share of packets is lost, the others are delayed by up to `delay_s`; or all are lost."""

    loss: float = 0.0
    delay_s: float = 0.0
    offline: bool = False


class Network(threading.Thread):
    """A link between this network namespace and one of its own, as a pair of tun devices.

    It does not need the kernel's netem, which some kernels lack.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fault = Fault()
        number = os.getpid() % 250
        self.name = f"edge{os.getpid() % 100_000}"
        self.here, self.there = f"10.213.{number}.1", f"10.213.{number}.2"
        self._ends = [self._open(f"{self.name}{end}") for end in "ab"]
        self._chance = random.Random(7)
        self._under_way: list[tuple[float, int, int, bytes]] = []
        self._ending, self._ended = os.pipe()
        run("ip", "netns", "add", self.name)
        run("ip", "link", "set", f"{self.name}b", "netns", self.name)
        run("ip", "addr", "add", f"{self.here}/30", "dev", f"{self.name}a")
        run("ip", "link", "set", f"{self.name}a", "up")
        run(*self.within, "ip", "addr", "add", f"{self.there}/30", "dev", f"{self.name}b")
        run(*self.within, "ip", "link", "set", f"{self.name}b", "up")

    @property
    def within(self) -> tuple[str, ...]:
        """The command that runs another one in the far namespace."""
        return "ip", "netns", "exec", self.name

    def run(self) -> None:
        count = 0
        while True:
            due_s = max(0.0, self._under_way[0][0] - time.monotonic()) if self._under_way else None
            readable = select.select([*self._ends, self._ending], [], [], due_s)[0]
            if self._ending in readable:
                return
            for end in readable:
                packet = os.read(end, MTU_BYTES + 100)
                if not self.fault.offline and self._chance.random() >= self.fault.loss:
                    at = time.monotonic() + self._chance.uniform(0, self.fault.delay_s)
                    count += 1
                    heapq.heappush(self._under_way, (at, count, self._ends[self._ends[0] == end], packet))
            while self._under_way and self._under_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(self._under_way)
                os.write(end, packet)

    def close(self) -> None:
        os.close(self._ended)
        self.join(WAIT_S)
        run("ip", "netns", "delete", self.name)
        for end in (*self._ends, self._ending):
            os.close(end)

    @staticmethod
    def _open(name: str) -> int:
        end = os.open(TUN, os.O_RDWR)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        return end


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None or not TUN.exists():
        pytest.skip("network namespaces need root, iproute2 and /dev/net/tun")
    try:
        network = Network()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    network.start()
    yield network
    network.close()


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (Fault(loss=0.1, delay_s=0.4), 60),
        (Fault(loss=0.4, delay_s=1.5), 60),
        (Fault(offline=True), 8),
        (Fault(offline=True), 25),
        (Fault(offline=True), 150),
    ],
    ids=["some loss and delay", "much loss and delay", "8 s offline", "25 s offline", "150 s offline"],
)
def test_after_the_network_failed_requests_are_answered_within_30_s_and_none_is_lost(
    network: Network, start_mosquitto: Callable[..., Mosquitto], tmp_path: Path, fault: Fault, seconds: float
) -> None:
    port = free_port()
    broker = start_mosquitto("allow_anonymous true", f"listener {port} {network.here}")
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=4096)
    config = f'queue = 16\n[mqtt]\nhost = "{network.here}"\nport = {port}\n'
    daemon = DaemonProcess(tmp_path, bundle, config)
    daemon.within = network.within
    daemon.start()
    load = MqttLoad(broker, repeats=True)
    keep_busy(load, 2)
    network.fault = fault
    keep_busy(load, seconds)
    network.fault = Fault()
    back = time.monotonic()
    load.ask("after", max_tokens=10)
    while "after" not in load.answers and time.monotonic() < back + 2 * RECOVERED_S:
        time.sleep(0.05)
    took_s = time.monotonic() - back
    until = time.monotonic() + WAIT_S
    while not load.satisfied and time.monotonic() < until:
        time.sleep(0.05)
    one_answer_each(f"{fault} for {seconds} s, recovered after {took_s:.1f} s", load, [])
    assert took_s < RECOVERED_S
    assert daemon.stop() == 0
    load.close()
    daemon.close()
