"""JSON objects as dataclasses. A field whose type is not that of its annotation raises FieldError.

Annotations can be str, int, float, bool, Any, a dataclass, `X | None`, Literal, `tuple[X, ...]` and
`Mapping[str, X]`. An integer is accepted for a float; there is no other conversion.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from edge.protocol.checks import FieldError, array, flag, mapping, one_of, text
from edge.protocol.strict_json import kind_of, printable

T = TypeVar("T")

MAX_ITEMS = 1 << 20


def read(kind: type[T], data: Any, path: str = "", later_keys: bool = False) -> T:
    """Make a `kind` from the JSON object `data`; `path` is where that stands, for messages.

    With `later_keys`, keys without a field are ignored. Raises FieldError.
    """
    known = _fields(kind)  # type: ignore[arg-type]  # python/mypy#11470
    required = tuple(name for name, (_, is_required) in known.items() if is_required)
    given = mapping(path or "it", data, None if later_keys else tuple(known), required)
    prefix = f"{path}." if path else ""
    return kind(
        **{
            name: _value(annotation, f"{prefix}{name}", given[name], later_keys)
            for name, (annotation, _) in known.items()
            if name in given
        }
    )


@cache
def _fields(kind: type[Any]) -> Mapping[str, tuple[Any, bool]]:
    """Return the annotation of each field of a dataclass, and whether the field is required."""
    hints = get_type_hints(kind)
    return {
        f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING) for f in fields(kind)
    }


def _integer(path: str, value: Any) -> int:
    if type(value) is not int:
        raise FieldError(f"{path} is {kind_of(value)}; allowed: an integer")
    return value


def _number(path: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise FieldError(f"{path} is {kind_of(value)}; allowed: a number")
    return float(value)


_SIMPLE: dict[Any, Callable[[str, Any], Any]] = {
    Any: lambda _path, value: value,
    str: text,
    bool: flag,
    int: _integer,
    float: _number,
}


def _value(annotation: Any, path: str, value: Any, later_keys: bool) -> Any:
    if annotation in _SIMPLE:
        return _SIMPLE[annotation](path, value)
    if is_dataclass(annotation) and isinstance(annotation, type):
        return read(annotation, value, path, later_keys)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is types.UnionType:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _value(inner, path, value, later_keys)
    if origin is Literal:
        return one_of(*arguments)(path, value)
    if origin is tuple:
        items = enumerate(array(path, value, MAX_ITEMS))
        return tuple(_value(arguments[0], f"{path}[{index}]", item, later_keys) for index, item in items)
    if origin is Mapping:
        entries = mapping(path, value).items()
        return {
            key: _value(arguments[1], f"{path}.{printable(key)[1:-1]}", item, later_keys)
            for key, item in entries
        }
    raise FieldError(f"{path} has an unsupported annotation: {annotation}")
