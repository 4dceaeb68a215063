"""Fuzz targets: functions that take any bytes and fail if a reader of untrusted input breaks its promise.

Each checks everything that a reader promises: a value that can be written and read back, or one typed error
of one line. `run.py` runs them with libFuzzer's inputs, `tests/test_fuzz_targets.py` with their seeds and
with Hypothesis.
"""

from __future__ import annotations

import json
import re
import tempfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from edge.bundles.bundle import Manifest
from edge.config import load
from edge.errors import BundleError, ConfigError, RequestError, TransportError
from edge.protocol.framing import Damaged, FrameDecoder, encode
from edge.protocol.messages import parse_answer, parse_request, peek_request
from edge.protocol.strict_json import loads
from edge.routes.config import parse_routes
from edge.routes.router import Event, Ignored, Question, Router
from edge.transports.mqtt import codec

_SETTINGS_BYTES = 3  # in front of a stream of frames
_READING_GAP_S = 61.0  # between two readings, so that conditions and regular questions fire


def frames(data: bytes) -> None:
    """A stream, cut anywhere, gives the frames that a plain statement of the format gives, in bounded memory.

    The first three bytes choose the reader's settings and the cuts. A line that ends in `*!` gets the right
    CRC here, which a fuzzer would not find.
    """
    if len(data) < _SETTINGS_BYTES:
        return
    lenient, limit, step = bool(data[0] & 1), 1 + data[1], 1 + data[2]
    stream = re.sub(rb"([^\n]*)\*!(?=\n)", _with_crc, data[_SETTINGS_BYTES:])
    decoder = FrameDecoder(limit, lenient)
    found: list[str | Damaged] = []
    for at in range(0, len(stream), step):
        found += decoder.feed(stream[at : at + step])
    for item in found:
        assert isinstance(item, str) or str(item).isprintable(), item
    assert [None if isinstance(item, Damaged) else item for item in found] == _expected(
        stream, limit, lenient
    )
    *_, last = [*decoder.feed(b"\n" + encode("x"))]
    assert isinstance(last, Damaged) if limit < len("x*12345678") else last == "x", "out of step"


def _with_crc(line: re.Match[bytes]) -> bytes:
    return line[1] + b"*%08X" % zlib.crc32(line[1])


def _expected(stream: bytes, limit: int, lenient: bool) -> list[str | None]:
    """Give the text of each line of `stream`, None for one that is no frame."""
    texts: list[str | None] = []
    for whole in stream.split(b"\n")[:-1]:
        line = whole.rstrip(b"\r")
        framed = re.fullmatch(rb"(.*)\*([0-9A-Fa-f]{8})", line, re.DOTALL)
        if len(whole) > limit:
            texts.append(None)
        elif framed is not None:
            fits = zlib.crc32(framed[1]) == int(framed[2], 16) and framed[1].isascii()
            texts.append(framed[1].decode("ascii") if fits else None)
        elif line:
            texts.append(_utf8(line) if lenient else None)
    return texts


def _utf8(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def requests(data: bytes) -> None:
    """A request is refused, or it can be written, framed, read back, and answered by its id."""
    try:
        request = parse_request(data)
    except RequestError as error:
        _is_one_line(error)
        peek_request(data)
        return
    assert parse_request(request.to_json()) == request
    assert [*FrameDecoder(10**7).feed(encode(request.to_json()))] == [request.to_json()]
    peeked = peek_request(data)
    assert (peeked.id, peeked.reply_to) == (request.id, request.reply_to)


def packets(data: bytes) -> None:
    """MQTT packets, cut anywhere, are the same ones; each is read, or is malformed and named in one line."""
    whole, _ = _split(data, len(data) or 1)
    assert _split(data, 1 + len(data) // 3)[0] == whole
    for first, body in whole:
        for version in (codec.V5, codec.V311):
            readers: tuple[Callable[[], object], ...] = (
                partial(codec.read_publish, first, body, version, 1),
                partial(codec.read_suback, body, version),
                partial(codec.read_connack, body),
                partial(codec.read_puback, body),
                partial(codec.read_disconnect, body),
                partial(codec.publish_identifier, first, body),
            )
            for read in readers:
                try:
                    read()
                except codec.MalformedPacket as error:
                    _is_one_line(error)


def _split(data: bytes, step: int) -> tuple[list[tuple[int, bytes]], str]:
    """Give the packets of a stream that arrives in pieces of `step` bytes, and what ended it."""
    buffer, found = bytearray(), list[tuple[int, bytes]]()
    try:
        for at in range(0, len(data), step):
            buffer += data[at : at + step]
            for packet in codec.split(buffer, 10_000):
                found.append(packet)
    except codec.MalformedPacket as error:
        _is_one_line(error)
        return found, str(error)
    return found, ""


def answers(data: bytes) -> None:
    """An answer is refused, or it can be written and read back."""
    try:
        answer = parse_answer(data)
    except TransportError as error:
        _is_one_line(error)
        return
    written = parse_answer(answer.to_json())
    assert (written.id, type(written)) == (answer.id, type(answer))
    assert parse_answer(written.to_json()) == written  # timings are rounded once


def manifests(data: bytes) -> None:
    """A bundle's manifest is refused, or it can be written and read back."""
    try:
        manifest = Manifest.from_json(data.decode("latin-1"))
    except BundleError as error:
        _is_one_line(error)
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


def configs(data: bytes) -> None:
    """A configuration is read, or refused with the name of the wrong entry."""
    path = _directory() / "edge.toml"
    path.write_bytes(data)
    try:
        config = load(path)
    except ConfigError as error:
        _is_one_line(error)
        return
    json.dumps([route.ask.request for route in config.routes if route.ask is not None], allow_nan=False)


def readings(data: bytes) -> None:
    """Any payload on any topic gives events, questions and reasons to ignore it, all of which can be sent.

    The topic is the first line, the payloads are the lines after it.
    """
    topic, *payloads = data.split(b"\n")
    router = Router(parse_routes(_ROUTES))
    for at, payload in enumerate(payloads, 1):
        now = at * _READING_GAP_S
        for outcome in router.reading(topic.decode(errors="replace"), payload, now) + router.tick(now + 1):
            if isinstance(outcome, Ignored):
                assert outcome.why.isprintable(), outcome
            elif isinstance(outcome, Event):
                loads(outcome.payload, 10**6)
            else:
                assert isinstance(outcome, Question)
                assert parse_request(outcome.request.to_json()) == outcome.request


def _is_one_line(error: Exception) -> None:
    assert str(error).isprintable(), repr(str(error))
    assert str(error), type(error)


@cache
def _directory() -> Path:
    """A directory of this run."""
    return Path(tempfile.mkdtemp(prefix="edge-gemma-fuzz-"))


_ROUTES = [
    {
        "name": "numbers",
        "topics": ["sensors/+/pressure", "plain/#"],
        "event_topic": "alarms/{sensor}",
        "answer_topic": "explanations/{sensor}",
        "trigger": {"when": "last > `8` || trend > `100`", "clear": "last < `6`", "min_interval_s": 1},
        "ask": {"question": "{sensor} {topic} {reason}: {statistics} {readings} {payload} {trend} {age}"},
    },
    {
        "name": "objects",
        "topics": ["sensors/+/state", "$SYS/x"],
        "value": "max([level, levels[*].v | [0], to_number(text)])",
        "event_topic": "events/{sensor}",
        "answer_topic": "said/{sensor}",
        "trigger": {"every_s": 60, "when": "contains(payload.tags, 'hot') || payload.level > last"},
        "ask": {"instructions": "Look.", "question": "{payload}"},
    },
]

_REQUEST = b"""{"id":"7","messages":[{"role":"system","content":"s"},{"role":"user","content":"\\u00e9"},
{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f",
"arguments":"{\\"a\\":1}"}}]},{"role":"tool","tool_call_id":"c","content":"3"}],"max_tokens":9,"temperature":0.5,
"top_k":4,"top_p":0.9,"seed":1,"stop":["a","b"],"stream":false,"response_format":{"type":"json_schema",
"json_schema":{"name":"n","schema":{"type":"object"}}},"tools":[{"type":"function","function":{"name":"f",
"description":"d","parameters":{}}}],"reasoning":true,"deadline_ms":1000,"reply_to":"a/b"}"""

_FINAL = b"""{"type":"final","id":"7","text":"x","finish_reason":"stop","usage":{"prompt":1,"cached":0,
"forced":0,"generated":2},"timings":{"queue_ms":0.5,"prefill_ms":1.0,"decode_ms":2.0,"first_token_ms":1.5},
"reasoning":"r","tool_calls":[{"function":{"name":"f","arguments":{"a":1}}}]}"""

_TABLE = """{"file":"decoder.tflite","rows":8,"columns":4,"bits":8,"codes":0,"scales":32,"groups":1,
"scale_type":"float32"}"""

_MANIFEST = f"""{{"format":1,"architecture":{{"family":"gemma4","vocabulary":8,"hidden":4,"query_heads":1,
"kv_heads":1,"sliding_window":4,"rope_sliding":{{"base":1e4,"rotated_share":1.0}},"rope_full":{{"base":1e6}},
"attention_scale":0.5,"rms_epsilon":1e-6,"max_positions":64,"layers":[{{"attention":"sliding","head_dim":4,
"feed_forward":8,"kv_owner":0}},{{"attention":"full","head_dim":4,"feed_forward":8,"kv_owner":1}}],
"logit_softcap":30.0,"tied_head":false}},"context":64,"verify_width":4,"prefill_widths":[16],
"prompt_format":"gemma4","bos_id":2,"stop_ids":[1],"recipe":"int8","quantization":{{"bytes_per_token":100}},
"embedding":{_TABLE},"head":{_TABLE},"per_layer_embedding":null,
"files":{{"decoder.tflite":{{"size":64,"sha256":"00"}}}},"source":{{}},"licence":"x","made_by":"y"}}""".encode()

_CONFIG = b"""node = "pump"
bundle = "b"
threads = 4
queue = 8
drain_s = 1.5
[mqtt]
host = "h"
port = 1883
tls = true
ca_file = "/c"
username = "u"
reply_prefixes = ["a/"]
[[serial]]
port = "/dev/x"
baud = 9600
flow_control = "xonxoff"
[[route]]
name = "r"
topics = ["s/+/t", "x/#"]
value = "a.b[0] | max(@)"
window = { readings = 10, seconds = 60 }
event_topic = "e/{sensor}"
answer_topic = "a/{sensor}"
[route.trigger]
every_s = 60
when = "last > `1` && trend < `0`"
clear = "last < `1`"
silence_s = 9
min_interval_s = 0
[route.ask]
instructions = "i"
question = "{sensor} {reason} {{}} {statistics}"
max_tokens = 9
stop = ["x"]
[route.ask.schema]
type = "object"
"""


class Target(NamedTuple):
    """A function to fuzz, the inputs to start from, and words to build inputs of."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[str, ...] = ()


def _words(*texts: bytes) -> tuple[str, ...]:
    """Give the names that occur in the seeds."""
    return tuple(sorted({word for text in texts for word in re.findall(r"[A-Za-z_]{3,}", text.decode())}))


_JSON = ("true", "false", "null", "1e999", "\\ud800", "NaN", "-1", "{}", "[]")

TARGETS = {
    "frames": Target(
        frames,
        (
            b'\0\xff\x05{"id":"7"}*!\n\r\n{"a":1}*00000000\n{}\n',
            b'\1\x40\xff{"id":"\xc3\xa4"}\n{"b":2}*!\r\n' + b"x" * 80 + b"\n",
        ),
        ("*!\\x0a", "\\x0d\\x0a", "*00000000\\x0a"),
    ),
    "requests": Target(
        requests,
        (_REQUEST, b'{"id":"a","prompt":"x","response_format":{"type":"choice","choice":["a"]},"stop":"x"}'),
        (*_words(_REQUEST), *_JSON, "json_object", "regex", "choice"),
    ),
    "packets": Target(
        packets,
        (
            b"\x32\x17\0\x03a/b\0\x07\x0b\x08\0\x03c/d\x09\0\x02xy{}",
            b"\x20\x06\0\0\x03\x21\0\x14\x90\x04\0\x01\0\x01\x40\x02\0\x07\xe0\x02\x8d\0",
        ),
    ),
    "answers": Target(
        answers,
        (
            _FINAL,
            b'{"type":"partial","id":"7","seq":0,"text":"x","reasoning":"y"}',
            b'{"type":"error","id":null,"code":"busy","message":"m","retry_after_ms":5}',
        ),
        (*_words(_FINAL), *_JSON, "partial", "error", "retry_after_ms"),
    ),
    "manifests": Target(manifests, (_MANIFEST,), (*_words(_MANIFEST), *_JSON)),
    "configs": Target(configs, (_CONFIG,), (*_words(_CONFIG), "1979-05-27", "0x1f", "inf", "nan", "'''")),
    "readings": Target(
        readings,
        (
            b"sensors/a/pressure\n9.5\n-1e3\n nan\n1_0\n",
            b'sensors/a/b/state\n{"level":3,"levels":[{"v":1}],"text":"4","tags":["hot"]}\n{"level":"x"}\n',
            b"plain/\xff\n7\n",
        ),
        ("level", "levels", "tags", "text", "hot", "sensors/", "/pressure", "/state", *_JSON),
    ),
}
