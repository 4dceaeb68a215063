"""Mixed precision: the formats with the highest fidelity within a budget of bytes.

The sensitivity of a matrix or table is the change of the model's distribution on a text (KL divergence) if
only this one is int4. For the other formats it is scaled by their squared error at the matrix's outputs.
Errors are small enough for both the scaling and sums over matrices to hold. Starting from the smallest
formats, bytes are then spent where each one lowers the divergence most.

Formats are int2 and int8 per channel and int4 in blocks of 32 (XNNPACK has no blockwise int2). In Gemma 4's
per-layer table, each layer's part of a row has a scale.

The text runs through the layers once: each quantised matrix has a stream of its own from its layer on. Memory
holds one layer's weights, a stream for each matrix, and the logits of a few hundred positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from converters.checkpoints.base import Checkpoint, LazyTensor
from converters.quantization import Floats, Format, quantize
from converters.recipes import Plan
from converters.reference_decoder import HEAD_ROWS, PROJECTION, ReferenceDecoder, Stream, run_layer
from converters.weight_layout import WeightLayout
from edge.errors import EdgeError

_MATRIX_FORMATS = (Format(4, 32), Format(2), Format(8))
_TABLE_FORMATS = (Format(4), Format(2), Format(8))
"""The formats of a matrix and of the per-layer table. The first one is measured on the model."""

_TOKENS = 256
_POSITIONS = 32
"""The number of tokens whose distributions are compared."""

_BATCH = 8
"""The number of streams whose logits are in memory at a time."""


@dataclass(frozen=True)
class FormatOption:
    """A format for a matrix or table, its size in bytes, and the divergence that it causes, in nats."""

    format: Format
    bytes: int
    divergence: float


def choose_formats(options: Mapping[str, Sequence[FormatOption]], budget: int) -> dict[str, FormatOption]:
    """Choose one option for each name, at most `budget` bytes in total, with a low total divergence.

    Starts with the smallest options and takes the step that lowers the divergence most per byte until none
    fits. If the smallest options do not fit, they are returned all the same.
    """
    chosen = {name: min(of_name, key=lambda option: option.bytes) for name, of_name in options.items()}
    left = budget - sum(option.bytes for option in chosen.values())
    while True:
        steps = [
            ((now.divergence - option.divergence) / (option.bytes - now.bytes), name, option)
            for name, now in chosen.items()
            for option in options[name]
            if 0 < option.bytes - now.bytes <= left and option.divergence < now.divergence
        ]
        if not steps:
            return chosen
        _, name, option = max(steps, key=lambda step: step[0])
        left -= option.bytes - chosen[name].bytes
        chosen[name] = option


def plan_within(
    budget: int,
    checkpoint: Checkpoint,
    layout: WeightLayout,
    ids: Sequence[int],
    size_of: Callable[[Plan], int],
    advance: Callable[[str, float], None] = lambda _name, _share: None,
) -> tuple[Plan, dict[str, object]]:
    """The plan of a bundle of at most `budget` bytes, and what the manifest records of the choice.

    `ids` and `advance` are as in `sensitivities`; `size_of` gives the size of a plan's bundle. Raises
    EdgeError if even the smallest bundle is larger than the budget.
    """
    smallest = size_of(Plan(layout, {name: formats_of(name)[1] for name in layout.weights}))
    if smallest > budget:
        raise EdgeError(
            f"--budget {budget / 1e6:.1f}MB: too small for this model; the least is"
            f" --budget {math.ceil(smallest / 1e6)}MB, all int2; --recipe int4-all preserves more quality"
        )
    found = sensitivities(checkpoint, layout, ids, advance)
    options = {
        name: [
            FormatOption(format, format.stored_bytes(*stored.shape), found[name][format])
            for format in formats_of(name)
        ]
        for name, stored in layout.weights.items()
    }
    overhead = 0
    while True:
        chosen = choose_formats(options, budget - overhead)
        plan = Plan(layout, {name: option.format for name, option in chosen.items()})
        excess = size_of(plan) - budget
        if excess <= 0:
            break
        overhead += max(excess, budget // 1000)  # the rest of the bundle depends slightly on the formats
    notes = {
        "budget": budget,
        "divergence": round(sum(option.divergence for option in chosen.values()), 5),
        "formats": {name: str(option.format) for name, option in chosen.items()},
    }
    return plan, notes


def sensitivities(
    checkpoint: Checkpoint,
    layout: WeightLayout,
    ids: Sequence[int],
    advance: Callable[[str, float], None] = lambda _name, _share: None,
) -> dict[str, dict[Format, float]]:
    """The divergence that each matrix and table of `layout` causes in each of its formats, in nats.

    `ids` are those of a text, of which the first few hundred are used. `advance` is called after each layer
    with its name and its share of the work.
    """
    probe = _Probe(checkpoint, layout, ids[:_TOKENS])
    count = len(checkpoint.architecture.layers)
    for index in range(count):
        probe.layer(index)
        advance(f"layers.{index}", 1 / count)
    return probe.sensitivities()


class _Probe:
    """A sequence between two layers: unchanged, and once for each matrix quantised so far."""

    def __init__(self, checkpoint: Checkpoint, layout: WeightLayout, ids: Sequence[int]) -> None:
        self._arch, self._layout = checkpoint.architecture, layout
        self._decoder = ReferenceDecoder(checkpoint)
        (self._exact,) = self._decoder.begin([ids])
        self._quantized: dict[str, Stream] = {}
        self._relative: dict[str, dict[Format, float]] = {}
        for name in ("embedding", "per_layer_embedding", PROJECTION):
            if name in checkpoint.tensors:
                self._begin(checkpoint, name, ids)
        self._head = "embedding" if self._arch.tied_head else "head"
        self._quantized_head = ReferenceDecoder(self._with_nearest_codes(checkpoint, self._head))

    def layer(self, index: int) -> None:
        """Run all streams through a layer, and start those of its own matrices."""
        weights = self._decoder.layer_weights(index)
        inputs: dict[str, Floats] = {}

        def record(name: str, x: Floats, weight: Floats) -> Floats:
            inputs[name] = x
            return x @ weight.T

        for stream in self._quantized.values():
            run_layer(self._arch, index, weights, stream)
        before = self._exact
        self._exact = replace(before, kv=dict(before.kv))
        run_layer(self._arch, index, weights, self._exact, record)
        for name, matrix in self._layout.matrices.items():
            if name.startswith(f"layers.{index}."):
                inner = [tensor.rpartition(".")[2] for tensor in matrix.tensors]
                parts = {tensor: weights[tensor] for tensor in inner}
                self._relative[name] = _relative_errors(parts.values(), _MATRIX_FORMATS, inputs[inner[0]])
                nearest = {tensor: _nearest(part, _MATRIX_FORMATS[0]) for tensor, part in parts.items()}
                self._quantized[name] = stream = replace(before, kv=dict(before.kv))
                run_layer(self._arch, index, {**weights, **nearest}, stream)

    def sensitivities(self) -> dict[str, dict[Format, float]]:
        """See the function of this name; call it after the last layer."""
        hidden = {name: self._hidden(stream) for name, stream in self._quantized.items()}
        exact = self._hidden(self._exact)
        expected = self._decoder.head(exact)
        # A tied embedding is quantised at both ends.
        at_head = exact if "embedding" in self._layout.tables else hidden.pop("embedding")
        found = {"head": _divergence(expected, self._quantized_head.head(at_head))}
        names = list(hidden)
        for start in range(0, len(names), _BATCH):
            batch = names[start : start + _BATCH]
            logits = self._decoder.head(np.concatenate([hidden[name] for name in batch]))
            for name, part in zip(batch, np.split(logits, len(batch)), strict=True):
                found[name] = _divergence(expected, part)
        head_rows = self._decoder.tensors[self._head].rows(0, min(HEAD_ROWS, self._arch.vocabulary))
        self._relative["head"] = _relative_errors([head_rows], _MATRIX_FORMATS, exact)
        return {
            name: {format: divergence * relative for format, relative in self._relative[name].items()}
            for name, divergence in found.items()
        }

    def _begin(self, checkpoint: Checkpoint, name: str, ids: Sequence[int]) -> None:
        """Start the stream of a tensor that is used before the first layer."""
        (stream,) = ReferenceDecoder(self._with_nearest_codes(checkpoint, name)).begin([ids])
        self._quantized[name] = stream
        tensor, used = checkpoint.tensors[name], sorted(set(ids))
        rows = tensor.array() if name == PROJECTION else np.concatenate([tensor.rows(i, i + 1) for i in used])
        self._relative[name] = _relative_errors(
            [rows.reshape(-1, self._layout.columns[name])], formats_of(name)
        )

    def _hidden(self, stream: Stream) -> Floats:
        """Final states at some positions of the second half."""
        last = self._decoder.finish(stream)
        return last[len(last) // 2 :: max(1, len(last) // 2 // _POSITIONS)]

    def _with_nearest_codes(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """The checkpoint with one tensor in the format that is measured."""
        quantized = _NearestCodes(checkpoint.tensors[name], formats_of(name)[0], self._layout.columns[name])
        return replace(checkpoint, tensors={**checkpoint.tensors, name: quantized})


def formats_of(name: str) -> tuple[Format, ...]:
    """The formats that are available for a matrix or table."""
    return _TABLE_FORMATS if name == "per_layer_embedding" else _MATRIX_FORMATS


def _nearest(values: Floats, format: Format) -> Floats:
    return quantize(values, format).dequantize()


class _NearestCodes(LazyTensor):
    """The values of a matrix after quantisation to its nearest codes."""

    def __init__(self, base: LazyTensor, format: Format, width: int) -> None:
        self.name, self.shape, self.source_type = base.name, base.shape, base.source_type
        self._base, self._format, self._width = base, format, width

    def rows(self, start: int, stop: int) -> Floats:
        values = self._base.rows(start, stop)
        return _nearest(values.reshape(-1, self._width), self._format).reshape(values.shape)


def _relative_errors(
    parts: Iterable[Floats], formats: Sequence[Format], x: Floats | None = None
) -> dict[Format, float]:
    """The squared error of each format relative to the first one's: of values, or of outputs for inputs x."""
    errors = dict.fromkeys(formats, 0.0)
    for part in parts:
        for format in formats:
            difference = _nearest(part, format) - part
            difference = difference if x is None else x @ difference.T
            errors[format] += float(np.square(difference).sum(dtype=np.float64))
    return {format: error / (errors[formats[0]] or 1.0) for format, error in errors.items()}


def _divergence(expected: Floats, logits: Floats) -> float:
    """Mean Kullback-Leibler divergence of distributions whose logits are rows."""
    p, q = _log_softmax(expected), _log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=-1, dtype=np.float64).mean())


def _log_softmax(logits: Floats) -> Floats:
    shifted: Floats = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
