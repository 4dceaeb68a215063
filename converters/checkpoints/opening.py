"""The one way to open a checkpoint, whatever its format."""

from __future__ import annotations

from pathlib import Path

from converters.checkpoints.base import Checkpoint
from converters.checkpoints.gguf_checkpoint import open_gguf
from converters.checkpoints.huggingface import open_folder
from edge.errors import CheckpointError


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face folder.

    Raises CheckpointError, in one line that names the file and the key or tensor, if it is missing, damaged,
    incomplete or of a kind that is not supported.
    """
    if path.is_file():
        return open_gguf(path)
    if path.is_dir():
        return open_folder(path)
    raise CheckpointError(f"{path}: no such file or folder; give a GGUF file or a Hugging Face folder")
