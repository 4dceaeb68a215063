"""Sensor scenarios with exact answers: text as gateways and this product's routes write it, JSON as answer.

A scenario is one prompt, the schema of its answer, and the only right answer. The readings have notes with
the results of arithmetic (`edge.routes.notes`); the model draws the conclusion. The rules for one sensor:

- `fault` is "missing" if the newest entry holds no value, or is overdue (older than three intervals); "stuck"
  if all values are the same to the last digit; "unit" if the newest value is in another unit than the
  sensor's, by name or because values jumped by a factor of five or more; else "none".
- With a fault, `trend` and `status` are "unknown". Else `trend` is "rising" if each value is higher than the
  one before, "falling" if each is lower, else "steady"; `status` is "alarm" if the newest value is beyond
  the sensor's limit, else "ok".

Of several sites, `site` is the one beyond the limit, "none" if there is none; a survey has the status of
each. Unclear cases are not generated: values nearer to the limit than a fortieth of the sensor's
range, drifts that are broken by a step back, values that double.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.field_270m import layouts
from adapters.field_270m.layouts import Entry, Limit, Report
from adapters.field_270m.sensors import ForeignUnit, SensorKind, World
from edge.protocol.messages import Request, parse_request

KINDS = ("threshold", "trend", "stuck", "unit", "missing", "sites", "survey")
MAX_TOKENS = 64

_INTERVALS = (5, 10, 30, 60, 120, 300, 600, 900)
_COUNTS = (3, 4, 4, 4, 5, 6)
STATUSES = ("ok", "alarm")
_JUMPS = (0.001, 0.01, 0.1, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Scenario:
    """A prompt, the schema of its answer, and the right answer, written as the grammar writes it."""

    kind: str
    sensor: str
    prompt: str
    schema: Mapping[str, Any]
    answer: str

    def request(self, identity: str) -> Request:
        """The scenario as a request to a base model."""
        schema = {"name": self.kind, "schema": self.schema}
        data = {"id": identity, "prompt": self.prompt, "max_tokens": MAX_TOKENS, "stream": False}
        data["response_format"] = {"type": "json_schema", "json_schema": schema}
        return parse_request(json.dumps(data))


def scenarios(world: World, seed: int, kinds: Sequence[str] = KINDS) -> Iterator[Scenario]:
    """Scenarios of `kinds` in turn, without end; the same for the same seed."""
    draw = random.Random(seed)
    while True:
        for kind in kinds:
            yield _ABOUT_SITES.get(kind, _sensor)(draw, world, kind)


_Layout = Callable[[random.Random, Report, bool], str]

SENSOR_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "fault": {"enum": ["none", "stuck", "unit", "missing"]},
        "trend": {"enum": ["rising", "falling", "steady", "unknown"]},
        "status": {"enum": ["ok", "alarm", "unknown"]},
    },
    "required": ["fault", "trend", "status"],
    "additionalProperties": False,
}


def site_schema(sites: Sequence[str]) -> Mapping[str, Any]:
    """The answer's schema for a question about `sites`."""
    return {
        "type": "object",
        "properties": {"site": {"enum": [*sites, "none"]}},
        "required": ["site"],
        "additionalProperties": False,
    }


def survey_schema(sites: Sequence[str]) -> Mapping[str, Any]:
    """The answer's schema for a question about each of `sites`."""
    return {
        "type": "object",
        "properties": {site: {"enum": [*STATUSES]} for site in sites},
        "required": [*sites],
        "additionalProperties": False,
    }


def _scenario(
    kind: str, sensor: SensorKind, prompt: str, schema: Mapping[str, Any], **answer: str
) -> Scenario:
    return Scenario(kind, sensor.quantity, prompt, schema, json.dumps(answer, separators=(",", ":")))


def _sensor(draw: random.Random, world: World, kind: str) -> Scenario:
    """A scenario of one sensor."""
    gauge = _Gauge(draw, draw.choice(world.kinds))
    status = draw.choice(STATUSES)
    trend = draw.choice(("rising", "falling")) if kind == "trend" else "steady"
    values = gauge.series(status, trend, draw.choice(_COUNTS))
    if kind == "stuck":
        values = [values[-1]] * len(values)
    entries = [Entry(gauge.text(value), gauge.kind.unit) for value in values]
    interval = draw.choice(_INTERVALS)
    age = draw.randint(0, interval)
    layout, units = _layout(draw)
    fault = "none"
    if kind in ("stuck", "unit", "missing"):
        fault, status, trend = kind, "unknown", "unknown"
    if kind == "unit":
        units = _strange(draw, gauge, values, entries, units)
    elif kind == "missing" and (layout is layouts.route or draw.random() < 0.5):
        age = interval * draw.randint(4, 40) + draw.randint(0, interval)
    elif kind == "missing":
        for index in range(1, draw.choice((2, 2, 3, 4))):
            entries[-index] = Entry(None, "", draw.choice(world.marks))
    elif layout is not layouts.route and kind != "stuck" and draw.random() < 0.1:
        lost = 1
        if _shows(values[:lost] + values[lost + 1 :], trend):
            entries[lost] = Entry(None, "", draw.choice(world.marks))
    report = Report(draw.choice(world.places), gauge.kind, gauge.limit, tuple(entries), interval, age)
    prompt = layout(draw, report, units)
    return _scenario(kind, gauge.kind, prompt, SENSOR_SCHEMA, fault=fault, trend=trend, status=status)


def _sites(draw: random.Random, world: World, kind: str) -> Scenario:
    """A scenario of several sites, of which one may be beyond the limit."""
    gauge = _Gauge(draw, draw.choice(world.kinds))
    sites = draw.sample(world.sites, draw.randint(3, 5))
    site = draw.choice((*sites, "none"))
    values = {name: gauge.text(gauge.value("alarm" if name == site else "ok")) for name in sites}
    write = draw.choice((layouts.sites_sentence, layouts.sites_message))
    prompt = write(gauge.kind, gauge.limit, values)
    return _scenario(kind, gauge.kind, prompt, site_schema(sites), site=site)


def _survey(draw: random.Random, world: World, kind: str) -> Scenario:
    """A scenario that asks for the status of every site."""
    gauge = _Gauge(draw, draw.choice(world.kinds))
    statuses = {site: draw.choice(STATUSES) for site in draw.sample(world.sites, draw.randint(4, 6))}
    values = {site: gauge.text(gauge.value(status)) for site, status in statuses.items()}
    write = draw.choice((layouts.sites_sentence, layouts.sites_message))
    prompt = write(gauge.kind, gauge.limit, values)
    return _scenario(kind, gauge.kind, prompt, survey_schema(list(statuses)), **statuses)


_ABOUT_SITES = {"sites": _sites, "survey": _survey}


def _layout(draw: random.Random) -> tuple[_Layout, bool]:
    """How a report is written, and whether each value names its unit."""
    layout: _Layout = draw.choice((*(layouts.sentence,) * 4, *(layouts.message,) * 2, layouts.route))
    return layout, layout is not layouts.route and draw.random() < 0.4


def _strange(
    draw: random.Random, gauge: _Gauge, values: Sequence[int], entries: list[Entry], units: bool
) -> bool:
    """Put the newest one or two values into another unit; returns whether values must name their units."""
    foreign = draw.choice(gauge.kind.foreign) if gauge.kind.foreign and units else None
    if foreign is None:
        newest = abs(gauge.size(values[-1]))
        jumps = [factor for factor in _JUMPS if 0.001 <= newest * factor < 1e6]
        foreign = ForeignUnit(gauge.kind.unit, draw.choice(jumps))
    for index in range(len(values) - draw.randint(1, 2), len(values)):
        value = gauge.size(values[index]) * foreign.factor + foreign.offset
        entries[index] = Entry(layouts.number(value), foreign.unit)
    return units


class _Gauge:
    """A sensor with a limit of its own. It counts in ticks, the smallest step that it writes."""

    def __init__(self, draw: random.Random, kind: SensorKind) -> None:
        self.kind, self._draw = kind, draw
        self._low, self._high = (round(end * 10**kind.decimals) for end in (kind.low, kind.high))
        self._span = self._high - self._low
        self._above = draw.random() < 0.5
        tidy = draw.choice((1, 5, 10)) if self._span >= 150 else 1
        room = self._span // 8
        self._limit = round(draw.randint(self._low + room, self._high - room) / tidy) * tidy
        self.limit = Limit(self._above, self.text(self._limit))

    def size(self, ticks: int) -> float:
        """A number of ticks in the sensor's unit."""
        return ticks / 10.0**self.kind.decimals

    def text(self, ticks: int) -> str:
        """A value as the sensor writes it."""
        return f"{self.size(ticks):.{self.kind.decimals}f}"

    def value(self, status: str) -> int:
        """A value with this status, clear of the limit."""
        margin = max(3, self._span // 40)
        far = max(margin, self._span // self._draw.choice((2, 5, 12)))
        way = 1 if self._above == (status == "alarm") else -1
        value = self._limit + way * self._draw.randint(margin, far)
        return value if self._low <= value <= self._high else self.value(status)

    def series(self, status: str, trend: str, count: int) -> list[int]:
        """Values that end in one of this status."""
        newest = self.value(status)
        largest = self._draw.randint(1, max(2, self._span // 25))
        if trend == "steady":
            values = [newest + self._draw.randint(-largest, largest) for _ in range(count - 1)] + [newest]
        else:
            steps = [self._draw.randint(1, largest) for _ in range(count)]
            way = -1 if trend == "rising" else 1
            values = [newest + way * sum(steps[index:-1]) for index in range(count)]
        alike = 2 * min(map(abs, values)) > max(map(abs, values)) and min(values) * max(values) > 0
        return values if alike and _shows(values, trend) else self.series(status, trend, count)


def _shows(values: Sequence[int], trend: str) -> bool:
    """Whether a series does just this, and is not stuck."""
    rises = all(a < b for a, b in itertools.pairwise(values))
    falls = all(a > b for a, b in itertools.pairwise(values))
    found = "rising" if rises else "falling" if falls else "steady"
    return found == trend and len(set(values)) > 1
