"""A node in Home Assistant: a device with the node's health, and an entity for each sensor of a route.

A retained message describes the device (MQTT device discovery, Home Assistant 2024.11 and later). It is
published on each connection, when Home Assistant has started, and when a route shows a sensor for the first
time. The values come from the node's retained health, the availability from its status.

A route that asks the model shows the latest answer (`sensor`). A route that only raises events shows whether
there is an alarm (`binary_sensor`). Home Assistant limits a state to 255 characters, so an answer is cut to
that length; the whole answer is in the attributes.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from edge.protocol.strict_json import dumps
from edge.protocol.topics import NodeTopics
from edge.routes.display import Display
from edge.transports.mqtt.messages import Outgoing
from edge.transports.routes import Routes

MAX_STATE = 255  # characters of a state in Home Assistant
MAX_SENSORS = 500  # with an entity: 250 kB of description
MAX_NAME = 64  # characters of a sensor in a topic

# The entities for health, by its keys: the name and other settings of Home Assistant.
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

    `topics` are those of the node; `status` returns the content of its status.
    """

    def __init__(
        self,
        prefix: str,
        node: str,
        topics: NodeTopics,
        status: Callable[[], Mapping[str, Any]],
        routes: Routes | None,
    ) -> None:
        self.birth_topic = f"{prefix}/status"
        self._prefix, self._node, self._topics = prefix, node, topics
        self._status = status
        self._asking = frozenset[str]() if routes is None else routes.asking
        self._sensors: dict[tuple[str, str], None] = {}  # route and sensor, in order of first appearance
        for route, sensor in () if routes is None else routes.displayed:
            self._know(route, sensor)

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

    def show(self, display: Display) -> list[Outgoing]:
        """Return the messages that show a sensor. For a new sensor, the device comes first."""
        new = self._know(display.route, display.sensor)
        state = display.state
        text = ("ON" if state else "OFF") if isinstance(state, bool) else _cut(state)
        shown = dumps({"state": text, "attributes": display.attributes})
        topics = [self._sensor_topic(display.route, display.sensor)]
        if not isinstance(state, bool):
            topics.append(self._topics.route(display.route))  # the latest answer of the route
        messages = [Outgoing(topic, shown, retain=True) for topic in topics]
        return [self.device(), *messages] if new else messages

    def _know(self, route: str, sensor: str) -> bool:
        """Add a sensor; True if it is new and there is room for it."""
        new = (route, sensor) not in self._sensors and len(self._sensors) < MAX_SENSORS
        if new:
            self._sensors[route, sensor] = None
        return new

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
        for route in sorted(self._asking):  # a route had one entity before: remove it
            parts[f"route-{route}"] = {"platform": "sensor"}
        for route, sensor in self._sensors:
            parts[f"route-{route}-{_slug(sensor)}"] = self._sensor(route, sensor)
        return parts

    def _sensor(self, route: str, sensor: str) -> dict[str, Any]:
        """Describe the entity of a sensor of a route."""
        topic, key = self._sensor_topic(route, sensor), f"route-{route}-{_slug(sensor)}"
        platform = "sensor" if route in self._asking else "binary_sensor"
        part = self._part(platform, key, f"{route} {sensor}", topic, "{{ value_json.state }}")
        if platform == "binary_sensor":
            part["device_class"] = "problem"
        part["json_attributes_topic"] = topic
        part["json_attributes_template"] = "{{ value_json.attributes | tojson }}"
        return part

    def _part(self, platform: str, key: str, name: str, topic: str, template: str) -> dict[str, Any]:
        return {
            "platform": platform,
            "unique_id": f"edge-{self._node}-{key}",
            "name": name,
            "state_topic": topic,
            "value_template": template,
        }

    def _sensor_topic(self, route: str, sensor: str) -> str:
        return self._topics.sensor(route, _slug(sensor))


def _slug(sensor: str) -> str:
    """Name a sensor for topics and identifiers; a checksum distinguishes names that become equal."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", sensor)[:MAX_NAME]
    return plain if plain == sensor else f"{plain}-{zlib.crc32(sensor.encode()):08x}"


def _cut(text: str) -> str:
    """Shorten a text to the length of a state, and mark it as shortened."""
    return text if len(text) <= MAX_STATE else text[: MAX_STATE - 3] + "..."
