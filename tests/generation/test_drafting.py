"""Prompt lookup: which tokens it drafts, and when it drafts nothing."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from edge.generation.drafting import DraftGate, PromptLookup

few_tokens = st.lists(st.integers(0, 4), max_size=60)


def test_the_draft_is_what_followed_the_last_tokens_earlier() -> None:
    lookup = PromptLookup([[1, 2, 3, 4, 5, 6, 9, 2, 3]])
    assert lookup.guess(3) == [4, 5, 6]
    lookup.extend([4, 5])
    assert lookup.guess(2) == [6, 9]
    lookup.extend([7])
    assert lookup.guess(2) == []


def test_the_longest_match_wins_and_among_equals_the_latest() -> None:
    assert PromptLookup([[8, 1, 2, 3, 30, 7, 2, 3, 40, 8, 1, 2, 3]]).guess(1) == [30]
    assert PromptLookup([[9, 1, 2, 50, 9, 1, 2, 60, 9, 1, 2]]).guess(1) == [60]


def test_a_draft_from_an_earlier_answer_never_runs_past_its_end() -> None:
    answer = [10, 11, 12, 13]
    assert PromptLookup([answer, [5, 10, 11]]).guess(8) == [12, 13]
    assert PromptLookup([answer, [5, 12, 13]]).guess(8) == []
    assert PromptLookup([[1], [2]]).guess(8) == []
    assert PromptLookup([]).guess(8) == []


@given(history=st.lists(few_tokens, max_size=4), grown=few_tokens, count=st.integers(1, 8))
def test_every_draft_occurs_in_the_earlier_tokens(
    history: list[list[int]], grown: list[int], count: int
) -> None:
    lookup = PromptLookup(history)
    lookup.extend(grown)
    texts = [*history[:-1], (history[-1] if history else []) + grown]
    guessed = lookup.guess(count)
    assert len(guessed) <= count
    if guessed:
        seen = texts[-1][-2:] + guessed
        assert any(text[i : i + len(seen)] == seen for text in texts for i in range(len(text)))


def drafted_share(gate: DraftGate, accepted: list[int]) -> float:
    """The share of opportunities at which tokens were drafted."""
    used = 0
    for count in accepted:
        if gate.allows():
            gate.observe(count)
            used += 1
    return used / len(accepted)


def test_drafting_continues_while_drafts_are_accepted() -> None:
    assert drafted_share(DraftGate(cost=2.0), [3] * 200) == 1


def test_drafting_stops_when_nothing_is_accepted_and_is_retried_later() -> None:
    gate = DraftGate(cost=2.0)
    assert 0 < drafted_share(gate, [0] * 2000) < 0.02
    assert not gate.pays
    assert drafted_share(gate, [7] * 4000) > 0.8
    assert gate.pays


def test_drafting_is_used_when_it_pays_and_costs_little_when_it_does_not() -> None:
    chance = random.Random(1)
    loss = [chance.choice([0, 0, 0, 0, 2]) for _ in range(3000)]
    gain = [chance.choice([0, 2, 4, 7]) for _ in range(3000)]
    assert drafted_share(DraftGate(cost=2.0), loss) < 0.1
    assert drafted_share(DraftGate(cost=2.0), gain) > 0.9
