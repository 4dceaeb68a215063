"""Bits where they matter: the formats that cost least fidelity among those that fit a number of bytes.

For each matrix and table it is measured how far the model's distribution moves on a piece of text (KL
divergence) if that one alone is int4. In another format it moves as much more or less as the squared error
at the matrix's outputs is; that holds for small errors, and so do sums over matrices. Then bytes go, step by
step, where a byte mends most. Formats are int2 and int8 per channel, and int4 in blocks of 32 (XNNPACK has
no blocks of int2); Gemma 4's per-layer table has a scale for each layer's part of a row.

The text runs through the layers once: each changed matrix has a stream of its own from its layer on. Memory
is one layer's weights, a stream for each matrix and the logits of a few hundred positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from converters.checkpoints.base import Checkpoint, LazyTensor
from converters.decoder_graph import matrix_shapes, stacked_matrices
from converters.quantization import Floats, Format, quantize
from converters.recipes import Plan
from converters.reference_decoder import HEAD_ROWS, PROJECTION, ReferenceDecoder, Stream, run_layer
from edge.bundles.architecture import Architecture
from edge.errors import EdgeError

_MATRIX_FORMATS = (Format(4, 32), Format(2), Format(8))
_TABLE_FORMATS = (Format(4), Format(2), Format(8))
"""What a matrix, or the per-layer table, may be; the first of them is tried on the model."""

_TOKENS = 256
_POSITIONS = 32
"""How many of the tokens' distributions are compared."""

_BATCH = 8
"""Streams whose logits are in memory at a time."""


@dataclass(frozen=True)
class Choice:
    """A format that a matrix or table may have: the bytes it takes and the divergence it brings, in nats."""

    format: Format
    bytes: int
    damage: float


def spend(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice for each name, at most `budget` bytes in all, with little damage in all.

    Begins with the smallest ones and takes the step that mends most per byte until none fits: if the smallest
    do not fit, these are returned all the same.
    """
    chosen = {name: min(options, key=lambda one: one.bytes) for name, options in choices.items()}
    left = budget - sum(one.bytes for one in chosen.values())
    while True:
        steps = [
            ((chosen[name].damage - option.damage) / (option.bytes - chosen[name].bytes), name, option)
            for name, options in choices.items()
            for option in options
            if 0 < option.bytes - chosen[name].bytes <= left and option.damage < chosen[name].damage
        ]
        if not steps:
            return chosen
        _, name, option = max(steps, key=lambda step: step[0])
        left -= option.bytes - chosen[name].bytes
        chosen[name] = option


def plan_within(
    budget: int,
    checkpoint: Checkpoint,
    ids: Sequence[int],
    size_of: Callable[[Plan], int],
    advance: Callable[[str, float], None] = lambda _name, _share: None,
) -> tuple[Plan, dict[str, object]]:
    """The formats for a bundle of at most `budget` bytes, and what the manifest tells of the choice.

    `ids` and `advance` are as for `damages`; `size_of` tells a bundle's size. Raises EdgeError if none is so
    small.
    """
    arch = checkpoint.architecture
    smallest = size_of(_plan(arch, {name: formats_of(name)[1] for name in _shapes(arch)}))
    if smallest > budget:
        raise EdgeError(
            f"--budget {budget / 1e6:.1f}MB: no bundle of this model is so small;"
            f" --budget {math.ceil(smallest / 1e6)}MB would do, all int2, and --recipe int4-all says more"
        )
    found = damages(checkpoint, ids, advance)
    choices = {
        name: [
            Choice(format, format.stored_bytes(*shape), found[name][format]) for format in formats_of(name)
        ]
        for name, shape in _shapes(arch).items()
    }
    beside = 0
    while True:
        chosen = spend(choices, budget - beside)
        plan = _plan(arch, {name: one.format for name, one in chosen.items()})
        over = size_of(plan) - budget
        if over <= 0:
            break
        beside += max(over, budget // 1000)  # what stands beside the codes depends a little on the formats
    notes = {
        "budget": budget,
        "divergence": round(sum(one.damage for one in chosen.values()), 5),
        "formats": {name: str(one.format) for name, one in chosen.items()},
    }
    return plan, notes


def _shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Rows and columns of each matrix and table; a row shares a scale where there are no blocks."""
    shapes = matrix_shapes(arch)
    if arch.per_layer_width:
        shapes["per_layer_embedding"] = arch.vocabulary * len(arch.layers), arch.per_layer_width
    return shapes if arch.tied_head else shapes | {"embedding": (arch.vocabulary, arch.hidden)}


def _plan(arch: Architecture, formats: Mapping[str, Format]) -> Plan:
    matrices = {name: formats[name] for name in matrix_shapes(arch)}
    return Plan(matrices, formats.get("per_layer_embedding", Format(8)), formats.get("embedding", Format(8)))


def damages(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    advance: Callable[[str, float], None] = lambda _name, _share: None,
) -> dict[str, dict[Format, float]]:
    """The divergence that each matrix of `stacked_matrices` and each table brings in each format, in nats.

    `ids` are those of a text, of which the first few hundred are used. `advance` is told each layer that is
    done, and its share of the work.
    """
    probe = _Probe(checkpoint, ids[:_TOKENS])
    count = len(checkpoint.architecture.layers)
    for index in range(count):
        probe.layer(index)
        advance(f"layers.{index}", 1 / count)
    return probe.damages()


class _Probe:
    """A sequence on its way through the layers as it is, and once for each matrix that was changed so far."""

    def __init__(self, checkpoint: Checkpoint, ids: Sequence[int]) -> None:
        self._arch = checkpoint.architecture
        self._decoder = ReferenceDecoder(checkpoint)
        (self._clean,) = self._decoder.begin([ids])
        self._changed: dict[str, Stream] = {}
        self._relative: dict[str, dict[Format, float]] = {}
        for name in ("embedding", "per_layer_embedding", PROJECTION):
            if name in checkpoint.tensors:
                self._begin(checkpoint, name, ids)
        self._changed_head = ReferenceDecoder(_with_nearest(checkpoint, self._head))

    @property
    def _head(self) -> str:
        return "embedding" if self._arch.tied_head else "head"

    def layer(self, index: int) -> None:
        """Take all streams through a layer, and begin those of its own matrices."""
        weights = self._decoder.layer_weights(index)
        inputs: dict[str, Floats] = {}

        def note(name: str, x: Floats, weight: Floats) -> Floats:
            inputs[name] = x
            return x @ weight.T

        for stream in self._changed.values():
            run_layer(self._arch, index, weights, stream)
        before = self._clean
        self._clean = replace(before, kv=dict(before.kv))
        run_layer(self._arch, index, weights, self._clean, note)
        for matrix, tensors in stacked_matrices(self._arch).items():
            if matrix.startswith(f"layers.{index}."):
                parts = {name.rpartition(".")[2]: weights[name.rpartition(".")[2]] for name in tensors}
                self._relative[matrix] = _relative(parts.values(), _MATRIX_FORMATS, inputs[next(iter(parts))])
                changed = {name: _nearest(part, _MATRIX_FORMATS[0]) for name, part in parts.items()}
                self._changed[matrix] = stream = replace(before, kv=dict(before.kv))
                run_layer(self._arch, index, {**weights, **changed}, stream)

    def damages(self) -> dict[str, dict[Format, float]]:
        """See the function of this name."""
        hidden = {name: self._hidden(stream) for name, stream in self._changed.items()}
        clean = self._hidden(self._clean)
        expected = self._decoder.head(clean)
        found = {"head": _divergence(expected, self._changed_head.head(hidden.pop("embedding", clean)))}
        names = list(hidden)
        for start in range(0, len(names), _BATCH):
            some = names[start : start + _BATCH]
            logits = self._decoder.head(np.concatenate([hidden[name] for name in some]))
            for name, part in zip(some, np.split(logits, len(some)), strict=True):
                found[name] = _divergence(expected, part)
        some_rows = self._decoder.tensors[self._head].rows(0, min(HEAD_ROWS, self._arch.vocabulary))
        self._relative["head"] = _relative([some_rows], _MATRIX_FORMATS, clean)
        return {
            name: {format: damage * share for format, share in self._relative[name].items()}
            for name, damage in found.items()
        }

    def _begin(self, checkpoint: Checkpoint, name: str, ids: Sequence[int]) -> None:
        """Begin the stream of a tensor that is used before the first layer."""
        (stream,) = ReferenceDecoder(_with_nearest(checkpoint, name)).begin([ids])
        self._changed[name] = stream
        tensor, used = checkpoint.tensors[name], sorted(set(ids))
        rows = tensor.array() if name == PROJECTION else np.concatenate([tensor.rows(i, i + 1) for i in used])
        self._relative[name] = _relative([rows.reshape(-1, _width(checkpoint, name))], formats_of(name))

    def _hidden(self, stream: Stream) -> Floats:
        """Final states at some positions of the later half."""
        last = self._decoder.finish(stream)
        return last[len(last) // 2 :: max(1, len(last) // 2 // _POSITIONS)]


def formats_of(name: str) -> tuple[Format, ...]:
    """The formats that a matrix or table may have."""
    return _TABLE_FORMATS if name == "per_layer_embedding" else _MATRIX_FORMATS


def _width(checkpoint: Checkpoint, name: str) -> int:
    """Columns that may share a scale."""
    whole = checkpoint.tensors[name].shape[1]
    return checkpoint.architecture.per_layer_width if name == "per_layer_embedding" else whole


def _nearest(values: Floats, format: Format) -> Floats:
    return quantize(values, format).dequantize()


class _Nearest(LazyTensor):
    """A matrix as its nearest codes have it."""

    def __init__(self, base: LazyTensor, format: Format, width: int) -> None:
        self.name, self.shape, self.source_type = base.name, base.shape, base.source_type
        self._base, self._format, self._width = base, format, width

    def rows(self, start: int, stop: int) -> Floats:
        values = self._base.rows(start, stop)
        return _nearest(values.reshape(-1, self._width), self._format).reshape(values.shape)


def _with_nearest(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint with a tensor in the format that is tried."""
    changed = _Nearest(checkpoint.tensors[name], formats_of(name)[0], _width(checkpoint, name))
    return replace(checkpoint, tensors={**checkpoint.tensors, name: changed})


def _relative(
    parts: Iterable[Floats], formats: Sequence[Format], x: Floats | None = None
) -> dict[Format, float]:
    """Squared error of each format over that of the first: of values, or of what they make of inputs x."""
    errors = dict.fromkeys(formats, 0.0)
    for part in parts:
        for format in formats:
            lost = _nearest(part, format) - part
            lost = lost if x is None else x @ lost.T
            errors[format] += float(np.square(lost).sum(dtype=np.float64))
    return {format: error / (errors[formats[0]] or 1.0) for format, error in errors.items()}


def _divergence(expected: Floats, found: Floats) -> float:
    """Mean Kullback-Leibler divergence of distributions whose logits are rows."""
    p, q = _log_softmax(expected), _log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=-1, dtype=np.float64).mean())


def _log_softmax(logits: Floats) -> Floats:
    shifted: Floats = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
