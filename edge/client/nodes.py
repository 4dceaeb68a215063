"""The nodes of a broker and their state, from their retained status and health."""

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
QUIET_S = 0.5  # after which all retained messages have arrived
MAX_BYTES = 64 * 1024  # of a status or health


class Nodes:
    """Listens to status and health of all nodes of a broker, or of one `node`; a context manager.

    `states` maps each node's name to its status and health, merged. Raises TransportError if a TLS file can't
    be used.
    """

    def __init__(self, broker: Broker, node: str | None) -> None:
        self.states: dict[str, dict[str, Any]] = {}
        topics = NodeTopics(node or "+")
        self._topics = topics.status, topics.health
        self._queue: queue.Queue[Received | None] = queue.Queue()  # None: subscribed, or the connection ended
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
        """Why there is no connection, or None."""
        return self._connection.problem

    def wait(self, timeout_s: float) -> bool:
        """Process the next message or change of the connection; False if there is none in time."""
        try:
            message = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return False
        if message is not None:
            self.states.setdefault(node_of(message.topic), {}).update(_content(message))
        return True

    # The connection calls these in its own thread.

    def connected(self) -> None:
        """Subscribe."""
        self._connection.subscribe(*self._topics, retained=True)

    def subscribed(self) -> None:
        """Wake up `wait`."""
        self._queue.put(None)

    def received(self, message: Received) -> None:
        """Queue it for `wait`."""
        self._queue.put(message)
        self._connection.acknowledge(message.token)

    def disconnected(self) -> None:
        """Wake up `wait`; the connection comes back."""
        self._queue.put(None)

    def tick(self) -> None:
        """Do nothing."""


def read_nodes(broker: Broker, node: str | None) -> dict[str, dict[str, Any]]:
    """Return status and health, merged, of each node by name; only of `node` if it is given.

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
    return dict(sorted(nodes.states.items()))


def as_text(name: str, state: Mapping[str, Any]) -> str:
    """Write a node's state in one line; unknown values are left out."""
    parts = [f"{name}: {state.get('state', 'unknown')}"]
    parts += [f"{state['model']} {state.get('bundle', '')}".strip()] if "model" in state else []
    if state.get("state") == "online" and "queue" in state:
        parts.append(f"{state['queue']} waiting, {'working' if state.get('working') else 'idle'}")
        parts.append(f"{state.get('answered', 0)} answered, {state.get('failed', 0)} failed")
        for key, form in _FORMS.items():
            if state.get(key) not in (None, []):
                parts.append(form(state[key]))
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
