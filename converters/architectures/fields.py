"""Typed access to a config.json or GGUF metadata, with errors that name the file and the key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge.errors import CheckpointError

_MAX_INTEGER = 1 << 24


class Fields:
    """Values by key; a key is looked up behind `prefix`. An absent key and a null are the same."""

    def __init__(self, source: str, values: Mapping[str, Any], prefix: str = "") -> None:
        self._source = source
        self._values = values
        self._prefix = prefix

    def get(self, key: str) -> Any:
        """The raw value, or None."""
        return self._values.get(self._prefix + key)

    def names(self) -> list[str]:
        """All keys, without the prefix."""
        return [key.removeprefix(self._prefix) for key in self._values if key.startswith(self._prefix)]

    def wrong(self, key: str, what: str) -> CheckpointError:
        """An error that names the file and the key."""
        return CheckpointError(f"{self._source}: {self._prefix}{key} {what}")

    def section(self, key: str) -> Fields:
        """The mapping under `key`; empty if it is absent."""
        values = self.get(key)
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise self.wrong(key, f"must be a mapping, not {values!r:.60}")
        return Fields(f"{self._source}: {self._prefix}{key}", values)

    def integer(
        self, key: str, default: int | None = None, minimum: int = 1, maximum: int = _MAX_INTEGER
    ) -> int:
        """A whole number from `minimum` to `maximum`; CheckpointError if it is absent without a default."""
        value = self.get(key)
        return self._checked(key, default if value is None else value, minimum, maximum)

    def integers(self, key: str, count: int, maximum: int = _MAX_INTEGER) -> list[int]:
        """`count` positive whole numbers, from an array of that length or from one number for all."""
        value = self.get(key)
        if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, str):
            return [self.integer(key, maximum=maximum)] * count
        if len(value) != count:
            raise self.wrong(key, f"has {len(value)} entries for {count} layers")
        return [self._checked(key, item, 1, maximum) for item in value]

    def number(self, key: str, default: float | None = None) -> float:
        """A finite positive number; CheckpointError if it is absent without a default."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise self.wrong(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.wrong(key, f"must be a positive number, not {value!r:.60}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite positive number, or None if it is absent."""
        return None if self.get(key) is None else self.number(key)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a checkpoint whose `key` is present with a value that is not in `allowed`."""
        value = self.get(key)
        if value is not None and (isinstance(value, np.ndarray) or value not in allowed):
            raise self.wrong(key, f"= {value!r:.60} is not supported")

    def _checked(self, key: str, value: Any, minimum: int, maximum: int) -> int:
        if value is None:
            raise self.wrong(key, "is missing")
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise self.wrong(key, f"must be a whole number, not {value!r:.60}")
        if not minimum <= value <= maximum:
            raise self.wrong(key, f"= {value} is out of range ({minimum} to {maximum})")
        return int(value)
