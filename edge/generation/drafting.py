"""Drafts by prompt lookup: the tokens that followed an earlier occurrence of the last few tokens.

A sensor's answer repeats its prompt (names, units, numbers) and earlier answers of its type. A guess costs
one dictionary lookup; checking it costs a verify pass, which takes longer than a decode step. So `DraftGate`
counts how many guesses are accepted, and stops drafting where it does not pay. Guesses never change what is
generated: they are checked against the model's own choice (`edge.generation.token_choice`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_BORDER = -1
_PLACES = 16
_LONGEST_MATCH = 16


class PromptLookup:
    """Finds earlier occurrences of the last tokens in a growing text.

    `history` holds earlier texts, oldest first, the prompt last; no guess crosses the border between two.
    """

    def __init__(self, history: Iterable[Sequence[int]]) -> None:
        self._tokens: list[int] = [_BORDER]
        self._places: dict[tuple[int, int], list[int]] = {}
        for text in history:
            self._tokens.append(_BORDER)
            self.extend(text)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the end of the last text."""
        for token in tokens:
            self._tokens.append(token)
            places = self._places.setdefault((self._tokens[-2], token), [])
            places.append(len(self._tokens))
            if len(places) > _PLACES:
                del places[0]

    def guess(self, count: int) -> list[int]:
        """Return up to `count` tokens that may come next, [] if the last two tokens did not occur before.

        Of several occurrences the one with the longest match before it is used, then the latest.
        """
        tokens, end = self._tokens, len(self._tokens)
        places = self._places.get((tokens[-2], tokens[-1]), []) if end >= 3 else []
        best = max((place for place in places if place < end), key=self._rank, default=end)
        guessed = tokens[best : best + count]
        return guessed[: guessed.index(_BORDER)] if _BORDER in guessed else guessed

    def _rank(self, place: int) -> tuple[int, int]:
        """Return the length of the match before `place`, up to `_LONGEST_MATCH`, and `place`."""
        tokens, end = self._tokens, len(self._tokens)
        length = 0
        while (
            length < min(place, _LONGEST_MATCH)
            and tokens[place - length - 1] == tokens[end - length - 1] != _BORDER
        ):
            length += 1
        return length, place


class Drafter:
    """Guesses for one answer, as long as drafting pays. `history` as in `PromptLookup`."""

    def __init__(self, history: Sequence[Sequence[int]], gate: DraftGate) -> None:
        self._history, self.gate = history, gate
        self._lookup: PromptLookup | None = None
        self._seen = 0

    def guess(self, answer: Sequence[int], count: int) -> list[int]:
        """Return up to `count` tokens that may follow the `answer` so far; often none."""
        if self._lookup is None:
            self._lookup = PromptLookup(self._history)
        self._lookup.extend(answer[self._seen :])
        self._seen = len(answer)
        guessed = self._lookup.guess(count)
        return guessed if guessed and self.gate.allows() else []


class DraftGate:
    """Decides whether to draft, by a moving average over the verify passes of many answers.

    `cost` is the time of a verify pass in decode steps, until both have been measured. Drafting pays if a
    pass yields more tokens than that (those accepted, and the model's own one). While it does not, one pass
    is tried after 16, 32, ... 512 opportunities.
    """

    FIRST_PAUSE, LAST_PAUSE = 16, 512

    def __init__(self, cost: float) -> None:
        self._cost = cost
        self._mean = cost + 1
        self._pause = self.FIRST_PAUSE
        self._waiting = 0
        self._step_s = self._verify_s = 0.0

    @property
    def pays(self) -> bool:
        """Whether recent passes took less time than the decode steps that they replaced."""
        return self._mean >= self._cost

    def allows(self) -> bool:
        """Return whether to draft now. Call it once for each opportunity."""
        if self.pays:
            return True
        self._waiting -= 1
        return self._waiting < 0

    def stepped(self, seconds: float) -> None:
        """Record how long a decode step took, including the choice of the token."""
        self._step_s += 0.1 * (seconds - self._step_s) if self._step_s else seconds

    def verified(self, accepted: int, seconds: float) -> None:
        """Record how long a verify pass took, and how many drafted tokens it accepted."""
        self._verify_s += 0.2 * (seconds - self._verify_s) if self._verify_s else seconds
        if self._step_s:
            self._cost = self._verify_s / self._step_s
        self.observe(accepted)

    def observe(self, accepted: int) -> None:
        """Record how many drafted tokens a verify pass accepted."""
        paid = self.pays
        self._mean += 0.2 * (accepted + 1 - self._mean)
        if self.pays:
            self._pause = self.FIRST_PAUSE
        else:
            self._pause = self.FIRST_PAUSE if paid else min(2 * self._pause, self.LAST_PAUSE)
            self._waiting = self._pause
