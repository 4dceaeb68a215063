"""Grammars of answers: which tokens a request's format allows, forces, and needs to be complete.

llguidance does the parsing. Its view of the vocabulary takes about 30 MB (without the lexer's tables for free
text, which would take 70 MB more). Inside a free text a mask over the vocabulary takes milliseconds, so
tokens are checked one by one there, in microseconds.

No compile time, step or memory is bounded here: untrusted formats are compiled in a process that can be
killed (`edge.generation.grammar_worker`). NumPy is not imported, which would double that process.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from edge.errors import BundleError, RequestError
from edge.generation.answer_format import AnswerFormat
from edge.generation.completion_planner import CompletionPlanner, Plan
from edge.generation.completion_search import CompletionSearch, allowed_tokens
from edge.generation.constraint import FEW_TOKENS, Step
from edge.generation.grammar_source import grammar_source
from edge.text.prompt import CHANNEL_END
from edge.text.tokenizer import Tokenizer
from edge.text.tool_syntax import QUOTE

# Enough for 15,000 choices.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=100_000, max_lexer_states=5_000, verbose_errors=False
)


class GrammarCompiler:
    """Compiles formats, and keeps what it compiled until `forget_oldest`. Not thread-safe.

    `stop_ids` end an answer where the grammar lets it end.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        """Build the engine's view of the vocabulary: about a second."""
        self._tokenizer = tokenizer
        self._stop_ids = tuple(stop_ids)
        vocabulary: Any = _Vocabulary(tokenizer, self._stop_ids)
        self._engine = LLTokenizer(vocabulary, eos_token=list(self._stop_ids), slices=[])
        self._search = CompletionSearch(tokenizer, _string_ends(tokenizer))
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(self, answer_format: AnswerFormat) -> Grammar:
        """Return the grammar of answers in a format.

        Raises RequestError("bad_request"), naming what can't be followed.
        """
        key = answer_format.to_json()
        matcher = self._compiled.pop(key, None) or self._matcher(answer_format)
        self._compiled[key] = matcher
        return Grammar(matcher, self._search, self._stop_ids, answer_format)

    def forget_oldest(self) -> bool:
        """Forget the grammar that was used least recently; False if there is none."""
        if not self._compiled:
            return False
        self._compiled.popitem(last=False)
        return True

    def _matcher(self, answer_format: AnswerFormat) -> LLMatcher:
        source = grammar_source(answer_format, self._tokenizer)
        matcher = LLMatcher(self._engine, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            reason = _one_line(matcher.get_error())
            raise RequestError("bad_request", f"{answer_format.fields}: {reason}; leave it out or change it")
        return matcher


class Grammar:
    """A compiled format; any number of answers can be made with it."""

    def __init__(
        self,
        matcher: LLMatcher,
        search: CompletionSearch,
        stop_ids: tuple[int, ...],
        answer_format: AnswerFormat,
    ) -> None:
        self._matcher, self._search, self._stop_ids = matcher, search, stop_ids
        self._format = answer_format

    def constrain(self, max_tokens: int) -> GrammarConstraint:
        """Begin an answer of at most `max_tokens` tokens."""
        planner = CompletionPlanner(self._search, self._stop_ids, max_tokens)
        return GrammarConstraint(
            self._matcher.deep_copy(), self._search, planner, self._stop_ids, max_tokens, self._format.fields
        )


class GrammarConstraint:
    """The position of one answer in its grammar (an `edge.generation.constraint.Constraint`).

    `remaining` counts the tokens that may still be taken. As long as a completion within them is known,
    `take` leaves it only for tokens that have one too: such an answer ends complete. There is one from the
    start unless `max_tokens` is too small, or a regular expression hides it.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        search: CompletionSearch,
        planner: CompletionPlanner,
        stop_ids: tuple[int, ...],
        max_tokens: int,
        fields: str,
    ) -> None:
        self._matcher, self._search, self._planner = matcher, search, planner
        self._stop_ids, self._fields = stop_ids, fields
        self.remaining = max_tokens

    @property
    def complete(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    def take(self, token: int, follow: bool = True) -> Step:
        """Take a token, or the one that the plan needs instead; with `follow` also what is forced after it.

        A stop id ends the answer and is not consumed. A token that is not allowed changes nothing: the
        Step's token is None then. Raises RequestError("bad_request") if the format is too complex to follow.
        """
        if not self._allows(token):
            return Step(None, [], self.complete, self.accepting)
        plan = self._planner.plan(self._matcher, self.remaining, token)
        if plan.token in self._stop_ids:
            return Step(plan.token, [], self.complete, self.accepting)
        self._consume(plan)
        return self._step(plan.token, follow)

    def follow(self) -> Step:
        """Take the tokens that are forced here; the Step has no other token."""
        return self._step(None, follow=True)

    def forced(self) -> list[int]:
        """Return the tokens that must come next, as the text would be tokenised; often none.

        Also none where the known completion spells the same text in other tokens, and too few tokens may
        remain for these.
        """
        if self.complete:
            return []
        tokens = self._matcher.compute_ff_tokens()[: self.remaining]
        self._check()
        path = self.completion() if tokens else None
        if path is None or path[: len(tokens)] == tokens or len(path) + len(tokens) < self.remaining:
            return tokens
        return []

    def allowed(self) -> list[int] | None:
        """Return the ids that may come next, ascending, if they are at most FEW_TOKENS; None if not."""
        if self.complete or self._search.in_free_text(self._matcher):
            return None
        tokens = allowed_tokens(self._matcher, FEW_TOKENS)
        self._check()
        return tokens

    def mask(self) -> bytes:
        """Return a bit for each id that may come next, lowest bit first."""
        bits: bytes = self._matcher.compute_bitmask()
        self._check()
        return bits

    def allowed_among(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return the first `count` of `tokens` that may come next."""
        return list(islice(filter(self._allows, tokens), count))

    def validate(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` could be taken one after the other.

        Unlike `mask` and `allowed` it also lets forced text pass in other tokens than `forced`.
        """
        return self._matcher.validate_tokens(list(tokens))

    def accept(self, tokens: Sequence[int]) -> None:
        """Take `tokens`, all of which must be allowed, without a plan.

        Raises RequestError("bad_request") if the format is too complex to follow, and ValueError for a token
        that is not allowed.
        """
        for token in tokens:
            if not self._allows(token):
                raise ValueError(f"token {token} is not allowed here")
            self._consume(Plan(token))

    def completion(self) -> list[int] | None:
        """Return tokens that complete the answer, [] if it is complete; None if none are known."""
        return self._planner.completion(self._matcher, self.remaining)

    def _step(self, token: int | None, follow: bool) -> Step:
        forced = self.forced()
        if follow:
            self.accept(forced)
        return Step(token, forced, self.complete, self.accepting, token is not None)

    def _allows(self, token: int) -> bool:
        allowed = self._matcher.validate_tokens([token]) == 1
        self._check()
        return allowed

    def _consume(self, plan: Plan) -> None:
        self._matcher.consume_token(plan.token)
        self._check()
        self.remaining -= 1
        self._planner.advance(plan, self.remaining)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _one_line(self._matcher.get_error())
            raise RequestError("bad_request", f"{self._fields}: too complex: {reason}; describe less at once")


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
    """The bytes of all pieces, made on demand; a control token, which has no text, is named by its number.

    Without names the engine's masks would take all control tokens for prefixes of each other.
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
    """Return the control tokens that end a free text: Gemma 4's string quote and channel end, if present."""
    ends = []
    for control in (QUOTE, CHANNEL_END):
        try:
            ends.append(tokenizer.control_id(control.piece))
        except BundleError:
            continue
    return ends


def _one_line(error: str) -> str:
    """Return the engine's reason without the decoration around it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["unknown"]
    reason = next((line for line in lines if line.startswith("error:")), lines[0])
    reason = re.sub(r"^(error: *|at \d+\(\d+\): *|failed to compile JSON schema: *)+", "", reason)
    return "no answer can satisfy it" if reason.startswith("NoExtension") else reason[:200]
