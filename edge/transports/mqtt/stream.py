"""A TCP or TLS connection to a broker that never blocks and is read and written in bulk.

Each system call gives up Python's lock and may have to wait for it again, so packets are not read and written
one by one.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from edge.endpoints import Broker
from edge.errors import TransportError

if TYPE_CHECKING:
    import ssl

CONNECT_S = 5.0  # for a TCP connection
HANDSHAKE_S = 10.0  # for a TLS handshake
DEAD_MS = 15_000  # data that TCP has had no acknowledgement of for so long ends the connection
RECEIVE_BYTES = 64 * 1024  # that the system holds for us: more would only be older when it is read
CHUNK_BYTES = 16 * 1024


def tls_context(broker: Broker) -> ssl.SSLContext | None:
    """Read the broker's TLS files; None without TLS. Raises TransportError if one can't be used."""
    if not broker.tls:
        return None
    import ssl  # a megabyte of memory, needed for TLS only

    try:
        context = ssl.create_default_context(cafile=broker.ca_file)
        if broker.certificate_file is not None:
            context.load_cert_chain(broker.certificate_file, broker.key_file)
    except (OSError, ValueError) as error:
        raise TransportError(f"broker {broker.address}: a TLS file can't be used: {error}") from None
    return context


class Stream:
    """A connection to a broker; what is written waits in `unsent` for `flush`."""

    def __init__(self, broker: Broker, context: ssl.SSLContext | None) -> None:
        """Connect, which may take CONNECT_S and HANDSHAKE_S seconds. Raises OSError."""
        self.unsent = bytearray()
        self._again: tuple[type[OSError], ...] = (BlockingIOError,)
        self._secure: ssl.SSLSocket | None = None
        self._socket = socket.create_connection((broker.host, broker.port), CONNECT_S)
        try:
            _tune(self._socket)
            if context is not None:
                import ssl

                self._again += (ssl.SSLWantReadError, ssl.SSLWantWriteError)
                self._socket.settimeout(HANDSHAKE_S)
                self._secure = context.wrap_socket(self._socket, server_hostname=broker.host)
                self._socket = self._secure
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Give the descriptor, for `select`."""
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether TLS holds data that `select` does not know of."""
        return self._secure is not None and self._secure.pending() > 0

    def read(self) -> bytes | None:
        """Read what is there, CHUNK_BYTES at most; None if that is nothing yet, b"" at the end.

        Raises OSError if the connection has failed.
        """
        try:
            return self._socket.recv(CHUNK_BYTES)
        except self._again:
            return None

    def flush(self) -> None:
        """Write what can be written now.

        A failure is not reported: `read` does so, after what the broker may have said before it.
        """
        try:
            while self.unsent:
                del self.unsent[: self._socket.send(self.unsent)]
        except self._again:
            return
        except OSError:
            self.unsent.clear()

    def close(self) -> None:
        """Write what can be written, and close."""
        self.flush()
        self._socket.close()

    def shut_down(self) -> None:
        """End the connection as a network failure would."""
        self._socket.shutdown(socket.SHUT_RDWR)


def _tune(sock: socket.socket) -> None:
    """Switch off Nagle's algorithm, which adds 40 ms to small packets, and detect an absent peer early.

    Without DEAD_MS, TCP retransmits ever more rarely, and a network that was down for a minute seems to be
    down for two (tcp(7)).
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_MS)
