"""The readings of one sensor in a sliding window, and their statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GAP_FACTOR = 3.0  # a pause this many times the median interval is a gap
MIN_INTERVALS = 4  # with fewer intervals the median means little


@dataclass(frozen=True)
class Statistics:
    """Statistics of the readings in a window. `trend` is the least-squares slope per hour, or None.

    `gaps` counts pauses of more than three times the median interval; `longest_pause_s` is the longest
    pause; `span_s` is the time from the first to the last reading, and `age_s` the age of the last.
    """

    count: int
    minimum: float
    mean: float
    maximum: float
    last: float
    trend: float | None
    gaps: int
    longest_pause_s: float
    span_s: float
    age_s: float


class Window:
    """At most `readings` readings, none older than `seconds`; grows as needed, to 32 bytes per reading."""

    def __init__(self, readings: int, seconds: float) -> None:
        self._most, self._seconds = readings, seconds
        self._buffer: NDArray[np.float64] = np.empty((2, min(2 * readings, 16)))
        self._start = self._end = 0

    def __len__(self) -> int:
        return self._end - self._start

    def add(self, time: float, value: float) -> None:
        """Add a reading; `time` (seconds of a monotonic clock) never decreases."""
        if self._end == self._buffer.shape[1]:
            self._make_room()
        self._buffer[:, self._end] = time, value
        self._end += 1
        self._start = max(self._start, self._end - self._most)
        self.expire(time)

    def expire(self, now: float) -> None:
        """Drop readings that are older than the window."""
        times = self._buffer[0, self._start : self._end]
        self._start += int(np.searchsorted(times, now - self._seconds))

    def latest(self, count: int) -> list[tuple[float, float]]:
        """Return the last `count` readings as (time, value), oldest first."""
        first = max(self._start, self._end - count)
        return [(float(t), float(v)) for t, v in self._buffer[:, first : self._end].T]

    def statistics(self, now: float) -> Statistics | None:
        """Return the statistics of the readings; None without any."""
        if not len(self):
            return None
        times, values = self._buffer[:, self._start : self._end]
        pauses = np.diff(times)
        gaps = 0
        if len(pauses) >= MIN_INTERVALS:
            gaps = int(np.count_nonzero(pauses > GAP_FACTOR * np.median(pauses)))
        return Statistics(
            count=len(values),
            minimum=float(values.min()),
            mean=_mean(values),
            maximum=float(values.max()),
            last=float(values[-1]),
            trend=_slope(times, values),
            gaps=gaps,
            longest_pause_s=float(pauses.max()) if len(pauses) else 0.0,
            span_s=float(times[-1] - times[0]),
            age_s=now - float(times[-1]),
        )

    def _make_room(self) -> None:
        """Move the window to the front of a new buffer, twice as large if it fills more than half of this."""
        window = self._buffer[:, self._start : self._end]
        width = self._buffer.shape[1]
        if 2 * window.shape[1] > width:
            width = min(2 * width, 2 * self._most)
        moved = np.empty((2, width))
        moved[:, : window.shape[1]] = window
        self._buffer, self._start, self._end = moved, 0, window.shape[1]


def _mean(values: NDArray[np.float64]) -> float:
    """Return a mean between minimum and maximum, even where the sum would overflow or be rounded."""
    scale = float(np.abs(values).max()) or 1.0
    return float(np.clip((values / scale).mean() * scale, values.min(), values.max()))


def _slope(times: NDArray[np.float64], values: NDArray[np.float64]) -> float | None:
    """Return the least-squares slope per hour; None without two different times, or on overflow."""
    hours = (times - times.mean()) / 3600.0
    spread = float(hours @ hours)
    if len(times) < 2 or spread == 0.0:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        slope = float(hours @ (values - _mean(values)) / spread)
    return slope if np.isfinite(slope) else None
