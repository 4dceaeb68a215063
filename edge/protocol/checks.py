"""Checks of untrusted values in requests and configuration. Each returns the value or raises FieldError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge.protocol.strict_json import kind_of, printable


class FieldError(ValueError):
    """A value is not allowed; the message names its key, the value and what is allowed."""


def text(path: str, value: Any) -> str:
    """Accept any string."""
    if not isinstance(value, str):
        raise FieldError(f"{path} is {kind_of(value)}; allowed: a string")
    return value


def flag(path: str, value: Any) -> bool:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise FieldError(f"{path} is {kind_of(value)}; allowed: true or false")
    return value


def integer(low: int, high: int) -> Callable[[str, Any], int]:
    """Make a check for an integer from `low` to `high`, both allowed."""

    def check(path: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise FieldError(f"{path} is {_shown(value)}; allowed: an integer from {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Callable[[str, Any], float]:
    """Make a check for a number from `low` to `high`, both allowed."""

    def check(path: str, value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise FieldError(f"{path} is {_shown(value)}; allowed: a number from {low} to {high}")
        return float(value)

    return check


def one_of(*allowed: str) -> Callable[[str, Any], str]:
    """Make a check for one of several strings."""

    def check(path: str, value: Any) -> str:
        if value not in allowed or not isinstance(value, str):
            shown = printable(value) if isinstance(value, str) else kind_of(value)
            raise FieldError(f"{path} is {shown}; allowed: {', '.join(allowed)}")
        return value

    return check


def array(path: str, value: Any, most: int, least: int = 0) -> list[Any]:
    """Accept an array of `least` to `most` items."""
    if not isinstance(value, list):
        raise FieldError(f"{path} is {kind_of(value)}; allowed: an array")
    if not least <= len(value) <= most:
        raise FieldError(f"{path} has {len(value)} items; allowed: {least} to {most}")
    return value


def mapping(
    path: str, value: Any, allowed: tuple[str, ...] | None = None, required: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Accept an object with the `required` keys and, unless `allowed` is None, no key outside `allowed`."""
    if not isinstance(value, dict):
        raise FieldError(f"{path} is {kind_of(value)}; allowed: an object")
    for key in value:
        if allowed is not None and key not in allowed:
            raise FieldError(f"{path} has the unknown key {printable(key)}; allowed: {', '.join(allowed)}")
    for key in required:
        if key not in value:
            raise FieldError(f"{path}.{key} is missing")
    return value


def _shown(value: Any) -> str:
    return str(value) if type(value) in (int, float) else kind_of(value)
