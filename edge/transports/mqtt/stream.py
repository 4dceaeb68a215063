"""A non-blocking TCP or TLS connection to a broker, read and written in large blocks.

Each system call releases the GIL and may wait to get it back, so packets are not read and written one by one.
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
DEAD_MS = 15_000  # TCP data unacknowledged for this long ends the connection
RECEIVE_BYTES = 64 * 1024  # receive buffer: with a larger one, data would only be older when it is read
CHUNK_BYTES = 16 * 1024


def tls_context(broker: Broker) -> ssl.SSLContext | None:
    """Read the broker's TLS files; None without TLS. Raises TransportError if one can't be used."""
    if not broker.tls:
        return None
    import ssl  # takes 1 MB, needed only for TLS

    try:
        context = ssl.create_default_context(cafile=broker.ca_file)
        if broker.certificate_file is not None:
            context.load_cert_chain(broker.certificate_file, broker.key_file)
    except (OSError, ValueError) as error:
        raise TransportError(f"broker {broker.address}: a TLS file can't be used: {error}") from None
    return context


class Stream:
    """A connection to a broker. Written data waits in `unsent` for `flush`."""

    def __init__(self, broker: Broker, context: ssl.SSLContext | None) -> None:
        """Connect, in at most CONNECT_S + HANDSHAKE_S seconds. Raises OSError."""
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
        """Return the file descriptor, for `select`."""
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether TLS has buffered data that `select` does not report."""
        return self._secure is not None and self._secure.pending() > 0

    def read(self) -> bytes | None:
        """Read the available data, at most CHUNK_BYTES; None if there is none yet, b"" at the end.

        Raises OSError if the connection has failed.
        """
        try:
            return self._socket.recv(CHUNK_BYTES)
        except self._again:
            return None

    def flush(self) -> None:
        """Write what can be written now.

        Does not report a failure; `read` does, after the last data from the broker.
        """
        try:
            while self.unsent:
                del self.unsent[: self._socket.send(self.unsent)]
        except self._again:
            return
        except OSError:
            self.unsent.clear()

    def close(self) -> None:
        """Write what can be written now, and close."""
        self.flush()
        self._socket.close()

    def shut_down(self) -> None:
        """End the connection as a network failure would."""
        self._socket.shutdown(socket.SHUT_RDWR)


def _tune(sock: socket.socket) -> None:
    """Switch off Nagle's algorithm, which adds 40 ms to small packets, and detect a lost peer early.

    Without DEAD_MS, TCP doubles its retransmission interval each time, so after a minute of network failure
    the connection can be dead for another minute (tcp(7)).
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_MS)
