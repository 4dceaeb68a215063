"""Readings of sensors over MQTT, on a connection of their own.

What comes on one connection waits in line, at the broker and in the system's buffers. A sensor that repeats
itself without end would hold up every request behind its readings, so those have a line of their own.

Topics are subscribed to at QoS 0: nothing is kept for an absent node, since readings of an hour ago would be
taken for new.
"""

from __future__ import annotations

from collections.abc import Callable

from edge.endpoints import Broker
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.messages import Received
from edge.transports.mqtt.problems import Problems
from edge.transports.routes import Routes


class MqttReadings:
    """Gives `routes` the messages on their topics, but for retained ones and those below `own`.

    Tells them when none can come, so that a broker that is away is not taken for sensors that are silent.
    `ready` is called, in the connection's thread, whenever the broker has accepted the subscriptions.
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

    # The listener of the connection, in its thread.

    def connected(self) -> None:
        """Subscribe to what the routes read."""
        self.connection.subscribe(at_most_once=self._routes.filters)

    def subscribed(self) -> None:
        """Readings are heard from now on."""
        self._routes.listen(True)
        self._ready()

    def disconnected(self) -> None:
        """Note that nothing is heard until the connection comes back."""
        self._routes.listen(False)

    def received(self, message: Received) -> None:
        """Pass a reading on."""
        if not message.retained and not message.topic.startswith(self._own):
            self._routes.reading(message.topic, message.payload)

    def tick(self) -> None:
        """Do nothing."""
