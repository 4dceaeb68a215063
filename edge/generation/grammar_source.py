"""Writes an answer format as a grammar for llguidance.

JSON answers are compact (no spaces between tokens), members in the schema's order. A schema is narrowed where
it allows harmful answers: an object that lists its properties holds nothing else, and numbers are such that
every JSON reader can hold them. Tool calls follow the declared parameters in Gemma 4's notation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher, regex_to_lark

from edge.errors import RequestError
from edge.generation.answer_format import AnswerFormat
from edge.generation.tool_grammar import ToolRules, number_bounds, quoted
from edge.text.prompt import CHANNEL, CHANNEL_END
from edge.text.tokenizer import Tokenizer

_TEXT = "TEXT: /(?s:.+)/"

# llguidance takes 8 KB of the stack for each schema below another, also by reference, and gigabytes for a
# multiple of millions. Common schemas stay far below both limits.
MAX_OBJECTS = 1024
MAX_MULTIPLE = 100_000


def grammar_source(answer_format: AnswerFormat, tokenizer: Tokenizer) -> str:
    """Write the grammar of all answers in a format, as llguidance's JSON.

    Raises RequestError("bad_request"), naming the keyword, if a tool's schema can't be followed, or if a
    schema is too large to compile.
    """
    _check_size("response_format", answer_format.response_format)
    _check_size("tools", answer_format.tools)
    try:
        return _source(answer_format, tokenizer)
    except RecursionError:
        raise RequestError(
            "bad_request", "tools: references are chained too deep; use fewer references"
        ) from None


def _source(answer_format: AnswerFormat, tokenizer: Tokenizer) -> str:
    answer, tools = _answer(answer_format.response_format), answer_format.tools
    if answer is not None and not tools and not answer_format.reasoning:
        return json.dumps({"grammars": [answer]})
    rules = ToolRules(tokenizer)
    body = "TEXT? calls?" if answer is None else "@answer | calls" if tools else "@answer"
    lark = [f"start: {_thoughts(answer_format, rules)} body", f"body: {body}", _TEXT]
    if tools:
        lark += ["calls: call+", *rules.calls(tools)]
    grammars = [{"name": "start", "lark_grammar": "\n".join(lark)}]
    if answer is not None:
        grammars.append({**answer, "name": "answer"})
    return json.dumps({"grammars": grammars})


def _check_size(where: str, value: Any) -> None:
    """Refuse too many objects (schemas and all they contain), and too large a multiple of all numbers."""
    pending, objects, multiple = [value], 0, 1
    while pending:
        item = pending.pop()
        if isinstance(item, Mapping):
            objects += 1
            multiple = math.lcm(multiple, _digits(item.get("multipleOf")))
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        if objects > MAX_OBJECTS:
            raise RequestError(
                "bad_request", f"{where}: more than {MAX_OBJECTS} objects; describe less at once"
            )
        if multiple > MAX_MULTIPLE:
            reason = (
                f"the multipleOf values have no common multiple up to {MAX_MULTIPLE}; use rounder numbers"
            )
            raise RequestError("bad_request", f"{where}: {reason}")


def _digits(multiple: Any) -> int:
    """Return the digits of a multipleOf without the zeros at its ends: 25 for 0.25 and for 2500."""
    if isinstance(multiple, bool) or not isinstance(multiple, (int, float)) or multiple <= 0:
        return 1
    return int("".join(map(str, Decimal(str(multiple)).normalize().as_tuple().digits)))


def _thoughts(answer_format: AnswerFormat, rules: ToolRules) -> str:
    """Let a thinking model think first, in a channel that the prompt may have opened already."""
    if not answer_format.reasoning:
        return ""
    end = f"TEXT? {rules.control(CHANNEL_END)}"
    if answer_format.in_thought:
        return end
    return f'({rules.control(CHANNEL)} "thought\\n" {end})?'


def _answer(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Write a response format as one entry of llguidance's list of grammars."""
    if response_format is None:
        return None
    format_type = response_format["type"]
    if format_type == "regex":
        return {"lark_grammar": f"start: /{regex_to_lark(response_format['regex'], 'd')}/"}
    if format_type == "choice":
        return {"lark_grammar": "start: " + " | ".join(map(quoted, response_format["choice"]))}
    schema = _ANY_OBJECT if format_type == "json_object" else response_format["json_schema"]["schema"]
    try:
        source = LLMatcher.grammar_from_json_schema(
            narrowed(schema),
            overrides={
                "whitespace_flexible": False,
                "item_separator": ",",
                "key_separator": ":",
                "lenient": False,
                "coerce_one_of": False,
            },
        )
    except ValueError as error:  # an integer of more than 64 bits
        raise RequestError(
            "bad_request", f"response_format.json_schema: {error}; describe it differently"
        ) from None
    answer: dict[str, Any] = json.loads(source)["grammars"][0]
    return answer


_SCHEMAS = ("items", "additionalProperties", "not", "contains", "propertyNames")
_LISTS_OF_SCHEMAS = ("prefixItems", "anyOf", "oneOf", "allOf")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_COMBINING = frozenset(
    ("anyOf", "oneOf", "allOf", "$ref", "patternProperties", "if", "unevaluatedProperties")
)
_ANY = {"$ref": "#/$defs/any"}
_OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": _ANY}
_SCALARS = [{"type": name} for name in ("string", "number", "boolean", "null")]
_ANY_OBJECT = {**_OBJECT, "$defs": {"any": {"anyOf": [*_SCALARS, {"type": "array", "items": _ANY}, _OBJECT]}}}


def narrowed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return `schema` without harmful answers; every answer that the result allows, `schema` allows too.

    Numbers get the bounds of `number_bounds`. Objects with `properties` get `additionalProperties: false`
    unless they have it, or the schema combines several descriptions of one object: what one of them does not
    list, another may.
    """
    result: dict[str, Any] = _narrowed(schema, close=not _combines(schema))
    return result


def _combines(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    if "allOf" in schema or ("properties" in schema and not _COMBINING.isdisjoint(schema)):
        return True
    return any(map(_combines, _children(schema)))


def _children(schema: Mapping[str, Any]) -> list[Any]:
    """List the schemas directly below a schema."""
    children = [schema[key] for key in _SCHEMAS if key in schema]
    for key in _LISTS_OF_SCHEMAS:
        children += schema[key] if isinstance(schema.get(key), list) else []
    for key in _NAMED_SCHEMAS:
        children += schema[key].values() if isinstance(schema.get(key), Mapping) else []
    return children


def _narrowed(schema: Any, close: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    result = dict(schema)
    for key in _SCHEMAS:
        if key in schema:
            result[key] = _narrowed(schema[key], close)
    for key in _LISTS_OF_SCHEMAS:
        if isinstance(schema.get(key), list):
            result[key] = [_narrowed(item, close) for item in schema[key]]
    for key in _NAMED_SCHEMAS:
        if isinstance(schema.get(key), Mapping):
            result[key] = {name: _narrowed(item, close) for name, item in schema[key].items()}
    types = schema.get("type")
    if types in ("number", "integer") or (
        isinstance(types, list) and {"number", "integer"} & {*map(str, types)}
    ):
        result |= number_bounds(schema, whole="number" not in types)
    return result | {"additionalProperties": False} if close and _closable(schema) else result


def _closable(schema: Mapping[str, Any]) -> bool:
    """Whether an object lists its properties, and needs no others."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if (
        not isinstance(properties, Mapping)
        or "additionalProperties" in schema
        or not isinstance(required, list)
    ):
        return False
    return set(map(str, required)) <= set(properties) and schema.get("minProperties", 0) <= len(properties)
