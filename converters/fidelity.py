"""Compares logits with those of the checkpoint.

Measured over all positions of all chunks: largest and root-mean-square error of the logits, agreement on the
top token, and the mean Kullback-Leibler divergence of the bundle's distribution from the checkpoint's.
Perplexity is over the second half of each chunk, where at least 256 tokens precede, as in llama.cpp's
`llama-perplexity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters.progress import Progress, ReportProgress, ignore_progress
from converters.quantization import Floats
from edge.errors import EdgeError

CHUNK = 512
"""Tokens of a chunk, `<bos>` included."""


@dataclass(frozen=True)
class Fidelity:
    """How logits differ: errors in logits, divergence in nats, agreement as a share from 0 to 1.

    `tokens` is the number of compared positions, `scored_tokens` of those that the perplexities cover.
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
        """The increase of the perplexity, relative to the checkpoint's."""
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


def cut(ids: Sequence[int], bos_id: int, length: int = CHUNK) -> list[list[int]]:
    """Cut a text's ids into chunks of `length`, each with `bos_id` first; the last can be shorter.

    Raises EdgeError if there are too few ids for a perplexity.
    """
    if len(ids) <= length // 2:
        raise EdgeError(
            f"the text has {len(ids)} tokens, at least {length // 2 + 1} are needed; give a longer one"
        )
    step = length - 1
    return [[bos_id, *ids[start : start + step]] for start in range(0, len(ids), step)]


def compare(
    chunks: Sequence[Sequence[int]],
    reference: Iterable[Floats],
    candidates: Sequence[Callable[[Sequence[int]], Iterable[Floats]]],
    report: ReportProgress = ignore_progress,
) -> list[Fidelity]:
    """Measure each of `candidates` against `reference`.

    `reference` yields the logits [n, vocabulary] of each chunk. A candidate takes ids and yields
    their logits in order, in blocks of any number of rows. Raises EdgeError if a logit is not finite.
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
                report(Progress(sum(each.tokens for each in sums), total, "tokens"))
            if start != len(ids):
                raise ValueError(f"{len(ids)} ids gave {start} rows of logits")
    return [own.fidelity() for own in sums]


class _Sums:
    """Running sums over all positions. Terms are float32, sums float64."""

    def __init__(self) -> None:
        self.tokens = self.values = self.agreed = self.scored = 0
        self.maximum = self.squares = self.divergence = self.reference_loss = self.candidate_loss = 0.0

    def add(self, reference: Floats, candidate: Floats, following: Sequence[int], scored_from: int) -> None:
        """Add n positions; `following` are the ids after them (n, or n - 1 at the end of a chunk).

        Positions from `scored_from` on count for the perplexity if an id follows them.
        """
        error = candidate - reference
        largest = float(np.abs(error).max())
        if not math.isfinite(largest):
            raise EdgeError(
                f"logits are not finite at or soon after position {self.tokens}; convert the checkpoint again"
            )
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
    """The parts of a softmax: logits minus their row's largest, `exp` of that, and its sums by row."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    powers: Floats = np.exp(shifted)
    return shifted, powers, powers.sum(axis=-1, dtype=np.float64)
