"""A microcontroller at the other end of a serial line."""

import json
import os
import select
import time
from pathlib import Path
from typing import Any

from edge.protocol.framing import Damaged, FrameDecoder, encode
from tests.support.counterparts import WAIT_S


class SerialBoard:
    """Writes and reads frames on one end of a pty pair. XON and XOFF from the node are skipped."""

    def __init__(self, port: Path) -> None:
        self._file = os.open(port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        self._decoder = FrameDecoder(10**6)
        self._received: list[dict[str, Any]] = []

    def send(self, text: str) -> None:
        """Write a frame."""
        self.write(encode(text))

    def write(self, data: bytes) -> None:
        """Write bytes as they are, and wait until the line has taken them."""
        while data:
            assert select.select([], [self._file], [], WAIT_S)[1], "the line takes nothing"
            data = data[os.write(self._file, data) :]

    def read(self) -> bytes:
        """Return what has arrived, after a wait of at most 50 ms."""
        data = os.read(self._file, 65536) if select.select([self._file], [], [], 0.05)[0] else b""
        return data.translate(None, b"\x11\x13")

    def receive(self, *types: str) -> dict[str, Any]:
        """Return the next frame of one of the types; others are skipped."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            while self._received:
                frame = self._received.pop(0)
                if not types or frame["type"] in types:
                    return frame
            for item in self._decoder.feed(self.read()):
                assert not isinstance(item, Damaged), item
                self._received.append(json.loads(item))
        raise AssertionError(f"no {types} came")

    def wait_for_request(self) -> None:
        """Wait for the next request."""
        until = time.monotonic() + WAIT_S
        while not any("prompt" in str(item) for item in list(self._decoder.feed(self.read()))):
            assert time.monotonic() < until

    def close(self) -> None:
        """Close the port."""
        os.close(self._file)
