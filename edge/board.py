"""What Linux says of the board: memory, processor, temperature, throttling, disks.

Each fact is None where the kernel does not tell it; nothing raises.
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
PAST_BITS = 16  # the same four, since the board was started


@dataclass(frozen=True)
class Throttling:
    """What holds the processor back: `now`, and `before` since the board was started."""

    now: tuple[str, ...]
    before: tuple[str, ...]


@dataclass(frozen=True)
class Disk:
    """Where a path is stored: `kind` is "SD card", "disk" (rotating), "SSD", "memory" or None (unknown)."""

    free_bytes: int
    read_only: bool
    kind: str | None


def boot_id() -> str:
    """Name the present boot of the board; empty if the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class Board:
    """The board whose files lie under `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def read(self, path: str) -> str | None:
        """Return the text of a file of /proc or /sys without surrounding space and NULs, or None."""
        try:
            return (self._root / path.lstrip("/")).read_text(errors="replace").strip("\0 \n")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Whether a path is there."""
        return (self._root / path.lstrip("/")).exists()

    @property
    def model(self) -> str | None:
        """The board's name, e.g. Raspberry Pi 5 Model B Rev 1.0."""
        return self.read("/proc/device-tree/model")

    def memory(self, name: str) -> int | None:
        """Bytes of an entry of /proc/meminfo, e.g. MemTotal, MemAvailable."""
        found = re.search(rf"^{name}:\s+(\d+) kB", self.read("/proc/meminfo") or "", re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def anonymous_memory(self, process: str) -> int | None:
        """RssAnon of a process in bytes; `process` is its number, or self."""
        status = self.read(f"/proc/{process}/status") or ""
        found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def anonymous_memory_of_unit(self, unit: str) -> int:
        """RssAnon of all processes of a system service together; 0 if there are none."""
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
        now = tuple(said for bit, said in THROTTLED_BITS.items() if bits >> bit & 1)
        before = tuple(said for bit, said in THROTTLED_BITS.items() if bits >> (bit + PAST_BITS) & 1)
        return Throttling(now, before)

    @cached_property
    def _throttled_file(self) -> str | None:
        """Below soc, or soc@107c000000: the node's name on a Pi 5 since Linux 6.12."""
        found = self._root.glob("sys/devices/platform/soc*/soc*:firmware/get_throttled")
        return next((str(path.relative_to(self._root)) for path in found), None)

    def cgroup_limit(self, unit: str, name: str) -> int | None:
        """Bytes of memory.max or memory.high of a system service; None if there is no limit."""
        text = self.read(f"/sys/fs/cgroup/system.slice/{unit}/{name}")
        return int(text) if text and text.isdigit() else None

    @property
    def cgroup_controllers(self) -> frozenset[str] | None:
        """Enabled controllers of cgroup version 2; None where that is not used."""
        text = self.read("/sys/fs/cgroup/cgroup.controllers")
        return None if text is None else frozenset(text.split())

    def disk(self, path: Path) -> Disk | None:
        """Where `path`, or the nearest of its parents that exists, is stored."""
        while not os.path.exists(path) and path != path.parent:  # false too where nobody may look
            path = path.parent
        try:
            stored, device = os.statvfs(path), path.stat().st_dev
        except OSError:
            return None
        kind, options = self._mount(device)
        # Since Linux 6.15 a disk that the kernel has shut after an error says so here only.
        read_only = bool(stored.f_flag & os.ST_RDONLY) or "emergency_ro" in options
        return Disk(stored.f_bavail * stored.f_frsize, read_only, self._disk_kind(device, kind))

    def _mount(self, device: int) -> tuple[str, list[str]]:
        """Give a device's kind of file system and its options (proc_pid_mountinfo(5))."""
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
        for folder in (block, block.parent):  # a partition has no queue of its own
            rotational = self.read(str(folder.relative_to(self._root.resolve()) / "queue/rotational"))
            if rotational is not None:
                return "disk" if rotational == "1" else "SSD"
        return None

    @property
    def swaps(self) -> tuple[str, ...]:
        """Devices and files that memory is swapped to."""
        lines = (self.read("/proc/swaps") or "").splitlines()[1:]
        return tuple(line.split()[0] for line in lines if line.split())

    def swap_file_behind(self, swap: str) -> str | None:
        """Where a zram device writes idle pages, e.g. /dev/loop0; None if they stay in memory."""
        found = self.read(f"/sys/block/{Path(swap).name}/backing_dev")
        return None if found in (None, "", "none") else found

    @property
    def consoles(self) -> tuple[str, ...]:
        """Serial ports that the kernel talks on, by name, e.g. ttyAMA0."""
        return tuple(re.findall(r"\bconsole=(tty[A-Z]+\d+|serial\d+)", self.read("/proc/cmdline") or ""))
