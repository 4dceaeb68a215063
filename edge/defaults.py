"""Defaults: paths, and the number of threads."""

from __future__ import annotations

import os
from pathlib import Path

CONFIG = "/etc/edge-gemma/edge-daemon.toml"
"""Where the package's unit reads its configuration."""

DIRECTORIES = {"STATE_DIRECTORY": "/var/lib/edge-gemma", "CACHE_DIRECTORY": "/var/cache/edge-gemma"}
"""What systemd sets in the environment of the package's unit."""


def cache_directory() -> str:
    """The directory of packed weights and prefix snapshots: systemd's for the unit, else XDG's."""
    return _directory("CACHE_DIRECTORY", "XDG_CACHE_HOME", ".cache")


def state_directory() -> str:
    """The directory of the journal and other state that must not be lost, found likewise."""
    return _directory("STATE_DIRECTORY", "XDG_STATE_HOME", ".local/state")


def threads() -> int:
    """One thread a core, up to four: decoding is bound by memory, not by cores."""
    return min(os.cpu_count() or 1, 4)


def _directory(variable: str, xdg: str, home: str) -> str:
    given = os.environ.get(variable, "").partition(":")[0]
    return given or str(Path(os.environ.get(xdg) or Path.home() / home) / "edge-gemma")
