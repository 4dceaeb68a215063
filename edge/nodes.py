"""Which nodes there are at a broker and how they are, by their retained status and health."""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from edge.config import Broker
from edge.errors import TransportError
from edge.strict_json import StrictJsonError, loads, printable
from edge.transports.mqtt_connection import MqttConnection, Received

CONNECT_S = 10.0  # for the broker to answer
QUIET_S = 0.5  # what is retained has come when nothing more comes for so long
MAX_BYTES = 64 * 1024  # of a status or health


class _Listener:
    """Passes on what comes. `connection` is to be set before it starts."""

    def __init__(self, topics: tuple[str, ...]) -> None:
        self.connection: MqttConnection | None = None
        self.answered = False
        self.heard: queue.Queue[Received | None] = queue.Queue()  # None: subscribed
        self._topics = topics

    def connected(self) -> None:
        """Subscribe."""
        if self.connection is not None:
            self.connection.subscribe(*self._topics, retained=True)

    def subscribed(self) -> None:
        """Pass it on."""
        self.answered = True
        self.heard.put(None)

    def received(self, message: Received) -> None:
        """Pass it on."""
        self.heard.put(message)
        if self.connection is not None:
            self.connection.acknowledge(message.token)

    def disconnected(self) -> None:
        """Do nothing: the connection comes back."""

    def published(self, mid: int, refused: str | None) -> None:
        """Do nothing: nothing is published."""

    def tick(self) -> None:
        """Do nothing."""


def read_nodes(broker: Broker, node: str | None) -> dict[str, dict[str, Any]]:
    """Give status and health, in one, of each node by name; of one node only if it is named.

    Raises TransportError if the broker does not answer or refuses.
    """
    listener = _Listener(tuple(f"edge/v1/{node or '+'}/{what}" for what in ("status", "health")))
    connection = MqttConnection(broker, f"edge-ask-{uuid.uuid4().hex[:12]}", listener, session_expiry_s=0)
    listener.connection = connection
    connection.start()
    nodes: dict[str, dict[str, Any]] = {}
    until = time.monotonic() + CONNECT_S
    try:
        while time.monotonic() < until:
            if connection.problem:
                raise TransportError(connection.problem)
            try:
                message = listener.heard.get(timeout=0.05)
            except queue.Empty:
                continue
            until = time.monotonic() + QUIET_S
            if message is not None:
                nodes.setdefault(message.topic.split("/")[2], {}).update(_content(message))
    finally:
        connection.stop(CONNECT_S)
    if not listener.answered:
        raise TransportError(f"broker {broker.address}: no answer in {CONNECT_S:.0f} s")
    return dict(sorted(nodes.items()))


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
