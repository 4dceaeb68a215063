"""Grammar of tool calls: the declared parameters' schemas in Gemma 4's notation, as rules of Lark.

Supported are types, enum, const, anyOf, local references (including recursive ones), lengths and patterns of
strings, bounds of numbers and lengths of arrays. Members are sorted by key, as the model writes them, and an
object with listed properties holds no others. Any other keyword is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from llguidance import regex_to_lark

from edge.errors import RequestError
from edge.text.prompt import CALL, CALL_END
from edge.text.tokenizer import Tokenizer
from edge.text.tool_syntax import QUOTE, Control, Segment, by_key, value

# fmt: off
_ANNOTATIONS = frozenset((
    "title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions",
    "deprecated", "readOnly", "writeOnly", "nullable",
))
# fmt: on
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_TYPES: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern"),
    "number": _NUMBERS,
    "integer": _NUMBERS,
    "boolean": (),
    "null": (),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}


def quoted(text: str) -> str:
    """Write `text` as a string literal of Lark; its escapes are JSON's."""
    return json.dumps(text)


def number_bounds(schema: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """Return the keywords that `schema` lacks to keep its numbers within I-JSON (RFC 7493, 2.2).

    That is, between -(2**53 - 1) and 2**53 - 1, and with at most nine decimals unless they are `whole`. This
    rules out exponents, which can overflow, and endless digits, which a small model can get stuck in.
    """
    bounds: dict[str, Any] = {}
    if "minimum" not in schema and "exclusiveMinimum" not in schema:
        bounds["minimum"] = 1 - 2**53
    if "maximum" not in schema and "exclusiveMaximum" not in schema:
        bounds["maximum"] = 2**53 - 1
    if not whole and "multipleOf" not in schema:
        bounds["multipleOf"] = 1e-9
    return bounds


class ToolRules:
    """Writes one Lark rule per schema node of the declared tools."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules: list[str] = []
        self._references: dict[tuple[str, str], str] = {}
        self._root: Mapping[str, Any] = {}
        self._tool = ""

    def control(self, control: Control) -> str:
        """Write a control token in Lark: by its number."""
        return f"<[{self._tokenizer.control_id(control.piece)}]>"

    def calls(self, tools: tuple[Mapping[str, Any], ...]) -> list[str]:
        """Write the rules for `call`: any of `tools` with its arguments."""
        calls = []
        for index, tool in enumerate(tools):
            function = tool["function"]
            self._tool = f"tools[{index}].function.parameters"
            self._root = function.get("parameters") or {"properties": {}}
            self._root = {"type": "object", **self._root}
            if self._root["type"] != "object":
                self._refuse(self._tool, "the parameters must be an object")
            calls.append(f"{quoted('call:' + function['name'])} {self._schema(self._root, self._tool)}")
        call = f"call: {self.control(CALL)} ({' | '.join(calls)}) {self.control(CALL_END)}"
        return [call, *self._rules]

    def _literal(self, segments: list[Segment]) -> str:
        """Write texts and control tokens; adjacent texts become one literal, so they are tokenised as one."""
        parts: list[str] = []
        text = ""
        for segment in segments:
            if isinstance(segment, str):
                text += segment
            else:
                parts += [quoted(text), self.control(segment)] if text else [self.control(segment)]
                text = ""
        if text:
            parts.append(quoted(text))
        return " ".join(parts)

    def _rule(self, body: str, prefix: str = "v") -> str:
        name = f"{prefix}{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _refuse(self, path: str, what: str) -> NoReturn:
        raise RequestError("bad_request", f"{path}: {what} in a tool call; describe it differently")

    def _schema(self, schema: Any, path: str) -> str:
        """Write a rule for values of `schema`; returns its name."""
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            self._refuse(path, "a schema must be an object")
        if "$ref" in schema:
            return self._reference(schema["$ref"], path)
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            if not isinstance(values, list) or not values:
                self._refuse(path, "an enum needs values")
            return self._rule(" | ".join(self._literal(list(value(item))) for item in values))
        options = self._options(schema, path)
        if schema.get("nullable") is True:
            options.append('"null"')
        return self._rule(" | ".join(options))

    def _options(self, schema: Mapping[str, Any], path: str) -> list[str]:
        """Write the alternatives of a schema without $ref, const and enum."""
        if "anyOf" in schema:
            self._only(schema, ("anyOf",), path)
            choices = schema["anyOf"]
            if not isinstance(choices, list) or not choices:
                self._refuse(path, "an anyOf needs schemas")
            return [self._schema(item, f"{path}.anyOf[{i}]") for i, item in enumerate(choices)]
        self._only(schema, ("type", *(key for keys in _TYPES.values() for key in keys)), path)
        implied = [type_name for type_name, keys in _TYPES.items() if not set(keys).isdisjoint(schema)]
        types = schema.get("type", implied or list(_TYPES))
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, list) or not types or any(type_name not in _TYPES for type_name in types):
            self._refuse(path, f"type {types!r:.60} is not supported")
        if "number" in types and "integer" in types:
            types = [type_name for type_name in types if type_name != "integer"]
        self._only(schema, ("type", *(key for type_name in types for key in _TYPES[type_name])), path)
        return [getattr(self, f"_{type_name}")(schema, path) for type_name in types]

    def _only(self, schema: Mapping[str, Any], known: tuple[str, ...], path: str) -> None:
        for key in schema:
            if key not in known and key not in _ANNOTATIONS:
                self._refuse(path, f"the keyword {key!r:.60} is not supported")

    def _reference(self, pointer: Any, path: str) -> str:
        """Return the rule of a `#/...` pointer, which may be incomplete yet: schemas can be recursive."""
        key = (self._tool, str(pointer))
        if key not in self._references:
            target: Any = self._root
            for part in str(pointer).split("/")[1:]:
                name = part.replace("~1", "/").replace("~0", "~")
                target = target.get(name) if isinstance(target, Mapping) else None
            if not isinstance(target, Mapping) or not str(pointer).startswith("#"):
                self._refuse(path, f"the reference {pointer!r:.60} points to no schema")
            self._references[key] = name = self._rule("", "r")
            place = len(self._rules) - 1
            self._rules[place] = f"{name}: {self._schema(target, path)}"
        return self._references[key]

    def _string(self, schema: Mapping[str, Any], path: str) -> str:
        quote = self.control(QUOTE)
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        if "pattern" in schema:
            if least or most != "":
                self._refuse(path, "a pattern together with minLength or maxLength is not supported")
            pattern = str(schema["pattern"])
            head = "" if pattern.startswith("^") else "(?s:.*)"
            tail = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
            inner = regex_to_lark(pattern.removeprefix("^").removesuffix("" if tail else "$"), "dw")
            return f"{quote} {self._rule(f'/{head}({inner}){tail}/', 'S')} {quote}"
        if not least and most == "":
            return f"{quote} TEXT? {quote}"
        self._counts(path, least, most)
        return f"{quote} {self._rule(f'/(?s:.{{{least},{most}}})/', 'S')} {quote}"

    def _counts(self, path: str, least: Any, most: Any) -> None:
        if (
            type(least) is not int
            or type(most) not in (int, str)
            or least < 0
            or (most != "" and most < least)
        ):
            self._refuse(path, f"lengths from {least!r:.20} to {most!r:.20} are not supported")

    def _number(self, schema: Mapping[str, Any], _path: str, type_name: str = "number") -> str:
        bounds = {key: schema[key] for key in _NUMBERS if key in schema}
        bounds |= number_bounds(schema, whole=type_name == "integer")
        return f"%json {json.dumps({'type': type_name, **bounds})}"

    def _integer(self, schema: Mapping[str, Any], path: str) -> str:
        return self._number(schema, path, "integer")

    def _boolean(self, _schema: Mapping[str, Any], _path: str) -> str:
        return '"true" | "false"'

    def _null(self, _schema: Mapping[str, Any], _path: str) -> str:
        return '"null"'

    def _array(self, schema: Mapping[str, Any], path: str) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems", "")
        self._counts(path, least, most)
        item = self._any() if "items" not in schema else self._schema(schema["items"], f"{path}.items")
        if most == 0:
            return '"[]"'
        if most == 1:
            return f'"[" {item} "]"' if least else f'"[" {item}? "]"'
        more = f'{item} ("," {item}){{{max(least - 1, 0)},{most and most - 1}}}'
        return f'"[" {more} "]"' if least else f'"[" ({more})? "]"'

    def _object(self, schema: Mapping[str, Any], path: str) -> str:
        """Write listed members, sorted by key as the model writes them; others are not allowed."""
        required = schema.get("required", [])
        if "properties" not in schema and not required:
            return self._map(schema.get("additionalProperties", True), path)
        properties = schema.get("properties", {})
        if not isinstance(properties, Mapping):
            self._refuse(path, "properties must be an object")
        if not isinstance(required, list) or any(name not in properties for name in required):
            self._refuse(path, "required names must be in properties")
        first, more = '"}"', '"}"'
        for name, child in reversed(by_key(properties)):
            where = f"{path}.properties.{name}"
            if not name or set(name) & set('{}[],:<>" \n\t'):
                self._refuse(where, "a name can't have spaces or punctuation")
            member = f"{quoted(name + ':')} {self._schema(child, where)}"
            rest = self._rule(more, "m")
            optional = "" if name in required else " | "
            first, more = (
                f"{member} {rest}" + (optional and optional + first),
                f'"," {member} {rest}' + (optional and optional + rest),
            )
        return f'"{{" {self._rule(first, "m")}'

    def _map(self, values: Any, path: str) -> str:
        if values is False:
            return '"{}"'
        item = self._any() if values is True else self._schema(values, f"{path}.additionalProperties")
        key = "/[A-Za-z0-9_.-]{1,64}/"
        return f'"{{" ({key} ":" {item} ("," {key} ":" {item})*)? "}}"'

    def _any(self) -> str:
        """Return the rule for any value; it is recursive and shared."""
        key = ("", "any")
        if key not in self._references:
            self._references[key] = name = self._rule("", "r")
            place = len(self._rules) - 1
            options = [
                getattr(self, f"_{type_name}")({}, "") for type_name in _TYPES if type_name != "integer"
            ]
            self._rules[place] = f"{name}: {' | '.join(options)}"
        return self._references[key]
