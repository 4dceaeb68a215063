"""Smoothing: scale moved from activations into weights, so that activations round better to int8.

XNNPACK rounds the input of every matrix to int8 with one scale per row, so one large channel costs all others
their precision. A channel of the input can be divided by any s > 0 if the matrix's column is multiplied by s.
For four types of input the division is free, because it goes into weights that exist anyway:

    attention_norm -> query, key, value        feed_forward_norm -> gate, up
    value -> output (one s for all query heads of a KV head)      up -> down

The computed function stays the same. The s of least rounding error of the inputs would make columns uneven,
so several powers of it are tried, including no change. The one with the least output error on sample inputs,
with inputs and weights rounded, is chosen. (Like SmoothQuant, Xiao et al. 2022, but with an optimum instead
of a fixed rule for s.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from converters.calibration.activations import round_activations
from converters.checkpoints.base import Checkpoint, LazyTensor
from converters.quantization import Floats, Format, quantize
from converters.reference_decoder import ReferenceDecoder, run_layer
from edge.bundles.architecture import Architecture

NORMED = ("output", "down", "per_layer_projection")
"""Matrices whose output is normed: an error counts relative to the norm of the output."""

_POWERS = (0.0, 0.75, 1.0)
_ITERATIONS = 8

_SAMPLE = 512
"""The number of inputs of a matrix used to measure a choice."""

_WEIGHT_SHARE = 0.25
"""The share of the error of nearest codes that error feedback leaves (measured: 0.1 to 0.4)."""

_TINY = np.float32(1e-6)
"""Values below this share of the largest are raised to it."""


@dataclass(frozen=True)
class SmoothingPoint:
    """An input that can be smoothed: the matrices that read it, and the weight that produces it.

    `producer` is a norm's vector or the rows of a matrix. The matrices have `groups` times `sharing` times
    some number of columns; the columns that share have one factor.
    """

    producer: str
    matrices: tuple[str, ...]
    groups: int = 1
    sharing: int = 1

    def possible(self, formats: Mapping[str, Format]) -> bool:
        """Whether new codes are chosen for all its matrices, the producer included; a norm has no codes."""
        return all(name in formats for name in self.matrices) and (
            self.producer.endswith("_norm") or self.producer in formats
        )


def smoothing_points(arch: Architecture, index: int) -> tuple[SmoothingPoint, ...]:
    """The smoothing points of a layer; tensor names are without the layer's prefix."""
    kv = ("key", "value") if arch.owns_kv(index) else ()
    points = [
        SmoothingPoint("attention_norm", ("query", *kv)),
        SmoothingPoint("feed_forward_norm", ("gate", "up")),
        SmoothingPoint("up", ("down",)),
    ]
    readers = sum(layer.kv_owner == index for layer in arch.layers)
    if kv and readers == 1 and not arch.value_norm:
        sharing = arch.query_heads // arch.kv_heads
        points.append(SmoothingPoint("value", ("output",), arch.kv_heads, sharing))
    return tuple(points)


class ScaledTensor(LazyTensor):
    """A tensor whose rows and columns are multiplied by factors, float32, as they are read."""

    def __init__(self, base: LazyTensor, rows: Floats | None, columns: Floats | None) -> None:
        self.name, self.shape, self.source_type = base.name, base.shape, base.source_type
        self._base, self._rows, self._columns = base, rows, columns

    def rows(self, start: int, stop: int) -> Floats:
        """See `LazyTensor.rows`."""
        values = self._base.rows(start, stop)
        if self._rows is not None:
            factors = self._rows[start:stop]
            values = values * (factors[:, None] if values.ndim == 2 else factors)
        return values if self._columns is None else values * self._columns


@dataclass(frozen=True)
class Smoothed:
    """A checkpoint that computes the same function with smoothed activations.

    `changed` of `tried` points were smoothed, because that lowered the error. `moment` is x^T x of the head's
    inputs, [hidden, hidden].
    """

    checkpoint: Checkpoint
    moment: Floats
    changed: int
    tried: int


def smooth(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    formats: Mapping[str, Format],
    advance: Callable[[str], None] = lambda _name: None,
) -> Smoothed:
    """Search the factors of every layer on `sequences`.

    `formats` are those of the tensors that will be quantised; others are not changed. `advance` is called
    with the name of each finished layer.
    """
    arch, decoder = checkpoint.architecture, ReferenceDecoder(checkpoint)
    streams, tensors, changed, tried = decoder.begin(sequences), dict(checkpoint.tensors), 0, 0
    step = max(1, sum(map(len, sequences)) // _SAMPLE)
    for index in range(len(arch.layers)):
        weights = decoder.layer_weights(index)
        own = {name: formats[at] for name in weights if (at := f"layers.{index}.{name}") in formats}
        points = [point for point in smoothing_points(arch, index) if point.possible(own)]
        samples = _Samples({point.matrices[0] for point in points}, step)
        for stream in streams:
            run_layer(arch, index, weights, stream, samples.multiply)
        factors = _Factors()
        for point in points:
            matrices = [_Matrix(weights[name], own[name]) for name in point.matrices]
            factors.add(point, _best(point, samples.inputs(point.matrices[0]), matrices))
        tensors |= factors.scaled({name: tensors[f"layers.{index}.{name}"] for name in weights}, index)
        changed, tried = changed + factors.points, tried + len(points)
        advance(f"layers.{index}")
    moment = np.zeros((arch.hidden, arch.hidden), np.float32)
    for stream in streams:
        x = round_activations(decoder.finish(stream))
        moment += x.T @ x
    return Smoothed(replace(checkpoint, tensors=tensors), moment, changed, tried)


class _Samples:
    """Samples of the inputs of some matrices, taken while a layer runs."""

    def __init__(self, names: Collection[str], step: int) -> None:
        self._parts: dict[str, list[Floats]] = {name: [] for name in names}
        self._step = step

    def multiply(self, name: str, x: Floats, weight: Floats) -> Floats:
        """Compute `x W^T` and keep every step-th row of x."""
        if name in self._parts:
            self._parts[name].append(x[:: self._step])
        return x @ weight.T

    def inputs(self, name: str) -> Floats:
        """The sampled rows, [m, in]."""
        return np.concatenate(self._parts[name])


class _Factors:
    """The factors of one layer's tensors."""

    def __init__(self) -> None:
        self.points = 0
        self._rows: dict[str, Floats] = {}
        self._columns: dict[str, Floats] = {}

    def add(self, point: SmoothingPoint, factors: tuple[Floats, Floats] | None) -> None:
        """Add (divisors of the producer's rows, factors of the matrices' columns), or None for no change."""
        if factors is None:
            return
        self.points += 1
        self._rows[point.producer] = np.float32(1) / factors[0]
        for name in point.matrices:
            self._columns[name] = factors[1]

    def scaled(self, tensors: Mapping[str, LazyTensor], index: int) -> dict[str, LazyTensor]:
        """The tensors of layer `index` that have factors, under their full names."""
        return {
            f"layers.{index}.{name}": ScaledTensor(tensor, self._rows.get(name), self._columns.get(name))
            for name, tensor in tensors.items()
            if name in self._rows or name in self._columns
        }


class _Matrix:
    """A matrix [out, in] and the error that smoothing its input by given factors leaves."""

    def __init__(self, weight: Floats, format: Format) -> None:
        self.weight, self._format = weight, format

    def error(self, x: Floats, columns: Floats, tokens: Floats) -> float:
        """Squared output error, weighted by `tokens`, if x is divided by `columns` and rounded."""
        divided, weight = x / columns, self.weight * columns
        of_inputs = (round_activations(divided) - divided) @ weight.T
        of_weights = divided @ (quantize(weight, self._format).dequantize() - weight).T
        squares = np.square(of_inputs).sum(axis=1) + _WEIGHT_SHARE * np.square(of_weights).sum(axis=1)
        return float(squares @ tokens)


def _best(point: SmoothingPoint, x: Floats, matrices: Sequence[_Matrix]) -> tuple[Floats, Floats] | None:
    """Factors of the producer's channels and of the matrices' columns; None if 1 is the best."""
    shape = point.groups, point.sharing, x.shape[1] // (point.groups * point.sharing)
    tokens: Floats = np.ones(len(x), np.float32)
    if point.matrices[0] in NORMED:
        tokens = tokens / _not_tiny(np.square(x @ matrices[0].weight.T).sum(axis=1))
    energy = np.sum([np.square(matrix.weight).sum(axis=0) for matrix in matrices], axis=0)
    balance = _balance(x, energy, tokens, shape)
    least, best = np.inf, None
    for power in _POWERS:
        channels = balance ** np.float32(power)
        columns = np.broadcast_to(channels[:, None], shape).reshape(-1)
        error = sum(matrix.error(x, columns, tokens) for matrix in matrices)
        if error < least:
            least, best = error, (channels.reshape(-1), columns) if power else None
    return best


def _balance(x: Floats, energy: Floats, tokens: Floats, shape: tuple[int, int, int]) -> Floats:
    """The factors of least rounding error of the inputs, [groups, channels]; weights are taken as exact.

    The error is the sum over tokens of range^2, times the sum over columns of factor^2 * energy. With the
    8-norm of a row as its range, the optimum is where each channel has equal shares in both sums; the
    fixed-point iteration takes one step for a single channel and a few for all together.
    """
    size, energy = _not_tiny(np.abs(x)), _not_tiny(energy)
    factors = np.ones((shape[0], shape[2]), np.float32)
    for _ in range(_ITERATIONS):
        columns = np.broadcast_to(factors[:, None], shape).reshape(-1)
        powers = size / columns
        largest = powers.max(axis=1, keepdims=True)
        powers /= largest
        for _ in range(3):
            np.square(powers, out=powers)
        sums = powers.sum(axis=1)
        ranges = np.square(largest[:, 0]) * sums ** np.float32(0.25) * tokens
        of_inputs = ((ranges / sums) @ powers).reshape(shape).sum(axis=1) / ranges.sum()
        of_weights = (np.square(columns) * energy).reshape(shape).sum(axis=1)
        factors = factors * (_not_tiny(of_inputs) * of_weights.sum() / of_weights) ** np.float32(0.1)
        factors /= np.exp(np.log(factors).mean())
    return factors.astype(np.float32)


def _not_tiny(values: Floats) -> Floats:
    """Values raised to a millionth of the largest where they are smaller; all 1 if all are 0."""
    largest = values.max()
    return np.maximum(values, largest * _TINY) if largest > 0 else np.ones_like(values)
