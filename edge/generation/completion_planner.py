"""Plans the end of an answer, so that its last token also makes it complete.

The planner knows one completion (tokens that end the answer validly) of the current position. Before a token
is taken, it looks for a completion after that token. Where that one would no longer fit into the tokens that
remain, the known completion is followed instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llguidance import LLMatcher

from edge.generation.completion_search import CompletionSearch

_MARGIN = 64
"""A token after which no completion is known is refused when fewer tokens than about this remain."""


class Plan(NamedTuple):
    """The token to take. `completion` is what completes the answer after it, if that was `searched` for."""

    token: int
    searched: bool = False
    completion: list[int] | None = None


class CompletionPlanner:
    """The plan of one answer of at most `budget` tokens; `stop_ids` end an answer.

    A completion is searched for only when none is known. After a search without result the next one waits
    for twice as many tokens as the last time.
    """

    def __init__(self, search: CompletionSearch, stop_ids: Sequence[int], budget: int) -> None:
        self._search, self._stop_ids = search, stop_ids
        self._known = False
        self._completion: list[int] | None = None
        self._hint: list[int] = []
        self._patience, self._next_search = 1, budget

    def completion(self, matcher: LLMatcher, remaining: int) -> list[int] | None:
        """Return tokens that complete the answer from `matcher`'s state, [] if it is complete.

        None if no completion of at most `remaining` tokens is known.
        """
        if not self._known and remaining <= self._next_search:
            self._remember(self._search.path(matcher, self._hint, remaining), remaining)
        return self._completion if self._known else None

    def plan(self, matcher: LLMatcher, remaining: int, token: int) -> Plan:
        """Return `token`, which `matcher` allows, or the token to take instead of it."""
        path = self.completion(matcher, remaining)
        if path is None or len(path) > remaining or token in self._stop_ids:
            return Plan(token)
        if path[:1] == [token]:
            after: list[int] | None = path[1:]
        else:
            moved = matcher.deep_copy()
            moved.consume_token(token)
            after = self._search.path(moved, path, remaining)
        needed = 2 * len(path) + _MARGIN if after is None else len(after)
        if needed < remaining:
            return Plan(token, True, after)
        return Plan(path[0], True, path[1:]) if path else Plan(self._stop_ids[0])

    def advance(self, plan: Plan, remaining: int) -> None:
        """Note that the plan's token was taken, which leaves `remaining` tokens."""
        path = self._completion if self._known else None
        self._known = False
        if plan.searched:
            self._remember(plan.completion, remaining)
        elif path and path[0] == plan.token:
            self._remember(path[1:], remaining)

    def _remember(self, completion: list[int] | None, remaining: int) -> None:
        self._completion, self._known = completion, True
        if completion is not None:
            self._hint, self._patience = completion, 1
        else:
            self._patience *= 2
        self._next_search = remaining - self._patience
