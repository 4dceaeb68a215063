"""Publishes a node's retained status and health, its Last Will, and its device for Home Assistant.

`status` is `online` once the node receives requests and, if it has routes, readings. The Last Will sets
`offline` when the node fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from edge.protocol.strict_json import dumps
from edge.protocol.topics import NodeTopics
from edge.routes.display import Display
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.home_assistant import HomeAssistant
from edge.transports.mqtt.messages import Outgoing, Received

HEALTH_CHANGED_S, HEALTH_SAME_S = 1.0, 60.0  # the shortest and longest time between two health messages

Report = Callable[[], Mapping[str, Any]]


def will(topics: NodeTopics) -> Outgoing:
    """Return the Last Will of a node."""
    return Outgoing(topics.status, dumps({"state": "offline"}), retain=True)


class Presence:
    """Publishes status and health over a connection; used in its thread.

    `awaits_readings`: the node is not online before `readings_heard`.
    """

    def __init__(
        self,
        connection: MqttConnection,
        topics: NodeTopics,
        status: Report,
        health: Report,
        home: HomeAssistant | None,
        awaits_readings: bool,
    ) -> None:
        self._connection, self._topics, self._home = connection, topics, home
        self._status, self._health = status, health
        self._subscribed, self._awaits_readings = False, awaits_readings
        self._published_health, self._published_at = "", float("-inf")

    @property
    def online(self) -> bool:
        """Whether requests are heard, and readings have been since the start."""
        return self._subscribed and not self._awaits_readings

    def subscribed(self) -> None:
        """Note that requests are heard."""
        self._subscribed = True
        self.announce()

    def disconnected(self) -> None:
        """Note that the subscriptions to requests are gone until the next connection."""
        self._subscribed = False

    def readings_heard(self) -> None:
        """Note that readings are heard; this is announced once, since clients that hear it ask again."""
        if self._awaits_readings:
            self._awaits_readings = False
            self.announce()

    def announce(self) -> None:
        """Publish the status, Home Assistant's device and the health, if the node is online."""
        if self.online:
            self._connection.publish(self._state("online"))
            self.introduce()
            self._published_health = ""

    def leave(self) -> None:
        """Publish that the node is offline."""
        self._connection.publish(self._state("offline"))

    @property
    def births(self) -> tuple[str, ...]:
        """Home Assistant's birth topic, if Home Assistant is configured."""
        return () if self._home is None else (self._home.birth_topic,)

    def birth(self, message: Received) -> None:
        """Publish the device again after Home Assistant has started."""
        if message.payload == b"online":
            self.introduce()

    def introduce(self) -> None:
        """Publish the device and its entities for Home Assistant."""
        if self._home is not None:
            self._connection.publish(self._home.device())

    def show(self, display: Display) -> None:
        """Show a sensor of a route in Home Assistant."""
        for message in () if self._home is None else self._home.show(display):
            self._connection.publish(message)

    def tick(self) -> None:
        """Publish health when it has changed, and regularly."""
        age = time.monotonic() - self._published_at
        if age < HEALTH_CHANGED_S:
            return
        health = dumps(self._health())
        if health != self._published_health or age >= HEALTH_SAME_S:
            self._connection.publish(Outgoing(self._topics.health, health, retain=True))
            self._published_health, self._published_at = health, time.monotonic()

    def _state(self, state: str) -> Outgoing:
        status = {"state": state, "user_topics": True, **self._status()}
        return Outgoing(self._topics.status, dumps(status), retain=True)
