"""Recorded readings played through routes: which events and questions they lead to, and when.

A recording has one reading a line: seconds since the epoch, topic, payload, as
`mosquitto_sub -F '%U %t %p' -t 'sensors/#'` prints them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from edge.errors import EdgeError
from edge.protocol.strict_json import printable
from edge.routes.config import Route
from edge.routes.router import Event, Ignored, Outcome, Question, Router


@dataclass
class _Count:
    """What one route made of a recording."""

    readings: int = 0
    ignored: int = 0
    events: int = 0
    questions: int = 0

    def __str__(self) -> str:
        return (
            f"{self.readings} readings, {self.ignored} ignored, {self.events} events, "
            f"{self.questions} questions"
        )


class Replay:
    """A recording that is played through `routes`; `name` of the recording is for messages."""

    def __init__(self, routes: Sequence[Route], name: str) -> None:
        self._name, self._now = name, 0.0
        self._router = Router(routes, wall_clock=lambda: self._now)
        self._lines = self._matched = 0
        self._counts = {route.name: _Count() for route in routes}

    def play(self, lines: Iterable[str]) -> Iterator[tuple[float, Outcome]]:
        """Yield each outcome with its time, in seconds since the epoch, in order.

        Raises EdgeError, naming the line, if one is not a reading or is earlier than the line before.
        """
        for number, line in enumerate(lines, 1):
            if line.strip():
                for outcome in self._line(line, f"{self._name}:{number}"):
                    self._count(outcome)
                    yield self._now, outcome

    @property
    def used(self) -> bool:
        """Whether a route could use any of the readings."""
        return any(count.readings > count.ignored for count in self._counts.values())

    def summary(self) -> str:
        """Count the lines, and what each route made of them."""
        head = f"{self._name}: {self._matched} of {self._lines} lines match a route"
        return "\n".join([head, *(f"  {name}: {count}" for name, count in self._counts.items())])

    def _line(self, line: str, where: str) -> Iterator[Outcome]:
        time, topic, payload = _reading(line, where)
        if time < self._now:
            raise EdgeError(f"{where}: earlier than the line before; sort the recording by time")
        while (due := self._router.next_due()) < time:
            self._now = max(due, self._now)
            yield from self._router.tick(self._now)
        self._now = time
        readers = self._router.readers(topic)
        self._lines += 1
        self._matched += bool(readers)
        for name in readers:
            self._counts[name].readings += 1
        yield from self._router.reading(topic, payload.encode(), time)

    def _count(self, outcome: Outcome) -> None:
        count = self._counts.get(outcome.route)
        if count is not None:
            count.ignored += isinstance(outcome, Ignored)
            count.events += isinstance(outcome, Event)
            count.questions += isinstance(outcome, Question)


def describe(at: float, outcome: Outcome) -> str:
    """Write an outcome as a line with its time (UTC), with the prompt of a question below it."""
    when = datetime.fromtimestamp(at, UTC).isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")
    if isinstance(outcome, Event):
        return f"{when} event    {outcome.topic} {outcome.payload}"
    if isinstance(outcome, Ignored):
        reader = f" by route {outcome.route}" if outcome.route else ""
        return f"{when} ignored  {outcome.topic}{reader}: {outcome.why}"
    request = outcome.request
    prompt = "\n\n".join(message.content for message in request.messages)
    return (
        f"{when} question {outcome.topic} by route {outcome.route}, {outcome.reason}; "
        f"answer to {outcome.answer_topic}\n{textwrap.indent(prompt, '    ')}"
    )


def _reading(line: str, where: str) -> tuple[float, str, str]:
    parts = line.rstrip("\r\n").split(" ", 2)
    try:
        return float(parts[0]), parts[1], parts[2]
    except (ValueError, IndexError):
        raise EdgeError(
            f"{where}: {printable(line.strip())} is not '<seconds> <topic> <payload>'; "
            f"record with mosquitto_sub -F '%U %t %p'"
        ) from None
