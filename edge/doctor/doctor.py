"""Finds what keeps the daemon from running well on this board, and the command that fixes it.

`examine` runs every check, even after a failure; each check gives one or more Findings. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from edge.board import Board
from edge.config import Config
from edge.doctor.board_checks import (
    check_clock,
    check_cpu,
    check_disk,
    check_limits,
    check_memory,
    check_power,
    check_swap,
    check_system,
)
from edge.doctor.finding import Finding
from edge.doctor.link_checks import check_broker, check_bundle, check_secrets, check_serial, check_store
from edge.doctor.sdram_check import check_sdram
from edge.protocol.strict_json import dumps


def examine(config: Config, board: Board | None = None) -> list[Finding]:
    """Run every check. A check that fails unexpectedly gives a finding of state "unknown"."""
    board = board or Board()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "system": check_system,
        "cpu": lambda: check_cpu(board),
        "sdram": lambda: check_sdram(board),
        "power": lambda: check_power(board),
        "clock": check_clock,
        "bundle": lambda: check_bundle(config),
        "store": lambda: check_store(config),
        "memory": lambda: check_memory(board, config),
        "limits": lambda: check_limits(board, config),
        "swap": lambda: check_swap(board),
        "disk": lambda: check_disk(board, config),
        "secrets": lambda: check_secrets(config),
        "serial": lambda: check_serial(board, config),
        "broker": lambda: check_broker(config),
    }
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            findings.extend(check())
        except Exception as error:  # a failed check must not hide the others
            findings.append(Finding(name, "unknown", f"could not be checked: {error}"))
    return findings


def as_text(findings: list[Finding]) -> str:
    """Write one line for each finding, with the fix below it."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.check:8} {finding.message}")
        if finding.fix:
            lines.append(f"{'':18}fix: {finding.fix}")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    """Write all findings as one JSON object, with the number of problems; scripts rely on its keys."""
    problems = sum(finding.state == "problem" for finding in findings)
    entries = [
        {"check": finding.check, "state": finding.state, "said": finding.message, "mend": finding.fix}
        for finding in findings
    ]
    return dumps({"problems": problems, "findings": entries})
