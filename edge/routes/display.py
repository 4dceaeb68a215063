"""What a dashboard shows for a route's sensors: the model's latest answer, or whether there is an alarm."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge.protocol import strict_json


@dataclass(frozen=True)
class Display:
    """One sensor of a route. `state` is text for an answer, and True or False for an alarm."""

    route: str
    sensor: str
    state: str | bool
    attributes: Mapping[str, Any]


def answer_display(content: Mapping[str, Any], template: str | None) -> Display:
    """Show an answer as `edge.routes.router.answer_payload` writes it.

    The state is what `template` makes of a JSON object, or else its first field.
    """
    if "error" in content:
        state = f"{content['error']['code']}: {content['error']['message']}"
    else:
        state = _state(content["answer"], template)
    return Display(content["route"], content["sensor"], state, content)


def _state(answer: Any, template: str | None) -> str:
    if not isinstance(answer, dict) or not answer:
        return _text(answer)
    if template is None:
        return _text(next(iter(answer.values())))
    pieces = string.Formatter().parse(template)
    return "".join(text + (_text(answer.get(name)) if name else "") for text, name, _, _ in pieces)


def _text(value: Any) -> str:
    """Write a value for people: text as it is, nothing for null, the rest as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else strict_json.dumps(value)


_ENDS = {"cleared": "condition", "back": "silence"}


class Alarms:
    """Which sensors of a route are alarmed or silent, from the events of the route."""

    def __init__(self) -> None:
        self._active: dict[tuple[str, str], set[str]] = {}

    def display(self, content: Mapping[str, Any]) -> Display:
        """Show an event: the sensor is on while its condition holds or it is silent."""
        key, event = (content["route"], content["sensor"]), content["event"]
        active = self._active.setdefault(key, set())
        if event in _ENDS:
            active.discard(_ENDS[event])
        else:
            active.add(event)
        if not active:
            del self._active[key]
        return Display(*key, bool(active), content)
