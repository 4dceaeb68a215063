"""Answers that are valid by construction: which tokens a request's format allows, forces, and still needs.

llguidance does the parsing. Its view of the vocabulary is built on the first request that needs it (about
30 MB, without the lexer's tables for free text, which would take 70 MB more). Instead of a mask over the
vocabulary, which takes milliseconds inside a string, tokens are drawn and then checked, in microseconds.
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from edge.errors import BundleError, RequestError
from edge.generation.completion_search import Closings, allowed_tokens
from edge.generation.grammar_source import grammar_source
from edge.generation.sampling import Sampler, largest
from edge.protocol.messages import Request
from edge.runtime.memory import return_free_memory
from edge.text.prompt import CHANNEL_END
from edge.text.tokenizer import Tokenizer
from edge.text.tool_syntax import QUOTE

CACHED_GRAMMARS = 32
FEW_TOKENS = 1024
"""Up to so many allowed tokens are listed, so that their logits alone can be computed."""

# Enough for 15,000 choices; a hostile pattern is refused after about 20 MB and 0.2 s.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=100_000, max_lexer_states=5_000, verbose_errors=False
)
_MARGIN = 64  # a token after which no closing is known is refused when fewer tokens than about this remain


class GrammarCompiler:
    """Compiles the formats of requests, and keeps the last `CACHED_GRAMMARS`. Not thread-safe.

    `stop_ids` end an answer where the grammar lets it end.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = tuple(stop_ids)
        self._engine: LLTokenizer | None = None
        self._closings: Closings | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    @property
    def cached(self) -> int:
        """How many grammars are kept."""
        return len(self._compiled)

    def prepare(self) -> None:
        """Build the engine's view of the vocabulary now (about a second), if that is not done yet."""
        if self._engine is None:
            vocabulary: Any = _Vocabulary(self._tokenizer, self._stop_ids)
            self._engine = LLTokenizer(vocabulary, eos_token=list(self._stop_ids), slices=[])
            self._closings = Closings(self._tokenizer, _string_ends(self._tokenizer))
            return_free_memory()

    def compile(self, request: Request) -> Grammar | None:
        """Return the grammar of `request`'s answers; None if it allows any text.

        Raises RequestError("bad_request"), naming what can't be followed.
        """
        source = grammar_source(request, self._tokenizer)
        if source is None:
            return None
        matcher = self._compiled.pop(source, None) or self._matcher(source, request)
        self._compiled[source] = matcher
        if len(self._compiled) > CACHED_GRAMMARS:
            self._compiled.popitem(last=False)
        assert self._closings is not None  # built with the engine
        return Grammar(matcher, self._closings, self._stop_ids)

    def _matcher(self, source: str, request: Request) -> LLMatcher:
        self.prepare()
        assert self._engine is not None
        matcher = LLMatcher(self._engine, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _refusal(matcher, request)
        return matcher


class Grammar:
    """A compiled format; any number of answers can be made with it."""

    def __init__(self, matcher: LLMatcher, closings: Closings, stop_ids: tuple[int, ...]) -> None:
        self._matcher, self._closings, self._stop_ids = matcher, closings, stop_ids

    def constrain(self, max_tokens: int) -> Constraint:
        """Begin an answer of at most `max_tokens` tokens."""
        return Constraint(self._matcher.deep_copy(), self._closings, self._stop_ids, max_tokens)


class Constraint:
    """Where one answer stands in its grammar.

    `remaining` counts the tokens that may still be accepted. As long as a way to complete the answer within
    them is known, `choose` leaves it only for tokens that have one too: such an answer ends complete. There
    is one from the start unless `max_tokens` is too small, or a regular expression hides it.
    """

    def __init__(
        self, matcher: LLMatcher, closings: Closings, stop_ids: tuple[int, ...], max_tokens: int
    ) -> None:
        self._matcher, self._closings, self._stop_ids = matcher, closings, stop_ids
        self.remaining = max_tokens
        self._closing: list[int] | None = None
        self._closing_known = False
        self._hint: list[int] = []
        self._patience, self._next_search = 1, max_tokens
        self._after: tuple[int, list[int] | None] | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    def forced(self) -> list[int]:
        """Return the tokens that must come next, as the text would be tokenised; often none.

        None either where the known way to the end has the same text in other tokens, and there may not be
        enough left for these.
        """
        tokens = self._matcher.compute_ff_tokens()[: self.remaining]
        path = self.closing() if tokens else None
        if path is None or path[: len(tokens)] == tokens or len(path) + len(tokens) < self.remaining:
            return tokens
        return []

    def allowed(self) -> NDArray[np.int32] | None:
        """Return the ids that may come next, ascending, if they are few; None if they are not."""
        if self._closings.in_free_text(self._matcher):
            return None
        tokens = allowed_tokens(self._matcher)
        self._check()
        return tokens if len(tokens) <= FEW_TOKENS else None

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of tokens that may not come next to -inf, in place."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        logits[np.unpackbits(bits, count=len(logits), bitorder="little") == 0] = -np.inf

    def validate(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` could be accepted one after the other.

        Unlike `mask`, `allowed` and `choose` it also lets forced text pass in other tokens than `forced`.
        """
        return self._matcher.validate_tokens(list(tokens))

    def accept(self, token: int) -> None:
        """Go on by one token, which must be allowed.

        Raises RequestError("bad_request") if the format turns out to be too complex, and ValueError for a
        token that is not allowed.
        """
        if self._matcher.validate_tokens([token]) == 0 and not self._matcher.is_error():
            raise ValueError(f"token {token} is not allowed here")
        self._matcher.consume_token(token)
        self._check()
        self.remaining -= 1
        path = self._closing if self._closing_known else None
        self._closing_known = False
        if self._after is not None and self._after[0] == token:
            self._remember(self._after[1])
        elif path and path[0] == token:
            self._remember(path[1:])
        self._after = None

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""
        self._matcher.rollback(count)
        self._check()
        self.remaining += count
        self._closing_known, self._after = False, None
        self._patience, self._next_search = 1, self.remaining

    def closing(self) -> list[int] | None:
        """Return tokens that complete the answer, [] if it is complete; None if no way is known."""
        if not self._closing_known and self.remaining <= self._next_search:
            self._remember(self._closings.path(self._matcher, self._hint, self.remaining))
        return self._closing if self._closing_known else None

    def choose(
        self, sampler: Sampler, logits: NDArray[np.float32], ids: NDArray[np.int32] | None = None
    ) -> int:
        """Choose an allowed token, distributed as if all others were masked first; it may be a stop id.

        `ids` are what `allowed` returned, if the logits are theirs. `logits` may be changed. Near the end of
        `remaining` a token that would leave too few is replaced by the first one of `closing`.
        """
        token = self._draw(sampler, logits, ids)
        path = self.closing()
        if path is None or len(path) > self.remaining or token in self._stop_ids:
            return token
        if path[:1] == [token]:
            after: list[int] | None = path[1:]
        else:
            moved = self._matcher.deep_copy()
            moved.consume_token(token)
            after = self._closings.path(moved, path, self.remaining)
        needed = 2 * len(path) + _MARGIN if after is None else len(after)
        if needed >= self.remaining:
            token, after = (path[0], path[1:]) if path else (self._stop_ids[0], [])
        self._after = (token, after)
        return token

    def _remember(self, closing: list[int] | None) -> None:
        """Note what a search found; after one without result, wait twice as long as the last time."""
        self._closing, self._closing_known = closing, True
        if closing is not None:
            self._hint, self._patience = closing, 1
        else:
            self._patience *= 2
        self._next_search = self.remaining - self._patience

    def _draw(self, sampler: Sampler, logits: NDArray[np.float32], ids: NDArray[np.int32] | None) -> int:
        if ids is not None:
            return sampler.sample(logits, ids)
        if forced := self.forced():
            return forced[0]
        if sampler.greedy and self._matcher.validate_tokens([token := sampler.sample(logits)]):
            return token
        if sampler.candidates <= FEW_TOKENS:
            best = largest(logits, 4 * sampler.candidates).tolist()
            valid = filter(lambda token: self._matcher.validate_tokens([token]), best)
            ids = np.sort(np.fromiter(itertools.islice(valid, sampler.candidates), np.int32))
            if len(ids) == sampler.candidates:  # the other tokens are out of the top-k
                return sampler.sample(logits[ids], ids)
        self.mask(logits)
        return sampler.sample(logits)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError("bad_request", f"response_format: {_one_line(self._matcher.get_error())}")


class _Vocabulary:
    """What llguidance asks of a tokenizer; `tokens` is iterated over once, and never held as a list here."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = None
        self.special_token_ids = [i for i, text in enumerate(tokenizer.all_piece_bytes()) if not text]
        self.tokens = _Pieces(tokenizer)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class _Pieces(Sequence[bytes]):
    """The bytes of all pieces, made when asked for; a control token, which has none, is called by its number.

    Without a name all control tokens look like the beginning of each other to the engine's masks.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return self._tokenizer.vocabulary_size

    def __getitem__(self, index: Any) -> Any:
        return self._tokenizer.piece_bytes(index) or b"<%d>" % index

    def __iter__(self) -> Iterator[bytes]:
        for index, text in enumerate(self._tokenizer.all_piece_bytes()):
            yield text or b"<%d>" % index


def _string_ends(tokenizer: Tokenizer) -> list[int]:
    """Control tokens that end a free text: Gemma 4's string quote and channel end, where there are such."""
    found = []
    for control in (QUOTE, CHANNEL_END):
        try:
            found.append(tokenizer.control_id(control.piece))
        except BundleError:
            continue
    return found


def _refusal(matcher: LLMatcher, request: Request) -> RequestError:
    where = " or ".join(name for name in ("response_format", "tools") if getattr(request, name))
    if request.response_format is not None:
        where = where.replace("response_format", f"response_format.{request.response_format['type']}")
    reason = _one_line(matcher.get_error())
    return RequestError("bad_request", f"{where}: {reason}; leave it out or describe it otherwise")


def _one_line(error: str) -> str:
    """The engine's reason, without the drawing around it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["unknown"]
    reason = next((line for line in lines if line.startswith("error:")), lines[0])
    reason = re.sub(r"^(error: *|at \d+\(\d+\): *|failed to compile JSON schema: *)+", "", reason)
    return "no answer can follow it" if reason.startswith("NoExtension") else reason[:200]
