"""Short ways from where a grammar stands to a complete answer, so that the last tokens can be planned.

The grammar engine says which tokens may come next, not how far the end is. Here the end is searched for
greedily: forced tokens are taken, strings and lists are closed as soon as they may be, and of a few choices
the one that forces least is tried. A path that is found is real, though not always the shortest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from edge.tokenizer import Tokenizer

LONGEST = 4096
"""Tokens of the longest path that is searched for."""

_FEW = 256
_FILLERS = 64  # tokens of padding in a row, 31 spaces each, after which a text seems to have no end


def allowed_tokens(matcher: LLMatcher) -> NDArray[np.int32]:
    """Ids that may come next, ascending; milliseconds where nearly all of them may."""
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.flatnonzero(np.unpackbits(mask, bitorder="little")).astype(np.int32)


class Closings:
    """Finds closing paths over one vocabulary; `string_ends` are control tokens that end a free text."""

    def __init__(self, tokenizer: Tokenizer, string_ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        marks = ["".join(c) for n in (3, 2, 1) for c in itertools.product('"}],:{[', repeat=n)]
        closers = [text for text in marks if "}" in text or "]" in text]
        ranked = sorted(closers, key=lambda text: -text.count("}") - text.count("]")) + marks
        structure = [text for text in ranked if not text.startswith('"') or text.startswith('""')]
        self._ends = self._single([*structure, "0", "null", "true", *"123456789", '"'])
        self._text_ends = [
            *string_ends,
            *self._single(text for text in ranked[: len(closers)] if text.startswith('"')),
        ]
        self._quotes = self._single(text for text in marks if text.startswith('"'))
        self._fillers = self._single(" " * count for count in range(31, 0, -1))
        self._probes = self._single("aZ7 ")
        self._characters = self._single(map(chr, range(32, 127)))

    def path(self, matcher: LLMatcher, hint: Sequence[int] = ()) -> list[int] | None:
        """Find tokens that complete the answer from `matcher`'s state, [] if it is complete; None if none is.

        `hint` is the path of an earlier state: mostly some end of it still serves, which is quickly seen.
        """
        if matcher.is_accepting():
            return []
        for start in reversed(range(min(len(hint), 64))):
            rest = list(hint[start:])
            if matcher.validate_tokens(rest) == len(rest) and _completes(matcher, rest):
                return rest
        return self._search(matcher.deep_copy())

    def in_free_text(self, matcher: LLMatcher) -> bool:
        """Whether nearly any token may come next, found without computing which."""
        return all(matcher.validate_tokens([token]) for token in self._probes)

    def _single(self, texts: Iterable[str]) -> list[int]:
        """Ids of those of `texts` that are one token."""
        encoded = map(self._tokenizer.encode, texts)
        return [ids[0] for ids in encoded if len(ids) == 1]

    def _search(self, matcher: LLMatcher) -> list[int] | None:
        path: list[int] = []
        fillers = 0
        while not matcher.is_accepting():
            tokens = matcher.compute_ff_tokens() or self._step(matcher)
            fillers = fillers + 1 if tokens[:1] == self._fillers[:1] else 0
            if not tokens or fillers > _FILLERS or len(path) > LONGEST or not matcher.consume_tokens(tokens):
                return None
            path += tokens
        return path

    def _step(self, matcher: LLMatcher) -> list[int]:
        """Return one token towards the end, in a list; empty if there is none."""
        free = self.in_free_text(matcher)
        found = self._first(matcher, self._text_ends if free else self._ends)
        if free:
            found = found or self._quote(matcher) or self._first(matcher, self._fillers)
        if found:
            return found
        tokens = allowed_tokens(matcher).tolist()
        if len(tokens) > _FEW:
            longest = sorted(tokens, key=lambda token: -len(self._tokenizer.piece_bytes(token)))[:8]
            tokens = [token for token in self._characters if matcher.validate_tokens([token])] + longest
        else:
            tokens = self._whole(tokens)[:32]
        return [min(tokens, key=lambda token: self._cost(matcher, token))] if tokens else []

    def _first(self, matcher: LLMatcher, tokens: list[int]) -> list[int]:
        return next(([token] for token in tokens if matcher.validate_tokens([token])), [])

    def _quote(self, matcher: LLMatcher) -> list[int]:
        """Return a token that ends a string here and goes on only as it must."""
        quote = self._quotes[-1]
        if not matcher.validate_tokens([quote]):
            return []
        after = matcher.deep_copy()
        after.consume_token(quote)
        sure = b'"' + after.compute_ff_bytes()
        return next([token] for token in self._quotes if sure.startswith(self._tokenizer.piece_bytes(token)))

    def _whole(self, tokens: list[int]) -> list[int]:
        """Pick those of `tokens` that are not the beginning of another one of them."""
        spelled = sorted((self._tokenizer.piece_bytes(token), token) for token in tokens)
        following = [text for text, _ in spelled[1:]] + [b""]
        pairs = zip(spelled, following, strict=True)
        return [token for (text, token), after in pairs if not after.startswith(text)]

    def _cost(self, matcher: LLMatcher, token: int) -> tuple[bool, bool, int, int]:
        """Order choices: complete at once, then with a forced continuation (the shorter), then longest."""
        after = matcher.deep_copy()
        if not after.consume_token(token):
            return (True, True, 0, 0)
        forced = after.compute_ff_tokens()
        size = len(self._tokenizer.piece_bytes(token))
        return (not after.is_accepting(), not forced, len(forced), -size)


def _completes(matcher: LLMatcher, tokens: list[int]) -> bool:
    after = matcher.deep_copy()
    return after.consume_tokens(tokens) and after.is_accepting()
