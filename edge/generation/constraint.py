"""What limits the tokens of one answer: a grammar in this process, or in a worker that can be killed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

FEW_TOKENS = 1024
"""Up to so many allowed tokens are listed, so that their logits alone can be computed."""


class Step(NamedTuple):
    """One step of an answer: what was taken, what must come next, and whether the answer may end now.

    `token` is None if nothing was taken but what is forced. A stop id ends the answer and is not
    `consumed`. `forced` tokens were taken too if the call was to `follow`. `complete`: nothing may
    come next; `accepting`: the answer may end here.
    """

    token: int | None
    forced: list[int]
    complete: bool
    accepting: bool
    consumed: bool = False


class Constraint(Protocol):
    """The position of one answer in its grammar; see `edge.generation.grammar.GrammarConstraint`.

    All methods raise RequestError("bad_request") if the format can't be followed, and may raise Interruption.
    """

    def take(self, token: int, follow: bool = True) -> Step:
        """Take a token, or the one that is needed instead to complete the answer in time."""

    def follow(self) -> Step:
        """Take the tokens that are forced here."""

    def allowed(self) -> list[int] | None:
        """Return the ids that may come next, if they are few."""

    def mask(self) -> bytes:
        """Return a bit for each id that may come next, lowest bit first."""

    def allowed_among(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return the first `count` of `tokens` that may come next."""

    def validate(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` could be taken one after the other."""
