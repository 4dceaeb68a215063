"""What health says, as a text file for Prometheus: node_exporter's textfile collector reads it.

A file and not a port: nothing listens, no thread serves, and in /run no card is written. It is replaced
whole, readable by everybody, and gone after a clean stop; whether it is fresh, node_exporter tells itself
(`node_textfile_mtime_seconds`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edge.board import THROTTLED_BITS

log = logging.getLogger(__name__)

EVERY_S = 15.0  # Prometheus seldom looks more often
MODE = 0o644


class _Metric(NamedTuple):
    """A value of health: its key there, its name and type here, and how many base units its unit is."""

    key: str
    name: str
    kind: str
    help: str
    scale: float = 1


_METRICS = (
    _Metric("queue", "queued_requests", "gauge", "Requests that wait."),
    _Metric("working", "working", "gauge", "1 while a request is being answered."),
    _Metric("answered", "answers_total", "counter", "Requests that were answered since the start."),
    _Metric(
        "failed", "errors_total", "counter", "Requests that were answered with an error since the start."
    ),
    _Metric("tokens_per_s", "tokens_per_second", "gauge", "Decoding speed of the last answer."),
    _Metric(
        "first_token_ms", "first_token_seconds", "gauge", "Arrival to first token of the last answer.", 1e-3
    ),
    _Metric("memory_mib", "anonymous_memory_bytes", "gauge", "Memory that is not pages of files.", 1 << 20),
    _Metric("temperature_c", "temperature_celsius", "gauge", "The processor's temperature."),
)


class MetricsFile:
    """The file `path`; `labels` name the node and its bundle, `health` gives what that module gathers."""

    def __init__(
        self,
        path: Path,
        node: str,
        status: Callable[[], Mapping[str, Any]],
        health: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._path, self._node, self._status, self._health = path, node, status, health
        self._scratch = path.with_name(f".{path.name}.new")
        self._written = float("-inf")
        self._problem: str | None = None

    def update(self) -> None:
        """Write the file if it is older than EVERY_S; where that fails, say so once and go on."""
        if time.monotonic() - self._written < EVERY_S:
            return
        self._written = time.monotonic()
        try:
            self._write(as_text(self._node, self._status(), self._health()))
            self._problem = None
        except OSError as error:
            problem = f"{self._path}: metrics can't be written: {error.strerror}"
            if problem != self._problem:
                log.warning("%s", problem)
            self._problem = problem

    def remove(self) -> None:
        """Remove the file, so that nobody takes it for a running daemon's."""
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _write(self, text: str) -> None:
        with self._scratch.open("w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), MODE)
            file.write(text)
        self._scratch.replace(self._path)


def as_text(node: str, status: Mapping[str, Any], health: Mapping[str, Any]) -> str:
    """Write status and health in Prometheus' text format; what is null there is left out."""
    return "".join(_lines(node, status, health))


def _lines(node: str, status: Mapping[str, Any], health: Mapping[str, Any]) -> Iterator[str]:
    about = {key: str(status[key]) for key in ("version", "model", "bundle")}
    yield from _family("info", "gauge", "What answers; always 1.")
    yield _sample("info", 1, node=node, **about)
    for metric in _METRICS:
        value = health[metric.key]
        if value is not None:
            yield from _family(metric.name, metric.kind, metric.help)
            yield _sample(metric.name, value * metric.scale, node=node)
    if health["throttling"] is not None:
        yield from _family("throttled", "gauge", "1 while the reason holds the processor back.")
        for reason in THROTTLED_BITS.values():
            yield _sample("throttled", reason in health["throttling"], node=node, reason=reason)
    yield from _family("journal_on_disk", "gauge", "0 while requests are kept in memory only.")
    yield _sample("journal_on_disk", health["journal"] is None, node=node)


def _family(name: str, kind: str, said: str) -> Iterator[str]:
    yield f"# HELP edge_gemma_{name} {said}\n# TYPE edge_gemma_{name} {kind}\n"


def _sample(name: str, value: float, **labels: str) -> str:
    shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"edge_gemma_{name}{{{shown}}} {float(value):.15g}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
