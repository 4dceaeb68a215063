"""Chooses the tokens of an answer: the sampler's choice among those that the grammar allows.

Each token is distributed as if all that are not allowed were masked first. The mask itself, which takes
milliseconds, is computed only where checking the most probable tokens does not settle the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge.errors import RequestError
from edge.generation.constraint import FEW_TOKENS, Constraint, Step
from edge.generation.sampling import Sampler, largest
from edge.runtime.decoder import Decoder
from edge.runtime.kv_cache import Floats

_UNCONSTRAINED = Step(None, [], complete=False, accepting=False)


class TokenChooser:
    """Chooses by sampler and grammar; every token that it returns counts as part of the answer.

    `formatted`: the grammar describes the whole answer, and not only the tool calls in it. `forced` counts
    the tokens that the grammar forced.
    """

    def __init__(
        self, sampler: Sampler, constraint: Constraint | None, stop_ids: Sequence[int], formatted: bool
    ) -> None:
        self._sampler, self._constraint = sampler, constraint
        self.stop_ids, self._formatted = stop_ids, formatted
        self._step = _UNCONSTRAINED
        self.forced = 0

    @property
    def complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self._step.complete

    @property
    def whole(self) -> bool:
        """Whether the answer has the requested format if it ends here."""
        return self._formatted and self._step.accepting

    def forced_here(self) -> list[int]:
        """Take and return the tokens that the grammar forces at the current position."""
        if self._constraint is None or self._step.complete or self._step.token in self.stop_ids:
            return []
        return self._followed(self._constraint.follow())

    def next(self, decoder: Decoder) -> list[int]:
        """Return a token chosen by the decoder's logits, and those that the grammar forces after it."""
        constraint = self._constraint
        if constraint is None:
            return [self._sampler.sample(decoder.logits())]
        few = constraint.allowed()
        if few is None:
            step = choose(constraint, self._sampler, decoder.logits())
        else:
            ids = np.asarray(few, np.int32)
            step = take(constraint, self._sampler.sample(decoder.logits_for(ids), ids))
        return [_token(step), *self._followed(step)]

    def check(self, guesses: Sequence[int], rows: Floats) -> list[int]:
        """Return the guesses that are what would have been chosen, and the first choice that differs.

        `rows` are the logits before each guess and after the last one, [len(guesses) + 1, vocabulary].
        """
        chosen: list[int] = []
        forced: Sequence[int] = ()
        for guess, logits in zip([*guesses, None], rows, strict=True):
            constraint = self._constraint
            if constraint is None:
                chosen.append(self._sampler.sample(logits))
            else:
                if forced:
                    self._step = take(constraint, forced[0], follow=False)
                else:
                    self._step = choose(constraint, self._sampler, logits, follow=False)
                chosen.append(_token(self._step))
                forced = self._step.forced
            if chosen[-1] != guess or guess in self.stop_ids or self.complete:
                break
        return chosen

    def possible(self, guesses: list[int]) -> list[int]:
        """Return the first of `guesses` that the grammar allows one after the other."""
        if self._constraint is None or not guesses:
            return guesses
        return guesses[: self._constraint.validate(guesses)]

    def _followed(self, step: Step) -> list[int]:
        self._step = step
        self.forced += len(step.forced)
        return step.forced


def choose(constraint: Constraint, sampler: Sampler, logits: Floats, follow: bool = True) -> Step:
    """Take the sampler's choice from the logits of all tokens [vocabulary]; they may be changed."""
    if sampler.greedy:
        step = constraint.take(sampler.sample(logits), follow)
        if step.token is not None:
            return step
    if sampler.candidates <= FEW_TOKENS:
        best = largest(logits, 4 * sampler.candidates).tolist()
        ids = np.sort(np.asarray(constraint.allowed_among(best, sampler.candidates), np.int32))
        if len(ids) == sampler.candidates:  # the other tokens are not in the top k
            return take(constraint, sampler.sample(logits[ids], ids), follow)
    bits = np.frombuffer(constraint.mask(), np.uint8)
    logits[np.unpackbits(bits, count=len(logits), bitorder="little") == 0] = -np.inf
    return take(constraint, sampler.sample(logits), follow)


def take(constraint: Constraint, token: int, follow: bool = True) -> Step:
    """Take a token that the constraint offered."""
    step = constraint.take(token, follow)
    if step.token is None:
        raise RequestError(
            "bad_request", "response_format or tools: too complex to follow; describe less at once"
        )
    return step


def _token(step: Step) -> int:
    assert step.token is not None
    return step.token
