"""The loop of one answer: prefill, then choose and run tokens until something ends it.

Tokens that a grammar forces are run together with the token before them, or with the prompt, and without the
output head. Where a grammar allows only a few tokens, only their logits are computed. Drafted tokens are run
together and checked in one pass. None of this changes what is generated: each token is the sampler's own
choice from the model's logits, with one random number drawn for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Generator as Coroutine
from dataclasses import dataclass

from edge.errors import Interruption
from edge.generation.drafting import Drafter
from edge.generation.token_choice import TokenChooser
from edge.protocol.messages import Timings, ToolCall, Usage
from edge.runtime.decoder import Decoder
from edge.runtime.prefix_cache import SHORTEST
from edge.text.prompt import OutputParser

Interrupted = Callable[[], str | None]
"""Polled once per prefill chunk and decode step: None to continue, or the finish reason to stop with."""


@dataclass(frozen=True)
class Delta:
    """Text that became certain with the last token; either part may be empty."""

    text: str
    reasoning: str


@dataclass(frozen=True)
class Completion:
    """The whole answer. `finish_reason` is stop, length, tool_calls, or what `interrupted` returned."""

    text: str
    finish_reason: str
    usage: Usage
    timings: Timings
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


class AnswerLoop:
    """Generates one answer of at most `budget` tokens; `tokens` are those it has so far.

    Later prompts are likely to start with the first `stable` tokens of this one, so these are remembered.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: list[int],
        stable: int,
        chooser: TokenChooser,
        output: OutputParser,
        drafter: Drafter,
        budget: int,
    ) -> None:
        self._decoder, self._prompt, self._stable = decoder, prompt, stable
        self._chooser, self._output, self._drafter, self._budget = chooser, output, drafter, budget
        self.tokens: list[int] = []
        self._cached = 0
        self._started = self._prefilled = self._first_token = time.monotonic()

    def run(self, interrupted: Interrupted) -> Iterator[Delta | Completion]:
        """Yield text as it becomes certain, and finally one Completion."""
        self._started = self._prefilled = time.monotonic()
        try:
            reason = yield from self._run(interrupted)
        except Interruption as interruption:
            reason = interruption.reason
        rest = self._output.finish()
        if rest.text or rest.reasoning:
            yield Delta(rest.text, rest.reasoning)
        yield self._completion("tool_calls" if reason == "stop" and self._output.tool_calls else reason)

    def _run(self, interrupted: Interrupted) -> Coroutine[Delta, None, str]:
        """Generate the answer; returns the finish reason."""
        opening = self._chooser.forced_here()
        reason = self._prefill(opening, interrupted)
        self._prefilled = time.monotonic()
        if reason is None:
            reason = yield from self._decode(opening, interrupted)
        return reason

    def _prefill(self, opening: list[int], interrupted: Interrupted) -> str | None:
        """Run the part of the prompt that is not cached, and `opening`, which the answer must start with.

        Remembers the prompt's stable part if it is long enough to be worth another snapshot.
        """
        decoder, prompt = self._decoder, self._prompt
        self._cached = decoder.recall(prompt[:-1])
        if self._stable - self._cached >= SHORTEST:
            reason = decoder.prefill(prompt[self._cached : self._stable], interrupted)
            if reason is not None:
                return reason
            decoder.remember()
        return decoder.advance(prompt[len(decoder.tokens) :] + opening, interrupted)

    def _decode(self, opening: list[int], interrupted: Interrupted) -> Coroutine[Delta, None, str]:
        """Yield `opening`, which was run already, then choose and run tokens until the answer ends.

        Returns the finish reason.
        """
        if opening:
            self._first_token = time.monotonic()
            ended = yield from self._emit(opening)
            if ended is not None:
                return ended
        chosen = pending = self._chooser.next(self._decoder)
        if not opening:
            self._first_token = time.monotonic()
        while True:
            ended = yield from self._emit(chosen)
            if ended is not None:
                return ended
            reason = interrupted()
            if reason is not None:
                return reason
            guesses = self._guesses(pending)
            if guesses:
                accepted = self._verify(pending, guesses)
                forced = self._chooser.forced_here()
                chosen, pending = accepted + forced, accepted[-1:] + forced
                continue
            started = time.perf_counter()
            reason = self._decoder.advance(pending, interrupted)
            if reason is not None:
                return reason
            single = len(pending) == 1
            chosen = pending = self._chooser.next(self._decoder)
            if single:
                self._drafter.gate.stepped(time.perf_counter() - started)

    def _emit(self, chosen: list[int]) -> Coroutine[Delta, None, str | None]:
        """Yield tokens one by one; returns the finish reason if one of them ends the answer."""
        for token in chosen:
            self.tokens.append(token)
            if token in self._chooser.stop_ids:
                return "stop"
            increment = self._output.push(token)
            yield Delta(increment.text, increment.reasoning)
            if self._output.stopped:
                return "stop"
            if len(self.tokens) >= self._budget:
                break
        if self._chooser.complete:
            return "stop"
        if len(self.tokens) < self._budget:
            return None
        return "stop" if self._chooser.whole else "length"

    def _guesses(self, pending: list[int]) -> list[int]:
        """Return guesses for the tokens after `pending`, as many as one pass can check."""
        room = self._decoder.verify_width - len(pending)
        room = min(room, self._budget - len(self.tokens) - 1)
        guesses = self._drafter.guess(self.tokens, room) if room > 0 else []
        return self._chooser.possible(guesses)

    def _verify(self, pending: list[int], guesses: list[int]) -> list[int]:
        started = time.perf_counter()
        rows = self._decoder.verify([*pending, *guesses])
        chosen = self._chooser.check(guesses, rows[len(pending) - 1 :])
        self._decoder.commit(len(pending) + len(chosen) - 1)
        self._drafter.gate.verified(len(chosen) - 1, time.perf_counter() - started)
        return chosen

    def _completion(self, reason: str) -> Completion:
        now = time.monotonic()
        first = self._first_token if self.tokens else now
        timings = Timings(
            queue_ms=0.0,
            prefill_ms=(self._prefilled - self._started) * 1000,
            decode_ms=(now - self._prefilled) * 1000,
            first_token_ms=(first - self._started) * 1000,
        )
        usage = Usage(len(self._prompt), self._cached, self._chooser.forced, len(self.tokens))
        output = self._output
        return Completion(output.text, reason, usage, timings, output.reasoning or None, output.tool_calls)
