"""Finds short completions: tokens that end an answer validly from where it stands in its grammar.

The grammar engine says which tokens may come next, not how far the end is. The search is greedy: forced
tokens are taken, strings and lists are ended as soon as they may be, and of a few choices the one that forces
least is tried. Where that repeats itself (`[0-9]+ bar`), a second search takes the tokens that lead out of
the repetition. A completion that is found is valid, though not always the shortest.
"""

from __future__ import annotations

import re
import string
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from llguidance import LLMatcher

from edge.text.tokenizer import Tokenizer

LONGEST = 1024
"""Tokens of the longest completion that is searched for."""

SEARCH_S = 0.25
"""Processor time after which a search gives up."""

_HINTED_STEPS = 3
_MASKS = 32  # states of a search at which it may ask for all allowed tokens, which is slow
_ESCAPES = 12  # out of repetitions that a search may try, each of which is slower still
_NOT_ASCII = 32
_FEW = 256
_PERIOD = 2  # steps after which a search that repeats itself takes the same token again: `0`, or `0` and `,`
_FILLERS = 64  # tokens of padding in a row, 31 spaces each, after which a text seems to have no end
_BITS = [[bit for bit in range(8) if byte >> bit & 1] for byte in range(256)]


def allowed_tokens(matcher: LLMatcher, most: int) -> list[int] | None:
    """Return the ids that may come next, ascending; None if they are more than `most`.

    Takes milliseconds where nearly all tokens are allowed.
    """
    mask: bytes = matcher.compute_bitmask()
    return _ids(mask) if int.from_bytes(mask, "little").bit_count() <= most else None


def _ids(mask: bytes) -> list[int]:
    bytes_set = ((match.start() * 8, _BITS[mask[match.start()]]) for match in re.finditer(rb"[^\0]", mask))
    return [first + bit for first, bits in bytes_set for bit in bits]


def _among(tokens: Iterable[int], mask: bytes) -> Iterator[int]:
    """Yield those of `tokens` whose bits are set in `mask`."""
    return (token for token in tokens if mask[token >> 3] >> (token & 7) & 1)


class CompletionSearch:
    """Finds completions over one vocabulary; `string_ends` are control tokens that end a free text."""

    def __init__(self, tokenizer: Tokenizer, string_ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._not_ascii = array("i")
        lengths = bytearray(tokenizer.vocabulary_size)
        marks: dict[int, bytes] = {}
        for token, text in enumerate(tokenizer.all_piece_bytes()):
            lengths[token] = min(len(text), 255)
            if text[:1] >= b"\x80":
                self._not_ascii.append(token)
            if text and not text.strip(b'"}],:{['):
                marks[token] = text
        self._longest_first = array("i", sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))
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
        """Return tokens that complete the answer from `matcher`'s state, [] if it is complete.

        None if no completion of at most `longest` tokens is found. `hint` is the completion of an earlier
        state: its end often still serves, at once or after a step, which is cheap to check.
        """
        until = time.process_time() + SEARCH_S
        path = self._path(matcher, hint, longest, until, escaping=False)
        return self._path(matcher, hint, longest, until, escaping=True) if path is None else path

    def _path(
        self, matcher: LLMatcher, hint: Sequence[int], longest: int, until: float, escaping: bool
    ) -> list[int] | None:
        matcher = matcher.deep_copy()
        path: list[int] = []
        taken, escapes = deque[list[int]](maxlen=_PERIOD), set[int]()
        fillers = masks = steps = escaped = 0
        while not matcher.is_accepting():
            if hint and steps < _HINTED_STEPS and (rest := _serving(matcher, hint)):
                return path + rest
            forced = matcher.compute_ff_tokens()
            tokens = forced or self._step(matcher)
            if not tokens:
                masks += 1
                tokens = self._best(matcher)
            if not forced:
                if escaping and tokens in taken and escaped < _ESCAPES:
                    escaped += 1
                    tokens = self._escape(matcher, tokens, escapes) or tokens
                    escapes.update(tokens)
                taken.append(tokens)
            steps += 1
            fillers = fillers + 1 if tokens[:1] == self._fillers[:1] else 0
            path += tokens
            if not tokens or len(path) > min(longest, LONGEST) or fillers > _FILLERS or masks > _MASKS:
                return None
            if time.process_time() > until:
                return None
            matcher.consume_tokens(tokens)
        return path

    def in_free_text(self, matcher: LLMatcher) -> bool:
        """Whether nearly any token may come next, found without computing which."""
        return all(matcher.validate_tokens([token]) for token in self._probes)

    def _single(self, texts: Iterable[str]) -> list[int]:
        """Return the ids of those of `texts` that are one token."""
        encoded = map(self._tokenizer.encode, texts)
        return [ids[0] for ids in encoded if len(ids) == 1]

    def _step(self, matcher: LLMatcher) -> list[int]:
        """Return one of the tokens that usually lead to the end, in a list; empty if none is allowed."""
        if self.in_free_text(matcher):
            return (
                self._first(matcher, self._text_ends)
                or self._along(matcher, b'"')
                or self._first(matcher, self._fillers)
            )
        sure = matcher.compute_ff_bytes()
        return self._along(matcher, sure) if sure else self._first(matcher, self._ends)

    def _along(self, matcher: LLMatcher, sure: bytes) -> list[int]:
        """Return the punctuation token that starts with `sure` and gets furthest, in a list; else nothing.

        It opens no string that it does not end, and continues to another member only if one is required.
        """
        for token, text in self._marks:
            rest = text[len(sure) :]
            if not text.startswith(sure) or (sure[-1:] == b'"' and rest[:1] not in (b"", b'"', b",", b":")):
                continue
            if matcher.validate_tokens([token]) and self._must_go_on(matcher, text):
                return [token]
        return []

    def _must_go_on(self, matcher: LLMatcher, text: bytes) -> bool:
        """Whether a comma in `text`, if there is one, is forced by the text before it."""
        before, comma, _ = text.partition(b",")
        if not comma:
            return True
        after = matcher.deep_copy()
        after.consume_tokens(self._tokenizer.encode(before.decode()))
        return after.compute_ff_bytes().startswith(b",")

    def _best(self, matcher: LLMatcher) -> list[int]:
        """Return the best of all allowed tokens, in a list; empty if none is allowed."""
        mask: bytes = matcher.compute_bitmask()
        if int.from_bytes(mask, "little").bit_count() > _FEW:
            tokens = [token for token in self._characters if matcher.validate_tokens([token])]
            tokens += islice(_among(self._longest_first, mask), 8)
        else:
            tokens = self._whole(_ids(mask))[:32]
        return [min(tokens, key=lambda token: self._cost(matcher, token))] if tokens else []

    def _escape(self, matcher: LLMatcher, repeated: list[int], tried: set[int]) -> list[int]:
        """Return the best character other than `repeated` that changes what may come next.

        In a list; empty if there is none. A `tried` one is returned only if there is no other.
        """
        here = self._allowed_signs(matcher)

        def leads_out(token: int) -> bool:
            after = matcher.deep_copy()
            if [token] == repeated or not after.consume_token(token):
                return False
            ends = after.is_accepting() or bool(after.compute_ff_bytes())
            return ends or self._allowed_signs(after) != here

        characters = [token for token in self._characters if matcher.validate_tokens([token])]
        tokens = list(filter(leads_out, characters)) or list(filter(leads_out, self._outside_ascii(matcher)))
        return [min(tokens, key=lambda token: (token in tried, self._cost(matcher, token)))] if tokens else []

    def _outside_ascii(self, matcher: LLMatcher) -> list[int]:
        """Return some of the allowed tokens that start with a character outside ASCII."""
        return self._whole(list(islice(_among(self._not_ascii, matcher.compute_bitmask()), _NOT_ASCII)))

    def _allowed_signs(self, matcher: LLMatcher) -> list[int]:
        """Return which sample characters may come next: the fingerprint of a position in a grammar."""
        return [token for token in self._signs if matcher.validate_tokens([token])]

    def _first(self, matcher: LLMatcher, tokens: list[int]) -> list[int]:
        return next(([token] for token in tokens if matcher.validate_tokens([token])), [])

    def _whole(self, tokens: list[int]) -> list[int]:
        """Return those of `tokens` that are not a prefix of another one of them."""
        spelled = sorted((self._tokenizer.piece_bytes(token), token) for token in tokens)
        following = [*(text for text, _ in spelled[1:]), b""]
        pairs = zip(spelled, following, strict=False)
        return [token for (text, token), after in pairs if not after.startswith(text)]

    def _cost(self, matcher: LLMatcher, token: int) -> tuple[bool, bool, int, int]:
        """Order tokens: those that complete the answer, then those that force a short text; longer first."""
        after = matcher.deep_copy()
        if not after.consume_token(token):
            return (True, True, 0, 0)
        forced = after.compute_ff_bytes()
        size = len(self._tokenizer.piece_bytes(token))
        return (not after.is_accepting(), not forced, len(forced), -size)


def _closed(text: bytes) -> int:
    """Return how many more brackets `text` closes than it opens."""
    return sum(text.count(mark) for mark in (b"}", b"]")) - sum(text.count(mark) for mark in (b"{", b"["))


def _serving(matcher: LLMatcher, hint: Sequence[int]) -> list[int]:
    """Return an end of `hint` that completes the answer (usually its last token, or nearly all), or []."""
    for start in (len(hint) - 1, *range(min(len(hint) - 1, 64))):
        rest = list(hint[start:])
        if matcher.validate_tokens(rest) == len(rest):
            after = matcher.deep_copy()
            if after.consume_tokens(rest) and after.is_accepting():
                return rest
    return []
