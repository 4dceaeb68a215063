"""The doctor's check of a Raspberry Pi 5's memory layout, which decides how fast weights are read.

The bootloader arranges the SDRAM's banks in the address space (`SDRAM_BANKLOW`). Its default on a Pi 5 is 1,
made for a kernel that divides the memory into emulated NUMA nodes and interleaves pages over them: the
bootloader adds `numa=fake=N` and the kernel's device tree `numa_policy=interleave`. A kernel without NUMA
then reads from few banks at a time; 45% less bandwidth has been measured. 3 suits such a kernel better.
Source: Raspberry Pi documentation, bootloader configuration; raspberrypi/rpi-eeprom issue 733.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge.board import Board
from edge.doctor.finding import Finding

PI_5 = ("Raspberry Pi 5", "Raspberry Pi Compute Module 5")  # a Pi 500 is one too
NUMA_BANK_LOW = 1  # the bootloader's default on a Pi 5
PLAIN_BANK_LOW = 3  # the best value for a kernel without NUMA

_UPDATE = "sudo apt full-upgrade && sudo rpi-eeprom-update -a && sudo reboot"
_EDIT = "sudo rpi-eeprom-config --edit"


def check_sdram(board: Board) -> Iterator[Finding]:
    """Whether the bootloader's memory layout and the kernel's NUMA settings match, on a Pi 5."""
    if not (board.model or "").startswith(PI_5):
        return
    yield _with_numa(board) if board.numa_nodes > 1 else _without_numa(board)


def _with_numa(board: Board) -> Finding:
    nodes, bank = board.numa_nodes, board.sdram_bank_low
    if not any(each.startswith("numa_policy=interleave") for each in board.kernel_parameters):
        message = f"{nodes} NUMA nodes, but pages are not interleaved over them: memory is slow"
        fix = "sudo sed -i '1s/$/ numa_policy=interleave/' /boot/firmware/cmdline.txt && sudo reboot"
        return Finding("sdram", "warning", message, fix)
    if bank not in (None, NUMA_BANK_LOW):
        message = f"SDRAM_BANKLOW={bank} in the bootloader configuration: slower than its default with NUMA"
        return Finding("sdram", "warning", message, f"{_EDIT}, remove the line SDRAM_BANKLOW, then reboot")
    return Finding("sdram", "ok", f"{nodes} NUMA nodes, interleaved")


def _without_numa(board: Board) -> Finding:
    bank = board.sdram_bank_low
    if bank is not None and bank >= PLAIN_BANK_LOW:
        return Finding("sdram", "ok", f"no NUMA, SDRAM_BANKLOW={bank}")
    turned_off = [each for each in board.kernel_parameters if each in ("numa=off", "numa=fake=1")]
    if turned_off:
        message = f"{turned_off[0]} on the kernel's command line: up to 45% less memory bandwidth"
        fix = f"remove {turned_off[0]} from /boot/firmware/cmdline.txt, then reboot"
        return Finding("sdram", "warning", message, fix)
    if bank is not None or any(each.startswith("numa=fake=") for each in board.kernel_parameters):
        message = "the bootloader expects NUMA, and this kernel has none: up to 45% less memory bandwidth"
        fix = f"{_UPDATE}; or keep the kernel: {_EDIT}, set SDRAM_BANKLOW={PLAIN_BANK_LOW}, then reboot"
        return Finding("sdram", "warning", message, fix)
    if board.bootloader_config is None:
        message = "no NUMA; the bootloader configuration can only be read by root"
        return Finding("sdram", "unknown", message, "sudo edge-daemon doctor")
    message = "neither bootloader nor kernel interleave memory: they are older than 2025"
    return Finding("sdram", "warning", message, _UPDATE)
