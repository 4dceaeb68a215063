"""One node on one broker: its connections, and the dispatch of messages to its parts.

Requests and readings (`readings`) have separate connections, so sensors that send continuously do not delay
requests. Topics are those of `edge.protocol.topics`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from edge.config import MqttConfig
from edge.logs import RepeatedLog
from edge.protocol.strict_json import printable
from edge.protocol.topics import ROOT, NodeTopics
from edge.requests.engine import Sink
from edge.requests.journaled_engine import JournaledEngine
from edge.routes.display import Display
from edge.transports.mqtt import presence
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.home_assistant import HomeAssistant
from edge.transports.mqtt.messages import Outgoing, Received
from edge.transports.mqtt.presence import Presence
from edge.transports.mqtt.problems import Problems
from edge.transports.mqtt.readings import MqttReadings
from edge.transports.mqtt.requests import CLIENT, MqttRequests
from edge.transports.routes import Routes

__all__ = ["CLIENT", "MqttTransport"]

log = logging.getLogger(__name__)


class MqttTransport:
    """Serves one node on one broker. `status` returns the retained status, `health` the health."""

    def __init__(
        self,
        config: MqttConfig,
        node: str,
        engine: JournaledEngine,
        status: Callable[[], Mapping[str, Any]],
        health: Callable[[], Mapping[str, Any]],
        routes: Routes | None = None,
    ) -> None:
        """Prepare the transport. Raises TransportError if a TLS file can't be used."""
        self._topics = topics = NodeTopics(node)
        self._engine = engine
        self._retained, self._refused, self._dropped = (RepeatedLog(log) for _ in range(3))
        self._publishing = 0  # messages of routes that the broker has not acknowledged
        name, problems, broker = f"edge-{node}", Problems(), config.broker
        self.connection = MqttConnection(
            broker, name, self, config.session_expiry_s, presence.will(topics), problems
        )
        self.connections = {"mqtt": self.connection}
        home: HomeAssistant | None = None
        if config.discovery_prefix is not None:
            home = HomeAssistant(config.discovery_prefix, node, topics, status, routes)
        self._requests = MqttRequests(self.connection, topics, config.reply_prefixes, engine)
        self._presence = Presence(self.connection, topics, status, health, home, routes is not None)
        if routes is not None:
            heard = partial(self.connection.post, self._presence.readings_heard)
            readings = MqttReadings(broker, f"{name}-readings", routes, f"{ROOT}/", heard, problems)
            self.connections["mqtt readings"] = readings.connection

    def start(self) -> None:
        """Start the threads of the connections."""
        for connection in self.connections.values():
            connection.start()

    @property
    def online(self) -> bool:
        """Whether requests are heard, and readings have been since the start."""
        return self._presence.online

    @property
    def unconfirmed(self) -> int:
        """Requests whose final or error the broker has not acknowledged, or that have none yet."""
        return self._requests.unconfirmed

    def stop(self, timeout_s: float) -> None:
        """Send finished answers and `offline`, and disconnect; takes at most about `timeout_s` seconds."""
        until = time.monotonic() + timeout_s
        handed_over = threading.Event()  # everything posted before has then been published
        self.connection.post(handed_over.set)
        pause = threading.Event()  # works after a clock jump, when time.sleep does not
        while self.connection.connected and time.monotonic() < until:
            if handed_over.is_set() and not self._publishing and not self._requests.answering:
                break
            pause.wait(0.02)
        self.connection.post(self._presence.leave)
        for connection in self.connections.values():
            connection.stop(timeout_s)

    def sink(self, client: str, request_id: str, note: str) -> Sink:
        """Make a sink for a request of an earlier run; called before the start."""
        return self._requests.sink(client, request_id, note)

    def publish(self, topic: str, payload: str, delivered: Callable[[], None] | None) -> None:
        """Publish the message of a route, from any thread; `delivered` is called when the broker has it.

        Without `delivered`, the message is dropped if too many messages wait for the broker.
        """
        self.connection.post(lambda: self._publish(topic, payload, delivered))

    def show(self, display: Display) -> None:
        """Show a sensor of a route in Home Assistant, from any thread."""
        self.connection.post(partial(self._presence.show, display))

    def announce(self) -> None:
        """Publish the changed status, from any thread."""
        self.connection.post(self._presence.announce)

    # The methods below are called only in the connection's thread.

    def connected(self) -> None:
        """Subscribe to requests, and to Home Assistant's birth topic at QoS 0."""
        topics, users = self._topics, self._topics.of_user("+")
        filters = (topics.request, topics.cancel, users.request, users.cancel)
        self.connection.subscribe(*filters, at_most_once=self._presence.births)

    def subscribed(self) -> None:
        """Note that requests are heard."""
        self._presence.subscribed()

    def disconnected(self) -> None:
        """Note that no requests arrive until the next connection."""
        self._engine.sync()
        self._presence.disconnected()

    def received(self, message: Received) -> None:
        """Pass a message to the part that handles it."""
        if message.topic in self._presence.births:
            self._presence.birth(message)
        elif message.retained:
            self._retained.warning(
                "%s: a retained request is ignored; publish it without the retain flag", message.topic
            )
            self.connection.acknowledge(message.token)
        elif message.topic.startswith((self._topics.request, self._topics.cancel)):
            self._requests.received(message)
        else:
            self.connection.acknowledge(message.token)  # from an old subscription in the session

    def tick(self) -> None:
        """Sync accepted requests to the disk, and publish health."""
        self._engine.sync()
        self._presence.tick()

    def _publish(self, topic: str, payload: str, delivered: Callable[[], None] | None) -> None:
        def done(refused: str | None) -> None:
            self._publishing -= 1
            if refused:
                self._refused.warning("%s: the broker refuses it: %s", printable(topic, 200), refused)
            if delivered is not None:
                delivered()

        if self.connection.publish(Outgoing(topic, payload), keep=delivered is not None, done=done):
            self._publishing += 1
        else:
            said = printable(topic, 200)
            self._dropped.warning("%s: too many messages wait for the broker; a message is dropped", said)
