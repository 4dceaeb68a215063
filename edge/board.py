"""What Linux reports about the board: memory, processor, temperature, throttling, disks.

A fact is None where the kernel does not report it; nothing raises.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

THROTTLED_BITS = {  # of the firmware's get_throttled (Raspberry Pi documentation, vcgencmd)
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
PAST_BITS = 16  # offset of the same four since boot


@dataclass(frozen=True)
class Throttling:
    """Reasons why the processor is slowed down: `now`, and `before`, earlier since boot."""

    now: tuple[str, ...]
    before: tuple[str, ...]


@dataclass(frozen=True)
class Disk:
    """The disk of a path; `kind` is "SD card", "disk" (rotating), "SSD", "memory" or None (unknown)."""

    free_bytes: int
    read_only: bool
    kind: str | None


def boot_id() -> str:
    """Return the kernel's id of the current boot; empty if it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class Board:
    """The board whose file system is below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def read(self, path: str) -> str | None:
        """Return the text of a file in /proc or /sys without surrounding space and NULs, or None."""
        try:
            return (self._root / path.lstrip("/")).read_text(errors="replace").strip("\0 \n")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Whether a path exists."""
        return (self._root / path.lstrip("/")).exists()

    @property
    def model(self) -> str | None:
        """The board's name, e.g. Raspberry Pi 5 Model B Rev 1.0."""
        return self.read("/proc/device-tree/model")

    def memory(self, name: str) -> int | None:
        """An entry of /proc/meminfo in bytes, e.g. MemTotal, MemAvailable."""
        found = re.search(rf"^{name}:\s+(\d+) kB", self.read("/proc/meminfo") or "", re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def anonymous_memory(self, process: str) -> int | None:
        """RssAnon of a process in bytes; `process` is its number, or self."""
        status = self.read(f"/proc/{process}/status") or ""
        found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def anonymous_memory_of_unit(self, unit: str) -> int:
        """Total RssAnon of the processes of a system service, in bytes; 0 if it is not running."""
        processes = (self.read(f"/sys/fs/cgroup/system.slice/{unit}/cgroup.procs") or "").split()
        return sum(self.anonymous_memory(process) or 0 for process in processes)

    @property
    def cpu_features(self) -> frozenset[str]:
        """The kernel's names of the processor's features: asimddp and i8mm on Arm, avx2 and so on on x86."""
        found = re.search(r"^(?:Features|flags)\s*: (.*)$", self.read("/proc/cpuinfo") or "", re.MULTILINE)
        return frozenset(found[1].split()) if found else frozenset()

    @property
    def governor(self) -> str | None:
        """The frequency governor of the first core."""
        return self.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")

    @property
    def temperature_c(self) -> float | None:
        """The first thermal zone in degrees Celsius; on a Pi the processor's."""
        text = self.read("/sys/class/thermal/thermal_zone0/temp")
        return int(text) / 1000 if text and re.fullmatch(r"-?\d+", text) else None

    @property
    def throttling(self) -> Throttling | None:
        """What the firmware of a Raspberry Pi reports; None on other boards."""
        text = None if self._throttled_file is None else self.read(self._throttled_file)
        if not text or not re.fullmatch(r"(0x)?[0-9a-fA-F]+", text):
            return None
        bits = int(text, 16)
        now = tuple(name for bit, name in THROTTLED_BITS.items() if bits >> bit & 1)
        before = tuple(name for bit, name in THROTTLED_BITS.items() if bits >> (bit + PAST_BITS) & 1)
        return Throttling(now, before)

    @cached_property
    def _throttled_file(self) -> str | None:
        """In soc, or in soc@107c000000: the node's name on a Pi 5 since Linux 6.12."""
        found = self._root.glob("sys/devices/platform/soc*/soc*:firmware/get_throttled")
        return next((str(path.relative_to(self._root)) for path in found), None)

    def cgroup_limit(self, unit: str, name: str) -> int | None:
        """memory.max or memory.high of a system service in bytes; None without a limit."""
        text = self.read(f"/sys/fs/cgroup/system.slice/{unit}/{name}")
        return int(text) if text and text.isdigit() else None

    @property
    def cgroup_controllers(self) -> frozenset[str] | None:
        """Enabled controllers of cgroup version 2; None where it is not in use."""
        text = self.read("/sys/fs/cgroup/cgroup.controllers")
        return None if text is None else frozenset(text.split())

    def disk(self, path: Path) -> Disk | None:
        """The file system of `path`, or of its nearest parent that exists."""
        while not os.path.exists(path) and path != path.parent:  # also false without permission
            path = path.parent
        try:
            stored, device = os.statvfs(path), path.stat().st_dev
        except OSError:
            return None
        kind, options = self._mount(device)
        # Since Linux 6.15 this is the only sign of a disk that the kernel has shut down after an error.
        read_only = bool(stored.f_flag & os.ST_RDONLY) or "emergency_ro" in options
        return Disk(stored.f_bavail * stored.f_frsize, read_only, self._disk_kind(device, kind))

    def _mount(self, device: int) -> tuple[str, list[str]]:
        """Return a device's file system type and its options (proc_pid_mountinfo(5))."""
        mounts = self.read("/proc/self/mountinfo") or ""
        number = f"{os.major(device)}:{os.minor(device)}"
        here = re.search(rf"^\S+ \S+ {number} .* - (\S+) \S+ (\S+)$", mounts, re.MULTILINE)
        return (here[1], here[2].split(",")) if here else ("", [])

    def _disk_kind(self, device: int, file_system: str) -> str | None:
        if os.major(device) == 0:
            return "memory" if file_system in ("tmpfs", "ramfs") else None
        block = (self._root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
        if any(part.startswith("mmcblk") for part in block.parts):
            return "SD card"
        for folder in (block, block.parent):  # a partition has no queue directory
            rotational = self.read(str(folder.relative_to(self._root.resolve()) / "queue/rotational"))
            if rotational is not None:
                return "disk" if rotational == "1" else "SSD"
        return None

    @property
    def swaps(self) -> tuple[str, ...]:
        """Devices and files in use as swap."""
        lines = (self.read("/proc/swaps") or "").splitlines()[1:]
        return tuple(line.split()[0] for line in lines if line.split())

    def swap_file_behind(self, swap: str) -> str | None:
        """The device that zram writes idle pages to, e.g. /dev/loop0; None if they stay in memory."""
        found = self.read(f"/sys/block/{Path(swap).name}/backing_dev")
        return None if found in (None, "", "none") else found

    @property
    def kernel_parameters(self) -> tuple[str, ...]:
        """The kernel's command line, split at spaces."""
        return tuple((self.read("/proc/cmdline") or "").split())

    @property
    def consoles(self) -> tuple[str, ...]:
        """Names of serial ports that the kernel uses as its console, e.g. ttyAMA0."""
        names = (re.match(r"console=(tty[A-Z]+\d+|serial\d+)", each) for each in self.kernel_parameters)
        return tuple(name[1] for name in names if name)

    @property
    def numa_nodes(self) -> int:
        """How many NUMA nodes the kernel uses; 1 for a kernel without NUMA."""
        ranges = re.findall(r"(\d+)(?:-(\d+))?", self.read("/sys/devices/system/node/online") or "0")
        return sum(int(last or first) - int(first) + 1 for first, last in ranges)

    @property
    def bootloader_config(self) -> str | None:
        """The configuration in a Raspberry Pi's EEPROM, as it was at boot; None without root's permissions.

        It is the NVMEM device that the alias blconfig names (Raspberry Pi documentation, device trees).
        """
        alias = self.read("/sys/firmware/devicetree/base/aliases/blconfig")
        if alias is None:
            return None
        node = (self._root / "sys/firmware/devicetree/base" / alias.lstrip("/")).resolve()
        for device in sorted(self._root.glob("sys/bus/nvmem/devices/*")):
            if (device / "of_node").resolve() == node:
                return self.read(str((device / "nvmem").relative_to(self._root)))
        return None

    @property
    def sdram_bank_low(self) -> int | None:
        """SDRAM_BANKLOW in `bootloader_config`; None where it is not set: the bootloader chooses."""
        config = (self.bootloader_config or "").partition("[config.txt]")[0]
        values = re.findall(r"^\s*SDRAM_BANKLOW\s*=\s*(\d)\s*$", config, re.MULTILINE)
        return int(values[-1]) if values else None
