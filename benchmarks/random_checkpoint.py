"""Random checkpoints with the dimensions of Gemma 4 E2B and E4B, to convert and to time.

A folder as it is published: config.json, bfloat16 safetensors, tokenizer.model (the real vocabulary of the
270M, which Gemma 4 shares but for names of control tokens). Values come from one pool of normal deviates that
is read round and round at an odd length, so that no two rows are equal; it is written at the disk's speed.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from converters.architectures import gemma4
from converters.architectures.fields import Fields
from converters.architectures.names import huggingface_name
from converters.architectures.tensor_shapes import tensor_shapes
from converters.checkpoints.opening import open_checkpoint

_Item = TypeVar("_Item", bound=np.generic)

_PREFIX = "model.language_model."
_SLIDING, _FULL = "sliding_attention", "full_attention"
_POOL = (1 << 23) + 9
"""Values in the pool: 16 MB of bfloat16; odd, and no multiple of any row."""

_COMMON = {
    "model_type": "gemma4_text",
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
    "num_attention_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 256,
    "sliding_window": 512,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "tie_word_embeddings": True,
    "rope_parameters": {
        _FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        _SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "e2b": _COMMON
    | {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "use_double_wide_mlp": True,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "layer_types": ([_SLIDING] * 4 + [_FULL]) * 7,
    },
    "e4b": _COMMON
    | {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "use_double_wide_mlp": False,
        "num_hidden_layers": 42,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
        "layer_types": ([_SLIDING] * 5 + [_FULL]) * 7,
    },
}


def write_checkpoint(folder: Path, shape: str, tokenizer_from: Path) -> None:
    """Write the checkpoint of a shape; the tokenizer is that of the checkpoint `tokenizer_from`."""
    config = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "text_config": SHAPES[shape],
    }
    scratch = folder.with_name(f".{folder.name}")
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "tokenizer.model").write_bytes(open_checkpoint(tokenizer_from).tokenizer_model)
    (scratch / "config.json").write_text(json.dumps(config, indent=1))
    arch = gemma4.from_config(Fields("config.json", SHAPES[shape]))
    with (scratch / "model.safetensors").open("wb") as file:
        _write_tensors(file, tensor_shapes(arch))
    scratch.rename(folder)


def _write_tensors(file: BinaryIO, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        entry = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        header[_PREFIX + huggingface_name(name)] = entry
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    noise = np.random.default_rng(0).standard_normal(_POOL, np.float32)
    for name, shape in shapes.items():
        for part in repeated(_bfloat16(random_values(noise, name, shape)), math.prod(shape)):
            file.write(part.data)


def random_values(noise: NDArray[np.float32], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The pool as values of a tensor's kind, such that states and scores keep a moderate size."""
    if name.endswith("layer_scalar"):
        values = np.clip(0.5 + 0.1 * noise, 0.2, 0.9)
    elif name.endswith(("query_norm", "key_norm")):  # scores are not divided by sqrt(head_dim)
        values = (1 + 0.25 * noise) / shape[0] ** 0.25
    elif name.endswith("norm"):
        values = 1 + 0.25 * noise
    else:
        values = noise / math.sqrt(256 if name == "per_layer_embedding" else shape[-1])
    result: NDArray[np.float32] = values.astype(np.float32)
    return result


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the values, cut off."""
    return np.right_shift(values.view(np.uint32), 16).astype(np.uint16)


def repeated(pool: NDArray[_Item], count: int) -> Iterator[NDArray[_Item]]:
    """A flat pool over and over until `count` elements are out."""
    for start in itertools.count(0, len(pool)):
        if start >= count:
            return
        yield pool[: count - start]
