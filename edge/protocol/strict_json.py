"""JSON from untrusted input: exactly one object, bounded, unambiguous, and valid Unicode throughout.

`json.loads` alone accepts duplicate keys (the last wins), NaN and infinities, lone surrogates that can't be
encoded again, and any nesting up to the recursion limit. `loads` refuses all of these.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 32


class StrictJsonError(ValueError):
    """The text is not acceptable JSON; the message gives the reason in a few words."""


def loads(raw: bytes | str, max_bytes: int) -> dict[str, Any]:
    """Read the single JSON object in `raw`: UTF-8, at most `max_bytes` long and `MAX_DEPTH` levels deep.

    Raises StrictJsonError for everything else (RFC 8259 leaves duplicate keys and lone surrogates open).
    """
    try:
        size = len(raw) if isinstance(raw, bytes) else len(raw.encode())
        if size > max_bytes:
            raise StrictJsonError(f"{size} bytes; at most {max_bytes} are allowed")
        text = raw.decode() if isinstance(raw, bytes) else raw
        value = json.loads(
            text, object_pairs_hook=_object, parse_float=_number, parse_int=_integer, parse_constant=_constant
        )
    except StrictJsonError:
        raise
    except UnicodeError:
        raise StrictJsonError("not valid UTF-8") from None
    except RecursionError:
        raise StrictJsonError(f"nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"not JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(value, dict):
        raise StrictJsonError(f"a JSON object is required, not {kind_of(value)}")
    if "\\u" in text or text.count("{") + text.count("[") > MAX_DEPTH:  # otherwise nothing can be wrong
        _check_tree(value)
    return value


def dumps(value: Any) -> str:
    """Write compact ASCII JSON, which any serial line and log can carry. Raises ValueError for NaN."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def kind_of(value: Any) -> str:
    """Name the JSON type of `value` (TOML's for dates) with an article, for messages."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "a date or time")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise StrictJsonError(f"duplicate key {printable(key)}")
        result[key] = value
    return result


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJsonError(f"number {printable(text)} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:
        raise StrictJsonError(f"number {printable(text)} has too many digits")
    return int(text)


def _constant(text: str) -> NoReturn:
    raise StrictJsonError(f"{text} is not a JSON number")


def _check_tree(root: dict[str, Any]) -> None:
    """Check depth and surrogates, without recursion."""
    pending: list[tuple[Any, int]] = [(root, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, (dict, list)):
            if depth > MAX_DEPTH:
                raise StrictJsonError(f"nested deeper than {MAX_DEPTH} levels")
            if isinstance(value, dict):
                pending.extend((key, depth) for key in value)
            children = value.values() if isinstance(value, dict) else value
            pending.extend((child, depth + 1) for child in children)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise StrictJsonError("a string contains a lone surrogate (\\ud800 to \\udfff)") from None


def printable(text: str, limit: int = 40) -> str:
    """Quote `text` as ASCII, cut to `limit` characters, so that it is safe in a log or a terminal."""
    return ascii(text if len(text) <= limit else text[:limit] + "...")


def first_line(error: Exception) -> str:
    """The first line of a library's error message in printable ASCII, or the error's type if it has none."""
    said = str(error).split("\n", 1)[0]
    return ascii(said)[1:-1] if said else type(error).__name__
