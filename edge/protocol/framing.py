"""Frames on a serial line: `{"id":"7",...}*1A2B3C4D` and a newline.

One JSON object in ASCII, `*`, the CRC-32 of the bytes before the `*` as 8 hex digits (the CRC of zlib, PNG
and MicroPython's `binascii.crc32`), and a newline. A frame is readable, is safe with XON/XOFF, and lets a
reader synchronise again at the next newline. A carriage return before the newline and empty lines are
ignored: a sender can start with a newline so that noise before it does not damage its first frame.

A lenient reader also accepts a UTF-8 line without `*` and CRC, for typing by hand.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from edge.protocol.strict_json import printable

_CHECK_BYTES = 9  # the `*` and 8 hex digits
_HEX = frozenset(b"0123456789abcdefABCDEF")


@dataclass(frozen=True)
class Damaged:
    """A line that is not a frame. `reason`: crc, no_crc, not_ascii or too_long."""

    reason: str
    line: str

    @property
    def why(self) -> str:
        """What is wrong with the line, without quoting it."""
        return {
            "crc": "its CRC-32 does not match; send it again",
            "no_crc": "it does not end with * and a CRC-32 of 8 hex digits",
            "not_ascii": "it is not ASCII; write other characters as \\u escapes",
            "too_long": "it is too long; shorten the request",
        }[self.reason]

    def __str__(self) -> str:
        return f"line {self.line} was ignored: {self.why}"


def encode(text: str) -> bytes:
    """Frame one line of ASCII text, as `to_json` of a message writes it.

    Raises ValueError if `text` contains a character that a frame can't carry.
    """
    if not text.isascii() or not text.isprintable():
        raise ValueError(f"not printable ASCII: {printable(text)}")
    body = text.encode("ascii")
    return body + b"*%08X\n" % zlib.crc32(body)


class FrameDecoder:
    """Bytes in as they arrive, frames out; holds at most `max_bytes` of an unfinished line."""

    def __init__(self, max_bytes: int, lenient: bool = False) -> None:
        self._max_bytes = max_bytes
        self._lenient = lenient
        self._line = bytearray()
        self._overflowed = False

    def feed(self, data: bytes) -> Iterator[str | Damaged]:
        """Yield the text of each frame that `data` completes, and a Damaged for each other line."""
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._extend(end)
            line, overflowed = bytes(self._line.rstrip(b"\r")), self._overflowed
            self._line.clear()
            self._overflowed = False
            if overflowed:
                yield Damaged("too_long", printable(line.decode("latin-1")))
            elif line:
                yield self._open(line)
        self._extend(rest)

    def _extend(self, piece: bytes) -> None:
        room = self._max_bytes - len(self._line)
        self._overflowed = self._overflowed or len(piece) > room
        self._line += piece[:room]

    def _open(self, line: bytes) -> str | Damaged:
        shown = printable(line.decode("latin-1"))
        body, check = line[:-_CHECK_BYTES], line[-_CHECK_BYTES:]
        if len(check) == _CHECK_BYTES and check[:1] == b"*" and _HEX.issuperset(check[1:]):
            if zlib.crc32(body) != int(check[1:], 16):
                return Damaged("crc", shown)
            return body.decode("ascii") if body.isascii() else Damaged("not_ascii", shown)
        if not self._lenient:
            return Damaged("no_crc", shown)
        try:
            return line.decode()
        except UnicodeDecodeError:
            return Damaged("not_ascii", shown)
