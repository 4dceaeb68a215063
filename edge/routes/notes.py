"""Adds to readings, in words, what arithmetic can tell: a small model is bad at comparing numbers.

The field adapter is trained on this text, so its form must not change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

JUMP_FACTOR = 5.0
OVERDUE_FACTOR = 3.0  # times the median pause


@dataclass(frozen=True)
class Limit:
    """A limit that values above it, or else below it, exceed."""

    above: bool
    value: float

    def __str__(self) -> str:
        return f"{'above' if self.above else 'below'} {number(self.value)}"

    def exceeded_by(self, value: float) -> bool:
        """Whether `value` exceeds the limit."""
        return value > self.value if self.above else value < self.value


def number(value: float) -> str:
    """Format with four digits; with an exponent only from 1e+10 on, or below 0.0001."""
    text = f"{value:.4g}"
    return f"{float(text):.0f}" if "e+0" in text else text


def noted(text: str, value: float, before: float | None, limit: Limit | None) -> str:
    """Add to a reading's `text` its change since the one `before`, and `beyond` if it exceeds the limit.

    The change is `same`, a signed difference, or `jump` if one is at least five times the other.
    """
    marks = [] if before is None else [_change(value, before)]
    if limit is not None and limit.exceeded_by(value):
        marks.append("beyond")
    return f"{text} ({', '.join(marks)})" if marks else text


def age(seconds: float, overdue: bool) -> str:
    """Write the age of the newest reading."""
    return f"newest {number(seconds)} s old{', overdue' if overdue else ''}"


def notes(readings: Sequence[tuple[float, float]], now: float, limit: Limit | None) -> str:
    """Write readings (time in seconds, value), oldest first: `7.9, 8.4 (+0.5, beyond), newest 33 s old`.

    From three readings on, the newest is overdue if it is older than three times the median pause.
    """
    if not readings:
        return "no readings"
    times = [time for time, _ in readings]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    overdue = len(pauses) > 1 and now - times[-1] > OVERDUE_FACTOR * median(pauses)
    return ", ".join([*_each([value for _, value in readings], limit), age(now - times[-1], overdue)])


def _each(values: Sequence[float], limit: Limit | None) -> Iterator[str]:
    before = None
    for value in values:
        yield noted(number(value), value, before, limit)
        before = value


def _change(value: float, before: float) -> str:
    if value == before:
        return "same"
    small, large = sorted((abs(value), abs(before)))
    if 0 < JUMP_FACTOR * small <= large:
        return "jump"
    return f"{'+' if value > before else ''}{number(value - before)}"
