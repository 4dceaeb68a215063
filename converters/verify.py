"""How far a bundle is from its checkpoint: the same text through both, and what differs.

The text is cut into chunks of 512 tokens that each start with `<bos>`. Over all positions of all chunks:
largest and root-mean-square error of the logits, how often both put the same token first, and the mean
Kullback-Leibler divergence of the bundle's distribution from the checkpoint's. Perplexity is taken over the
second half of each chunk, where at least 256 tokens have been seen, as llama.cpp's `llama-perplexity` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.checkpoints.base import Checkpoint
from converters.checkpoints.opening import open_checkpoint
from converters.reference_decoder import Floats, ReferenceDecoder
from edge.bundle import TOKENIZER, Bundle
from edge.decoder import Decoder
from edge.errors import BundleError, EdgeError
from edge.tokenizer import Tokenizer

CHUNK = 512

Progress = Callable[[int, int], None]
"""Is told how many tokens have been compared, and how many there are."""


@dataclass(frozen=True)
class Report:
    """What was measured. Errors are in logits, the divergence in nats, agreement a share of 0 to 1.

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

    def to_json(self) -> str:
        """One line of JSON with the fields of this class."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        """Four lines for a person."""
        ratio = self.bundle_perplexity / self.checkpoint_perplexity - 1
        return (
            f"logit error   largest {self.maximum_error:.3g}, root mean square {self.rms_error:.3g}"
            f" over {self.tokens:,} positions\n"
            f"same top token {self.top1_agreement:.1%}\n"
            f"KL divergence {self.kl_divergence:.4f} nats\n"
            f"perplexity    checkpoint {self.checkpoint_perplexity:.3f}, bundle {self.bundle_perplexity:.3f}"
            f" ({ratio:+.2%}) over {self.scored_tokens:,} tokens"
        )


def built_in_text() -> str:
    """Return the text used where none is given: English prose about field work, 4,039 Gemma tokens."""
    return resources.files("converters").joinpath("data/verification_text.txt").read_text("utf-8")


def verify_bundle(
    bundle_directory: Path,
    checkpoint_path: Path,
    text: str,
    cache_directory: Path,
    threads: int,
    progress: Progress = lambda _done, _all: None,
) -> Report:
    """Run bundle and checkpoint over `text`; LiteRT's packed weights are kept in `cache_directory`.

    Raises BundleError, CheckpointError or RuntimeFailure for what can't be read or run, BundleError if both
    are different models, and EdgeError if the text is too short to measure a perplexity.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    bundle = Bundle.open(bundle_directory, cache_directory)
    if bundle.manifest.architecture != checkpoint.architecture:
        raise BundleError(
            f"{bundle_directory}: its dimensions are not those of {checkpoint_path};"
            " name the checkpoint that it was made from"
        )
    length = min(CHUNK, bundle.manifest.context)
    tokenizer = Tokenizer(bundle.path(TOKENIZER).read_bytes())
    chunks = cut(tokenizer.encode(text), bundle.manifest.bos_id, length)
    decoder = Decoder(bundle, cache_directory, threads, length)
    return compare(chunks, reference_logits(checkpoint, chunks), decoder.logits_of, progress)


def cut(ids: Sequence[int], bos_id: int, length: int = CHUNK) -> list[list[int]]:
    """Chunks of `length` ids, the last maybe shorter, each `bos_id` and the next ids of the text.

    Raises EdgeError if there are too few for a perplexity.
    """
    if len(ids) <= length // 2:
        raise EdgeError(f"the text has {len(ids)} tokens, {length // 2 + 1} are needed; give a longer one")
    step = length - 1
    return [[bos_id, *ids[start : start + step]] for start in range(0, len(ids), step)]


def reference_logits(checkpoint: Checkpoint, chunks: Sequence[Sequence[int]]) -> Iterator[Floats]:
    """The checkpoint's logits of each chunk, [n, vocabulary], one chunk in memory at a time."""
    decoder = ReferenceDecoder(checkpoint)
    for hidden in decoder.hidden_states(chunks):
        yield decoder.head(hidden)


def compare(
    chunks: Sequence[Sequence[int]],
    reference: Iterable[Floats],
    candidate: Callable[[Sequence[int]], Iterable[Floats]],
    progress: Progress = lambda _done, _all: None,
) -> Report:
    """Measure `candidate` against `reference`.

    `reference` yields the logits [n, vocabulary] of each chunk; `candidate` yields those of the ids it is
    given in blocks of any number of rows, in order. Raises EdgeError if a logit is not finite.
    """
    sums, half = _Sums(), max(map(len, chunks)) // 2
    total = sum(map(len, chunks))
    for ids, expected in zip(chunks, reference, strict=True):
        start = 0
        for block in candidate(ids):
            stop = start + len(block)
            following = ids[start + 1 : stop + 1]
            sums.add(expected[start:stop], block, following, scored_from=max(0, half - start))
            start = stop
            progress(sums.tokens, total)
        if start != len(ids):
            raise ValueError(f"{len(ids)} ids gave {start} rows of logits")
    return sums.report()


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

    def report(self) -> Report:
        """Turn the sums into means."""
        return Report(
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
