"""Sensor readings over MQTT, on a separate connection.

Messages on one connection queue at the broker and in the system's buffers. On a shared connection, a sensor
that sends continuously would delay every request.

Subscriptions use QoS 0, so the broker stores no readings for an absent node. Stored readings would arrive an
hour late and look new.
"""

from __future__ import annotations

from collections.abc import Callable

from edge.endpoints import Broker
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.messages import Received
from edge.transports.mqtt.problems import Problems
from edge.transports.routes import Routes


class MqttReadings:
    """Gives `routes` the messages on their topics, except retained ones and those below `own`.

    The routes are notified while no reading can arrive, so that sensors do not count as silent while the
    broker is down. `ready` is called in the connection's thread when the broker has accepted the
    subscriptions.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        routes: Routes,
        own: str,
        ready: Callable[[], None],
        problems: Problems | None = None,
    ) -> None:
        """Prepare the connection; it shares `problems` with others to the same broker.

        Raises TransportError if a TLS file can't be used.
        """
        self._routes, self._own, self._ready = routes, own, ready
        routes.listen(False)
        self.connection = MqttConnection(broker, client_id, self, session_expiry_s=0, problems=problems)

    # Called as the Listener, in the connection's thread.

    def connected(self) -> None:
        """Subscribe to the topics of the routes."""
        self.connection.subscribe(at_most_once=self._routes.filters)

    def subscribed(self) -> None:
        """Tell the routes that readings can arrive."""
        self._routes.listen(True)
        self._ready()

    def disconnected(self) -> None:
        """Tell the routes that no reading can arrive."""
        self._routes.listen(False)

    def received(self, message: Received) -> None:
        """Pass a reading on."""
        if not message.retained and not message.topic.startswith(self._own):
            self._routes.reading(message.topic, message.payload)

    def tick(self) -> None:
        """Do nothing."""
