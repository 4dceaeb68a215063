"""A socket that reads and writes in bulk, for a library that does so byte by byte.

paho-mqtt reads a packet's head one byte at a time and writes each packet by itself. Where many threads share
Python's lock, each such call may wait for it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl

CHUNK_BYTES = 16 * 1024


class BufferedSocket:
    """Wraps a connected socket. What is sent waits for `flush`; `pending` says what there is to read."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._read, self._at = b"", 0
        self.unsent = bytearray()

    def recv(self, most: int) -> bytes:
        """Read at most `most` bytes. Raises OSError as a socket's `recv` does."""
        if self._at == len(self._read):
            self._read, self._at = self._sock.recv(CHUNK_BYTES), 0
        data = self._read[self._at : self._at + most]
        self._at += len(data)
        return data

    def send(self, data: bytes | bytearray) -> int:
        """Take all of `data`, to be written by `flush`."""
        self.unsent += data
        return len(data)

    def flush(self) -> None:
        """Write what can be written now. Raises OSError if the connection has ended."""
        try:
            while self.unsent:
                del self.unsent[: self._sock.send(self.unsent)]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return

    def pending(self) -> int:
        """How many bytes have been read from the network and not yet by `recv`."""
        below = self._sock.pending() if isinstance(self._sock, ssl.SSLSocket) else 0
        return len(self._read) - self._at + below

    def setblocking(self, blocking: bool) -> None:
        """As a socket's."""
        self._sock.setblocking(blocking)

    def fileno(self) -> int:
        """As a socket's."""
        return self._sock.fileno()

    def close(self) -> None:
        """Write what can be written, and close."""
        with contextlib.suppress(OSError):
            self.flush()
        self._sock.close()
