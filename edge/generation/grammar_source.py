"""What a request allows as an answer, written as a grammar for llguidance.

JSON answers are compact (no spaces between tokens), members in the schema's order. A schema is narrowed where
it leaves open what does harm: an object that lists its properties holds nothing else, and numbers are such
that every JSON reader can hold them. Tool calls follow the declared parameters in Gemma 4's notation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher, regex_to_lark

from edge.errors import RequestError
from edge.generation.tool_grammar import ToolRules, number_bounds, quoted
from edge.protocol.messages import Request
from edge.text.prompt import CHANNEL, CHANNEL_END, begins_in_thought
from edge.text.tokenizer import Tokenizer

_TEXT = "TEXT: /(?s:.+)/"

# llguidance takes 8 KB of the stack for each schema below another, be it by reference, and the process ends
# where the stack does; it takes gigabytes for a multiple of millions. Of common schemas none comes near.
MAX_OBJECTS = 1024
MAX_MULTIPLE = 100_000


def grammar_source(request: Request, tokenizer: Tokenizer) -> str | None:
    """Write the grammar of all answers to `request`, as llguidance's JSON; None if any text will do.

    Raises RequestError("bad_request"), naming the keyword, if a tool's schema can't be followed, or if one is
    so large that compiling it would harm others.
    """
    if request.response_format is None and not request.tools:
        return None
    _check_size("response_format", request.response_format)
    _check_size("tools", request.tools)
    try:
        return _source(request, tokenizer)
    except RecursionError:
        raise RequestError("bad_request", "tools: too many references, one behind the other") from None


def _source(request: Request, tokenizer: Tokenizer) -> str:
    answer = _answer(request.response_format)
    if answer is not None and not request.tools and not request.reasoning:
        return json.dumps({"grammars": [answer]})
    rules = ToolRules(tokenizer)
    body = "TEXT? calls?" if answer is None else "@answer | calls" if request.tools else "@answer"
    lark = [f"start: {_thoughts(request, rules)} body", f"body: {body}", _TEXT]
    if request.tools:
        lark += ["calls: call+", *rules.calls(request.tools)]
    grammars = [{"name": "start", "lark_grammar": "\n".join(lark)}]
    if answer is not None:
        grammars.append({**answer, "name": "answer"})
    return json.dumps({"grammars": grammars})


def _check_size(where: str, value: Any) -> None:
    """Refuse too many objects (schemas and all that is in them), and too large a multiple of all numbers."""
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
            said = f"the multipleOf in it have no common multiple up to {MAX_MULTIPLE}; use rounder numbers"
            raise RequestError("bad_request", f"{where}: {said}")


def _digits(multiple: Any) -> int:
    """Give the digits of a multipleOf without the zeros at its ends: 25 for 0.25 and for 2500."""
    if not isinstance(multiple, (int, float)) or multiple <= 0:
        return 1
    return int("".join(map(str, Decimal(str(multiple)).normalize().as_tuple().digits)))


def _thoughts(request: Request, rules: ToolRules) -> str:
    """Let a thinking model think first, in a channel that the prompt may have opened already."""
    if not request.reasoning:
        return ""
    end = f"TEXT? {rules.control(CHANNEL_END)}"
    if begins_in_thought(request):
        return end
    return f'({rules.control(CHANNEL)} "thought\\n" {end})?'


def _answer(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Write the answer's format as one entry of llguidance's list of grammars."""
    if response_format is None:
        return None
    kind = response_format["type"]
    if kind == "regex":
        return {"lark_grammar": f"start: /{regex_to_lark(response_format['regex'], 'd')}/"}
    if kind == "choice":
        return {"lark_grammar": "start: " + " | ".join(map(quoted, response_format["choice"]))}
    schema = _ANY_OBJECT if kind == "json_object" else response_format["json_schema"]["schema"]
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
            "bad_request", f"response_format.json_schema: {error}; describe it otherwise"
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
_SCALARS = [{"type": kind} for kind in ("string", "number", "boolean", "null")]
_ANY_OBJECT = {**_OBJECT, "$defs": {"any": {"anyOf": [*_SCALARS, {"type": "array", "items": _ANY}, _OBJECT]}}}


def narrowed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return `schema` without answers that do harm; every answer to the result is one to `schema`.

    Numbers get the bounds of `number_bounds`. Objects get `additionalProperties: false` wherever `properties`
    stands without it, unless the schema combines several descriptions of one object: what one of them does
    not list, another may.
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
    """List what stands directly below a schema in places for schemas."""
    found = [schema[key] for key in _SCHEMAS if key in schema]
    for key in _LISTS_OF_SCHEMAS:
        found += schema[key] if isinstance(schema.get(key), list) else []
    for key in _NAMED_SCHEMAS:
        found += schema[key].values() if isinstance(schema.get(key), Mapping) else []
    return found


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
    kinds = schema.get("type")
    if kinds in ("number", "integer") or (
        isinstance(kinds, list) and {"number", "integer"} & {*map(str, kinds)}
    ):
        result |= number_bounds(schema, whole="number" not in kinds)
    return result | {"additionalProperties": False} if close and _closable(schema) else result


def _closable(schema: Mapping[str, Any]) -> bool:
    """Whether an object lists its properties, and can do with them."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if (
        not isinstance(properties, Mapping)
        or "additionalProperties" in schema
        or not isinstance(required, list)
    ):
        return False
    return set(map(str, required)) <= set(properties) and schema.get("minProperties", 0) <= len(properties)
