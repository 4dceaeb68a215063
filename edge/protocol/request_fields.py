"""The fields of a request. Each has a check from a JSON value to the runtime's value, or FieldError.

`messages`, `tools` and `response_format` have the structure of OpenAI's chat API; the formats `regex` and
`choice` have vLLM's names. Only structure is checked here; a schema is compiled later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge.protocol import strict_json
from edge.protocol.checks import FieldError, array, flag, integer, mapping, number, text
from edge.protocol.strict_json import StrictJsonError

MAX_REQUEST_BYTES = 256 * 1024
MAX_MESSAGES = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOOLS = 64
MAX_CHOICES = 1024
MAX_TOPIC_BYTES, MAX_TOPIC_LEVELS = 512, 100  # mosquitto knows 200 levels, EMQX 128

_ID = re.compile(r"[!-~]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_CHARACTERS = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
_NOT_IN_TOPICS = re.compile(f"[+#\0-\x1f\x7f-\x9f\ufdd0-\ufdef{_NO_CHARACTERS}]")


@dataclass(frozen=True)
class ToolCall:
    """A tool call of the model. `arguments` is a JSON object; a tool message refers to the call by `id`."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `tool_name` is the tool of a tool message."""

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str | None = None


def request_id(path: str, value: Any) -> str:
    """Accept a name that is safe in a log line and a topic."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise FieldError(f"{path} is not valid; allowed: 1 to 64 printable ASCII characters without spaces")
    return value


def response_topic(path: str, value: Any) -> str:
    """Accept an MQTT topic name (MQTT 5, 4.7) that no broker ends the connection for.

    Some brokers do so for control characters, for Unicode non-characters (1.5.4) or for many levels; the
    answer would then be sent again over each new connection.
    """
    topic = text(path, value)
    if not 1 <= len(topic.encode()) <= MAX_TOPIC_BYTES or _NOT_IN_TOPICS.search(topic):
        raise FieldError(
            f"{path} is not a topic; allowed: 1 to {MAX_TOPIC_BYTES} bytes without +, # and control codes"
        )
    if topic.count("/") >= MAX_TOPIC_LEVELS:
        raise FieldError(f"{path} has {topic.count('/') + 1} levels; allowed: at most {MAX_TOPIC_LEVELS}")
    return topic


def stops(path: str, value: Any) -> tuple[str, ...]:
    """Accept one stop string or several."""
    values = [value] if isinstance(value, str) else array(path, value, MAX_STOPS)
    for index, item in enumerate(values):
        if not 1 <= len(text(f"{path}[{index}]", item)) <= MAX_STOP_CHARACTERS:
            raise FieldError(
                f"{path}[{index}] has {len(item)} characters; allowed: 1 to {MAX_STOP_CHARACTERS}"
            )
    return tuple(values)


def messages(path: str, value: Any) -> tuple[Message, ...]:
    """Read the turns of a conversation, at least one; a tool message gets the name of its call."""
    names: dict[str, str] = {}
    result = []
    for index, item in enumerate(array(path, value, MAX_MESSAGES, least=1)):
        message = _message(f"{path}[{index}]", item, names)
        names |= {call.id: call.name for call in message.tool_calls if call.id}
        result.append(message)
    return tuple(result)


_MESSAGE_KEYS = {
    "system": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "reasoning", "tool_calls"),
    "tool": ("role", "content", "name", "tool_call_id"),
}


def _message(path: str, value: Any, names: Mapping[str, str]) -> Message:
    data = mapping(path, value, None, ("role",))
    role = data["role"]
    if not isinstance(role, str) or role not in _MESSAGE_KEYS:
        raise FieldError(f"{path}.role is not valid; allowed: {', '.join(_MESSAGE_KEYS)}")
    mapping(path, data, _MESSAGE_KEYS[role])
    calls = read_tool_calls(f"{path}.tool_calls", data.get("tool_calls") or [])
    content = data.get("content")
    if content is None and calls:
        content = ""
    reasoning = data.get("reasoning")
    return Message(
        role,
        text(f"{path}.content", content),
        None if reasoning is None else text(f"{path}.reasoning", reasoning),
        calls,
        _tool_name(path, data, names) if role == "tool" else None,
    )


def _tool_name(path: str, data: Mapping[str, Any], names: Mapping[str, str]) -> str:
    if "name" in data:
        return _name(f"{path}.name", data["name"])
    call = data.get("tool_call_id")
    if not isinstance(call, str) or call not in names:
        raise FieldError(
            f"{path} answers no tool call; allowed: a tool_call_id of an earlier message, or a name"
        )
    return names[call]


def read_tool_calls(path: str, value: Any) -> tuple[ToolCall, ...]:
    """Read OpenAI's `tool_calls`; `arguments` is a string of JSON, or a JSON object."""
    return tuple(_tool_call(f"{path}[{i}]", item) for i, item in enumerate(array(path, value, MAX_TOOLS)))


def _tool_call(path: str, value: Any) -> ToolCall:
    data = mapping(path, value, ("id", "type", "function"), ("function",))
    _only_function(path, data)
    function = mapping(f"{path}.function", data["function"], ("name", "arguments"), ("name",))
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = strict_json.loads(arguments, MAX_REQUEST_BYTES)
        except StrictJsonError as error:
            raise FieldError(f"{path}.function.arguments: {error}") from None
    arguments = mapping(f"{path}.function.arguments", arguments)
    return ToolCall(
        _name(f"{path}.function.name", function["name"]), arguments, text(f"{path}.id", data.get("id", ""))
    )


def tool_call_to_dict(call: ToolCall) -> dict[str, Any]:
    """Write a tool call as OpenAI's API does, with `arguments` as a string of JSON."""
    function = {"name": call.name, "arguments": strict_json.dumps(call.arguments)}
    return ({"id": call.id} if call.id else {}) | {"type": "function", "function": function}


def message_to_dict(message: Message) -> dict[str, Any]:
    """Write a turn; `messages` reads it back."""
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        data["reasoning"] = message.reasoning
    if message.tool_calls:
        data["tool_calls"] = [tool_call_to_dict(call) for call in message.tool_calls]
    if message.tool_name is not None:
        data["name"] = message.tool_name
    return data


def tools(path: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Accept OpenAI's `tools`: functions with a name and optional description and parameters."""
    return tuple(_tool(f"{path}[{i}]", item) for i, item in enumerate(array(path, value, MAX_TOOLS)))


def _tool(path: str, value: Any) -> Mapping[str, Any]:
    data = mapping(path, value, ("type", "function"), ("function",))
    _only_function(path, data)
    where = f"{path}.function"
    function = mapping(where, data["function"], ("name", "description", "parameters", "strict"), ("name",))
    _name(f"{where}.name", function["name"])
    text(f"{where}.description", function.get("description", ""))
    mapping(f"{where}.parameters", function.get("parameters", {}))
    return data


def _only_function(path: str, data: Mapping[str, Any]) -> None:
    if data.get("type", "function") != "function":
        raise FieldError(f'{path}.type is not valid; allowed: "function"')


def response_format(path: str, value: Any) -> Mapping[str, Any] | None:
    """Accept `{"type": "json_schema", "json_schema": {"schema": ...}}` or another type of `_FORMATS`."""
    data = mapping(path, value, None, ("type",))
    kind = data["type"]
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise FieldError(f"{path}.type is not valid; allowed: {', '.join(_FORMATS)}")
    if kind in ("text", "json_object"):
        mapping(path, data, ("type",))
        return None if kind == "text" else data
    mapping(path, data, ("type", kind), (kind,))
    _FORMATS[kind](f"{path}.{kind}", data[kind])
    return data


def _json_schema(path: str, value: Any) -> None:
    data = mapping(path, value, ("name", "description", "schema", "strict"), ("schema",))
    mapping(f"{path}.schema", data["schema"])


def _regex(path: str, value: Any) -> None:
    if not text(path, value):
        raise FieldError(f"{path} is empty; allowed: a regular expression")


def _choice(path: str, value: Any) -> None:
    for index, item in enumerate(array(path, value, MAX_CHOICES, least=1)):
        if not text(f"{path}[{index}]", item):
            raise FieldError(f"{path}[{index}] is empty; allowed: a string of at least 1 character")


def _nothing(_path: str, _value: Any) -> None:
    return None


_FORMATS: dict[str, Callable[[str, Any], None]] = {
    "json_schema": _json_schema,
    "json_object": _nothing,
    "regex": _regex,
    "choice": _choice,
    "text": _nothing,
}


def _name(path: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise FieldError(f"{path} is not valid; allowed: 1 to 64 of A-Z a-z 0-9 _ . -")
    return value


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "id": request_id,
    "prompt": text,
    "messages": messages,
    "max_tokens": integer(1, 131_072),
    "temperature": number(0, 2),
    "top_k": integer(1, 262_144),
    "top_p": number(1e-6, 1),
    "seed": integer(0, 2**63 - 1),
    "stop": stops,
    "stream": flag,
    "response_format": response_format,
    "tools": tools,
    "reasoning": flag,
    "deadline_ms": integer(1, 86_400_000),
    "reply_to": response_topic,
}
