"""Where a program keeps things and how many threads decode, if nobody says otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> str:
    """Where packed weights and prefixes are kept: what systemd made for the unit, or XDG's place."""
    return _directory("CACHE_DIRECTORY", "XDG_CACHE_HOME", ".cache")


def state_directory() -> str:
    """Where what must not be lost is kept, likewise."""
    return _directory("STATE_DIRECTORY", "XDG_STATE_HOME", ".local/state")


def threads() -> int:
    """One thread a core, up to four: decoding is bound by memory, not by cores."""
    return min(os.cpu_count() or 1, 4)


def _directory(variable: str, xdg: str, home: str) -> str:
    given = os.environ.get(variable, "").partition(":")[0]
    return given or str(Path(os.environ.get(xdg) or Path.home() / home) / "edge-gemma")
