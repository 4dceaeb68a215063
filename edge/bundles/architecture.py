"""The dimensions of a decoder, as the runtime, the graph builder and the float reference share them.

One description covers Gemma 3 and Gemma 4: what a family lacks is zero, false or None.
Formulas are in `converters.reference_decoder`; names of tensors in `tensor_shapes` below.
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


def tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Our name and the shape, [out, in] for matrices, of every tensor that the decoder uses.

    Norm weights are the factor itself (Gemma 3's safetensors store it minus one).
    """
    hidden, width, count = arch.hidden, arch.per_layer_width, len(arch.layers)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (arch.vocabulary, hidden), "final_norm": (hidden,)}
    if not arch.tied_head:
        shapes["head"] = (arch.vocabulary, hidden)
    if width:
        shapes["per_layer_embedding"] = (arch.vocabulary, count * width)
        shapes["per_layer_model_projection"] = (count * width, hidden)
        shapes["per_layer_projection_norm"] = (width,)
    for index in range(count):
        for name, shape in layer_shapes(arch, index).items():
            shapes[f"layers.{index}.{name}"] = shape
    return shapes


def layer_shapes(arch: Architecture, index: int) -> dict[str, tuple[int, ...]]:
    """Name, without the `layers.N.` prefix, and shape of each tensor of one layer."""
    layer, hidden = arch.layers[index], arch.hidden
    queries, keys = arch.query_heads * layer.head_dim, arch.kv_heads * layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "query": (queries, hidden),
        "query_norm": (layer.head_dim,),
    }
    if arch.owns_kv(index):
        shapes |= {"key": (keys, hidden), "key_norm": (layer.head_dim,), "value": (keys, hidden)}
    shapes |= {
        "output": (hidden, queries),
        "post_attention_norm": (hidden,),
        "feed_forward_norm": (hidden,),
        "gate": (layer.feed_forward, hidden),
        "up": (layer.feed_forward, hidden),
        "down": (hidden, layer.feed_forward),
        "post_feed_forward_norm": (hidden,),
    }
    if arch.per_layer_width:
        shapes |= {
            "per_layer_gate": (arch.per_layer_width, hidden),
            "per_layer_projection": (hidden, arch.per_layer_width),
            "post_per_layer_norm": (hidden,),
        }
    if arch.layer_scalar:
        shapes["layer_scalar"] = (1,)
    return shapes
