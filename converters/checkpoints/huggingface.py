"""Opens a Hugging Face folder (config.json, safetensors, tokenizer) of Gemma 3 or 4 as a `Checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.architectures import gemma3, gemma4
from converters.architectures.fields import Fields
from converters.architectures.names import huggingface_name
from converters.architectures.tensor_shapes import tensor_shapes
from converters.checkpoints.base import Checkpoint, LazyTensor
from converters.checkpoints.chat import chat_info, folder_licence, folder_template
from converters.checkpoints.gemma_quant import PackedTensor, is_packed
from converters.checkpoints.q4_0 import GridTensor
from converters.checkpoints.safetensors_file import TensorEntry, read_safetensors
from converters.checkpoints.tensor_reader import (
    Stored,
    StoredTensor,
    bfloat16_rows,
    float16_rows,
    float32_rows,
)
from converters.checkpoints.text_files import read_json
from converters.checkpoints.tokenizer_model import from_sentencepiece, from_tokenizer_json, piece_count
from edge.bundles.architecture import Architecture
from edge.errors import CheckpointError

_FAMILIES = {
    "gemma3_text": gemma3,
    "gemma3": gemma3,
    "gemma4_text": gemma4,
    "gemma4": gemma4,
}
_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
_HEAD_PREFIXES = ("", "language_model.")
_FLOATS = {"F32": float32_rows, "F16": float16_rows}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Folder:
    """A folder's tensors by their names in the files, and the prefix of the text decoder's."""

    path: Path
    entries: Mapping[str, TensorEntry]
    prefix: str
    packed: bool

    def source_name(self, name: str) -> str:
        """The name in the files of our tensor `name`."""
        if name != "head":
            return self.prefix + huggingface_name(name)
        names = [prefix + huggingface_name(name) for prefix in _HEAD_PREFIXES]
        return next((full for full in names if full in self.entries), names[0])


def open_folder(path: Path) -> Checkpoint:
    """Open the folder at `path`.

    Raises CheckpointError, naming the file and the key or tensor, if it is damaged or not supported.
    """
    config = read_json(path / "config.json")
    module, text = _text_config(path / "config.json", config)
    architecture = module.from_config(Fields(str(path / "config.json"), text))
    packed = _is_packed_release(path / "config.json", config)
    entries = _read_shards(path)
    folder = _Folder(path, entries, _prefix(path, entries), packed)
    added = module.HUGGINGFACE_NORM_ADDED
    shapes = tensor_shapes(architecture)
    tensors = {name: _tensor(folder, name, shape, added) for name, shape in shapes.items()}
    tokenizer_file, tokenizer_model = _tokenizer(path, architecture)
    shards = sorted({folder.entries[tensor.name].file for tensor in tensors.values()})
    return Checkpoint(
        path=path,
        architecture=architecture,
        tensors=tensors,
        tokenizer_model=tokenizer_model,
        chat=chat_info(architecture.family, folder_template(path)),
        source_files=(path / "config.json", *shards, tokenizer_file),
        licence=folder_licence(path),
    )


def _text_config(path: Path, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The family's module and the text part of the config, whether nested or flat."""
    kind = config.get("model_type")
    text = config.get("text_config", config)
    if not isinstance(kind, str) or kind not in _FAMILIES or not isinstance(text, dict):
        raise CheckpointError(
            f"{path}: model_type {kind!r:.60} is not supported; Gemma 3 (270M, 1B) and Gemma 4 (E2B, E4B) are"
        )
    inner = text.get("model_type", kind)
    if not isinstance(inner, str) or _FAMILIES.get(inner) is not _FAMILIES[kind]:
        raise CheckpointError(f"{path}: text_config's model_type {inner!r:.60} is not supported in a {kind}")
    if config.get("tie_word_embeddings") is False:
        text = text | {"tie_word_embeddings": False}
    return _FAMILIES[kind], text


def _is_packed_release(path: Path, config: dict[str, Any]) -> bool:
    """True if the weights are quantised integers (`quant_method` "gemma"); refuses other quantisations."""
    text = config.get("text_config", {})
    quantization = config.get("quantization_config") or text.get("quantization_config")
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "gemma":
        raise CheckpointError(
            f"{path}: quant_method {method!r:.60} is not supported; use the bf16 repository, the mobile"
            " release (quant_method gemma) or a GGUF file"
        )
    return True


def _read_shards(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder's safetensors files."""
    entries: dict[str, TensorEntry] = {}
    for shard in _shard_files(path):
        for name, entry in read_safetensors(shard).items():
            if name in entries:
                raise CheckpointError(
                    f"{shard}: tensor {name} is also in {entries[name].file.name}; fetch the folder again"
                )
            entries[name] = entry
    return entries


def _shard_files(path: Path) -> list[Path]:
    """The files that the index lists, or the only one."""
    if not (path / _INDEX).exists():
        return [path / "model.safetensors"]
    files = read_json(path / _INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path / _INDEX}: has no weight_map")
    names = set(map(str, files.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{path / _INDEX}: names a file outside the folder: {name:.60}")
    return [path / name for name in sorted(names)]


def _prefix(path: Path, entries: Mapping[str, TensorEntry]) -> str:
    """The prefix of the text decoder's tensor names in this type of repository."""
    stem = huggingface_name("final_norm")
    for prefix in _PREFIXES:
        if prefix + stem in entries:
            return prefix
    raise CheckpointError(f"{path}: no tensor named model.{stem}; the text decoder is not in these files")


def _tensor(folder: _Folder, name: str, shape: tuple[int, ...], norm_added: float) -> LazyTensor:
    source = folder.source_name(name)
    if folder.packed and is_packed(folder.entries, source):
        return PackedTensor(folder.entries, source, shape)
    entry = folder.entries.get(source)
    if entry is None:
        raise CheckpointError(f"{folder.path}: tensor {source} is in none of the safetensors files")
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.file}: tensor {source} has shape {entry.shape} but config.json requires {shape}"
        )
    stored = Stored(entry.file, source, entry.offset, entry.size // shape[0])
    added = norm_added if name.endswith("norm") else 0.0
    if entry.dtype == "BF16":
        return GridTensor(stored, shape) if len(shape) > 1 else _vector(stored, shape, added)
    if entry.dtype not in _FLOATS:
        raise CheckpointError(f"{entry.file}: tensor {source}: type {entry.dtype} is not supported")
    return StoredTensor(stored, shape, entry.dtype, _FLOATS[entry.dtype], added)


def _vector(stored: Stored, shape: tuple[int, ...], added: float) -> LazyTensor:
    return StoredTensor(stored, shape, "BF16", bfloat16_rows, added)


def _tokenizer(path: Path, architecture: Architecture) -> tuple[Path, bytes]:
    """The tokenizer's file and model: tokenizer.model, the smaller file, unless it has too few pieces.

    Tokens that were added to a vocabulary are in tokenizer.json only.
    """
    model, vocabulary = path / "tokenizer.model", path / "tokenizer.json"
    if model.exists() and (not vocabulary.exists() or piece_count(model) >= architecture.vocabulary):
        return model, from_sentencepiece(model, architecture.vocabulary)
    if vocabulary.exists():
        return vocabulary, from_tokenizer_json(vocabulary, architecture.vocabulary)
    raise CheckpointError(f"{path}: has neither tokenizer.model nor tokenizer.json; fetch one of them")
