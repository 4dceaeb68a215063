"""Default paths and the default number of threads."""

from __future__ import annotations

import os
from pathlib import Path

CONFIG = "/etc/edge-gemma/edge-daemon.toml"
"""The configuration file of the package's systemd unit."""

DIRECTORIES = {"STATE_DIRECTORY": "/var/lib/edge-gemma", "CACHE_DIRECTORY": "/var/cache/edge-gemma"}
"""The directories that systemd sets in the environment of the package's unit."""


def cache_directory() -> str:
    """The directory for packed weights and prefix snapshots: from systemd in its unit, else from XDG."""
    return _directory("CACHE_DIRECTORY", "XDG_CACHE_HOME", ".cache")


def state_directory() -> str:
    """The directory for the journal and other state that must not be lost, found in the same way."""
    return _directory("STATE_DIRECTORY", "XDG_STATE_HOME", ".local/state")


def threads() -> int:
    """One thread per core, at most four: decoding is limited by memory bandwidth, not by cores."""
    return min(os.cpu_count() or 1, 4)


def _directory(variable: str, xdg: str, home: str) -> str:
    given = os.environ.get(variable, "").partition(":")[0]
    return given or str(Path(os.environ.get(xdg) or Path.home() / home) / "edge-gemma")
