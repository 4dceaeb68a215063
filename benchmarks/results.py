"""Results: the values of each round, their medians, the ratios of each round, and a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

MACHINE = "machine"
"""Where the yardstick of start-up stands: how long a bare interpreter takes, in seconds, as `interpreter`."""


@dataclass(frozen=True)
class Measure:
    """One row. `unit` determines the direction that is better: rates and shares up, times and bytes down.

    `once`: measured in the first round only, because it takes long or does not vary.
    """

    key: str
    label: str
    unit: str
    once: bool = False

    @property
    def more_is_better(self) -> bool:
        """Whether a larger value is a better one."""
        return self.unit in ("tok/s", "%")

    def show(self, value: float) -> str:
        """A value with three significant digits."""
        scaled = value / {"MB": 1e6, "GB/s": 1e9, "ms": 1e-3}.get(self.unit, 1)
        return f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"


MEASURES = (
    Measure("prefill_128", "prefill of 128", "tok/s"),
    Measure("prefill_512", "prefill of 512", "tok/s"),
    Measure("decode", "decode of 128 after 512", "tok/s"),
    Measure("bytes_per_token", "  weights read for a token", "MB"),
    Measure("bandwidth", "  read bandwidth just before", "GB/s"),
    Measure("bound", "  so at most", "tok/s"),
    Measure("share", "  share of that", "%"),
    Measure("first_token_new", "first token, new system prompt", "ms"),
    Measure("first_token_repeated", "first token, repeated system prompt", "ms"),
    Measure("json_alarm", "JSON answer: alarm", "tok/s"),
    Measure("json_summary", "JSON answer: summary", "tok/s"),
    Measure("json_classification", "JSON answer: classification", "tok/s"),
    Measure("json_setup", "  not counted: set-up for each", "ms"),
    Measure("json_all", "  all three, with their set-up", "tok/s"),
    Measure("json_valid", "  answers that were valid", "%"),
    Measure("first_ready", "start to ready, the first time", "s", once=True),
    Measure("ready", "start to ready", "s"),
    Measure("text", "start to first text", "s"),
    Measure("text_repeated", "  after a known prompt of 900 tokens", "s"),
    Measure("anonymous", "RssAnon with 2,048 tokens", "MB", once=True),
    Measure("peak", "memory at its peak, file pages too", "MB", once=True),
)

COMPARED = [measure for measure in MEASURES if measure.unit != "%"]
"""Rows whose ratios mean something."""


@dataclass
class Results:
    """Values of every round, by engine and measure; `facts` are engines' properties that do not vary.

    `others`: the share of the processors' time that other programs took meanwhile.
    """

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: float = 0.0

    def add(self, engine: str, key: str, value: float) -> None:
        """Note a value of the current round."""
        self.values.setdefault(engine, {}).setdefault(key, []).append(value)

    def of(self, engine: str, key: str) -> list[float]:
        """Values of all rounds; empty if the engine was not measured so."""
        return self.values.get(engine, {}).get(key, [])

    def engines(self) -> list[str]:
        """Names of those that were measured, ours first."""
        return [name for name in self.values if name != MACHINE]

    def advantage(self, measure: Measure, ours: str, other: str) -> list[float]:
        """How many times better `ours` was than `other`, round by round."""
        pairs = zip(self.of(ours, measure.key), self.of(other, measure.key), strict=False)
        return [a / b if measure.more_is_better else b / a for a, b in pairs]


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median: one disturbed round is no spread.

    Of a median of 0, as when no answer was valid, there is no share: 0.
    """
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / median if median else 0.0


def table(results: Results) -> str:
    """The results in Markdown: one row per measure with median and spread, then ratios to the peers."""
    engines = results.engines()
    head = ["", "unit", *engines]
    rows = []
    for measure in MEASURES:
        cells = [_cell(measure, results.of(engine, measure.key)) for engine in engines]
        if any(cells):
            rows.append([measure.label, measure.unit, *cells])
    parts = [_markdown(head, rows)]
    if pairs(results):
        parts.append("How many times better, median of the ratios of each round:")
        names = [f"{ours} / {peer}" for ours, peer in pairs(results)]
        parts.append(_markdown(["", *names], [*_ratio_rows(results)]))
    parts.append(f"Other programs took {100 * results.others:.0f}% of the processors' time.")
    return "\n\n".join(parts)


def _ratio_rows(results: Results) -> Iterable[list[str]]:
    for measure in COMPARED:
        ratios = [results.advantage(measure, ours, peer) for ours, peer in pairs(results)]
        if any(ratios):
            yield [measure.label, *(_cell(Measure("", "", "x"), values) for values in ratios)]


def pairs(results: Results) -> list[tuple[str, str]]:
    """Each engine of ours with each peer of the same bits."""
    bits = {name: results.facts[name]["bits"] for name in results.engines()}
    ours = [name for name in bits if results.facts[name].get("ours")]
    return [(a, b) for a in ours for b in bits if b not in ours and bits[a] == bits[b]]


def _cell(measure: Measure, values: Sequence[float]) -> str:
    if not values:
        return ""
    shown = measure.show(statistics.median(values))
    return shown if len(values) == 1 else f"{shown} ±{100 * spread(values):.0f}%"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])
