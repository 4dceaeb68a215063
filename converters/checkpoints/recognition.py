"""Recognises paths that are no checkpoints; the error then names the right command."""

from __future__ import annotations

import re
from pathlib import Path

_RUNTIME_SUFFIXES = {".task": "MediaPipe task", ".litertlm": "LiteRT-LM model", ".tflite": "TFLite graph"}
_HUB = re.compile(
    r"(?:(?:https?:/+)?(?:huggingface\.co|hf\.co)/+)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)/?"
)


def hub_name(path: Path) -> str | None:
    """The repository that a missing path names on Hugging Face, like "google/gemma-3-270m-it"; else None."""
    match = None if path.exists() or path.is_absolute() else _HUB.fullmatch(str(path))
    return None if match is None or match[1].startswith(".") else match[1]


def missing_checkpoint(path: Path) -> str:
    """The error for a checkpoint path that does not exist."""
    if name := hub_name(path):
        folder = name.rpartition("/")[2]
        return (
            f"{path}: no such file or folder; to get it from Hugging Face, run: hf download {name}"
            f" --local-dir {folder}; then: edge-convert {folder} -o {folder}-bundle"
        )
    return f"{path}: no such file or folder; give a GGUF file or a Hugging Face folder"


def wrong_file(path: Path) -> str | None:
    """The error for a file that is no checkpoint, by its suffix; None if it could be one."""
    if path.suffix == ".safetensors":
        return f"{path}: holds tensors only; give its folder: edge-convert {_quoted(path.parent)} -o bundle"
    if type_ := _RUNTIME_SUFFIXES.get(path.suffix):
        return (
            f"{path}: is a {type_}, already converted for another runtime; convert the checkpoint that it was"
            " made from, for example: hf download google/gemma-3-270m-it --local-dir gemma; then:"
            " edge-convert gemma -o bundle"
        )
    return None


def wrong_folder(path: Path) -> str | None:
    """The error for a folder of another type than a model; None if it could be a model."""
    if (path / "config.json").exists():
        return None
    if gguf := sorted(path.glob("*.gguf")):
        return (
            f"{path}: is a folder of GGUF files; give one of them: edge-convert {_quoted(gguf[0])} -o bundle"
        )
    if snapshots := sorted((path / "snapshots").glob("*")):
        return (
            f"{path}: is a download cache; give its snapshot: edge-convert {_quoted(snapshots[-1])} -o bundle"
        )
    if (path / "adapter_config.json").exists():
        return f"{path}: is a LoRA adapter; give its base: edge-convert BASE --lora {_quoted(path)} -o bundle"
    if (path / "manifest.json").exists():
        return f"{path}: is a bundle already; to see what is in it, run: edge-convert inspect {_quoted(path)}"
    return None


def wrong_adapter(path: Path) -> str | None:
    """The error for a path that is no adapter folder; None if it could be one."""
    if path.is_file():
        return f"{path}: is a file; give the adapter's folder: --lora {_quoted(path.parent)}"
    if not path.exists():
        if name := hub_name(path):
            folder = name.rpartition("/")[2]
            return (
                f"{path}: no such folder; to get it from Hugging Face, run: hf download {name}"
                f" --local-dir {folder}; then give --lora {folder}"
            )
        return f"{path}: no such folder; give one with adapter_config.json and adapter_model.safetensors"
    if not (path / "adapter_config.json").exists() and (path / "config.json").exists():
        return f"{path}: is a model, not an adapter; give it as the checkpoint, and the adapter after --lora"
    return None


def _quoted(path: Path) -> str:
    text = str(path)
    return f"'{text}'" if " " in text else text
