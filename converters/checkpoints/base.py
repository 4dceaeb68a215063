"""What every checkpoint offers the converter, whatever its file format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.architecture import Architecture


class LazyTensor(ABC):
    """A tensor on disk, read a slice of rows at a time; nothing of it stays in memory.

    `shape` is [out, in] for matrices and [n] for vectors. `source_type` names the stored type, e.g. "BF16".
    """

    name: str
    shape: tuple[int, ...]
    source_type: str

    @abstractmethod
    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop` (of a vector: its elements) as float32, dequantised.

        Raises CheckpointError, naming the tensor and its file, if a value is NaN or infinite.
        """

    def array(self) -> NDArray[np.float32]:
        """The whole tensor as float32. Only for tensors known to be small, or one at a time."""
        return self.rows(0, self.shape[0])


@dataclass(frozen=True)
class ChatInfo:
    """What the checkpoint says of how it is talked to.

    `prompt_format` is "gemma3", "gemma4" or "plain" (a base model: completion only).
    """

    prompt_format: str
    bos_id: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: tensors under the names of `edge.architecture.tensor_shapes`, all present and
    of the right shape. `tokenizer_model` is a SentencePiece ModelProto, serialised.
    """

    path: Path
    architecture: Architecture
    tensors: Mapping[str, LazyTensor]
    tokenizer_model: bytes
    chat: ChatInfo
    source_files: tuple[Path, ...]
    licence: str
