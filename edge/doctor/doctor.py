"""What is wrong with this board for the daemon, and the command that mends it.

`examine` looks at everything and stops at nothing; each check gives one or more Findings. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

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
from edge.doctor.link_checks import check_broker, check_bundle, check_serial, check_store
from edge.protocol.strict_json import dumps


def examine(config: Config, board: Board | None = None) -> list[Finding]:
    """Run every check. An unexpected failure of one is a finding of state "unknown"."""
    board = board or Board()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "system": check_system,
        "cpu": lambda: check_cpu(board),
        "power": lambda: check_power(board),
        "clock": check_clock,
        "bundle": lambda: check_bundle(config),
        "store": lambda: check_store(config),
        "memory": lambda: check_memory(board, config),
        "limits": lambda: check_limits(board, config),
        "swap": lambda: check_swap(board),
        "disk": lambda: check_disk(board, config),
        "serial": lambda: check_serial(board, config),
        "broker": lambda: check_broker(config),
    }
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            findings.extend(check())
        except Exception as error:  # one check that fails must not hide the others
            findings.append(Finding(name, "unknown", f"could not be checked: {error}"))
    return findings


def as_text(findings: list[Finding]) -> str:
    """Write one line for each finding, and what mends it below."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.check:8} {finding.said}")
        if finding.mend:
            lines.append(f"{'':18}mend: {finding.mend}")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    """Write all findings as one JSON object, with the number of problems."""
    problems = sum(finding.state == "problem" for finding in findings)
    return dumps({"problems": problems, "findings": [asdict(finding) for finding in findings]})
