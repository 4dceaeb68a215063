"""From logits to the next token: temperature, then top-k, then top-p, as in transformers.

The same seed and the same logits give the same tokens. One uniform number is drawn for each sampled token,
and none for a greedy one. So checking drafted tokens (sample at each position, continue while the draft
agrees) gives the same tokens as plain decoding, and the distribution stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.errors import RuntimeFailure


@dataclass(frozen=True)
class Sampling:
    """How to choose. `temperature` 0 is greedy; `top_k` is at least 1, `top_p` in (0, 1].

    `seed` None draws from the system's entropy.
    """

    temperature: float = 0.0
    top_k: int = 64
    top_p: float = 0.95
    seed: int | None = None


class Sampler:
    """Draws tokens for one generation, with NumPy's PCG64.

    `softcap` c replaces each logit x by c * tanh(x / c) (Gemma 4), which changes the probabilities of tokens
    but not their order; None where the logits are final. A logit of -inf marks a token as not allowed.
    """

    def __init__(self, sampling: Sampling, softcap: float | None = None) -> None:
        self._sampling = sampling
        self._softcap = softcap
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self._sampling.temperature == 0

    @property
    def candidates(self) -> int:
        """How many of the largest logits can affect the choice."""
        return 1 if self.greedy else self._sampling.top_k

    def sample(self, logits: NDArray[np.float32], ids: NDArray[np.int32] | None = None) -> int:
        """Choose a token from logits [n]; logit i belongs to token `ids[i]` (ascending), or to token i.

        Of equal logits the lower id wins. Raises RuntimeFailure if a logit is NaN or none is finite.
        """
        if self.greedy:
            best = int(np.argmax(logits))
            _check(logits[best])
            return best if ids is None else int(ids[best])
        tokens, probabilities = self.distribution(logits, ids)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(tokens[min(int(drawn), len(tokens) - 1)])

    def distribution(
        self, logits: NDArray[np.float32], ids: NDArray[np.int32] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the tokens that `sample` may choose, most probable first, and their probabilities (sum 1).

        top-p keeps the fewest tokens whose probabilities reach `top_p`. Arguments and errors as in `sample`.
        """
        chosen = largest(logits, self.candidates)
        values = logits[chosen].astype(np.float64)
        tokens = chosen if ids is None else ids[chosen].astype(np.int64)
        if self.greedy:
            return tokens, np.ones(1)
        if self._softcap is not None:
            values = self._softcap * np.tanh(values / self._softcap)
        with np.errstate(over="ignore"):
            weights = np.exp((values - values[0]) / self._sampling.temperature)
        weights /= weights.sum()
        if self._sampling.top_p < 1:
            kept = int(np.searchsorted(np.cumsum(weights), self._sampling.top_p)) + 1
            tokens, weights = tokens[:kept], weights[:kept] / weights[:kept].sum()
        return tokens, weights


def _check(largest: np.float32) -> None:
    if not np.isfinite(largest):
        raise RuntimeFailure(
            f"decoder.tflite: the largest logit is {largest}; verify the bundle, or convert again"
        )


def largest(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` largest finite logits, largest first; of equal ones the lower first.

    At least `count` logits reach the `count`-th largest of the blocks' maxima, so the others need no sorting.
    """
    _check(logits.max())
    size = len(logits) // (4 * count)
    floor = -np.inf
    if size > 1:
        blocks = len(logits) // size
        maxima = logits[: blocks * size].reshape(blocks, size).max(axis=1)
        floor = np.partition(maxima, blocks - count)[blocks - count]
    candidates = np.flatnonzero((logits >= floor) & (logits > -np.inf))
    order = np.argsort(-logits[candidates], kind="stable")[:count]
    return candidates[order]
