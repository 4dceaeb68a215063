"""How far bundles are from their checkpoint: the same text through all of them, and what differs.

The text is cut into chunks of 512 tokens that each start with `<bos>`. Over all positions of all chunks:
largest and root-mean-square error of the logits, how often both put the same token first, and the mean
Kullback-Leibler divergence of the bundle's distribution from the checkpoint's. Perplexity is taken over the
second half of each chunk, where at least 256 tokens have been seen, as llama.cpp's `llama-perplexity` does.

A layer's error is that of the keys that it stores, relative to their length: it shows what the layers before
it have done to the residual stream. Layers that share another one's keys have none of their own.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.checkpoints.opening import open_checkpoint
from converters.reference_decoder import Floats, ReferenceDecoder
from edge.bundles.bundle import TOKENIZER, Bundle
from edge.errors import BundleError, EdgeError
from edge.runtime.decoder import Decoder
from edge.text.tokenizer import Tokenizer

CHUNK = 512

_TIMED_STEPS = 32

_TOGETHER = 16 * CHUNK
"""Tokens that the checkpoint runs over at a time: 0.3 GB with the 270M, 0.6 GB with E2B."""

Progress = Callable[[int, int], None]
"""Is told how many tokens have been compared, and how many there are."""


@dataclass(frozen=True)
class Fidelity:
    """How logits differ. Errors are in logits, the divergence in nats, agreement a share of 0 to 1.

    `tokens` counts the compared positions, `scored_tokens` those that the perplexities are over.
    """

    tokens: int
    maximum_error: float
    rms_error: float
    top1_agreement: float
    kl_divergence: float
    scored_tokens: int
    checkpoint_perplexity: float
    bundle_perplexity: float

    @property
    def perplexity_rise(self) -> float:
        """How much higher the bundle's perplexity is, as a share of the checkpoint's."""
        return self.bundle_perplexity / self.checkpoint_perplexity - 1

    def __str__(self) -> str:
        """Four lines for a person."""
        return (
            f"  logit error    largest {self.maximum_error:.3g}, root mean square {self.rms_error:.3g}"
            f" over {self.tokens:,} positions\n"
            f"  same top token {self.top1_agreement:.1%}\n"
            f"  KL divergence  {self.kl_divergence:.4f} nats\n"
            f"  perplexity     checkpoint {self.checkpoint_perplexity:.3f},"
            f" bundle {self.bundle_perplexity:.3f} ({self.perplexity_rise:+.2%})"
            f" over {self.scored_tokens:,} tokens"
        )


@dataclass(frozen=True)
class Report:
    """What was measured of a bundle of that name, recipe and size of its files in bytes.

    `layer_errors` has the relative error of each layer's keys by the layer's index, `tokens_per_second` the
    speed of decoding on this machine.
    """

    name: str
    recipe: str
    bytes: int
    fidelity: Fidelity
    layer_errors: Mapping[int, float]
    tokens_per_second: float

    def to_json(self) -> str:
        """One line of JSON with the fields of this class and, beside them, those of its fidelity."""
        fields = asdict(self)
        return json.dumps(fields | fields.pop("fidelity"))

    def __str__(self) -> str:
        """A few lines for a person."""
        errors = " ".join(f"{100 * error:.1f}" for error in self.layer_errors.values())
        return (
            f"{self.name}: {self.recipe}, {self.bytes / 1e6:,.1f} MB\n{self.fidelity}\n"
            f"  layers' keys   {errors} % off\n"
            f"  decode         {self.tokens_per_second:.1f} tokens/s on this machine"
        )


def built_in_text() -> str:
    """Return the text used where none is given: English prose about field work, 4,039 Gemma tokens."""
    return resources.files("converters").joinpath("data/verification_text.txt").read_text("utf-8")


def evaluate_bundles(
    directories: Sequence[Path],
    checkpoint_path: Path,
    text: str,
    cache_directory: Path,
    threads: int,
    progress: Progress = lambda _done, _all: None,
) -> list[Report]:
    """Run bundles and their checkpoint over `text`; LiteRT's packed weights are kept in `cache_directory`.

    The checkpoint runs once for all of them, and chunks are no longer than the shortest context. Raises
    BundleError, CheckpointError or RuntimeFailure for what can't be read or run, BundleError if a bundle is
    another model's, and EdgeError if the text is too short to measure a perplexity.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    bundles = [Bundle.open(directory, cache_directory) for directory in directories]
    for bundle in bundles:
        if bundle.manifest.architecture != checkpoint.architecture:
            raise BundleError(
                f"{bundle.directory}: its dimensions are not those of {checkpoint_path};"
                " name the checkpoint that it was made from"
            )
    length = min(CHUNK, *(bundle.manifest.context for bundle in bundles))
    tokenizer = Tokenizer(bundles[0].path(TOKENIZER).read_bytes())
    chunks = cut(tokenizer.encode(text), bundles[0].manifest.bos_id, length)
    reference = _Reference(ReferenceDecoder(checkpoint))
    candidates = [
        _Candidate(Decoder(bundle, cache_directory, threads, length), reference) for bundle in bundles
    ]
    logits = reference.logits_of(chunks)
    found = compare(chunks, logits, [candidate.logits_of for candidate in candidates], progress)
    return [
        Report(
            name=directory.name,
            recipe=bundle.manifest.recipe,
            bytes=sum(entry.size for entry in bundle.manifest.files.values()),
            fidelity=fidelity,
            layer_errors=candidate.layer_errors(),
            tokens_per_second=_decode_speed(candidate.decoder, chunks[0]),
        )
        for directory, bundle, candidate, fidelity in zip(
            directories, bundles, candidates, found, strict=True
        )
    ]


class _Kept(dict[int, tuple[Floats, Floats]]):
    """A stream's K and V by layer, none of them dropped when the last layer has read it."""

    def __delitem__(self, _layer: int) -> None:
        pass


class _Reference:
    """The checkpoint, run over a few chunks at a time: each time reads all weights, each chunk takes memory.

    `keys` has those of the chunk in hand, [kv_heads, n, head_dim] by the layers that have their own.
    """

    def __init__(self, decoder: ReferenceDecoder) -> None:
        self.decoder = decoder
        self.keys: Mapping[int, Floats] = {}

    def logits_of(self, chunks: Sequence[Sequence[int]]) -> Iterator[Floats]:
        """The logits of each chunk, [n, vocabulary]."""
        step = max(1, _TOGETHER // len(chunks[0]))
        for start in range(0, len(chunks), step):
            streams = self.decoder.begin(chunks[start : start + step])
            for stream in streams:
                stream.kv = _Kept()
            self.decoder.run(streams)
            for stream in streams:
                self.keys = {layer: stream.kv[layer][0] for layer in self.decoder.arch.owners}
                yield self.decoder.head(self.decoder.finish(stream))


class _Candidate:
    """A bundle's decoder, and how far its keys were from those of the checkpoint."""

    def __init__(self, decoder: Decoder, reference: _Reference) -> None:
        self.decoder = decoder
        self._reference = reference
        self._lost = dict.fromkeys(reference.decoder.arch.owners, 0.0)
        self._whole = dict(self._lost)

    def logits_of(self, ids: Sequence[int]) -> Iterator[Floats]:
        """Logits of the chunk that the reference has in hand, see `Decoder.logits_of`."""
        yield from self.decoder.logits_of(ids)
        for layer, keys in self._reference.keys.items():
            found = self.decoder.keys_of(layer)
            expected = keys[:, -found.shape[1] :]
            self._lost[layer] += float(np.square(found - expected).sum(dtype=np.float64))
            self._whole[layer] += float(np.square(expected).sum(dtype=np.float64))

    def layer_errors(self) -> dict[int, float]:
        """Root-mean-square error of each layer's keys over all chunks, relative to their length."""
        return {layer: math.sqrt(lost / self._whole[layer]) for layer, lost in self._lost.items()}


def _decode_speed(decoder: Decoder, ids: Sequence[int]) -> float:
    """Tokens per second, head included, of single steps after the first half of `ids`: the median step's."""
    half = len(ids) // 2
    decoder.rewind(())
    decoder.advance(ids[:half], lambda: None)
    seconds = []
    for token in ids[half : half + _TIMED_STEPS]:
        started = time.perf_counter()
        decoder.advance([token], lambda: None)
        decoder.logits()
        seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds)


def cut(ids: Sequence[int], bos_id: int, length: int = CHUNK) -> list[list[int]]:
    """Chunks of `length` ids, the last maybe shorter, each `bos_id` and the next ids of the text.

    Raises EdgeError if there are too few for a perplexity.
    """
    if len(ids) <= length // 2:
        raise EdgeError(f"the text has {len(ids)} tokens, {length // 2 + 1} are needed; give a longer one")
    step = length - 1
    return [[bos_id, *ids[start : start + step]] for start in range(0, len(ids), step)]


def compare(
    chunks: Sequence[Sequence[int]],
    reference: Iterable[Floats],
    candidates: Sequence[Callable[[Sequence[int]], Iterable[Floats]]],
    progress: Progress = lambda _done, _all: None,
) -> list[Fidelity]:
    """Measure each of `candidates` against `reference`.

    `reference` yields the logits [n, vocabulary] of each chunk; a candidate yields those of the ids it is
    given in blocks of any number of rows, in order. Raises EdgeError if a logit is not finite.
    """
    sums, half = [_Sums() for _ in candidates], max(map(len, chunks)) // 2
    total = sum(map(len, chunks)) * len(candidates)
    for ids, expected in zip(chunks, reference, strict=True):
        for candidate, own in zip(candidates, sums, strict=True):
            start = 0
            for block in candidate(ids):
                stop = start + len(block)
                following = ids[start + 1 : stop + 1]
                own.add(expected[start:stop], block, following, scored_from=max(0, half - start))
                start = stop
                progress(sum(one.tokens for one in sums), total)
            if start != len(ids):
                raise ValueError(f"{len(ids)} ids gave {start} rows of logits")
    return [own.fidelity() for own in sums]


class _Sums:
    """Running sums over all positions. Terms are float32, sums float64."""

    def __init__(self) -> None:
        self.tokens = self.values = self.agreed = self.scored = 0
        self.maximum = self.squares = self.divergence = self.reference_loss = self.candidate_loss = 0.0

    def add(self, reference: Floats, candidate: Floats, following: Sequence[int], scored_from: int) -> None:
        """Add n positions; `following` are the ids that came after them (n, or n - 1 at a chunk's end).

        Positions from `scored_from` on count for the perplexity if an id came after them.
        """
        error = candidate - reference
        largest = float(np.abs(error).max())
        if not math.isfinite(largest):
            raise EdgeError(f"logits are not finite at position {self.tokens} or soon after it")
        self.maximum = max(self.maximum, largest)
        self.squares += float(np.square(error, out=error).sum(dtype=np.float64))
        self.values += error.size
        self.agreed += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        expected, weights, expected_total = _exponentials(reference)
        found, _, found_total = _exponentials(candidate)
        np.multiply(weights, expected - found, out=weights)
        divergence = weights.sum(axis=-1, dtype=np.float64) / expected_total
        self.divergence += float((divergence - np.log(expected_total / found_total)).sum())
        rows = np.arange(scored_from, len(following))
        targets = np.asarray(following, np.int64)[rows]
        self.reference_loss += float((np.log(expected_total[rows]) - expected[rows, targets]).sum())
        self.candidate_loss += float((np.log(found_total[rows]) - found[rows, targets]).sum())
        self.scored += len(rows)
        self.tokens += len(reference)

    def fidelity(self) -> Fidelity:
        """Turn the sums into means."""
        return Fidelity(
            tokens=self.tokens,
            maximum_error=self.maximum,
            rms_error=math.sqrt(self.squares / self.values),
            top1_agreement=self.agreed / self.tokens,
            kl_divergence=self.divergence / self.tokens,
            scored_tokens=self.scored,
            checkpoint_perplexity=math.exp(self.reference_loss / self.scored),
            bundle_perplexity=math.exp(self.candidate_loss / self.scored),
        )


def _exponentials(logits: Floats) -> tuple[Floats, Floats, NDArray[np.float64]]:
    """Logits less their row's largest, `exp` of that, and the sums of the latter: a softmax taken apart."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    powers: Floats = np.exp(shifted)
    return shifted, powers, powers.sum(axis=-1, dtype=np.float64)
