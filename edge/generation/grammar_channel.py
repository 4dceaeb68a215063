"""What the daemon and the process that grammars live in have in common: limits and messages.

A message is four bytes with the length, then the marshalled object: both ends run the same interpreter, and
neither reads bytes of a client as a message.
"""

from __future__ import annotations

import marshal
import socket
import struct
from collections.abc import Callable
from typing import Any

REQUEST_S = 1.0
STEP_S = 0.02
"""Processor time that one request may take, and what each of its operations adds to it (up to the former)."""

MEMORY_BYTES = 48 * 1024 * 1024
STACK_BYTES = 16 * 1024 * 1024
"""What one request may take beyond the engine's view of the vocabulary."""

OUT_OF_MEMORY = 3
"""Exit status of a child to which Python could give no memory; llguidance aborts in that case."""

STATUS = struct.Struct("<ii")
"""How the last child ended, as `os.waitpid` tells it, and the process id of the new one."""

_LENGTH = struct.Struct("<I")


class Channel:
    """One end of a stream socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, content: Any) -> None:
        """Send an object of Python's plain types. Raises ConnectionError if the other end is gone."""
        body = marshal.dumps(content)
        self._end.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self, wait: Callable[[socket.socket], None] = lambda _: None) -> Any:
        """Return the next object. `wait` is called before each read; what it raises is passed on.

        Raises EOFError if the other end is gone.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, wait))
        return marshal.loads(self._read(length, wait))

    def close(self) -> None:
        """Close this end."""
        self._end.close()

    def _read(self, count: int, wait: Callable[[socket.socket], None]) -> bytes:
        content = bytearray()
        while len(content) < count:
            wait(self._end)
            part = self._end.recv(count - len(content))
            if not part:
                raise EOFError
            content += part
        return bytes(content)
