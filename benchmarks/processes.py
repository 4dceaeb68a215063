"""Measured processes and disturbing ones: memory, processor time, children that answer JSON lines."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

PATIENCE_S = 300


@dataclass(frozen=True)
class Memory:
    """Bytes: anonymous pages now (RssAnon), and all resident pages at their peak (VmHWM)."""

    anonymous: int
    peak: int


def memory_of(pid: int | str) -> Memory:
    """Memory of a process, from proc(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return Memory(*(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmHWM")))


class OtherPrograms:
    """The share of processor time that other programs took since this object was created."""

    def __init__(self) -> None:
        self._ours, (self._busy, self._all) = self._own_seconds(), self._machine_seconds()

    def share(self) -> float:
        """From 0 to 1; our children count as ours once they have ended."""
        ours, (busy, everything) = self._own_seconds(), self._machine_seconds()
        others = (busy - self._busy) - (ours - self._ours)
        return max(0.0, others / max(everything - self._all, 1e-9))

    @staticmethod
    def _own_seconds() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    @staticmethod
    def _machine_seconds() -> tuple[float, float]:
        """Busy and all seconds of all processors (proc(5), the first 8 columns of `cpu`)."""
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        unit = os.sysconf("SC_CLK_TCK")
        return (sum(ticks) - idle) / unit, sum(ticks) / unit


class Worker:
    """A child process that holds a model: a request is a line of JSON, and so is its answer."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it and wait for its first line; `ready_s` is how long that took."""
        self._command = command
        started = time.perf_counter()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()
        self.ready_s = time.perf_counter() - started

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have the child measure something. Raises ClickException with what the child said if it failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def memory(self) -> Memory:
        """The child's memory."""
        return memory_of(self._process.pid)

    def close(self) -> None:
        """End the child."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print there too
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise click.ClickException(f"{self._command[1]}: {answer['error']}")
                return answer
        raise click.ClickException(f"{' '.join(self._command[:3])}: ended with status {self._process.wait()}")
