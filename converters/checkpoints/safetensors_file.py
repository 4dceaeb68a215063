"""The header of a safetensors file: the positions of its tensors.

The `safetensors` package checks the file (https://github.com/huggingface/safetensors#format); it does not
give offsets and has no bfloat16 for NumPy, so the header's JSON is read here once it has been checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from edge.errors import CheckpointError


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: `dtype` is safetensors' name ("BF16"), `offset` is from the start of `file`."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_safetensors(path: Path) -> dict[str, TensorEntry]:
    """The tensors of the file at `path` by name; raises CheckpointError if it is missing or damaged."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({error}); fetch it again") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
    entries = {}
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            shape = tuple(info["shape"])
            entries[name] = TensorEntry(path, name, info["dtype"], shape, 8 + length + begin, end - begin)
    return entries
