"""How a report of one sensor, or of several sites, is written: as a sentence, as JSON, or by a route.

Each reading has notes with the results of arithmetic, as in the field `{notes}` of a route
(`edge.routes.notes`), in every layout.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapters.field_270m.sensors import SensorKind
from edge.routes import notes
from edge.routes.config import parse_routes
from edge.routes.router import Outcome, Question, Router

END = "\nJSON:"
"""The end of every prompt."""


@dataclass(frozen=True)
class Limit:
    """Values beyond `value` are too high (`above`) or too low; `value` is written as the sensor would."""

    above: bool
    value: str

    @property
    def side(self) -> str:
        """The word for beyond."""
        return "above" if self.above else "below"

    def noted(self, text: str, value: str, before: str | None) -> str:
        """A value, written as `text`, with its notes; `before` is the value that came before it."""
        limit = notes.Limit(self.above, float(self.value))
        return notes.noted(text, float(value), None if before is None else float(before), limit)


@dataclass(frozen=True)
class Entry:
    """One reading as it came: `value` as text, None if the sensor sent `mark` instead."""

    value: str | None
    unit: str
    mark: str = ""


@dataclass(frozen=True)
class Report:
    """The data about one sensor; `entries` oldest first, one due every `interval` seconds."""

    place: str
    kind: SensorKind
    limit: Limit
    entries: tuple[Entry, ...]
    interval: int
    age: int

    @property
    def newest(self) -> str:
        """The age of the newest entry."""
        return notes.age(self.age, self.age > notes.OVERDUE_FACTOR * self.interval)

    def listed(self, units: bool) -> Iterator[str]:
        """The entries with their notes; with `units`, each value names its own."""
        before = None
        for entry in self.entries:
            if entry.value is None:
                yield entry.mark
                continue
            text = f"{entry.value} {entry.unit}" if units else entry.value
            yield self.limit.noted(text, entry.value, before)
            before = entry.value


def number(value: float) -> str:
    """At most four digits and no exponent."""
    return f"{float(f'{value:.4g}'):.10f}".rstrip("0").rstrip(".")


def sentence(draw: random.Random, report: Report, units: bool) -> str:
    """A line of text; with `units` behind each value."""
    limit, kind = report.limit, report.kind
    listed = ", ".join([*report.listed(units), report.newest])
    alarm = f"alarm {limit.side} {limit.value}"
    if draw.random() < 0.5:
        return f"{report.place}, {kind.quantity} in {kind.unit}, {alarm}: {listed}.{END}"
    return f"{report.place} ({kind.quantity}, {kind.unit}; {alarm}): {listed}.{END}"


def message(_draw: random.Random, report: Report, units: bool) -> str:
    """A gateway's JSON message."""
    content = {
        "sensor": report.place,
        "quantity": report.kind.quantity,
        "unit": report.kind.unit,
        f"alarm_{report.limit.side}": _plain(report.limit.value),
        "values": [*report.listed(units)],
        "age": report.newest,
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + END


def route(_draw: random.Random, report: Report, _units: bool) -> str:
    """The question of a route of this product that heard the readings; they must all be numbers."""
    limit, kind = report.limit, report.kind
    last = (len(report.entries) - 1) * report.interval
    table = {
        "name": "field",
        "topics": ["+"],
        "window": {"seconds": 31 * 86400},
        "answer_topic": "answers/{sensor}",
        "trigger": {"every_s": last + report.age},
        "ask": {
            "question": f"{{sensor}}, {kind.quantity} in {kind.unit}, alarm {{limit}}: {{notes}}.{END}",
            "limit": {limit.side: float(limit.value)},
        },
    }
    router = Router(parse_routes([table]), plain=True)
    outcomes: list[Outcome] = []
    for index, entry in enumerate(report.entries):
        assert entry.value is not None
        outcomes += router.reading(report.place, entry.value.encode(), float(index * report.interval))
    (asked,) = (*outcomes, *router.tick(float(last + report.age)))
    assert isinstance(asked, Question)
    return asked.request.prompt or ""


def sites_sentence(kind: SensorKind, limit: Limit, values: Mapping[str, str]) -> str:
    """A line about one quantity at several sites."""
    listed = ", ".join(f"{site} {limit.noted(value, value, None)}" for site, value in values.items())
    return f"{kind.quantity} in {kind.unit}, alarm {limit.side} {limit.value}: {listed}.{END}"


def sites_message(kind: SensorKind, limit: Limit, values: Mapping[str, str]) -> str:
    """A gateway's JSON message about one quantity at several sites."""
    content = {
        "quantity": kind.quantity,
        "unit": kind.unit,
        f"alarm_{limit.side}": _plain(limit.value),
        "sites": {site: limit.noted(value, value, None) for site, value in values.items()},
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + END


def _plain(text: str) -> float:
    """The number that `text` writes, whole where it has no point."""
    return float(text) if "." in text else int(text)
