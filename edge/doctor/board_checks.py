"""The doctor's checks of the board: processor, power, clock, memory and disk."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import struct
import time
from collections.abc import Iterator

from edge.board import Board
from edge.bundles.bundle import DECODER, Manifest, read_manifest
from edge.bundles.requirements import SYSTEM_BYTES, requirements
from edge.config import Config
from edge.doctor.finding import Finding
from edge.errors import EdgeError

MB = 1_000_000
MIN_FREE_BYTES = 200 * MB
UNIT = "edge-daemon.service"
HOT_C = 80.0  # a Raspberry Pi throttles from here on
EARLIEST_YEAR = 2025
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def check_system() -> Iterator[Finding]:
    """Whether LiteRT supports this architecture."""
    machine, bits = platform.machine(), struct.calcsize("P") * 8
    if machine not in ("aarch64", "arm64", "x86_64") or bits != 64:
        yield Finding(
            "system",
            "problem",
            f"{machine}, {bits}-bit Python: LiteRT needs a 64-bit system",
            "install the 64-bit edition of Raspberry Pi OS",
        )
        return
    try:
        version = importlib.metadata.version("ai-edge-litert")
        yield Finding("system", "ok", f"{machine}, Python {platform.python_version()}, LiteRT {version}")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "system", "problem", "ai-edge-litert is not installed", "python3 -m pip install ai-edge-litert"
        )


def check_cpu(board: Board) -> Iterator[Finding]:
    """Whether the processor has dot-product instructions, and may use its full clock rate."""
    features, name = board.cpu_features, board.model or platform.machine()
    if not features:
        yield Finding("cpu", "unknown", f"{name}: the kernel does not report the processor's features")
    elif features & {"asimddp", "avx2"}:
        yield Finding("cpu", "ok", name)
    else:
        message = f"{name}: no dot-product instructions (as on a Pi 4, 3 and Zero 2 W): prefill is slow"
        yield Finding("cpu", "warning", message, "keep prompts short, or use a Pi 5")
    if board.governor == "powersave":
        yield Finding(
            "cpu",
            "warning",
            "the governor powersave keeps the clock at its lowest rate",
            "echo ondemand | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )


def check_power(board: Board) -> Iterator[Finding]:
    """Temperature, throttling and supply voltage."""
    temperature, throttling = board.temperature_c, board.throttling
    shown = "temperature unknown" if temperature is None else f"{temperature:.0f} °C"
    if throttling is not None and throttling.now:
        message, state = f"{shown}, now: {', '.join(throttling.now)}", "problem"
    elif throttling is not None and throttling.before:
        message, state = f"{shown}, since boot: {', '.join(throttling.before)}", "warning"
    elif temperature is not None and temperature >= HOT_C:
        message, state = f"{shown}: the processor throttles at this temperature", "warning"
    else:
        yield Finding("power", "unknown" if temperature is None else "ok", shown)
        return
    voltage = "under-voltage" in message
    fix = "use the board's official power supply and a short cable" if voltage else "fit a heat sink or a fan"
    yield Finding("power", "problem" if state == "problem" else "warning", message, fix)


def check_clock() -> Iterator[Finding]:
    """Whether the clock is right; certificates and deadlines depend on it."""
    year = time.gmtime().tm_year
    if year < EARLIEST_YEAR:
        yield Finding(
            "clock",
            "problem",
            f"the year is {year}: TLS certificates will not be valid",
            "sudo timedatectl set-ntp true, or add a real-time clock",
        )
    elif not _clock_is_synchronised():
        yield Finding("clock", "warning", "not synchronised", "sudo timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", "synchronised")


def _clock_is_synchronised() -> bool:
    """Read the kernel's state of the clock."""
    timex = ctypes.create_string_buffer(512)  # larger than struct timex; mode 0 only reads
    verdict: int = ctypes.CDLL(None).adjtimex(timex)
    return verdict != TIME_ERROR


def check_memory(board: Board, config: Config) -> Iterator[Finding]:
    """Whether the model fits into memory; otherwise weights are read from the disk for every token."""
    manifest = _manifest(config)
    total, available = board.memory("MemTotal"), board.memory("MemAvailable")
    if available is not None:  # memory of the running daemon is available to it
        available += board.anonymous_memory_of_unit(UNIT)
    if total is None or manifest is None:
        yield Finding("memory", "unknown", "unknown: no bundle, or no /proc/meminfo")
        return
    needed = requirements(manifest, config.context).total
    message = f"{needed // MB} MB needed of {total // MB} MB"
    smaller = "use a smaller model or int4, or a smaller context in the configuration"
    if needed + SYSTEM_BYTES > total:
        yield Finding("memory", "problem", f"{message}: the model does not fit", smaller)
    elif available is not None and needed > available:
        message = f"{message}, {available // MB} MB available: other programs use the rest"
        yield Finding("memory", "warning", message, f"stop programs that are not needed, or {smaller}")
    else:
        yield Finding("memory", "ok", message)


def check_limits(board: Board, config: Config) -> Iterator[Finding]:
    """Whether the memory controller is enabled, and the unit's limits are large enough for the model."""
    controllers = board.cgroup_controllers
    if controllers is None:
        yield Finding("limits", "unknown", "cgroup version 2 is not in use")
        return
    if "memory" not in controllers:
        yield Finding(
            "limits",
            "warning",
            "the memory controller is off (default of Raspberry Pi OS): the unit's MemoryMax has no effect",
            "sudo sed -i '1s/$/ cgroup_enable=memory/' /boot/firmware/cmdline.txt && sudo reboot",
        )
        return
    manifest = _manifest(config)
    needed = 0 if manifest is None else requirements(manifest, config.context).total
    for name, key in (("memory.max", "MemoryMax"), ("memory.high", "MemoryHigh")):
        limit = board.cgroup_limit(UNIT, name)
        if limit is not None and limit < needed:
            yield Finding(
                "limits",
                "problem",
                f"{key} of {UNIT} is {limit // MB} MB of {needed // MB} MB needed: weights are read again",
                f"sudo systemctl set-property {UNIT} {key}={(needed >> 20) + 64}M",
            )
            return
    yield Finding("limits", "ok", "the memory controller is on, and no limit is too low")


def check_swap(board: Board) -> Iterator[Finding]:
    """Whether memory is swapped to a disk: it is slow, and wears out an SD card."""
    on_disk = [name for name in board.swaps if not name.startswith("/dev/zram")]
    behind = [device for name in board.swaps if (device := board.swap_file_behind(name)) is not None]
    if behind:
        yield Finding(
            "swap",
            "warning",
            f"idle memory is written to {', '.join(behind)} (default of Raspberry Pi OS trixie: /var/swap)",
            "sudo mkdir -p /etc/rpi/swap.conf.d && printf '[Main]\\nMechanism=zram\\n' | "
            "sudo tee /etc/rpi/swap.conf.d/edge-gemma.conf && sudo reboot",
        )
    elif on_disk:
        yield Finding(
            "swap",
            "warning",
            f"memory is swapped to {', '.join(on_disk)}",
            "sudo apt install systemd-zram-generator && sudo apt remove dphys-swapfile && sudo reboot",
        )
    else:
        yield Finding("swap", "ok", "compressed in memory" if board.swaps else "none")


def check_disk(board: Board, config: Config) -> Iterator[Finding]:
    """Free space and type of disk of the directories that the daemon writes."""
    manifest = _manifest(config)
    try:
        packed = any(config.cache_directory.glob("*.xnnpack"))
    except PermissionError:
        packed = True  # without permission it is unknown whether they are missing
    weights = 0 if manifest is None or packed else manifest.files[DECODER].size
    wanted = {config.state_directory: MIN_FREE_BYTES, config.cache_directory: MIN_FREE_BYTES + weights}
    for directory, least in wanted.items():
        disk = board.disk(directory)
        if disk is None:
            yield Finding("disk", "unknown", f"{directory} can't be examined")
            continue
        message = f"{directory}: {disk.free_bytes // MB} MB free on {disk.kind or 'an unknown type of disk'}"
        if disk.read_only:
            yield Finding(
                "disk", "problem", f"{message}, read-only", "sudo mount -o remount,rw /, then read dmesg"
            )
        elif disk.free_bytes < MIN_FREE_BYTES:
            yield Finding(
                "disk", "problem", message, f"free {least // MB} MB: sudo apt clean, remove old bundles"
            )
        elif disk.free_bytes < least:
            message = f"{message}; the packed weights still need {weights // MB} MB"
            yield Finding("disk", "warning", message, "remove old bundles")
        else:
            yield Finding("disk", "ok", message)


def _manifest(config: Config) -> Manifest | None:
    try:
        return read_manifest(config.bundle)
    except EdgeError:
        return None
