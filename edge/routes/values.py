"""The number in a payload, as a route's `value` and `parse_text` say where and how it is written."""

from __future__ import annotations

import math
import re
from typing import Any

from jmespath.parser import ParsedResult

from edge.protocol import strict_json
from edge.protocol.strict_json import StrictJsonError, first_line, kind_of, printable
from edge.routes.expressions import ExpressionError, search

MAX_PAYLOAD_BYTES = 8 * 1024

_WORDS = {"on": 1.0, "true": 1.0, "yes": 1.0, "off": 0.0, "false": 0.0, "no": 0.0}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+[.,]?[0-9]*|[.,][0-9]+)(?:[eE][+-]?[0-9]+)?")
_UNIT = re.compile(r"(?:[^\W\d_]|[°%‰])(?:[^\W\d_]|[°%‰/·^*]|(?<=[mM])[23]){0,15}")


class UnusableError(ValueError):
    """A payload has no number for the route; the message describes its value."""


def read_value(expression: ParsedResult | None, parse_text: bool, payload: bytes) -> tuple[float, Any]:
    """Return the number in a payload, and the content that conditions see as `payload`.

    Without an `expression` the payload itself is the number and the content. Raises UnusableError.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise UnusableError(f"more than {MAX_PAYLOAD_BYTES} bytes")
    if expression is None:
        number = _from_bytes(payload, parse_text)
        return number, number
    try:
        content = strict_json.loads(payload, MAX_PAYLOAD_BYTES)
        value = search(expression, content)
    except (StrictJsonError, ExpressionError) as error:
        raise UnusableError(first_line(error)) from None
    return _from_json(value, parse_text), content


def parse_number(text: str) -> float | None:
    """Read a number out of text: quoted, with a decimal comma, with a unit, or a word such as on or false.

    None for any other text, such as a time, a date or an address. Thousands separators are not understood.
    """
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    text = text.replace("\N{MINUS SIGN}", "-", 1)
    number = _NUMBER.match(text)
    if number is None:
        return None
    unit = text[number.end() :].lstrip()
    return float(number[0].replace(",", ".")) if not unit or _UNIT.fullmatch(unit) else None


def _from_bytes(payload: bytes, parse_text: bool) -> float:
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        text = payload.decode("latin-1")  # some devices send their degree sign like this
    parsed = parse_number(text)
    if parse_text and parsed is not None:
        return _finite(parsed)
    try:
        if not text.isascii() or "_" in text:  # Python reads 1_000 and digits of all scripts
            raise ValueError
        return _finite(float(text))
    except UnusableError:
        raise
    except ValueError:
        hint = "" if parse_text or parsed is None else "; parse_text = true in the route reads it"
        raise UnusableError(f"not a number: {printable(text)}{hint}") from None


def _from_json(value: Any, parse_text: bool) -> float:
    if type(value) in (int, float):
        return _finite(value)
    parsed = parse_number(value) if isinstance(value, str) else None
    if isinstance(value, bool):
        parsed = float(value)
    if parse_text and parsed is not None:
        return _finite(parsed)
    what = f"the text {printable(value)}" if isinstance(value, str) else kind_of(value)
    hint = "" if parse_text or parsed is None else "; parse_text = true in the route reads it"
    raise UnusableError(f"the value is {what}, not a number{hint}")


def _finite(value: float) -> float:
    """Convert to float. Raises UnusableError for nan, infinity and an integer that no float holds."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        what = "nan" if math.isnan(number) else "too large"
        raise UnusableError(f"the value is {what}; a reading must be a finite number")
    return number
