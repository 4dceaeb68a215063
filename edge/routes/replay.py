"""Recorded readings through a configuration's routes: what would have been said and asked, and when.

A recording has one reading a line: seconds since the epoch, topic, payload, as
`mosquitto_sub -F '%U %t %p' -t 'sensors/#'` prints them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

from edge.errors import EdgeError
from edge.protocol.strict_json import printable
from edge.routes.config import Route
from edge.routes.router import Event, Ignored, Outcome, Router


def replay(routes: Sequence[Route], lines: Iterable[str], name: str) -> Iterator[tuple[float, Outcome]]:
    """Yield each outcome with its time, in seconds since the epoch, in order.

    `name` of the recording is for errors. Raises EdgeError, naming the line, if one is not a reading.
    """
    now = 0.0
    router = Router(routes, wall_clock=lambda: now)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        time, topic, payload = _reading(line, f"{name}:{number}")
        if time < now:
            raise EdgeError(f"{name}:{number}: earlier than the line before; sort the recording by time")
        while (due := router.next_due()) < time:
            now = max(due, now)
            yield from ((now, outcome) for outcome in router.tick(now))
        now = time
        yield from ((now, outcome) for outcome in router.reading(topic, payload.encode(), now))


def describe(at: float, outcome: Outcome) -> str:
    """Write an outcome for people: a line with its time (UTC), and the prompt of a question below it."""
    when = datetime.fromtimestamp(at, UTC).isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")
    if isinstance(outcome, Event):
        return f"{when} event    {outcome.topic} {outcome.payload}"
    if isinstance(outcome, Ignored):
        return f"{when} ignored  {outcome.topic} by route {outcome.route}: {outcome.why}"
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
