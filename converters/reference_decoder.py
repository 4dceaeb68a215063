"""A float32 decoder of a checkpoint in NumPy, the reference for converted bundles.

It shares no code with the graph builder or the runtime, keeps no cache and takes a whole sequence at a time,
so that each line can be compared with the formulas of the models. It follows transformers' `gemma3` and
`gemma4` modules (tests compare the logits); positions count from 0 at `<bos>`. Every Gemma layer computes

    x = x + norm(W_output attention(norm(x)))
    x = x + norm(W_down(gelu(W_gate m) * W_up m)),  m = norm(x)

and Gemma 4's then

    x = (x + norm(W_projection(gelu(W_per_layer_gate x) * p))) * layer_scalar,  p = per_layer_input[layer]

Weights are read a layer at a time and dropped again; the head is read in slices of rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from converters.architectures.tensor_shapes import layer_shapes
from converters.checkpoints.base import Checkpoint, LazyTensor
from edge.bundles.architecture import Architecture, Rope

Floats = NDArray[np.float32]
Linear = Callable[[str, Floats, Floats], Floats]
"""Multiplies the input [n, in] of the matrix of that name by the matrix [out, in]; gives [n, out]."""
Steps = Generator[tuple[tuple[str, ...], Floats], Sequence[Floats], None]
"""See `layer_steps`."""

HEAD_ROWS = 16384
PROJECTION = "per_layer_model_projection"


def multiply(_name: str, x: Floats, weight: Floats) -> Floats:
    """Compute `x W^T`. Calibration passes functions that also record x, or round it."""
    return x @ weight.T


def rms_norm(x: Floats, epsilon: float, weight: Floats | None = None) -> Floats:
    """`x / sqrt(mean(x^2) + epsilon)` over the last axis, times the weight if there is one."""
    normed: Floats = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + epsilon)
    return normed if weight is None else normed * weight


def gelu(x: Floats) -> Floats:
    """GELU in its tanh form: `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    result: Floats = 0.5 * x * (1 + np.tanh(inner))
    return result


def rotary_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float64]:
    """Radians per position of each of the head_dim / 2 pairs; 0 for pairs that do not turn (p-RoPE)."""
    frequencies: NDArray[np.float64] = rope.base ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    frequencies[int(rope.rotated_share * head_dim / 2) :] = 0
    return frequencies


def rotate(x: Floats, frequencies: NDArray[np.float64]) -> Floats:
    """Turn x [heads, n, head_dim] by its positions 0..n-1; pairs are (k, k + head_dim / 2)."""
    angles = np.arange(x.shape[1])[:, None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def visible(length: int, window: int | None) -> NDArray[np.bool_]:
    """Mask [query, key]: query i sees key j iff 0 <= i - j and, with a window, i - j < window."""
    distance = np.arange(length)[:, None] - np.arange(length)
    seen: NDArray[np.bool_] = distance >= 0
    return seen if window is None else seen & (distance < window)


def attend(query: Floats, key: Floats, value: Floats, mask: NDArray[np.bool_], scale: float) -> Floats:
    """Softmax attention. Query [heads, n, d], key and value [kv_heads, n, d]; gives [n, heads * d].

    Query head j uses KV head `j // (heads / kv_heads)`.
    """
    heads, length, size = query.shape
    grouped = query.reshape(key.shape[0], -1, length, size)
    scores = np.where(mask, grouped @ key[:, None].swapaxes(-1, -2) * scale, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: Floats = (weights @ value[:, None]).reshape(heads, length, size)
    return mixed.transpose(1, 0, 2).reshape(length, heads * size)


@dataclass
class Stream:
    """The state of one sequence between two layers.

    `x` is the residual stream [n, hidden]; `per_layer` the per-layer inputs [n, layers, width] of Gemma 4;
    `kv` holds K (normed and turned) and V, [kv_heads, n, head_dim], by the index of the layer that owns them.
    """

    x: Floats
    per_layer: Floats | None = None
    kv: dict[int, tuple[Floats, Floats]] = field(default_factory=dict)


def run_layer(
    arch: Architecture, index: int, weights: Mapping[str, Floats], stream: Stream, linear: Linear = multiply
) -> None:
    """Advance a stream by layer `index`. `weights` are named by `edge.bundles.architecture`."""
    steps = layer_steps(arch, index, weights, stream)
    with contextlib.suppress(StopIteration):
        names, x = next(steps)
        while True:
            names, x = steps.send([linear(name, x, weights[name]) for name in names])


def layer_steps(arch: Architecture, index: int, weights: Mapping[str, Floats], stream: Stream) -> Steps:
    """Advance a stream by layer `index`; the caller computes the matrix products.

    Yields the names of matrices and their common input [n, in]; send the outputs back. Other weights are
    looked up when needed.
    """

    def norm(x: Floats, name: str) -> Floats:
        return rms_norm(x, arch.rms_epsilon, weights[name])

    attended = yield from _attention(arch, index, weights, stream)
    stream.x = stream.x + norm(attended, "post_attention_norm")
    (down,) = yield ("down",), _gated(*(yield ("gate", "up"), norm(stream.x, "feed_forward_norm")))
    stream.x = stream.x + norm(down, "post_feed_forward_norm")
    if stream.per_layer is not None:
        (gate,) = yield ("per_layer_gate",), stream.x
        (projected,) = yield ("per_layer_projection",), gelu(gate) * stream.per_layer[:, index]
        stream.x = stream.x + norm(projected, "post_per_layer_norm")
    if arch.layer_scalar:
        stream.x = stream.x * weights["layer_scalar"]


def _gated(gate: Floats, up: Floats) -> Floats:
    return gelu(gate) * up


def _attention(
    arch: Architecture, index: int, weights: Mapping[str, Floats], stream: Stream
) -> Generator[tuple[tuple[str, ...], Floats], Sequence[Floats], Floats]:
    """Run the attention branch; K and V stay as long as a later layer reads them."""
    layer = arch.layers[index]
    frequencies = rotary_frequencies(arch.rope(layer.attention), layer.head_dim)
    names = ("query", "key", "value") if arch.owns_kv(index) else ("query",)
    outputs = yield names, rms_norm(stream.x, arch.rms_epsilon, weights["attention_norm"])
    heads = [x.reshape(len(x), -1, layer.head_dim).transpose(1, 0, 2) for x in outputs]
    query = rotate(rms_norm(heads[0], arch.rms_epsilon, weights["query_norm"]), frequencies)
    if arch.owns_kv(index):
        _, key, value = heads
        key = rotate(rms_norm(key, arch.rms_epsilon, weights["key_norm"]), frequencies)
        stream.kv[index] = key, rms_norm(value, arch.rms_epsilon) if arch.value_norm else value
    key, value = stream.kv[layer.kv_owner]
    if all(later.kv_owner != layer.kv_owner for later in arch.layers[index + 1 :]):
        del stream.kv[layer.kv_owner]
    mask = visible(len(stream.x), arch.sliding_window if layer.attention == "sliding" else None)
    (attended,) = yield ("output",), attend(query, key, value, mask, arch.attention_scale)
    return attended


class ReferenceDecoder:
    """Logits and hidden states of a checkpoint, in float32.

    Memory: one layer's weights, the sequences' activations and, for `logits`, n * vocabulary * 4 bytes.
    Reading may raise CheckpointError.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.arch = checkpoint.architecture
        self.tensors = checkpoint.tensors

    def layer_weights(self, index: int) -> dict[str, Floats]:
        """Read the tensors of one layer; their names are without the prefix."""
        return {
            name: self.tensors[f"layers.{index}.{name}"].array() for name in layer_shapes(self.arch, index)
        }

    def begin(self, sequences: Sequence[Sequence[int]], linear: Linear = multiply) -> list[Stream]:
        """Streams before the first layer: scaled embeddings and, for Gemma 4, the per-layer inputs.

        Raises ValueError for an id outside the vocabulary.
        """
        projection = norm = None
        if self.arch.per_layer_width:
            projection = self.tensors[PROJECTION].array()
            norm = self.tensors["per_layer_projection_norm"].array()
        streams = []
        for ids in sequences:
            stream = Stream(_gather(self.tensors["embedding"], ids) * self.arch.embedding_scale)
            if projection is not None and norm is not None:
                stream.per_layer = self._per_layer(ids, linear(PROJECTION, stream.x, projection), norm)
            streams.append(stream)
        return streams

    def _per_layer(self, ids: Sequence[int], projected: Floats, norm: Floats) -> Floats:
        """Per-layer inputs [n, layers, width]: token and context parts, `(context + token) / sqrt(2)`.

        Both tables are layer-major: entries i * width .. (i + 1) * width - 1 belong to layer i.
        """
        shape = (len(ids), len(self.arch.layers), self.arch.per_layer_width)
        context = (projected / self.arch.embedding_scale).reshape(shape)
        context = rms_norm(context, self.arch.rms_epsilon, norm)
        token = _gather(self.tensors["per_layer_embedding"], ids) * math.sqrt(self.arch.per_layer_width)
        return np.multiply(context + token.reshape(shape), np.float32(math.sqrt(0.5)))

    def finish(self, stream: Stream) -> Floats:
        """Apply the final norm; returns the input of the head, [n, hidden]."""
        return rms_norm(stream.x, self.arch.rms_epsilon, self.tensors["final_norm"].array())

    def run(self, streams: Sequence[Stream]) -> None:
        """Run streams through all layers; each layer is read once."""
        for index in range(len(self.arch.layers)):
            weights = self.layer_weights(index)
            for stream in streams:
                run_layer(self.arch, index, weights, stream)

    def hidden_states(self, sequences: Sequence[Sequence[int]]) -> list[Floats]:
        """Return each sequence's states [n, hidden] after the final norm."""
        streams = self.begin(sequences)
        self.run(streams)
        return [self.finish(stream) for stream in streams]

    def head(self, hidden: Floats) -> Floats:
        """Logits [n, vocabulary] of hidden states [n, hidden], softcapped if the model does that."""
        table = self.tensors["embedding" if self.arch.tied_head else "head"]
        logits = np.empty((len(hidden), self.arch.vocabulary), np.float32)
        for start in range(0, self.arch.vocabulary, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, self.arch.vocabulary)
            part = hidden @ table.rows(start, stop).T
            if self.arch.logit_softcap is not None:
                part = self.arch.logit_softcap * np.tanh(part / self.arch.logit_softcap)
            logits[:, start:stop] = part
        return logits

    def logits(self, ids: Sequence[int]) -> Floats:
        """Logits [n, vocabulary] at every position of one sequence."""
        return self.head(self.hidden_states([ids])[0])


def _gather(table: LazyTensor, ids: Sequence[int]) -> Floats:
    """Rows `ids` of a table, [n, width]; reads only those rows."""
    distinct, where = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    if distinct[0] < 0 or distinct[-1] >= table.shape[0]:
        raise ValueError(f"ids must lie in 0..{table.shape[0] - 1}, got {distinct[0]}..{distinct[-1]}")
    rows: Floats = np.concatenate([table.rows(int(n), int(n) + 1) for n in distinct])
    return rows[where]
