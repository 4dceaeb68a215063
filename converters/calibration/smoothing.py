"""Kinder activations: factors moved between a matrix and what feeds it, so that int8 rows hold more.

XNNPACK rounds the input of every matrix to int8, one scale a row, so one large channel costs all others their
precision. A channel's input may be divided by any s > 0 if the matrix's column is multiplied by it, and four
kinds of input can be divided for nothing, because the factor goes into weights that are there anyway:

    attention_norm -> query, key, value        feed_forward_norm -> gate, up
    value -> output (one s for all query heads of a KV head)      up -> down

The function computed stays the same. The s of least rounding error of the inputs would make columns uneven,
so powers of it are tried, by the output error on sample inputs that rounding inputs and weights makes; no
change is one of the choices. (Like SmoothQuant, Xiao et al. 2022, with an optimum in place of a rule for s.)
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
"""Matrices whose output goes through a norm: an error counts relative to the output's length."""

_POWERS = (0.0, 0.75, 1.0)
_ITERATIONS = 8

_SAMPLE = 512
"""Inputs of a matrix that a choice is measured on."""

_WEIGHT_SHARE = 0.25
"""What error feedback leaves of the error that nearest codes make (measured: 0.1 to 0.4)."""

_TINY = np.float32(1e-6)
"""What is less than this share of the largest counts as much."""


@dataclass(frozen=True)
class Fold:
    """One place where factors can go: `feeder`, a vector or rows of a matrix, and the matrices it feeds.

    The matrices' columns are `groups` times `sharing` times some channels; those that share have one factor.
    """

    feeder: str
    matrices: tuple[str, ...]
    groups: int = 1
    sharing: int = 1

    def possible(self, formats: Mapping[str, Format]) -> bool:
        """Whether all its matrices are quantised anew; a feeder that is a vector has no format."""
        return all(name in formats for name in self.matrices) and (
            self.feeder.endswith("_norm") or self.feeder in formats
        )


def folds_of(arch: Architecture, index: int) -> tuple[Fold, ...]:
    """The folds of a layer; tensor names without the layer's prefix."""
    kv = ("key", "value") if arch.owns_kv(index) else ()
    folds = [
        Fold("attention_norm", ("query", *kv)),
        Fold("feed_forward_norm", ("gate", "up")),
        Fold("up", ("down",)),
    ]
    readers = sum(layer.kv_owner == index for layer in arch.layers)
    if kv and readers == 1 and not arch.value_norm:
        folds.append(Fold("value", ("output",), arch.kv_heads, arch.query_heads // arch.kv_heads))
    return tuple(folds)


class FoldedTensor(LazyTensor):
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
class Folded:
    """A checkpoint that computes the same with kinder activations, and what was done to it.

    `moved` of `tried` folds measured better. `moment` is x^T x of the head's inputs, [hidden, hidden].
    """

    checkpoint: Checkpoint
    moment: Floats
    moved: int
    tried: int


def fold(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    formats: Mapping[str, Format],
    advance: Callable[[str], None] = lambda _name: None,
) -> Folded:
    """Search the factors of every layer on `sequences`.

    `formats` are those of the tensors that will be quantised; others are not touched. `advance` is told each
    layer that is done.
    """
    arch, decoder = checkpoint.architecture, ReferenceDecoder(checkpoint)
    streams, tensors, moved, tried = decoder.begin(sequences), dict(checkpoint.tensors), 0, 0
    step = max(1, sum(map(len, sequences)) // _SAMPLE)
    for index in range(len(arch.layers)):
        weights = decoder.layer_weights(index)
        own = {name: formats[at] for name in weights if (at := f"layers.{index}.{name}") in formats}
        folds = [one for one in folds_of(arch, index) if one.possible(own)]
        samples = _Samples({one.matrices[0] for one in folds}, step)
        for stream in streams:
            run_layer(arch, index, weights, stream, samples.multiply)
        factors = _Factors()
        for one in folds:
            matrices = [_Matrix(weights[name], own[name]) for name in one.matrices]
            factors.add(one, _best(one, samples.inputs(one.matrices[0]), matrices))
        tensors |= factors.folded({name: tensors[f"layers.{index}.{name}"] for name in weights}, index)
        moved, tried = moved + factors.moved, tried + len(folds)
        advance(f"layers.{index}")
    moment = np.zeros((arch.hidden, arch.hidden), np.float32)
    for stream in streams:
        x = round_activations(decoder.finish(stream))
        moment += x.T @ x
    return Folded(replace(checkpoint, tensors=tensors), moment, moved, tried)


class _Samples:
    """Some of the inputs of some matrices, taken while layers run."""

    def __init__(self, names: Collection[str], step: int) -> None:
        self._parts: dict[str, list[Floats]] = {name: [] for name in names}
        self._step = step

    def multiply(self, name: str, x: Floats, weight: Floats) -> Floats:
        """Compute `x W^T`, and keep every step-th row of x."""
        if name in self._parts:
            self._parts[name].append(x[:: self._step])
        return x @ weight.T

    def inputs(self, name: str) -> Floats:
        """The rows that were kept, [m, in]."""
        return np.concatenate(self._parts[name])


class _Factors:
    """The factors of one layer's tensors."""

    def __init__(self) -> None:
        self.moved = 0
        self._rows: dict[str, Floats] = {}
        self._columns: dict[str, Floats] = {}

    def add(self, one: Fold, factors: tuple[Floats, Floats] | None) -> None:
        """Note (the factors of the feeder, those of the matrices' columns); None if none is better."""
        if factors is None:
            return
        self.moved += 1
        self._rows[one.feeder] = np.float32(1) / factors[0]
        for name in one.matrices:
            self._columns[name] = factors[1]

    def folded(self, tensors: Mapping[str, LazyTensor], index: int) -> dict[str, LazyTensor]:
        """The tensors of layer `index` that have factors, under their full names."""
        return {
            f"layers.{index}.{name}": FoldedTensor(tensor, self._rows.get(name), self._columns.get(name))
            for name, tensor in tensors.items()
            if name in self._rows or name in self._columns
        }


class _Matrix:
    """A matrix [out, in] and what folding costs it."""

    def __init__(self, weight: Floats, format: Format) -> None:
        self.weight, self._format = weight, format

    def error(self, x: Floats, columns: Floats, tokens: Floats) -> float:
        """Squared output error, weighted by `tokens`, if x is divided by `columns` and then rounded."""
        divided, weight = x / columns, self.weight * columns
        of_inputs = (round_activations(divided) - divided) @ weight.T
        of_weights = divided @ (quantize(weight, self._format).dequantize() - weight).T
        lost = np.square(of_inputs).sum(axis=1) + _WEIGHT_SHARE * np.square(of_weights).sum(axis=1)
        return float(lost @ tokens)


def _best(one: Fold, x: Floats, matrices: Sequence[_Matrix]) -> tuple[Floats, Floats] | None:
    """Factors of the feeder's channels and of the matrices' columns, or None if nothing beats 1."""
    shape = one.groups, one.sharing, x.shape[1] // (one.groups * one.sharing)
    tokens: Floats = np.ones(len(x), np.float32)
    if one.matrices[0] in NORMED:
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

    The error is the sum over tokens of range^2 times the sum over columns of factor^2 * energy. If a range is
    taken as the 8-norm of its row, a channel's share in the second sum must be its share in the first; a
    channel alone gets there in one step, all together in a few.
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
    """Values, none smaller than a millionth of the largest (1 where all are 0)."""
    largest = values.max()
    return np.maximum(values, largest * _TINY) if largest > 0 else np.ones_like(values)
