"""Requests and answers, and both as JSON (docs/protocol.md).

The answer to a request is any number of Partials, then exactly one Final or one Failure. Field names are
those of OpenAI's chat API where it has one. Parsing is strict: an unknown or invalid field is refused by
name, with what is allowed. Nothing is guessed, so a misspelt `max_token` can't silently mean the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from edge.errors import RequestError, TransportError
from edge.protocol import strict_json, typed_json
from edge.protocol.checks import FieldError, one_of
from edge.protocol.request_fields import (
    CHECKS,
    MAX_REQUEST_BYTES,
    Message,
    ToolCall,
    message_to_dict,
    read_tool_calls,
    tool_call_to_dict,
)
from edge.protocol.strict_json import StrictJsonError, dumps, printable

__all__ = [
    "MAX_REQUEST_BYTES",
    "Answer",
    "Failure",
    "Final",
    "Message",
    "Partial",
    "PeekedRequest",
    "Request",
    "Timings",
    "ToolCall",
    "Usage",
    "parse_answer",
    "parse_request",
    "peek_request",
]

MAX_ANSWER_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """One question. Exactly one of `prompt` and `messages` is given (`messages` is empty otherwise).

    `deadline_ms` counts from arrival. `reply_to` is a response topic, for clients of MQTT 3.1.1.
    """

    id: str
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 64
    top_p: float = 0.95
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = True
    response_format: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    reasoning: bool = False
    deadline_ms: int | None = None
    reply_to: str | None = None

    def to_json(self) -> str:
        """Write compact ASCII JSON, without fields at their default; `parse_request` reads it."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if "messages" in given:
            given["messages"] = [message_to_dict(message) for message in self.messages]
        return dumps(given)


@dataclass(frozen=True)
class Partial:
    """The next piece of an answer. `seq` counts from 0 for each request."""

    id: str
    seq: int
    text: str
    reasoning: str | None = None

    def to_json(self) -> str:
        """Write compact ASCII JSON with `"type": "partial"`."""
        return dumps(_without_none({"type": "partial", **asdict(self)}))


@dataclass(frozen=True)
class Usage:
    """Token counts. `cached` prompt tokens were not computed again; `forced` ones follow from the grammar.

    A client of the daemon is told of cached tokens only if it sent or received them itself.
    """

    prompt: int
    cached: int
    forced: int
    generated: int


@dataclass(frozen=True)
class Timings:
    """Milliseconds in the queue, in prefill and in decode, and from arrival to the first token."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    first_token_ms: float


@dataclass(frozen=True)
class Final:
    """The complete answer, which needs no Partial.

    `finish_reason`: stop, length, deadline, cancelled or tool_calls.
    """

    id: str
    text: str
    finish_reason: str
    usage: Usage
    timings: Timings
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed; None without a decode step."""
        ms = self.timings.decode_ms
        return round(self.usage.generated / ms * 1000, 1) if ms else None

    def to_json(self) -> str:
        """Write compact ASCII JSON with `"type": "final"`; tool calls as OpenAI writes them."""
        timings = {name: round(value, 1) for name, value in asdict(self.timings).items()}
        answer: dict[str, Any] = {"type": "final", **asdict(self), "timings": timings}
        answer["tool_calls"] = [tool_call_to_dict(call) for call in self.tool_calls] or None
        return dumps(_without_none(answer))


@dataclass(frozen=True)
class Failure:
    """Why a request has no Final. `id` is None where the request's own could not be read.

    `code`: bad_request, too_long, busy, expired, unavailable or internal.
    """

    id: str | None
    code: str
    message: str
    retry_after_ms: int | None = None

    def to_json(self) -> str:
        """Write compact ASCII JSON with `"type": "error"`."""
        data: dict[str, Any] = {"type": "error", "id": self.id, "code": self.code, "message": self.message}
        if self.retry_after_ms is not None:
            data["retry_after_ms"] = self.retry_after_ms
        return dumps(data)


Answer = Partial | Final | Failure
_KINDS: dict[str, type[Answer]] = {"partial": Partial, "final": Final, "error": Failure}


class PeekedRequest:
    """A request whose JSON has been read once; only `id` and `reply_to` have been checked so far.

    Each of these two is None where it is missing or not valid.
    """

    def __init__(self, content: Mapping[str, Any] | StrictJsonError) -> None:
        self._content = content
        self.id: str | None = self._field("id")
        self.reply_to: str | None = self._field("reply_to")

    @property
    def content(self) -> Mapping[str, Any]:
        """The JSON object; empty if there is none."""
        return {} if isinstance(self._content, StrictJsonError) else self._content

    def parse(self) -> Request:
        """Check all fields. Raises RequestError("bad_request"), as `parse_request` does."""
        try:
            if isinstance(self._content, StrictJsonError):
                raise self._content
            return _read_request(self._content)
        except (StrictJsonError, FieldError) as error:
            raise RequestError("bad_request", f"request: {error}") from None

    def _field(self, key: str) -> Any:
        try:
            return CHECKS[key](key, self.content.get(key))
        except FieldError:
            return None


def peek_request(raw: bytes | str) -> PeekedRequest:
    """Read the JSON in `raw`, at most MAX_REQUEST_BYTES, but check no more than its id and `reply_to`.

    Raises nothing: what is wrong with the JSON is reported by `PeekedRequest.parse`.
    """
    try:
        return PeekedRequest(strict_json.loads(raw, MAX_REQUEST_BYTES))
    except StrictJsonError as error:
        return PeekedRequest(error)


def parse_request(raw: bytes | str) -> Request:
    """Read the request in `raw`, at most MAX_REQUEST_BYTES of JSON.

    Raises RequestError("bad_request"), naming the key, what is wrong with it and what is allowed.
    """
    return peek_request(raw).parse()


def _read_request(data: Mapping[str, Any]) -> Request:
    for key in data:
        if key not in CHECKS:
            raise FieldError(f"unknown key {printable(key)}; allowed: {', '.join(CHECKS)}")
    given = {key: CHECKS[key](key, value) for key, value in data.items()}
    if "id" not in given:
        raise FieldError("id is missing; allowed: 1 to 64 printable ASCII characters without spaces")
    if ("prompt" in given) == ("messages" in given):
        raise FieldError("exactly one of prompt and messages is needed")
    return Request(**given)


def parse_answer(raw: bytes | str) -> Answer:
    """Read an answer that `to_json` wrote; keys of later versions are ignored.

    Raises TransportError if it can't be read.
    """
    try:
        data = strict_json.loads(raw, MAX_ANSWER_BYTES)
        kind = _KINDS[one_of(*_KINDS)("type", data.get("type"))]
        calls = read_tool_calls("tool_calls", data.pop("tool_calls", []))
        answer: Answer = typed_json.read(kind, data, later_keys=True)
        return replace(answer, tool_calls=calls) if isinstance(answer, Final) else answer
    except (StrictJsonError, FieldError) as error:
        raise TransportError(
            f"an answer can't be read: {error}; check that client and daemon have the same version"
        ) from None


def _without_none(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}
