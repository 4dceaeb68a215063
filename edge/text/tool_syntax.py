"""Gemma 4's notation for tools: writes declarations, calls and results, and reads calls.

A value is JSON with bare keys, and with the control token `<|"|>` on both sides of a string:
`call:get_weather{city:<|"|>Oslo<|"|>,days:3,tags:[]}`. Text between two of these tokens is literal, so no
string can break out. Follows the chat template published with Gemma 4 E2B and E4B; mappings are sorted by
key, ignoring case, as Jinja's `dictsort` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge.protocol.messages import ToolCall

MAX_DEPTH = 32
"""How deeply the arguments of a call may nest."""


@dataclass(frozen=True)
class Control:
    """A control token, by the spelling of its piece."""

    piece: str


Segment = str | Control
QUOTE = Control('<|"|>')

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NAMED = {"true": True, "false": False, "null": None, "None": None}
_STANDARD_KEYS = ("description", "type", "properties", "required", "nullable")


class ToolCallError(ValueError):
    """The model's output is not a call; the message says why."""


def call(tool_call: ToolCall) -> Iterator[Segment]:
    """Yield the segments of `call:name{...}`, without the tokens around it."""
    yield f"call:{tool_call.name}"
    yield from value(tool_call.arguments)


def response(name: str, content: str) -> Iterator[Segment]:
    """Yield the segments of `response:name{value:...}`, without the tokens around it."""
    yield f"response:{name}"
    yield from value({"value": content})


def declaration(tool: Mapping[str, Any]) -> Iterator[Segment]:
    """Yield the segments of `declaration:name{...}` for a tool, without the tokens around it.

    Parameters without a type are an object, as in JSON schema; the template would leave a brace open.
    """
    function = tool["function"]
    yield f"declaration:{function['name']}{{description:"
    yield from value(function.get("description", ""))
    parameters = function.get("parameters")
    if parameters:
        members: list[list[Segment]] = []
        if parameters.get("properties"):
            members.append(["properties:{", *_properties(parameters["properties"]), "}"])
        if parameters.get("required"):
            members.append(["required:", *value(parameters["required"])])
        members.append(["type:", *value(str(parameters.get("type", "object")).upper())])
        yield ",parameters:{"
        yield from _joined(members)
        yield "}"
    yield "}"


def value(item: Any, quoted_keys: bool = False) -> Iterator[Segment]:
    """Yield the segments of a JSON value. Only schemas below an array's `items` have quoted keys."""
    if isinstance(item, str):
        yield from (QUOTE, item, QUOTE)
    elif isinstance(item, Mapping):
        members = [
            [*(value(key) if quoted_keys else [key]), ":", *value(child, quoted_keys)]
            for key, child in by_key(item)
        ]
        yield from ("{", *_joined(members), "}")
    elif isinstance(item, Sequence):
        yield from ("[", *_joined([list(value(child, quoted_keys)) for child in item]), "]")
    elif isinstance(item, bool) or item is None:
        yield {True: "true", False: "false", None: "null"}[item]
    else:
        yield str(item)


def by_key(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the members sorted by key, ignoring case, as the templates do."""
    return sorted(mapping.items(), key=lambda member: member[0].lower())


def _joined(members: Iterable[Iterable[Segment]]) -> Iterator[Segment]:
    for index, member in enumerate(members):
        if index:
            yield ","
        yield from member


def _properties(properties: Mapping[str, Any]) -> Iterator[Segment]:
    yield from _joined(
        [f"{name}:{{", *_joined(_schema(schema)), "}"]
        for name, schema in by_key(properties)
        if isinstance(schema, Mapping)
    )


def _schema(schema: Mapping[str, Any]) -> list[list[Segment]]:
    """List the members of a property's schema in the template's order. `["string", "null"]` is nullable."""
    type_name, nullable = schema.get("type", ""), bool(schema.get("nullable"))
    if isinstance(type_name, Sequence) and not isinstance(type_name, str):
        nullable = nullable or "null" in type_name
        type_name = next((name for name in type_name if name != "null"), "null")
    type_name = str(type_name).upper()
    members: list[list[Segment]] = []
    if schema.get("description"):
        members.append(["description:", *value(schema["description"])])
    if type_name == "STRING" and schema.get("enum"):
        members.append(["enum:", *value(schema["enum"], True)])
    if type_name == "ARRAY" and schema.get("items") and isinstance(schema["items"], Mapping):
        members.append(["items:{", *_joined(_items(schema["items"])), "}"])
    if nullable:
        members.append(["nullable:true"])
    if type_name == "OBJECT":
        inner = schema.get("properties")
        if not isinstance(inner, Mapping):
            inner = {key: child for key, child in schema.items() if key not in _STANDARD_KEYS}
        members.append(["properties:{", *_properties(inner), "}"])
        if schema.get("required"):
            members.append(["required:", *value(schema["required"])])
    members.append(["type:", *value(type_name)])
    return members


def _items(schema: Mapping[str, Any]) -> Iterator[list[Segment]]:
    for key, child in by_key(schema):
        if child is None:
            continue
        if key == "properties":
            yield ["properties:{", *(_properties(child) if isinstance(child, Mapping) else ()), "}"]
        elif key == "type":
            type_name = child.upper() if isinstance(child, str) else [str(name).upper() for name in child]
            yield ["type:", *value(type_name)]
        else:
            yield [f"{key}:", *value(child, True)]


def parse_call(parts: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a call, given the texts before, between and after its `<|"|>` tokens.

    So `parts[1]`, `parts[3]`, ... are strings, and the others are notation. Keys may be quoted too, and there
    may be spaces between any two symbols. Raises ToolCallError.
    """
    if len(parts) % 2 == 0:
        raise ToolCallError("a string is incomplete")
    return _Reader(parts).call()


class _Reader:
    """Recursive descent over symbols: one of `{}[],:`, a bare word, or a string as a one-element tuple."""

    def __init__(self, parts: Sequence[str]) -> None:
        self._symbols: list[str | tuple[str]] = []
        for index, part in enumerate(parts):
            if index % 2:
                self._symbols.append((part,))
            else:
                words = re.findall(r"[{}\[\],:]|[^{}\[\],:]+", part)
                self._symbols += [stripped for word in words if (stripped := word.strip())]
        self._next = 0

    def call(self) -> tuple[str, dict[str, Any]]:
        self._expect("call")
        self._expect(":")
        name = self._take()
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ToolCallError("the tool's name is missing")
        self._expect("{")
        arguments = self._object(1)
        if self._next != len(self._symbols):
            raise ToolCallError("text follows the end of the call")
        return name, arguments

    def _take(self) -> str | tuple[str]:
        if self._next == len(self._symbols):
            raise ToolCallError("the call is incomplete")
        self._next += 1
        return self._symbols[self._next - 1]

    def _expect(self, symbol: str) -> None:
        taken = self._take()
        if taken != symbol:
            raise ToolCallError(f"expected {symbol!r}, not {taken!r}")

    def _ends(self, symbol: str) -> bool:
        """Take `symbol` if it is next."""
        ends = self._next < len(self._symbols) and self._symbols[self._next] == symbol
        self._next += ends
        return ends

    def _object(self, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not self._ends("}"):
            if result:
                self._expect(",")
            key = self._take()
            key = key if isinstance(key, str) else key[0]
            if key in result:
                raise ToolCallError(f"duplicate key {key!r}")
            self._expect(":")
            result[key] = self._value(depth)
        return result

    def _array(self, depth: int) -> list[Any]:
        result: list[Any] = []
        while not self._ends("]"):
            if result:
                self._expect(",")
            result.append(self._value(depth))
        return result

    def _value(self, depth: int) -> Any:
        symbol = self._take()
        if isinstance(symbol, tuple):
            return symbol[0]
        if symbol in "{[":
            if depth == MAX_DEPTH:
                raise ToolCallError(f"nested deeper than {MAX_DEPTH} levels")
            return self._object(depth + 1) if symbol == "{" else self._array(depth + 1)
        if symbol in _NAMED:
            return _NAMED[symbol]
        return _number(symbol)


def _number(word: str) -> int | float:
    matched = _NUMBER.fullmatch(word)
    if not matched:
        raise ToolCallError(f"{word!r} is not a value")
    if not matched[2] and not matched[3] and len(word) <= 20:
        return int(word)
    if not math.isfinite(float(word)):
        raise ToolCallError(f"number {word} is too large")
    return float(word)
