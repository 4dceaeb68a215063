"""What LiteRT and TFLite write to C's `stderr`, and nothing that the rest of the process writes there.

TFLite logs whatever LiteRT's own log level is, with no option or callback to change that. While a model is
compiled, C's variable `stderr` names a stream of this module. Python's threads write to the file descriptor,
which stays as it is, so their log lines are neither held back nor lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)

_LINE_BUFFERED = 1  # _IOLBF in glibc's stdio.h: each line comes in one piece
_MOST_ERRORS = 20

_Write = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char), ctypes.c_size_t)


class _CookieFunctions(ctypes.Structure):
    """`cookie_io_functions_t` of fopencookie(3)."""

    _fields_ = (
        ("read", ctypes.c_void_p),
        ("write", _Write),
        ("seek", ctypes.c_void_p),
        ("close", ctypes.c_void_p),
    )


class _Stream:
    """A C stream whose lines come here. It lives as long as the process: others may hold its address."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._functions = _CookieFunctions(write=_Write(self._write))
        libc = ctypes.CDLL(None)
        libc.fopencookie.restype = ctypes.c_void_p
        libc.fopencookie.argtypes = (ctypes.c_void_p, ctypes.c_char_p, _CookieFunctions)
        libc.setvbuf.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        self._address: int | None = libc.fopencookie(None, b"w", self._functions)
        if self._address is None:
            raise OSError("fopencookie failed")
        libc.setvbuf(self._address, None, _LINE_BUFFERED, 0)
        self._stderr = ctypes.c_void_p.in_dll(libc, "stderr")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let `stderr` name this stream."""
        self.errors.clear()
        before, self._stderr.value = self._stderr.value, self._address
        try:
            yield
        finally:
            self._stderr.value = before

    def _write(self, _cookie: int | None, text: Any, size: int) -> int:
        for line in ctypes.string_at(text, size).decode(errors="replace").splitlines():
            if line.startswith("ERROR: "):
                self.errors[_MOST_ERRORS - 1 :] = [line.removeprefix("ERROR: ")]
            elif not line.startswith("INFO: "):
                log.warning("LiteRT: %s", line)
        return size


_lock = threading.Lock()
_streams: list[_Stream] = []


@contextlib.contextmanager
def native_messages() -> Iterator[list[str]]:
    """Yield the list that error lines go to; INFO lines are dropped, all others logged at once.

    Where C's `stderr` can't be replaced (no glibc), the list stays empty and the lines go where they went.
    """
    with _lock:
        if not _streams and sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError, ValueError):
                _streams.append(_Stream())
        if not _streams:
            yield []
            return
        with _streams[0].installed():
            yield _streams[0].errors
