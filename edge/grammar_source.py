"""What a request allows as an answer, written as a grammar for llguidance.

JSON answers are compact (no spaces between tokens), members in the schema's order. An object that lists its
properties and does not say what else it may hold is taken to hold nothing else: all such answers are valid,
and a small model is not led astray. Tool calls follow the declared parameters in Gemma 4's notation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, regex_to_lark

from edge.messages import Request
from edge.prompt import CHANNEL, CHANNEL_END, begins_in_thought
from edge.tokenizer import Tokenizer
from edge.tool_grammar import ToolRules, quoted

_TEXT = "TEXT: /(?s:.+)/"


def grammar_source(request: Request, tokenizer: Tokenizer) -> str | None:
    """Write the grammar of all answers to `request`, as llguidance's JSON; None if any text will do.

    Raises RequestError("bad_request"), naming the keyword, if a tool's schema can't be followed.
    """
    if request.response_format is None and not request.tools:
        return None
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
    schema = {"type": "object"} if kind == "json_object" else response_format["json_schema"]["schema"]
    source = LLMatcher.grammar_from_json_schema(
        closed_schema(schema),
        overrides={
            "whitespace_flexible": False,
            "item_separator": ",",
            "key_separator": ":",
            "lenient": False,
            "coerce_one_of": False,
        },
    )
    answer: dict[str, Any] = json.loads(source)["grammars"][0]
    return answer


_SCHEMAS = ("items", "additionalProperties", "not", "contains", "propertyNames")
_LISTS_OF_SCHEMAS = ("prefixItems", "anyOf", "oneOf")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_COMBINING = frozenset(
    ("anyOf", "oneOf", "allOf", "$ref", "patternProperties", "if", "unevaluatedProperties")
)


def closed_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return `schema` with `additionalProperties: false` wherever `properties` stands without it.

    Schemas that combine several descriptions of one object are left as they are: what one of them does not
    list, another may.
    """
    return dict(schema) if _combines(schema) else _closed(schema)


def _children(schema: Mapping[str, Any]) -> list[Any]:
    """List the schemas directly below one, for all keywords but allOf."""
    found = [schema[key] for key in _SCHEMAS if key in schema]
    for key in _LISTS_OF_SCHEMAS:
        found += schema[key] if isinstance(schema.get(key), list) else []
    for key in _NAMED_SCHEMAS:
        found += schema[key].values() if isinstance(schema.get(key), Mapping) else []
    return [child for child in found if isinstance(child, Mapping)]


def _combines(schema: Mapping[str, Any]) -> bool:
    if "allOf" in schema or ("properties" in schema and not _COMBINING.isdisjoint(schema)):
        return True
    return any(map(_combines, _children(schema)))


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(schema)
    for key in _SCHEMAS:
        if isinstance(schema.get(key), Mapping):
            result[key] = _closed(schema[key])
    for key in _LISTS_OF_SCHEMAS:
        if isinstance(schema.get(key), list):
            result[key] = [_closed(item) if isinstance(item, Mapping) else item for item in schema[key]]
    for key in _NAMED_SCHEMAS:
        if isinstance(schema.get(key), Mapping):
            result[key] = {
                name: _closed(item) if isinstance(item, Mapping) else item
                for name, item in schema[key].items()
            }
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and "additionalProperties" not in schema:
        required = schema.get("required", [])
        listed = isinstance(required, list) and all(name in properties for name in required)
        if listed and schema.get("minProperties", 0) <= len(properties):
            result["additionalProperties"] = False
    return result
