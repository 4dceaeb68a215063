"""Short ways from where a grammar stands to a complete answer, so that the last tokens can be planned.

The grammar engine says which tokens may come next, not how far the end is. Here the end is searched for
greedily: forced tokens are taken, strings and lists are closed as soon as they may be, and of a few choices
the one that forces least is tried. Where that goes round in a repetition (`[0-9]+ bar`), a second search
takes what leads out of it. A path that is found is real, though not always the shortest.
"""

from __future__ import annotations

import string
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from edge.text.tokenizer import Tokenizer

LONGEST = 1024
"""Tokens of the longest path that is searched for."""

_HINTED_STEPS = 3
_MASKS = 32  # states of a search at which it may ask for all allowed tokens, which is slow
_WAYS_OUT = 12  # out of repetitions that a search may take, each of which is slower still
_FOREIGN = 32
_FEW = 256
_PERIOD = 2  # steps after which a search that goes round takes the same token again: `0`, or `0` and `,`
_FILLERS = 64  # tokens of padding in a row, 31 spaces each, after which a text seems to have no end


def allowed_tokens(matcher: LLMatcher) -> NDArray[np.int32]:
    """Ids that may come next, ascending; milliseconds where nearly all of them may."""
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    used = np.flatnonzero(mask)
    rows, bits = np.nonzero(np.unpackbits(mask[used, None], axis=1, bitorder="little"))
    return (used[rows] * 8 + bits).astype(np.int32)


class Closings:
    """Finds closing paths over one vocabulary; `string_ends` are control tokens that end a free text."""

    def __init__(self, tokenizer: Tokenizer, string_ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._is_foreign = np.zeros(tokenizer.vocabulary_size, bool)
        marks: dict[int, bytes] = {}
        for token, text in enumerate(tokenizer.all_piece_bytes()):
            self._is_foreign[token] = text[:1] >= b"\x80"
            if text and not text.strip(b'"}],:{['):
                marks[token] = text
        self._marks = sorted(marks.items(), key=lambda mark: (-_closed(mark[1]), -len(mark[1]), mark))
        ends = [mark for mark in self._marks if _closed(mark[1]) > 0 and b"," not in mark[1]]
        self._text_ends = [*string_ends, *(token for token, text in ends if text.startswith(b'"'))]
        self._ends = [token for token, text in ends if text[:1] != b'"' or text.startswith(b'""')]
        self._ends += [token for token, text in self._marks if text[0] in b",:"]
        self._ends += self._single(["[]", "{}", '""', "0", "null", "true", *"123456789"])
        self._ends += [token for token, text in self._marks if text[0] in b"[{"]
        self._ends += self._single('"')
        self._fillers = self._single(" " * count for count in range(31, 0, -1))
        self._probes = self._single("aZ7 ")
        self._characters = [*string_ends, *self._single(map(chr, range(32, 127)))]
        self._signs = [*string_ends, *self._single(" 09AZaz" + string.punctuation)]

    def path(self, matcher: LLMatcher, hint: Sequence[int] = (), longest: int = LONGEST) -> list[int] | None:
        """Find tokens that complete the answer from `matcher`'s state, [] if it is complete.

        None if no way of at most `longest` tokens is found. `hint` is the path of an earlier state: mostly
        some end of it still serves, at once or after a step, which is quickly seen.
        """
        found = self._path(matcher, hint, longest, escaping=False)
        return self._path(matcher, hint, longest, escaping=True) if found is None else found

    def _path(
        self, matcher: LLMatcher, hint: Sequence[int], longest: int, escaping: bool
    ) -> list[int] | None:
        matcher = matcher.deep_copy()
        path: list[int] = []
        taken, escapes = deque[list[int]](maxlen=_PERIOD), set[int]()
        fillers = masks = steps = ways_out = 0
        while not matcher.is_accepting():
            if hint and steps < _HINTED_STEPS and (rest := _serving(matcher, hint)):
                return path + rest
            forced = matcher.compute_ff_tokens()
            tokens = forced or self._step(matcher)
            if not tokens:
                masks += 1
                tokens = self._choice(matcher)
            if not forced:
                if escaping and tokens in taken and ways_out < _WAYS_OUT:
                    ways_out += 1
                    tokens = self._escape(matcher, tokens, escapes) or tokens
                    escapes.update(tokens)
                taken.append(tokens)
            steps += 1
            fillers = fillers + 1 if tokens[:1] == self._fillers[:1] else 0
            path += tokens
            if not tokens or len(path) > min(longest, LONGEST) or fillers > _FILLERS or masks > _MASKS:
                return None
            matcher.consume_tokens(tokens)
        return path

    def in_free_text(self, matcher: LLMatcher) -> bool:
        """Whether nearly any token may come next, found without computing which."""
        return all(matcher.validate_tokens([token]) for token in self._probes)

    def _single(self, texts: Iterable[str]) -> list[int]:
        """Ids of those of `texts` that are one token."""
        encoded = map(self._tokenizer.encode, texts)
        return [ids[0] for ids in encoded if len(ids) == 1]

    def _step(self, matcher: LLMatcher) -> list[int]:
        """Return one of the usual tokens towards the end, in a list; empty if none will do."""
        if self.in_free_text(matcher):
            return (
                self._first(matcher, self._text_ends)
                or self._along(matcher, b'"')
                or self._first(matcher, self._fillers)
            )
        sure = matcher.compute_ff_bytes()
        return self._along(matcher, sure) if sure else self._first(matcher, self._ends)

    def _along(self, matcher: LLMatcher, sure: bytes) -> list[int]:
        """Return the punctuation token that begins with `sure` and gets furthest, in a list; or nothing.

        It opens no string that it does not end, and goes on to a next member only if there must be one.
        """
        for token, text in self._marks:
            rest = text[len(sure) :]
            if not text.startswith(sure) or (sure[-1:] == b'"' and rest[:1] not in (b"", b'"', b",", b":")):
                continue
            if matcher.validate_tokens([token]) and self._must_go_on(matcher, text):
                return [token]
        return []

    def _must_go_on(self, matcher: LLMatcher, text: bytes) -> bool:
        """Whether a comma in `text`, if there is one, is forced by what stands before it."""
        before, comma, _ = text.partition(b",")
        if not comma:
            return True
        after = matcher.deep_copy()
        after.consume_tokens(self._tokenizer.encode(before.decode()))
        return after.compute_ff_bytes().startswith(b",")

    def _choice(self, matcher: LLMatcher) -> list[int]:
        """Return the best of all allowed tokens, in a list; empty if there is none."""
        tokens = allowed_tokens(matcher).tolist()
        if len(tokens) > _FEW:
            longest = sorted(tokens, key=lambda token: -len(self._tokenizer.piece_bytes(token)))[:8]
            tokens = [token for token in self._characters if matcher.validate_tokens([token])] + longest
        else:
            tokens = self._whole(tokens)[:32]
        return [min(tokens, key=lambda token: self._cost(matcher, token))] if tokens else []

    def _escape(self, matcher: LLMatcher, repeated: list[int], tried: set[int]) -> list[int]:
        """Return the best character, but for `repeated`, after which something else may come than here.

        In a list; empty if there is none. One that was `tried` only if there is no other.
        """
        here = self._allowed_signs(matcher)

        def leads_out(token: int) -> bool:
            after = matcher.deep_copy()
            if [token] == repeated or not after.consume_token(token):
                return False
            ends = after.is_accepting() or bool(after.compute_ff_bytes())
            return ends or self._allowed_signs(after) != here

        characters = [token for token in self._characters if matcher.validate_tokens([token])]
        tokens = list(filter(leads_out, characters)) or list(filter(leads_out, self._foreign(matcher)))
        return [min(tokens, key=lambda token: (token in tried, self._cost(matcher, token)))] if tokens else []

    def _foreign(self, matcher: LLMatcher) -> list[int]:
        """Pick some of the allowed tokens that begin with another character than those of ASCII."""
        tokens = allowed_tokens(matcher)
        return self._whole(tokens[self._is_foreign[tokens]][:_FOREIGN].tolist())

    def _allowed_signs(self, matcher: LLMatcher) -> list[int]:
        """By what may come next one place in a grammar is told from another."""
        return [token for token in self._signs if matcher.validate_tokens([token])]

    def _first(self, matcher: LLMatcher, tokens: list[int]) -> list[int]:
        return next(([token] for token in tokens if matcher.validate_tokens([token])), [])

    def _whole(self, tokens: list[int]) -> list[int]:
        """Pick those of `tokens` that are not the beginning of another one of them."""
        spelled = sorted((self._tokenizer.piece_bytes(token), token) for token in tokens)
        following = [*(text for text, _ in spelled[1:]), b""]
        pairs = zip(spelled, following, strict=False)
        return [token for (text, token), after in pairs if not after.startswith(text)]

    def _cost(self, matcher: LLMatcher, token: int) -> tuple[bool, bool, int, int]:
        """Order choices: complete at once, then with a forced continuation (the shorter), then longest."""
        after = matcher.deep_copy()
        if not after.consume_token(token):
            return (True, True, 0, 0)
        forced = after.compute_ff_bytes()
        size = len(self._tokenizer.piece_bytes(token))
        return (not after.is_accepting(), not forced, len(forced), -size)


def _closed(text: bytes) -> int:
    """How many more brackets `text` closes than it opens."""
    return sum(text.count(mark) for mark in (b"}", b"]")) - sum(text.count(mark) for mark in (b"{", b"["))


def _serving(matcher: LLMatcher, hint: Sequence[int]) -> list[int]:
    """Return an end of `hint` that completes the answer: mostly the last token, or nearly all; or nothing."""
    for start in (len(hint) - 1, *range(min(len(hint) - 1, 64))):
        rest = list(hint[start:])
        if matcher.validate_tokens(rest) == len(rest):
            after = matcher.deep_copy()
            if after.consume_tokens(rest) and after.is_accepting():
                return rest
    return []
