"""paho's MQTT client with what it lacks for a connection that is left alone for a year.

It reads and writes in bulk, hands on PUBLISH packets unread, keeps to the broker's Server Keep Alive and
gives up a TLS handshake in which nothing is said. What is overridden here is private to paho, so
pyproject.toml holds it below the next version, which is to be looked at first.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import MQTTErrorCode

from edge.transports.mqtt.buffered_socket import BufferedSocket

HANDSHAKE_S = 10  # a broker that is silent for so long in a TLS handshake is given up
DEAD_MS = 15_000  # what was sent and not acknowledged by TCP for so long ends the connection
RECEIVE_BYTES = 64 * 1024  # what the system holds for us: more would only be older when it is read


class PahoClient(Client):
    """A client for which `on_packet` reads each PUBLISH: it gets the first byte, and what follows the length.

    Reading and writing packet by packet, as paho does, costs half of a request's time.
    """

    def __init__(self, on_packet: Callable[[int, bytes], None], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._on_packet = on_packet

    def keep_alive(self, most_s: int) -> None:
        """Let the broker hear something every `most_s` seconds at least, if not 0 (MQTT 5, 3.2.2.3.14)."""
        self._keepalive = min(self._keepalive, most_s or self._keepalive)

    def _create_socket(self) -> Any:
        sock: Any = super()._create_socket()
        _tune(sock)
        return BufferedSocket(sock)

    def _handle_publish(self) -> MQTTErrorCode:
        packet: Any = self._in_packet
        self._on_packet(packet["command"], bytes(packet["packet"]))
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _handle_disconnect(self) -> None:
        """Have the reason read also where no properties follow it, as most brokers send it."""
        packet: Any = self._in_packet
        if packet["remaining_length"] in (1, 2):
            packet["remaining_length"] = 3
        super()._handle_disconnect()

    def _ssl_wrap_socket(self, tcp_sock: Any) -> Any:
        """Let a handshake last no longer than HANDSHAKE_S without a word; paho waits for the keepalive."""
        keepalive, self._keepalive = self._keepalive, min(self._keepalive, HANDSHAKE_S)
        try:
            return super()._ssl_wrap_socket(tcp_sock)
        finally:
            self._keepalive = keepalive


def _tune(sock: socket.socket) -> None:
    """Switch Nagle's algorithm off, which adds 40 ms to small packets; notice early that a peer is away.

    Without the limit TCP sends again ever more rarely, so that a network that was away for a minute seems
    to be away for two (tcp(7)).
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_MS)
