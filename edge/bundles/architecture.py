"""The dimensions of a decoder, as the runtime, the graph builder and the float reference share them.

One description covers Gemma 3 and Gemma 4: what a family lacks is zero, false or None.
Formulas are in `converters.reference_decoder`, the tensors in `converters.architectures.tensor_shapes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Attention = Literal["sliding", "full"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one attention type: `theta = position * base ** (-2k / head_dim)`.

    Pairs are (k, k + head_dim / 2); only the first `int(rotated_share * head_dim / 2)` pairs turn
    (Gemma 4's p-RoPE has a share of 0.25 on full layers, and the exponent's denominator stays head_dim).
    """

    base: float
    rotated_share: float = 1.0


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `kv_owner` is the index of the layer whose K and V it attends to."""

    attention: Attention
    head_dim: int
    feed_forward: int
    kv_owner: int


@dataclass(frozen=True)
class Architecture:
    """Every dimension of a text decoder.

    `attention_scale` multiplies q.k. `per_layer_width` is 0 where there are no per-layer embeddings.
    `sliding_window` counts the query's own position: key j is visible to query i iff 0 <= i - j < window.
    """

    family: str
    vocabulary: int
    hidden: int
    query_heads: int
    kv_heads: int
    sliding_window: int
    rope_sliding: Rope
    rope_full: Rope
    attention_scale: float
    rms_epsilon: float
    max_positions: int
    layers: tuple[Layer, ...]
    value_norm: bool = False
    layer_scalar: bool = False
    per_layer_width: int = 0
    logit_softcap: float | None = None
    tied_head: bool = True

    @property
    def embedding_scale(self) -> float:
        """What an embedding row is multiplied by: the square root of the hidden width."""
        return math.sqrt(self.hidden)

    def rope(self, attention: Attention) -> Rope:
        """Rotary parameters of an attention type."""
        return self.rope_sliding if attention == "sliding" else self.rope_full

    def owns_kv(self, index: int) -> bool:
        """Whether layer `index` computes and stores its own K and V."""
        return self.layers[index].kv_owner == index

    @property
    def owners(self) -> tuple[int, ...]:
        """Indices of the layers that own a KV cache, ascending."""
        return tuple(i for i in range(len(self.layers)) if self.owns_kv(i))

    def head_dim(self, attention: Attention) -> int:
        """Head width of an attention type (the same in all its layers); 0 if no layer has it."""
        return next((layer.head_dim for layer in self.layers if layer.attention == attention), 0)
