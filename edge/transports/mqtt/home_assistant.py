"""What Home Assistant shows of a node: one device with its health and, for each route, the last answer.

A retained message describes the device (MQTT device discovery, Home Assistant 2024.11 and later); it is
published on each connection and when Home Assistant says that it has started. Figures come from the node's
retained health, availability from its status. A state has at most 255 characters there, so the answer of a
route is cut to that, and stands whole in the attributes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge.protocol.strict_json import dumps
from edge.protocol.topics import NodeTopics
from edge.transports.mqtt.messages import Outgoing

MAX_STATE = 255  # characters of a state in Home Assistant

# Of health, by its keys: the name, and what else Home Assistant needs to know.
_FIGURES: dict[str, tuple[str, dict[str, str]]] = {
    "queue": ("Queue", {"state_class": "measurement"}),
    "answered": ("Answered", {"state_class": "total_increasing"}),
    "failed": ("Failed", {"state_class": "total_increasing"}),
    "tokens_per_s": ("Speed", {"state_class": "measurement", "unit_of_measurement": "tokens/s"}),
    "first_token_ms": (
        "Time to first token",
        {"state_class": "measurement", "unit_of_measurement": "ms", "device_class": "duration"},
    ),
    "memory_mib": (
        "Memory",
        {"state_class": "measurement", "unit_of_measurement": "MiB", "device_class": "data_size"},
    ),
    "temperature_c": (
        "Temperature",
        {"state_class": "measurement", "unit_of_measurement": "°C", "device_class": "temperature"},
    ),
}
_PROBLEMS = {"throttling": "Throttling", "journal": "Journal"}


class HomeAssistant:
    """Makes the messages for a node's device; `prefix` is Home Assistant's discovery prefix.

    `topics` are those of the node, `status` gives what its status says, `routes` those that answer.
    """

    def __init__(
        self,
        prefix: str,
        node: str,
        topics: NodeTopics,
        status: Callable[[], Mapping[str, Any]],
        routes: Sequence[str],
    ) -> None:
        self.birth_topic = f"{prefix}/status"
        self._prefix, self._node, self._topics = prefix, node, topics
        self._status, self._routes = status, routes

    def device(self) -> Outgoing:
        """Describe the device."""
        name = f"edge-{self._node}"
        status = self._status()
        version = str(status.get("version", "unknown"))
        described = {
            "device": {
                "identifiers": [name],
                "name": self._node,
                "manufacturer": "edge-gemma",
                "model": str(status.get("model", "unknown")),
                "sw_version": version,
            },
            "origin": {"name": "edge-gemma", "sw_version": version},
            "availability_topic": self._topics.status,
            "availability_template": "{{ value_json.state }}",
            "qos": 1,
            "components": self._components(),
        }
        return Outgoing(f"{self._prefix}/device/{name}/config", dumps(described), retain=True)

    def answer(self, route: str, payload: str) -> Outgoing:
        """Give a route's last answer, `payload` as it is on the answer topic, as state and attributes."""
        said = json.loads(payload)  # our own, so it is not read as that of a stranger
        answer = said.get("answer", said.get("error"))
        if "error" in said:
            state = f"{said['error']['code']}: {said['error']['message']}"
        else:
            state = answer if isinstance(answer, str) else dumps(answer)
        shown = {"state": _cut(state), "attributes": said}
        return Outgoing(self._route_topic(route), dumps(shown), retain=True)

    def _components(self) -> dict[str, dict[str, Any]]:
        health = self._topics.health
        parts: dict[str, dict[str, Any]] = {}
        for key, (name, more) in _FIGURES.items():
            value = f"{{{{ value_json.{key} }}}}"
            parts[key] = self._part("sensor", key, name, health, value) | more
        error = f"{{{{ (value_json.last_error or 'none')[:{MAX_STATE}] }}}}"
        parts["last_error"] = self._part("sensor", "last_error", "Last error", health, error)
        for key, name in _PROBLEMS.items():
            problem = f"{{{{ 'ON' if value_json.{key} else 'OFF' }}}}"
            parts[key] = self._part("binary_sensor", key, name, health, problem)
            parts[key]["device_class"] = "problem"
        for part in parts.values():
            part["entity_category"] = "diagnostic"
        for route in self._routes:
            topic, key = self._route_topic(route), f"route-{route}"
            parts[key] = self._part("sensor", key, route, topic, "{{ value_json.state }}") | {
                "json_attributes_topic": topic,
                "json_attributes_template": "{{ value_json.attributes | tojson }}",
            }
        return parts

    def _part(self, platform: str, key: str, name: str, topic: str, template: str) -> dict[str, Any]:
        return {
            "platform": platform,
            "unique_id": f"edge-{self._node}-{key}",
            "name": name,
            "state_topic": topic,
            "value_template": template,
        }

    def _route_topic(self, route: str) -> str:
        return self._topics.route(route)


def _cut(text: str) -> str:
    """Shorten a text to what fits into a state, with a sign that it was."""
    return text if len(text) <= MAX_STATE else text[: MAX_STATE - 3] + "..."
