"""The interface of checkpoints of all file formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge.bundles.architecture import Architecture


@dataclass(frozen=True)
class CodeRows:
    """Some rows of a quantised tensor: value = code * scale of its group.

    `codes` int8 [rows, width]; `scales` float32 [rows, width / group], finite and not negative; `exact` bool
    [rows, width / group], false where a group can't be represented by such codes and a non-negative scale
    (its codes are then the nearest, and the converter should quantise the group again).
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    exact: NDArray[np.bool_]


class ExactCodes(ABC):
    """The codes and scales that a tensor is stored with, to be copied bit for bit.

    `bits` is 2, 4 or 8 (codes from -2^(bits-1) to 2^(bits-1) - 1), `group` the number of values along a row
    that share a scale (the row's width: per channel), `scale_type` the float type that holds every scale.
    """

    bits: int
    group: int
    scale_type: Literal["F16", "F32"]

    @abstractmethod
    def rows(self, start: int, stop: int) -> CodeRows:
        """Codes and scales of rows `start` to `stop`; raises CheckpointError as `LazyTensor.rows` does."""


class LazyTensor(ABC):
    """A tensor on disk, read a slice of rows at a time and not kept in memory.

    `name` is the one in its file; `shape` is [out, in] for matrices and [n] for vectors; `source_type` names
    the stored type, e.g. "BF16", "Q4_K" or "INT4".
    """

    name: str
    shape: tuple[int, ...]
    source_type: str

    @abstractmethod
    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop` (of a vector: its elements) as float32, dequantised.

        Slices of 1 to 4 MB are by far the fastest (for larger ones the allocator maps new pages; measured).
        Raises CheckpointError, naming the tensor and its file, if a value is NaN or infinite.
        """

    def array(self) -> NDArray[np.float32]:
        """The whole tensor as float32. Only for tensors known to be small, or one at a time."""
        return self.rows(0, self.shape[0])

    def codes(self) -> ExactCodes | None:
        """The stored codes, if a bundle can keep them; else None."""
        return None


@dataclass(frozen=True)
class ChatInfo:
    """The checkpoint's prompt format and special tokens.

    `prompt_format` is "gemma3", "gemma4" or "plain" (a base model: completion only).
    """

    prompt_format: str
    bos_id: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; every tensor of its architecture is present, with the right shape.

    `tensors` has the names of `converters.architectures.tensor_shapes`; `tokenizer_model` is a SentencePiece
    ModelProto, serialised; `licence` is one line, or "" if the checkpoint states none; `adapter` is the
    folder of the LoRA adapter that was merged.
    """

    path: Path
    architecture: Architecture
    tensors: Mapping[str, LazyTensor]
    tokenizer_model: bytes
    chat: ChatInfo
    source_files: tuple[Path, ...]
    licence: str
    adapter: Path | None = None
