"""A decoder's layers as TFLite signatures that share every weight.

Signatures (T is a number of tokens):

    decode, verify   embeddings, rotary tables, masks, caches -> hidden [1,T,D] and new K, V rows
    prefill_T        the same inputs, the layers that own KV only -> new K, V rows
    head, head_T     hidden [1,T,D] -> logits [1,T,V] (before the softcap, which the runtime applies)

Inputs: `embeddings` [1,T,D] (scaled), `cos_A`, `sin_A` [1,T,1,head_dim] and `mask_A` [1,1,T,rows+T] per
attention type A (0 where visible, very negative elsewhere), `key_i`, `value_i` [1,kv,rows,head_dim] per
layer i that owns KV, `per_layer` [1,T,layers*width] (scaled rows of the per-layer table). The number
of rows is dynamic, one for each attention type. Outputs: `hidden` after the final norm, `new_key_i`,
`new_value_i` [1,kv,T,head_dim].
The caller stores new rows: no cache is copied or written in the graph.

The matrices are those of `converters.weight_layout`.
The first half of `sin_A` is negated, so that rope(x) = x * cos + swap_halves(x) * sin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.tflite.graph import DYNAMIC, Graph, Model, Tensor, Weight
from edge.bundles.architecture import Architecture, Attention

Vector = Callable[[str], NDArray[np.float32]]
"""Returns the values, float32, of a small tensor (norm, scalar) by name."""


@dataclass(frozen=True)
class Widths:
    """Tokens per run: of the verify signature, and of each prefill signature, ascending."""

    verify: int
    prefill: tuple[int, ...]


def widths_of(arch: Architecture) -> Widths:
    """The widths of a model's signatures: verify passes of 8 tokens and prefill chunks of 64.

    Chunks of 128 are no faster and need 10 MB more working memory. If every layer owns KV, verify does the
    same work as prefill, so short chunks use it: another signature would take 5 MB.
    """
    return Widths(8, (64,) if len(arch.owners) == len(arch.layers) else (8, 64))


def build(arch: Architecture, widths: Widths, weights: Mapping[str, Weight], vector: Vector) -> Model:
    """Build all signatures. `weights` has every matrix of the `WeightLayout`."""
    model = Model(f"{arch.family} decoder")
    for key, width in (("decode", 1), ("verify", widths.verify)):
        _Decoder(model.graph(key), arch, width, weights, vector).whole()
    for width in widths.prefill:
        _Decoder(model.graph(f"prefill_{width}"), arch, width, weights, vector).kv_only()
    for key, width in (("head", 1), ("head_verify", widths.verify)):
        graph = model.graph(key)
        hidden = graph.input("hidden", (1, width, arch.hidden))
        graph.output("logits", graph.fully_connected(hidden, weights["head"]))
    return model


class _Decoder:
    """Builds one signature of `width` tokens."""

    def __init__(
        self, graph: Graph, arch: Architecture, width: int, weights: Mapping[str, Weight], vector: Vector
    ) -> None:
        self.g, self.arch, self.width, self.weights, self.vector = graph, arch, width, weights, vector
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}
        self.fresh: dict[int, tuple[Tensor, Tensor]] = {}
        self.tables: dict[Attention, tuple[Tensor, Tensor, Tensor]] = {}

    def whole(self) -> None:
        """All layers and the final norm."""
        x = self._layers(range(len(self.arch.layers)))
        self.g.output("hidden", self._norm(x, self._constant("final_norm")))

    def kv_only(self) -> None:
        """The layers that own KV; the last one only up to its K and V."""
        self._layers(range(self.arch.owners[-1] + 1), last_stores_only=True)

    def _layers(self, indices: range, last_stores_only: bool = False) -> Tensor:
        x = self.g.input("embeddings", (1, self.width, self.arch.hidden))
        per_layer = self._per_layer_inputs(x) if self.arch.per_layer_width else None
        for i in indices:
            normed = self._norm(x, self._constant(f"layers.{i}.attention_norm"))
            queries = self._project(i, normed)
            if last_stores_only and i == indices[-1]:
                break
            x = self._block(i, x, queries, per_layer)
        for i, (key, value) in self.fresh.items():
            self.g.output(f"new_key_{i}", key)
            self.g.output(f"new_value_{i}", value)
        return x

    def _block(self, i: int, x: Tensor, queries: Tensor, per_layer: Tensor | None) -> Tensor:
        g, at = self.g, f"layers.{i}."
        attended = g.fully_connected(self._attend(i, queries), self.weights[f"{at}output"])
        x = g.add(x, self._norm(attended, self._constant(f"{at}post_attention_norm")))
        x = g.add(x, self._norm(self._feed_forward(i, x), self._constant(f"{at}post_feed_forward_norm")))
        if per_layer is not None:
            x = g.add(x, self._per_layer_branch(i, x, per_layer))
        if self.arch.layer_scalar:
            x = g.mul(x, self._constant(f"{at}layer_scalar"))
        return x

    def _project(self, i: int, normed: Tensor) -> Tensor:
        """Queries [1,kv,G*T,head_dim]; stores K and V [1,kv,T,head_dim] if the layer owns them.

        The heads of Q, K and V are normed together, those of Q and K rotated together: each operator costs
        2.5 KB of memory in every signature.
        """
        g, arch, layer = self.g, self.arch, self.arch.layers[i]
        own = arch.kv_heads if arch.owns_kv(i) else 0
        turning = arch.query_heads + own
        heads = self._heads(g.fully_connected(normed, self.weights[f"layers.{i}.qkv"]), turning + own)
        heads = self._norm(heads) if arch.value_norm else heads
        turned = g.slice(heads, 0, turning, axis=2) if own else heads
        turned = turned if arch.value_norm else self._norm(turned)
        turned = self._rope(g.mul(turned, self._head_norms(i, own)), layer.attention)
        queries = turned
        if own:
            queries = g.slice(turned, 0, arch.query_heads, axis=2)
            key, value = g.slice(turned, -own, None, axis=2), g.slice(heads, -own, None, axis=2)
            self.fresh[i] = self._heads_first(key), self._heads_first(value)
        groups = arch.query_heads // arch.kv_heads
        return g.reshape(self._heads_first(queries), (1, arch.kv_heads, groups * self.width, layer.head_dim))

    def _head_norms(self, i: int, own: int) -> Tensor:
        """The norm weight of each head of Q, attention scale included, and of K: [heads, head_dim]."""
        query = self.vector(f"layers.{i}.query_norm") * np.float32(self.arch.attention_scale)
        rows = [query] * self.arch.query_heads
        rows += [self.vector(f"layers.{i}.key_norm") for _ in range(own)]
        return self.g.constant(np.stack(rows))

    def _attend(self, i: int, queries: Tensor) -> Tensor:
        """Attention over the cache and the tokens of this run: [1,T,heads*head_dim]."""
        g, arch, layer = self.g, self.arch, self.arch.layers[i]
        owner, width, heads = layer.kv_owner, self.width, arch.query_heads
        keys, values = self._cache(owner)
        new_key, new_value = self.fresh[owner]
        old = g.matmul(queries, keys, transpose_b=True)
        scores = g.concat([old, g.matmul(queries, new_key, transpose_b=True)])
        flat, columns = scores.shape, scores.shape[-1]
        if flat[2] != heads // arch.kv_heads or arch.kv_heads > 1:
            scores = g.reshape(scores, (1, heads, width, columns))
        weights = g.softmax(g.add(scores, self._table(layer.attention)[2]))
        weights = g.reshape(weights, flat)
        mixed = g.add(
            g.matmul(g.slice(weights, 0, -width), values),
            g.matmul(g.slice(weights, -width, None), new_value),
        )
        mixed = g.reshape(mixed, (1, heads, width, layer.head_dim))
        if width > 1:
            mixed = g.transpose(mixed, (0, 2, 1, 3))
        return g.reshape(mixed, (1, width, heads * layer.head_dim))

    def _feed_forward(self, i: int, x: Tensor) -> Tensor:
        g, at, width = self.g, f"layers.{i}.", self.arch.layers[i].feed_forward
        normed = self._norm(x, self._constant(f"{at}feed_forward_norm"))
        both = g.fully_connected(normed, self.weights[f"{at}gate_up"])
        gated = g.mul(g.gelu(g.slice(both, 0, width)), g.slice(both, width, 2 * width))
        return g.fully_connected(gated, self.weights[f"{at}down"])

    def _per_layer_inputs(self, x: Tensor) -> Tensor:
        """Each token's input to every layer's per-layer branch: [1,T,layers,width]."""
        g, arch = self.g, self.arch
        shape = (1, self.width, len(arch.layers), arch.per_layer_width)
        rows = g.reshape(g.input("per_layer", (1, self.width, shape[2] * shape[3])), shape)
        context = g.mul(x, g.scalar(1 / arch.embedding_scale))
        context = g.reshape(g.fully_connected(context, self.weights["per_layer_model_projection"]), shape)
        context = self._norm(context, self._constant("per_layer_projection_norm"))
        both = g.mul(g.add(context, rows), g.scalar(2**-0.5))
        return g.reshape(both, (1, self.width, shape[2] * shape[3]))

    def _per_layer_branch(self, i: int, x: Tensor, per_layer: Tensor) -> Tensor:
        g, at, width = self.g, f"layers.{i}.", self.arch.per_layer_width
        mine = g.slice(per_layer, i * width, (i + 1) * width)
        gated = g.mul(g.gelu(g.fully_connected(x, self.weights[f"{at}per_layer_gate"])), mine)
        projected = g.fully_connected(gated, self.weights[f"{at}per_layer_projection"])
        return self._norm(projected, self._constant(f"{at}post_per_layer_norm"))

    def _norm(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x / sqrt(mean(x^2) + eps), times `weight`; over the last axis."""
        g = self.g
        power = g.add(g.mean(g.mul(x, x)), g.scalar(self.arch.rms_epsilon))
        normed = g.mul(x, g.rsqrt(power))
        return normed if weight is None else g.mul(normed, weight)

    def _rope(self, x: Tensor, attention: Attention) -> Tensor:
        """Rotates [1,T,heads,head_dim] by each token's position."""
        g, half = self.g, x.shape[-1] // 2
        cos, sin, _ = self._table(attention)
        swapped = g.concat([g.slice(x, half, 2 * half), g.slice(x, 0, half)])
        return g.add(g.mul(x, cos), g.mul(swapped, sin))

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return self.g.reshape(x, (1, self.width, heads, x.shape[-1] // heads))

    def _heads_first(self, x: Tensor) -> Tensor:
        _, width, heads, head_dim = x.shape
        if width == 1 or heads == 1:
            return self.g.reshape(x, (1, heads, width, head_dim))
        return self.g.transpose(x, (0, 2, 1, 3))

    def _constant(self, name: str) -> Tensor:
        return self.g.constant(self.vector(name))

    def _table(self, attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
        if attention not in self.tables:
            rotary = (1, self.width, 1, self.arch.head_dim(attention))
            self.tables[attention] = (
                self.g.input(f"cos_{attention}", rotary),
                self.g.input(f"sin_{attention}", rotary),
                self.g.input(f"mask_{attention}", (1, 1, self.width, DYNAMIC)),
            )
        return self.tables[attention]

    def _cache(self, owner: int) -> tuple[Tensor, Tensor]:
        if owner not in self.caches:
            layer = self.arch.layers[owner]
            shape = (1, self.arch.kv_heads, DYNAMIC, layer.head_dim)
            self.caches[owner] = (
                self.g.input(f"key_{owner}", shape),
                self.g.input(f"value_{owner}", shape),
            )
        return self.caches[owner]
