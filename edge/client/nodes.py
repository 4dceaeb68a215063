"""Which nodes there are at a broker and how they are, by their retained status and health."""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Self

from edge.endpoints import Broker
from edge.errors import TransportError
from edge.protocol.strict_json import StrictJsonError, loads, printable
from edge.protocol.topics import NodeTopics, node_of
from edge.transports.mqtt.connection import MqttConnection
from edge.transports.mqtt.messages import Received

CONNECT_S = 10.0  # for the broker to answer
QUIET_S = 0.5  # what is retained has come when nothing more comes for so long
MAX_BYTES = 64 * 1024  # of a status or health


class Nodes:
    """Listens to the status and health of nodes at a broker, of all or of the one that is named.

    `found` has status and health, in one, of each by name. A context manager: the connection ends with it.
    Raises TransportError if a TLS file can't be used.
    """

    def __init__(self, broker: Broker, node: str | None) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        topics = NodeTopics(node or "+")
        self._topics = topics.status, topics.health
        self._heard: queue.Queue[Received | None] = queue.Queue()  # None: subscribed, or the connection ended
        name = f"edge-ask-{uuid.uuid4().hex[:12]}"
        self._connection = MqttConnection(broker, name, self, session_expiry_s=0)

    def __enter__(self) -> Self:
        """Connect."""
        self._connection.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect."""
        self._connection.stop(CONNECT_S)

    @property
    def problem(self) -> str | None:
        """Why the broker can't be heard, or None."""
        return self._connection.problem

    def wait(self, timeout_s: float) -> bool:
        """Take in the next thing that is heard; False if there is none in time."""
        try:
            message = self._heard.get(timeout=timeout_s)
        except queue.Empty:
            return False
        if message is not None:
            self.found.setdefault(node_of(message.topic), {}).update(_content(message))
        return True

    # The listener of the connection, in its thread.

    def connected(self) -> None:
        """Subscribe."""
        self._connection.subscribe(*self._topics, retained=True)

    def subscribed(self) -> None:
        """Pass it on."""
        self._heard.put(None)

    def received(self, message: Received) -> None:
        """Pass it on."""
        self._heard.put(message)
        self._connection.acknowledge(message.token)

    def disconnected(self) -> None:
        """Pass it on: the connection comes back."""
        self._heard.put(None)

    def tick(self) -> None:
        """Do nothing."""


def read_nodes(broker: Broker, node: str | None) -> dict[str, dict[str, Any]]:
    """Give status and health, in one, of each node by name; of one node only if it is named.

    Raises TransportError if the broker does not answer or refuses.
    """
    until = time.monotonic() + CONNECT_S
    answered = False
    with Nodes(broker, node) as nodes:
        while time.monotonic() < until:
            if nodes.problem:
                raise TransportError(nodes.problem)
            if nodes.wait(0.05):
                answered, until = True, time.monotonic() + QUIET_S
    if not answered:
        raise TransportError(f"broker {broker.address}: no answer in {CONNECT_S:.0f} s")
    return dict(sorted(nodes.found.items()))


def as_text(name: str, found: Mapping[str, Any]) -> str:
    """Write a node's state in one line; what it does not tell is left out."""
    parts = [f"{name}: {found.get('state', 'unknown')}"]
    parts += [f"{found['model']} {found.get('bundle', '')}".strip()] if "model" in found else []
    if found.get("state") == "online" and "queue" in found:
        parts.append(f"{found['queue']} waiting, {'working' if found.get('working') else 'idle'}")
        parts.append(f"{found.get('answered', 0)} answered, {found.get('failed', 0)} failed")
        for key, form in _FORMS.items():
            if found.get(key) not in (None, []):
                parts.append(form(found[key]))
    return "; ".join(parts)


_FORMS: dict[str, Callable[[Any], str]] = {
    "tokens_per_s": lambda value: f"{value} tokens/s",
    "first_token_ms": lambda value: f"first token after {value} ms",
    "memory_mib": lambda value: f"{value} MiB",
    "temperature_c": lambda value: f"{value} °C",
    "throttling": lambda value: printable(", ".join(map(str, value))),
    "last_error": lambda value: f"last error {printable(str(value), 200)}",
    "journal": lambda value: f"journal {printable(str(value), 200)}",
}


def _content(message: Received) -> dict[str, Any]:
    try:
        return loads(message.payload, MAX_BYTES)
    except StrictJsonError:
        return {}
