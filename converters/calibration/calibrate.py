"""Calibrated quantisation: codes chosen for the output of the matrices on a text, not only for weights.

The calibration sequences run through the layers twice in parallel: as the checkpoint computes, and as the
bundle will, with inputs rounded as the runtime rounds them. A matrix W should give W x, but its input will be
x', the output of the quantised matrices before it. Its codes are those of least output error
against

    W + trust * W E[(x - x') x'^T] E[x' x'^T]^-1,

which with a trust of 1 is closest to W x on this text (GPTAQ, Li et al. 2025). Where the output is normed,
a token is weighted by the inverse square of its output's norm: otherwise a few very long outputs would decide
all codes. Nothing is random.

Memory: one layer's weights in float32 twice, the inputs of one matrix for all sequences twice (tokens * k * 4
bytes for k columns), for the widest matrix twice k * k * 4 bytes, and the packed codes of all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from converters.calibration.activations import round_activations
from converters.calibration.gptq import Objective, quantize_for
from converters.calibration.linear_algebra import add_product, add_square
from converters.calibration.smoothing import NORMED, Smoothed, smooth
from converters.calibration.text import CalibrationText
from converters.checkpoints.base import Checkpoint, LazyTensor
from converters.quantization import Floats, Format, Quantized, pack, quantize, tensor_group, unpack
from converters.reference_decoder import PROJECTION, ReferenceDecoder, Steps, Stream, layer_steps
from edge.errors import EdgeError

Advance = Callable[[str, float], None]
"""Called with the name of a finished step and its share of the work."""

_SMOOTHING_SHARE = 0.15
"""Of the whole time, roughly."""

_TRUST = np.float32(0.5)
"""How much of the correction for changed inputs is applied; all of it would overfit the text."""


def calibrate(
    checkpoint: Checkpoint,
    formats: Mapping[str, Format],
    text: CalibrationText,
    advance: Advance = lambda _name, _share: None,
) -> Calibrated:
    """Choose codes for the tensors in `formats`, for their inputs when the model reads `text`.

    Tensors without a format, or with 32 bits, stay as they are. Raises EdgeError if the text is too short or
    no tensor of a layer has a format; reading can raise CheckpointError.
    """
    formats = {name: format for name, format in formats.items() if format.bits < 32}
    if not any(name.startswith("layers.") for name in formats):
        raise EdgeError(
            f"{checkpoint.path}: all its stored integers are kept, so nothing is left to calibrate;"
            " omit --calibrate"
        )
    sequences = text.sequences(checkpoint)
    count = len(checkpoint.architecture.layers)
    some = sequences[: max(1, len(sequences) // 4)]
    smoothed = smooth(checkpoint, some, formats, lambda name: advance(name, _SMOOTHING_SHARE / count))
    calibrated = Calibrated(smoothed, text, sum(map(len, sequences)))
    run = _Run(calibrated, formats, sequences)
    for index in range(count):
        run.layer(index)
        advance(f"layers.{index}", (1 - _SMOOTHING_SHARE) / count)
    return calibrated


class Calibrated:
    """Codes of a checkpoint's matrices; a `converters.encoding.Quantizer` for `checkpoint`.

    `checkpoint` computes the same as the original, with smoothed activations. `errors` has the squared output
    error of each matrix of the layers, relative to its output.
    """

    def __init__(self, smoothed: Smoothed, text: CalibrationText, tokens: int) -> None:
        self.checkpoint = smoothed.checkpoint
        self.errors: dict[str, float] = {}
        self._smoothed, self._text, self._tokens = smoothed, text, tokens
        self._head = Objective.of(smoothed.moment)
        self._head_name = "embedding" if self.checkpoint.architecture.tied_head else "head"
        self._codes: dict[str, _PackedCodes] = {}

    def codes_for(self, name: str, start: int, rows: Floats, format: Format) -> Quantized:
        """See `converters.encoding.Quantizer.codes_for`; `rows` are those of `checkpoint`."""
        if format.bits == 32:
            return quantize(rows, format)
        if name in self._codes:
            return self._codes[name].rows(start, start + len(rows))
        return quantize_for(self._head, rows, format) if name == self._head_name else quantize(rows, format)

    def add(self, name: str, quantized: Quantized, error: float) -> None:
        """Store the codes of a whole tensor and the relative squared error of its output."""
        self.errors[name] = error
        codes = pack(quantized.codes, quantized.format.bits).reshape(len(quantized.codes), -1)
        self._codes[name] = _PackedCodes(quantized.format, codes, quantized.scales)

    def notes(self) -> dict[str, object]:
        """The manifest's entry for the calibration."""
        return {
            "text": self._text.name,
            "sha256": self._text.digest(),
            "tokens": self._tokens,
            "folds": f"{self._smoothed.changed} of {self._smoothed.tried}",  # the format's name for smoothing
            "output_errors": {group: round(error, 5) for group, error in self._group_errors().items()},
        }

    def report_lines(self) -> list[str]:
        """One line on the output error of each group of matrices, and one on the activations."""
        lines = [f"{group:<28} output error {error:8.3%}" for group, error in self._group_errors().items()]
        return [*lines, f"activations smoothed at {self._smoothed.changed} of {self._smoothed.tried} points"]

    def _group_errors(self) -> dict[str, float]:
        """Root mean square of the relative output errors in each group of matrices."""
        groups: dict[str, list[float]] = {}
        for name, error in self.errors.items():
            groups.setdefault(tensor_group(name), []).append(error)
        return {group: float(np.mean(errors)) ** 0.5 for group, errors in groups.items()}


@dataclass(frozen=True)
class _PackedCodes:
    """A tensor's codes, packed: uint8 [rows, bytes], and its scales."""

    format: Format
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32] | NDArray[np.float16]

    def rows(self, start: int, stop: int) -> Quantized:
        codes = unpack(self.codes[start:stop].reshape(-1), self.format.bits)
        return Quantized(self.format, codes.reshape(stop - start, -1), self.scales[start:stop])


class _Run:
    """The sequences between two layers: exact, and with the errors of the codes chosen so far."""

    def __init__(
        self, calibrated: Calibrated, formats: Mapping[str, Format], sequences: Sequence[Sequence[int]]
    ) -> None:
        self._calibrated, self._formats = calibrated, formats
        self._decoder = ReferenceDecoder(calibrated.checkpoint)
        self._epsilon = np.float32(self._decoder.arch.rms_epsilon)
        self._exact, self._quantized = self._begin(sequences)

    def layer(self, index: int) -> None:
        """Choose the codes of a layer's matrices, in the order in which they are used."""
        arch, weights = self._decoder.arch, self._decoder.layer_weights(index)
        coded = dict(weights)
        exact = [layer_steps(arch, index, weights, stream) for stream in self._exact]
        quantized = [layer_steps(arch, index, coded, stream) for stream in self._quantized]
        wanted, given = [next(step) for step in exact], [next(step) for step in quantized]
        while wanted:
            names = wanted[0][0]
            x, rounded = [x for _, x in wanted], [round_activations(x) for _, x in given]
            del given
            self._choose(f"layers.{index}.", names, weights, coded, x, rounded)
            wanted, given = _advance(exact, names, weights, x), _advance(quantized, names, coded, rounded)

    def _choose(
        self,
        prefix: str,
        names: Sequence[str],
        weights: Mapping[str, Floats],
        coded: dict[str, Floats],
        wanted: Sequence[Floats],
        given: Sequence[Floats],
    ) -> None:
        """Choose codes of matrices that share inputs; puts their dequantised values into `coded`."""
        names_to_choose = [name for name in names if prefix + name in self._formats]
        if not names_to_choose:
            return
        moment, cross = self._sums(wanted, given, weights[names[0]] if names[0] in NORMED else None)
        corrections = {name: weights[name] @ cross for name in names_to_choose}
        del cross
        objective = Objective.of(moment)
        for name in names_to_choose:
            target = weights[name] + _TRUST * objective.solve(corrections.pop(name))
            quantized = quantize_for(objective, target, self._formats[prefix + name])
            self._calibrated.add(prefix + name, quantized, objective.error(target, quantized))
            coded[name] = quantized.dequantize()

    def _sums(
        self, wanted: Sequence[Floats], given: Sequence[Floats], normed: Floats | None
    ) -> tuple[Floats, Floats]:
        """Sums over all tokens of x'^T x' (its lower triangle) and (x - x')^T x', x wanted and x' given.

        With a matrix `normed`, a token is weighted by the inverse square of the norm of `normed` x.
        """
        columns = given[0].shape[1]
        moment, cross = np.zeros((columns, columns), np.float32), np.zeros((columns, columns), np.float32)
        for exact, rounded in zip(wanted, given, strict=True):
            difference, x = exact - rounded, rounded
            if normed is not None:
                power = np.mean(np.square(exact @ normed.T), axis=-1, keepdims=True)
                length = np.sqrt(power + self._epsilon)
                difference, x = difference / length, rounded / length
            add_square(moment, x)
            add_product(cross, difference, x)
        return moment, cross

    def _begin(self, sequences: Sequence[Sequence[int]]) -> tuple[list[Stream], list[Stream]]:
        """Streams before the first layer: exact ones, and ones from quantised tables and projection."""
        checkpoint, formats = self._calibrated.checkpoint, self._formats
        ids = np.unique(np.concatenate([np.asarray(one, np.int64) for one in sequences]))
        tensors = dict(checkpoint.tensors)
        for name in ("embedding", "per_layer_embedding"):
            if name in formats:
                base = tensors[name]
                rows = np.concatenate([base.rows(int(n), int(n) + 1) for n in ids])
                width = checkpoint.architecture.per_layer_width if name != "embedding" else rows.shape[1]
                quantized = self._calibrated.codes_for(name, 0, rows.reshape(-1, width), formats[name])
                tensors[name] = _KnownRows(base, ids, quantized.dequantize().reshape(rows.shape))
        decoder = ReferenceDecoder(replace(checkpoint, tensors=tensors))
        if PROJECTION not in formats:
            return self._decoder.begin(sequences), decoder.begin(sequences)
        seen: list[Floats] = []

        def record(_name: str, x: Floats, weight: Floats) -> Floats:
            seen.append(x)
            return x @ weight.T

        decoder.begin(sequences, record)
        rounded = [round_activations(x) for x in seen]
        seen.clear()
        exact = self._decoder.begin(sequences, record)
        weights = {PROJECTION: tensors[PROJECTION].array()}
        coded = dict(weights)
        self._choose("", (PROJECTION,), weights, coded, seen, rounded)
        return exact, decoder.begin(sequences, lambda name, x, _weight: round_activations(x) @ coded[name].T)


def _advance(
    steps: Sequence[Steps], names: Sequence[str], weights: Mapping[str, Floats], inputs: list[Floats]
) -> list[tuple[tuple[str, ...], Floats]]:
    """Send the outputs of matrices to each of `steps`. Returns their next requests; none after the last."""
    requests = []
    for step in steps:
        x = inputs.pop(0)
        with contextlib.suppress(StopIteration):
            requests.append(step.send([x @ weights[name].T for name in names]))
    return requests


class _KnownRows(LazyTensor):
    """The rows of a table that the sequences need, after quantisation."""

    def __init__(self, base: LazyTensor, ids: NDArray[np.int64], values: Floats) -> None:
        self.name, self.shape, self.source_type = base.name, base.shape, base.source_type
        self._ids, self._values = ids, values

    def rows(self, start: int, stop: int) -> Floats:
        at = int(np.searchsorted(self._ids, start))
        return self._values[at : at + stop - start]
