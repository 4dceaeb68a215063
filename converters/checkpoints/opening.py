"""Opens a checkpoint of any format."""

from __future__ import annotations

from pathlib import Path

from converters.checkpoints.base import Checkpoint
from converters.checkpoints.gguf_checkpoint import open_gguf
from converters.checkpoints.huggingface import open_folder
from converters.checkpoints.recognition import missing_checkpoint, wrong_file, wrong_folder
from edge.errors import CheckpointError


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face folder.

    Raises CheckpointError, in one line that names the file and the key or tensor, if it is missing, damaged,
    incomplete or of an unsupported type.
    """
    if path.is_file():
        if advice := wrong_file(path):
            raise CheckpointError(advice)
        return open_gguf(path)
    if path.is_dir():
        if advice := wrong_folder(path):
            raise CheckpointError(advice)
        return open_folder(path)
    raise CheckpointError(missing_checkpoint(path))
