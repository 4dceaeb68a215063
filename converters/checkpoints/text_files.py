"""Reading the small files of a checkpoint folder, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge.errors import CheckpointError


def read_bytes(path: Path) -> bytes:
    """The bytes of the file at `path`; raises CheckpointError if it can't be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; fetch the folder again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`; raises CheckpointError if it can't be read or is not one."""
    try:
        data = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return data
