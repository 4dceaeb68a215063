"""MQTT topic filters: what they match, and what their wildcards stand for (MQTT 5, section 4.7)."""

from __future__ import annotations

import re


class TopicFilter:
    """A filter such as `sensors/+/temperature` or `sensors/#`. Raises ValueError if it is not valid."""

    def __init__(self, text: str) -> None:
        levels = text.split("/")
        wild_inside = any(level not in ("+", "#") and set(level) & set("+#") for level in levels)
        if not text or "\0" in text or wild_inside or "#" in levels[:-1]:
            raise ValueError("+ stands for one whole level, # for all that follow")
        self.text = text
        # a wildcard in the first place does not match the broker's own topics, $SYS and the like
        pattern = r"(?!\$)" if levels[0] in ("+", "#") else ""
        pattern += "/".join("([^/]*)" if level == "+" else re.escape(level) for level in levels)
        if levels[-1] == "#":
            pattern = pattern.removesuffix(re.escape("#"))
            pattern = f"{pattern.removesuffix('/')}(?:/(.*))?" if len(levels) > 1 else f"{pattern}(.*)"
        self._pattern = re.compile(pattern, re.DOTALL)

    def match(self, topic: str) -> tuple[str, ...] | None:
        """Return what each wildcard stands for in `topic`, or None if it does not match."""
        found = self._pattern.fullmatch(topic)
        return None if found is None else tuple(part for part in found.groups() if part is not None)
