"""Progress of a long computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of work, and the name of the current step."""

    done: int
    total: int
    name: str


ReportProgress = Callable[[Progress], None]


def ignore_progress(_progress: Progress) -> None:
    """Report nothing."""


class Work:
    """Adds up finished work and reports it.

    The unit is one value written. Other phases are weighted by how long they take compared with writing.
    """

    def __init__(self, values: int, report: ReportProgress) -> None:
        self._done, self._total, self._report = 0, values, report
        self._values = values

    def advance(self, name: str, values: int) -> None:
        """Report that `values` more values were written."""
        self._done += values
        self._report(Progress(self._done, self._total, name))

    def phase(self, weight: int) -> Callable[[str, float], None]:
        """Add a phase that takes `weight` times as long as writing; call the result with shares of it."""
        whole = weight * self._values
        self._total += whole
        return lambda name, share: self.advance(name, round(share * whole))
