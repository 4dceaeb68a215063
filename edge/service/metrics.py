"""Health as a text file for Prometheus, which the textfile collector of node_exporter reads.

A file rather than a port: nothing listens, no thread serves, and in /run no card is written. It is replaced
atomically, is world-readable, and is removed by a clean stop. node_exporter itself reports how old it is
(`node_textfile_mtime_seconds`). `prometheus_client` writes the format; it is imported for the first file,
since it takes 1 MB that a daemon without metrics does not need.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge.board import THROTTLED_BITS

if TYPE_CHECKING:
    from prometheus_client import Metric

log = logging.getLogger(__name__)

EVERY_S = 15.0  # Prometheus seldom looks more often
MODE = 0o644
PREFIX = "edge_gemma"


class _Value(NamedTuple):
    """A value of health: its key there, its name here, and how many base units its unit is."""

    key: str
    name: str
    help: str
    scale: float = 1


_COUNTERS = (
    _Value("answered", "answers", "Requests that were answered since the start."),
    _Value("failed", "errors", "Requests that were answered with an error since the start."),
    _Value("journal_damage", "journal_damage", "Journal records found damaged by the disk since the start."),
)
_GAUGES = (
    _Value("queue", "queued_requests", "Requests that wait."),
    _Value("working", "working", "1 while a request is being answered."),
    _Value("tokens_per_s", "tokens_per_second", "Decoding speed of the last answer."),
    _Value("first_token_ms", "first_token_seconds", "Arrival to first token of the last answer.", 1e-3),
    _Value("memory_mib", "anonymous_memory_bytes", "Memory that is not pages of files.", 1 << 20),
    _Value("temperature_c", "temperature_celsius", "The processor's temperature."),
)

Report = Callable[[], Mapping[str, Any]]


class MetricsFile:
    """The file `path`. `status` and `health` give what a node publishes under these names."""

    def __init__(self, path: Path, node: str, status: Report, health: Report) -> None:
        self._path, self._node, self._status, self._health = path, node, status, health
        self._scratch = path.with_name(f".{path.name}.new")
        self._written = float("-inf")
        self._problem: str | None = None

    def update(self) -> None:
        """Write the file if it is older than EVERY_S; log a failure once, and go on."""
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

    def _write(self, text: bytes) -> None:
        with self._scratch.open("wb") as file:
            os.fchmod(file.fileno(), MODE)
            file.write(text)
        self._scratch.replace(self._path)


def as_text(node: str, status: Mapping[str, Any], health: Mapping[str, Any]) -> bytes:
    """Write status and health in Prometheus' text format; what is null there is left out."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Report(node, status, health))
    return generate_latest(registry)


class _Report:
    """Status and health as a collector of prometheus_client."""

    def __init__(self, node: str, status: Mapping[str, Any], health: Mapping[str, Any]) -> None:
        self._node, self._status, self._health = node, status, health

    def collect(self) -> Iterator[Metric]:
        """Yield what is known, each metric with the node as its label."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        about = {key: str(self._status[key]) for key in ("version", "model", "bundle")}
        info = InfoMetricFamily(PREFIX, "What answers; always 1.")
        info.add_metric([], {"node": self._node, **about})
        yield info
        for values, family in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for value in values:
                if self._health[value.key] is not None:
                    metric = family(f"{PREFIX}_{value.name}", value.help, labels=["node"])
                    metric.add_metric([self._node], self._health[value.key] * value.scale)
                    yield metric
        on_disk = GaugeMetricFamily(
            f"{PREFIX}_journal_on_disk", "0 while requests are kept in memory only.", labels=["node"]
        )
        on_disk.add_metric([self._node], self._health["journal"] is None)
        yield on_disk
        throttling = self._health["throttling"]
        if throttling is not None:
            throttled = GaugeMetricFamily(
                f"{PREFIX}_throttled", "1 while the reason slows the processor.", labels=["node", "reason"]
            )
            for reason in THROTTLED_BITS.values():
                throttled.add_metric([self._node, reason], reason in throttling)
            yield throttled
