"""Ask an edge-daemon over a serial line, from CPython with pyserial or from MicroPython.

    stream = serial.Serial("/dev/serial0", 115200, timeout=0)           # CPython
    stream = machine.UART(1, 115200, rxbuf=1024, timeout=0)             # MicroPython
    client = EdgeClient(stream)
    client.reading("sensors/left/temperature", -14.5)                   # for the daemon's routes; no answer
    print(client.ask("Why does a freezer warm up at night?", max_tokens=60)["text"])

A frame is one line: a JSON object in ASCII, `*`, and the CRC-32 of the object as 8 hex digits. What noise
or a restart of the daemon swallows is sent again; the daemon recognises a repeated id and answers it once.
"""

import binascii
import json
import os
import time

TRIES = 5
FIRST_WAIT_MS = 400  # for an ack; doubled with each try up to LAST_WAIT_MS
LAST_WAIT_MS = 3200
REPEAT_MS = 100  # after a spoilt line
REMIND_MS = 10000  # an acknowledged request is repeated so often, in case its answer was lost
MAX_LINE_BYTES = 16384
HEAD_BYTES = 128  # of a longer line; they tell whose it is

if hasattr(time, "ticks_ms"):  # MicroPython: milliseconds that wrap around
    _now, _since, _pause = time.ticks_ms, time.ticks_diff, time.sleep_ms
else:

    def _now():
        return int(time.monotonic() * 1000)

    def _since(later, earlier):
        return later - earlier

    def _pause(milliseconds):
        time.sleep(milliseconds / 1000)


class EdgeError(Exception):
    """The daemon's refusal, or none at all; `code` is the contract's, e.g. bad_request, busy, unavailable."""

    def __init__(self, code, message):
        super().__init__(code + ": " + message)
        self.code = code


class EdgeClient:
    """One line to one daemon. `stream.read(n)` must return at once with what is there, b"" or None.

    `on_partial` is called with each piece of text while an answer is written.
    """

    def __init__(self, stream, on_partial=None):
        self._stream = stream
        self._on_partial = on_partial
        self._line = b""
        self._lines = []
        self._damaged = False
        # No id twice, even after a reset: the daemon would repeat the first answer. Nobody can guess an id.
        self._prefix = binascii.hexlify(os.urandom(8)).decode()
        self._count = 0

    def ask(self, prompt, timeout_s=120, **fields):
        """Return the final answer, a dictionary with `text` and so on; `fields` are the request's other ones.

        Raises EdgeError; its code is "expired" if no answer came within `timeout_s`.
        """
        self._count += 1
        name = self._prefix + "." + str(self._count)
        request = {"id": name, "prompt": prompt, "stream": self._on_partial is not None}
        request.update(fields)
        exchange = _Exchange(name, encode(request))
        start = _now()
        while _since(_now(), start) < timeout_s * 1000:
            if exchange.is_due():
                self._write(exchange.line)
            message = self._receive()
            if self._damaged:
                self._damaged = False
                exchange.repeat()
            if message is None:
                _pause(5)
            elif exchange.take(message) == "partial" and self._on_partial:
                self._on_partial(message["text"])
            elif exchange.final is not None:
                return exchange.final
        self._write(encode({"type": "cancel", "id": name}))
        raise EdgeError("expired", "no answer within " + str(timeout_s) + " s")

    def reading(self, topic, payload):
        """Send a reading, a number or an object, as a message on an MQTT topic would be."""
        self._write(encode({"type": "reading", "topic": topic, "payload": payload}))

    def _write(self, data):
        while data:
            written = self._stream.write(data)
            data = data[written or 0 :]

    def _receive(self):
        """Return the next message, or the head of one that is too long, or None; notes damaged lines."""
        if not self._lines:
            self._line += self._stream.read(256) or b""
            pieces = self._line.split(b"\n")
            self._line = pieces.pop()[: MAX_LINE_BYTES + 1]
            self._lines = [piece.strip() for piece in pieces]
        while self._lines:
            line = self._lines.pop(0)
            if len(line) > MAX_LINE_BYTES:
                return {"type": "head", "head": line[:HEAD_BYTES]}
            message = decode(line)
            if message is not None:
                return message
            self._damaged = self._damaged or line != b""
        return None


class _Exchange:
    """A request under way: when to send it (again), and what its answers mean."""

    def __init__(self, name, line):
        self.name = name
        self.line = line
        self.final = None
        self._tries = 0
        self._wait = 0
        self._sent = _now()
        self._acknowledged = False

    def is_due(self):
        """Whether to send the line now; counts the try. Raises EdgeError when there were enough."""
        if _since(_now(), self._sent) < self._wait:
            return False
        if self._acknowledged:
            self._wait = REMIND_MS
        elif self._tries == TRIES:
            raise EdgeError("unavailable", "nobody answers on the serial line")
        else:
            self._wait = min(FIRST_WAIT_MS << self._tries, LAST_WAIT_MS)
            self._tries += 1
        self._sent = _now()
        return True

    def repeat(self):
        """Send again soon: somebody is there, but a line was spoilt."""
        self._acknowledged, self._tries, self._wait = False, 0, min(self._wait, REPEAT_MS)

    def take(self, message):
        """Note what a message says; return its type if it is about this request."""
        kind = message.get("type")
        if kind == "nak" and not self._acknowledged:
            self.repeat()
        elif kind == "hello" and self._acknowledged:  # the daemon was restarted, or the cable came out
            self._acknowledged, self._tries, self._wait = False, 0, 0
        elif kind == "head" and b'"final"' in message["head"] and self.name.encode() in message["head"]:
            raise EdgeError("too_long", "the answer is too long for a line; ask for fewer tokens")
        elif message.get("id") == self.name or (kind == "error" and message.get("id") is None):
            if kind == "error":
                raise EdgeError(message["code"], message["message"])
            self._acknowledged, self._wait, self._tries = True, REMIND_MS, 0
            if kind == "final":
                self.final = message
            return kind
        return None


def encode(data):
    """Make a frame of a dictionary."""
    text = "".join([_escaped(ord(c)) for c in json.dumps(data)])
    body = text.encode()
    return body + b"*" + f"{binascii.crc32(body):08X}".encode() + b"\n"


def decode(line):
    """Read a frame without its newline; None if it is damaged."""
    body, check = line[:-9], line[-9:]
    try:
        if check[:1] != b"*" or int(check[1:], 16) != binascii.crc32(body):
            return None
        message = json.loads(body)
    except ValueError:
        return None
    if not isinstance(message, dict):
        return None
    return {key: _joined(value) if isinstance(value, str) else value for key, value in message.items()}


def _joined(text):
    """Make one character of each surrogate pair; MicroPython's json leaves the two apart."""
    out, high = "", 0
    for code in [ord(character) for character in text]:
        if 0xD800 <= code < 0xDC00:
            high = code
        elif high and 0xDC00 <= code < 0xE000:
            out += chr(0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00))
        else:
            out += chr(code)
    return out


def _escaped(code):
    """Write a character of JSON in ASCII; MicroPython's json leaves it as it is."""
    if 32 <= code < 127:
        return chr(code)
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
