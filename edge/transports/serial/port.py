"""One serial port with its thread: writes and reads frames, and reopens the port after it was unplugged.

Senders never wait for the port. Frames are queued, and when the queue is full droppable ones (partials,
`ack`, `nak`) are dropped first. A frame that was cut off when the port went away is written again in full. A
port that flow control holds is still read. The port is opened exclusively, by an advisory lock.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import serial

from edge.endpoints import SerialConfig
from edge.logs import RepeatedLog
from edge.protocol.framing import Damaged, FrameDecoder, encode
from edge.protocol.strict_json import printable

log = logging.getLogger(__name__)

TICK_S = 1.0  # at most between two signs of life of the thread
REOPEN_S = 0.5  # between two attempts to open the port
CHUNK_BYTES = 256  # written between two reads
HELD_S = 5.0  # a port that accepts no bytes for this long is reopened
XOFF_S = 30.0  # without XON; noise may have destroyed it, or have looked like XOFF
MAX_WAITING_BYTES = 1024 * 1024  # of queued frames
MAX_DROPPABLE_BYTES = MAX_WAITING_BYTES // 4  # beyond this the queue takes answers only


class _Frame(NamedTuple):
    """A queued frame; `written` is called when it has been written."""

    data: bytes
    droppable: bool
    written: Callable[[], None]


_END_OF_LINE = _Frame(b"\n", True, lambda: None)
"""Ends an incomplete line that the other side may have received."""


class SerialPort:
    """A port and its thread. `progress` grows while that lives; `problem` says why the port is not open.

    `opened` is called in the thread after each opening, `received` with each frame or damaged line.
    """

    def __init__(
        self,
        config: SerialConfig,
        max_line_bytes: int,
        opened: Callable[[], None],
        received: Callable[[str | Damaged], None],
    ) -> None:
        self.name = config.port
        self.progress = 0
        self.problem: str | None = None
        self._config = config
        self._max_line_bytes = max_line_bytes
        self._opened = opened
        self._received = received
        self._stopping = False
        self._dropped, self._no_xon = RepeatedLog(log), RepeatedLog(log)
        self._lock = threading.Lock()
        self._port: Any = None
        self._waiting: deque[_Frame] = deque()
        self._waiting_bytes = 0
        self._rest = b""  # of the frame at the head of the queue
        self._held_since: float | None = None  # when the port began to take nothing
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name=f"serial {config.port}", daemon=True)

    def start(self) -> None:
        """Start the thread; it opens the port as soon as that exists."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Write the queued frames, if the port accepts them in time, then close it and end the thread."""
        if self.is_open:
            self._idle.wait(timeout_s)
        self._stopping = True
        self._wake()
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_open(self) -> bool:
        """Whether the port is open."""
        return self._port is not None

    def send(self, text: str, droppable: bool = False, written: Callable[[], None] = lambda: None) -> None:
        """Queue a frame, from any thread; `written` is called in the port's thread after it was written.

        Raises ValueError if `text` is not printable ASCII.
        """
        frame = _Frame(encode(text), droppable, written)
        with self._lock:
            room = MAX_DROPPABLE_BYTES if droppable else MAX_WAITING_BYTES
            full = self._waiting_bytes + len(frame.data) > room
            if full or (droppable and self._port is None):
                if not droppable:
                    self._dropped.warning("port %s: the queue is full; an answer is dropped", self.name)
                return
            self._waiting.append(frame)
            self._waiting_bytes += len(frame.data)
            self._idle.clear()
            if len(self._waiting) > 1:
                return
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._port is not None:
                self._port.cancel_read()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._serve()
            except (OSError, serial.SerialException) as error:
                self._trouble(error)
            except Exception:
                log.exception("port %s: its thread failed", self.name)
            self._close()
            self.progress += 1
            if not self._stopping:
                time.sleep(REOPEN_S)

    def _serve(self) -> None:
        """Open the port and exchange frames until it goes away."""
        config = self._config
        port = serial.Serial(
            config.port,
            config.baud,
            timeout=TICK_S,
            xonxoff=config.flow_control == "xonxoff",
            rtscts=config.flow_control == "rtscts",
            exclusive=True,
        )
        with self._lock:
            self._port = port
            self._waiting.appendleft(_END_OF_LINE)
            self._waiting_bytes += len(_END_OF_LINE.data)
        self.problem, self._held_since = None, None
        log.info("port %s: open at %d baud", config.port, config.baud)
        decoder = FrameDecoder(self._max_line_bytes, config.lenient)
        self._opened()
        while not self._stopping:
            self.progress += 1
            writing = self._write_some(port)
            if self._held_since is not None:
                self._wait_held(port, self._held_since)
            count = port.in_waiting
            data = port.read(count if writing or count else 1)
            for item in decoder.feed(data):
                self._received(item)

    def _write_some(self, port: Any) -> bool:
        """Write as much of the first queued frame as the port accepts; False if none is queued."""
        if not self._rest:
            with self._lock:
                if not self._waiting:
                    self._idle.set()
                    return False
                self._rest = self._waiting[0].data
        taken = _written_at_once(port, self._rest[:CHUNK_BYTES])
        if not taken:
            self._held_since = self._held_since or time.monotonic()
            return True
        self._held_since = None
        self._rest = self._rest[taken:]
        if not self._rest:
            with self._lock:
                frame = self._waiting.popleft()
                self._waiting_bytes -= len(frame.data)
            frame.written()
        return True

    def _wait_held(self, port: Any, since: float) -> None:
        """Wait until the port accepts or has bytes; end a wait that lasts too long."""
        held_s = time.monotonic() - since
        if self._config.flow_control != "xonxoff" and held_s > HELD_S:
            raise serial.SerialTimeoutException(f"it accepted no bytes for {HELD_S:.0f} s")
        if held_s > XOFF_S:
            self._no_xon.warning("port %s: no XON for %.0f s; writing on without it", self.name, XOFF_S)
            port.set_output_flow_control(False)
            port.set_output_flow_control(True)
            self._held_since = None
        select.select([port], [port], [], TICK_S)

    def _close(self) -> None:
        held = self._held_since is not None
        with self._lock:
            port, self._port, self._rest = self._port, None, b""
            self._waiting = deque(frame for frame in self._waiting if not frame.droppable)
            self._waiting_bytes = sum(len(frame.data) for frame in self._waiting)
        if port is not None:
            if held:  # closing a UART would wait up to 30 s for these bytes to be sent
                with contextlib.suppress(OSError, termios.error):
                    port.reset_output_buffer()
            port.close()

    def _trouble(self, error: Exception) -> None:
        """Log what is wrong with the port, once until that changes."""
        said = f"port {self.name}: {_reason(error)}"
        if said != self.problem:
            log.warning("%s Trying again.", said)
        self.problem = said


def _written_at_once(port: Any, data: bytes) -> int:
    """Write as much as a port accepts without waiting; returns the number of bytes.

    pyserial's `write` would wait for room, and nothing would be read meanwhile.
    """
    if not select.select([], [port], [], 0)[1]:
        return 0
    try:
        return os.write(port.fileno(), data)
    except BlockingIOError:
        return 0


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number == errno.ENOENT:
        return "it does not exist; plug it in, or check its name with `ls /dev/serial/by-id`."
    if number in (errno.EACCES, errno.EPERM):
        return "permission denied; add the user to the group dialout."
    if number in (errno.EAGAIN, errno.EBUSY) or "exclusively lock" in str(error):
        return "another program has it open; stop that first."
    return f"it failed: {printable(str(error), 200)}."
