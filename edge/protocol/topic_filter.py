"""MQTT topic filters: matching, and the values of wildcards (MQTT 5, section 4.7)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest


class TopicFilter:
    """A filter such as `sensors/+/temperature` or `sensors/#`. Raises ValueError if it is not valid."""

    def __init__(self, text: str) -> None:
        levels = text.split("/")
        wild_inside = any(level not in ("+", "#") and set(level) & set("+#") for level in levels)
        if not text or "\0" in text or wild_inside or "#" in levels[:-1]:
            raise ValueError("+ must be a whole level, # the whole last level")
        self.text = text
        # a wildcard in the first level does not match topics that start with $, such as $SYS
        pattern = r"(?!\$)" if levels[0] in ("+", "#") else ""
        pattern += "/".join("([^/]*)" if level == "+" else re.escape(level) for level in levels)
        if levels[-1] == "#":
            pattern = pattern.removesuffix(re.escape("#"))
            pattern = f"{pattern.removesuffix('/')}(?:/(.*))?" if len(levels) > 1 else f"{pattern}(.*)"
        self._pattern = re.compile(pattern, re.DOTALL)

    def match(self, topic: str) -> tuple[str, ...] | None:
        """Return what each wildcard matches in `topic`, or None if the filter does not match."""
        found = self._pattern.fullmatch(topic)
        return None if found is None else tuple(part for part in found.groups() if part is not None)


def disjoint(filters: Iterable[str]) -> tuple[str, ...]:
    """Merge overlapping filters. The result matches at least the same topics, each with one filter only.

    A broker may deliver one copy for each overlapping subscription (MQTT 5, 3.3.4); mosquitto does.
    """
    apart: list[list[str]] = []
    for text in filters:
        levels = text.split("/")
        while (other := next((each for each in apart if _overlap(each, levels)), None)) is not None:
            apart.remove(other)
            levels = _merge(other, levels)
        apart.append(levels)
    return tuple("/".join(levels) for levels in apart)


def _overlap(a: Sequence[str], b: Sequence[str]) -> bool:
    """Return whether some topic matches both filters."""
    if a[0] != b[0] and (a[0].startswith("$") or b[0].startswith("$")):
        return False
    for one, other in zip_longest(a, b):
        if "#" in (one, other):
            return True
        if one != other and (None in (one, other) or "+" not in (one, other)):
            return False
    return True


def _merge(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """Return one filter that matches all topics of two overlapping ones."""
    levels: list[str] = []
    for one, other in zip_longest(a, b):
        if "#" in (one, other):
            return [*levels, "#"]
        levels.append(one if one == other else "+")
    return levels
