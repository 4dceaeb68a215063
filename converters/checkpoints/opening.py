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
        if path.suffix == ".safetensors":
            raise CheckpointError(
                f"{path}: holds tensors only; give its folder, with config.json and tokenizer"
            )
        return open_gguf(path)
    if path.is_dir():
        _refuse_other_folders(path)
        return open_folder(path)
    raise CheckpointError(f"{path}: no such file or folder; give a GGUF file or a Hugging Face folder")


def _refuse_other_folders(path: Path) -> None:
    """Say what to give instead of a folder that is whole, but not a model's."""
    if (path / "config.json").exists():
        return
    if gguf := sorted(path.glob("*.gguf")):
        raise CheckpointError(f"{path}: is a folder of GGUF files; give one of them, like {gguf[0]}")
    if (path / "snapshots").is_dir():
        raise CheckpointError(f"{path}: is a download cache; give a folder in {path / 'snapshots'}")
    if (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path}: is a LoRA adapter; give its base model, and this after --lora")
