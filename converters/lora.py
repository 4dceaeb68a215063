"""Merges a PEFT LoRA adapter into a checkpoint: each row becomes `row + scale * (B[row] @ A)`.

The merge happens as rows are read, in float32 and before quantisation, so memory stays bounded. An adapter is
a folder with `adapter_config.json` and `adapter_model.safetensors`, tensors named
`base_model.model.MODULE.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]. The scale is lora_alpha / r, or
lora_alpha / sqrt(r) with rsLoRA; `rank_pattern` and `alpha_pattern` override r and lora_alpha where their key
matches a module's name as `(.*\\.)?(key)$`, first match first. Source: peft, tuners/lora and utils/other.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from converters.architectures.names import huggingface_name
from converters.architectures.tensor_shapes import tensor_shapes
from converters.checkpoints.base import Checkpoint, LazyTensor
from converters.checkpoints.chat import chat_info, folder_template
from converters.checkpoints.recognition import wrong_adapter
from converters.checkpoints.safetensors_file import TensorEntry, read_safetensors
from converters.checkpoints.tensor_reader import (
    Floats,
    Stored,
    StoredTensor,
    bfloat16_rows,
    float16_rows,
    float32_rows,
    require_finite,
)
from converters.checkpoints.text_files import read_json
from converters.merged_adapter import ADAPTER_WEIGHTS
from converters.recipes import stored_format
from edge.bundles.architecture import Architecture
from edge.errors import CheckpointError

_CONFIG = "adapter_config.json"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
_TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
_DEAD = ("key", "value")  # of layers that share KV: present in published files, but unused
_FLOATS = {"F32": float32_rows, "F16": float16_rows, "BF16": bfloat16_rows}
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that do not change the base model's weights; PiSSA, OLoRA and others do."""

# Settings that a plain merge can't apply: the values that are accepted, and why others are refused.
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "peft_type": (("LORA",), "only LoRA adapters can be merged"),
    "bias": (("none", None), "adapters with trained biases are not supported; Gemma has none"),
    "fan_in_fan_out": ((False, None), "transposed weights are not Gemma's"),
    "use_dora": ((False, None), "DoRA is not supported; merge it with PEFT"),
    "use_qalora": ((False, None), "QA-LoRA is not supported; merge it with PEFT"),
    "use_bdlora": ((None, False), "BD-LoRA is not supported; merge it with PEFT"),
    "lora_bias": ((False, None), "adapters with biases are not supported"),
    "modules_to_save": ((None, []), "whole retrained modules are not supported; merge it with PEFT"),
    "layer_replication": ((None, []), "replicated layers are not supported"),
    "target_parameters": ((None, []), "adapters of bare parameters are not supported; merge it with PEFT"),
    "trainable_token_indices": ((None, [], {}), "trained tokens are not supported; merge it with PEFT"),
    "alora_invocation_tokens": ((None, []), "an activated LoRA can't be merged"),
    "init_lora_weights": ((None, *_PLAIN_STARTS), "this initialisation changes the base model's weights"),
}


def merge_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the adapter in `folder` merged into its tensors as they are read.

    The adapter's chat template, if it has one of the family, replaces the checkpoint's. Raises
    CheckpointError, which names the file and the setting, module or tensor if the adapter is damaged, of a
    type that can't be merged, or made for another model; also if the checkpoint holds quantised integers.
    """
    if advice := wrong_adapter(folder):
        raise CheckpointError(advice)
    adapter = _Adapter(folder, checkpoint.architecture)
    tensors = dict(checkpoint.tensors)
    for name in adapter.modules:
        codes = tensors[name].codes()
        format = None if codes is None else stored_format(codes, tensors[name].shape[1])
        if format is not None and not format.block:
            raise CheckpointError(
                f"{checkpoint.path}: holds quantised integers, to which nothing can be added; merge the"
                " adapter into the bf16 checkpoint"
            )
        tensors[name] = _Merged(tensors[name], adapter, name)
    files = (*checkpoint.source_files, folder / _CONFIG, folder / ADAPTER_WEIGHTS)
    chat = chat_info(checkpoint.architecture.family, folder_template(folder))
    if chat.prompt_format == "plain":  # it has no template of the family
        chat = checkpoint.chat
    return replace(checkpoint, tensors=tensors, source_files=files, chat=chat, adapter=folder)


@dataclass(frozen=True)
class _Module:
    """One adapted matrix: where its factors are stored, and the scale of their product."""

    a: TensorEntry
    b: TensorEntry
    scale: float


class _Adapter:
    """An adapter, checked against `arch`. `modules` is keyed by our names of the tensors."""

    def __init__(self, folder: Path, arch: Architecture) -> None:
        self._settings = _Settings(folder / _CONFIG)
        self._path = folder / ADAPTER_WEIGHTS
        self._shapes = tensor_shapes(arch)
        self._tied = arch.tied_head
        self._names = {
            huggingface_name(name).removesuffix(".weight"): name
            for name, shape in self._shapes.items()
            if len(shape) == 2 and name not in ("embedding", "per_layer_embedding")
        }
        layers = range(len(arch.layers))
        self._dead = {
            huggingface_name(f"layers.{i}.{name}").removesuffix(".weight")
            for i in layers
            for name in _DEAD
            if not arch.owns_kv(i)
        }
        self._latest: tuple[str, Floats, Floats] | None = None
        self.modules = self._read()
        if not self.modules:
            raise CheckpointError(
                f"{self._path}: has no module of the text decoder; is it the right adapter?"
            )

    def product(self, name: str, start: int, stop: int) -> Floats:
        """Rows `start` to `stop` of the product that is added to a matrix, float32.

        Raises CheckpointError if a value is not finite.
        """
        module = self.modules[name]
        latest = self._latest
        if (
            latest is None or latest[0] != name
        ):  # threads can get here at the same time; each reads for itself
            self._latest = latest = name, _array(module.a), _array(module.b)
        _, a, b = latest
        with np.errstate(over="ignore", invalid="ignore"):  # the result is checked
            rows: Floats = np.matmul(b[start:stop] * np.float32(module.scale), a)
        require_finite(rows, _stored(module.b))
        return rows

    def _read(self) -> dict[str, _Module]:
        entries = read_safetensors(self._path)
        pairs: dict[str, dict[str, TensorEntry]] = {}
        for key, entry in entries.items():
            match = _TENSOR.fullmatch(key)
            if match is None:
                raise CheckpointError(f"{self._path}: tensor {key} is not part of a plain LoRA adapter")
            pairs.setdefault(match[1], {})[match[2]] = entry
        modules = {}
        for path, pair in pairs.items():
            name = self._our_name(path)
            if name is not None:
                modules[name] = self._module(path, name, pair)
        return modules

    def _our_name(self, path: str) -> str | None:
        """Our name of a module's matrix; None if the text decoder does not use it."""
        inner = next(path.removeprefix(prefix) for prefix in _PREFIXES if path.startswith(prefix))
        if inner.startswith(_TOWERS) or inner in self._dead:
            return None
        if inner == "lm_head" and self._tied:
            raise CheckpointError(
                f"{self._path}: module {path}: the output head is also the embedding; merge it with PEFT"
            )
        if inner not in self._names:
            raise CheckpointError(
                f"{self._path}: module {path} is not in this model; give the adapter of this model"
            )
        return self._names[inner]

    def _module(self, path: str, name: str, pair: Mapping[str, TensorEntry]) -> _Module:
        if set(pair) != {"A", "B"}:
            raise CheckpointError(
                f"{self._path}: module {path} has lora_{''.join(pair)} only; fetch it again"
            )
        rows, columns = self._shapes[name]
        rank = self._settings.rank(path)
        for entry, shape in ((pair["A"], (rank, columns)), (pair["B"], (rows, rank))):
            if entry.shape != shape or entry.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{self._path}: tensor {entry.name} is {entry.dtype} of shape {entry.shape}; rank {rank}"
                    f" and this model require {shape}"
                )
        return _Module(pair["A"], pair["B"], self._settings.scale(path))


class _Settings:
    """`adapter_config.json`, checked."""

    def __init__(self, path: Path) -> None:
        self._path, self._fields = path, read_json(path)
        for key, (accepted, reason) in _REFUSED.items():
            value = self._fields.get(key)
            if value not in accepted:
                raise CheckpointError(f"{path}: {key} is {value!r:.60}: {reason}")
        self._ranks, self._alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")

    def rank(self, module: str) -> int:
        """The rank of a module's factors."""
        rank = self._of(module, "r", self._ranks)
        if rank != int(rank):
            raise CheckpointError(f"{self._path}: the rank of {module} is {rank}, not a whole number")
        return int(rank)

    def scale(self, module: str) -> float:
        """The factor of B @ A."""
        rank = self.rank(module)
        divisor = math.sqrt(rank) if self._fields.get("use_rslora") else rank
        return self._of(module, "lora_alpha", self._alphas) / divisor

    def _of(self, module: str, key: str, pattern: Mapping[re.Pattern[str], Any]) -> float:
        value = next(
            (value for regex, value in pattern.items() if regex.match(module)), self._fields.get(key)
        )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(f"{self._path}: {key} of {module} is {value!r:.60}, not a positive number")
        return value

    def _pattern(self, key: str) -> dict[re.Pattern[str], Any]:
        patterns = self._fields.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self._path}: {key} must be an object")
        try:
            return {re.compile(rf"(.*\.)?({regex})$"): value for regex, value in patterns.items()}
        except re.error as error:
            raise CheckpointError(f"{self._path}: {key} has an invalid pattern: {error}") from None


class _Merged(LazyTensor):
    """A matrix with an adapter's product added. It has no codes: those of the base no longer apply."""

    def __init__(self, base: LazyTensor, adapter: _Adapter, name: str) -> None:
        self.name, self.shape, self.source_type = base.name, base.shape, f"{base.source_type} with LoRA"
        self._base, self._adapter, self._our_name = base, adapter, name

    def rows(self, start: int, stop: int) -> Floats:
        """See `LazyTensor.rows`."""
        merged: Floats = self._base.rows(start, stop) + self._adapter.product(self._our_name, start, stop)
        return merged


def _stored(entry: TensorEntry) -> Stored:
    return Stored(entry.file, entry.name, entry.offset, entry.size // entry.shape[0])


def _array(entry: TensorEntry) -> Floats:
    """The values of a factor; raises CheckpointError if one is not finite."""
    return StoredTensor(_stored(entry), entry.shape, entry.dtype, _FLOATS[entry.dtype]).array()
