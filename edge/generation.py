"""The loop: a request in, a stream of text out, one token at a time.

`Generator` owns a bundle's decoder and tokenizer. What a prompt has in common with the one before it, from
its start on, is not computed again as far as the KV cache still holds it. What comes before a request's first
user message (its system prompt, its tools) is stored on disk when it is first seen, and so is what two
prompts in a row have in common.

Where a grammar says what must come next, those tokens are run together without the output head; where it
allows a few, only their logits are computed. Either way the answer is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Coroutine
from dataclasses import dataclass, replace
from pathlib import Path

from edge.bundle import TOKENIZER, Bundle
from edge.decoder import Decoder
from edge.errors import RequestError
from edge.grammar import Constraint, GrammarCompiler
from edge.messages import Message, Request, Timings, ToolCall, Usage
from edge.prompt import OutputParser, render
from edge.sampling import Sampler, Sampling
from edge.tokenizer import Tokenizer

Interrupted = Callable[[], str | None]
"""Polled once per prefill chunk and decode step: None to go on, or the finish reason to stop with."""


@dataclass(frozen=True)
class Delta:
    """Text that became certain with the last token; either part may be empty."""

    text: str
    reasoning: str


@dataclass(frozen=True)
class Completion:
    """The whole answer. `finish_reason` is stop, length, tool_calls, or what `interrupted` said."""

    text: str
    finish_reason: str
    usage: Usage
    timings: Timings
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


class Generator:
    """Answers one request at a time from an opened bundle. Not thread-safe."""

    def __init__(self, bundle: Bundle, cache_directory: Path, threads: int, context: int | None) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.context = min(context or manifest.context, manifest.context)
        self.tokenizer = Tokenizer(bundle.path(TOKENIZER).read_bytes())
        self._grammars = GrammarCompiler(self.tokenizer, manifest.stop_ids)
        self._previous: list[int] = []
        self.decoder = Decoder(bundle, cache_directory, threads, self.context)

    @classmethod
    def open(cls, directory: Path, cache_directory: Path, threads: int, context: int | None) -> Generator:
        """Verify and map a bundle. `context` None takes the bundle's.

        Raises BundleError or RuntimeFailure.
        """
        return cls(Bundle.open(directory, cache_directory), cache_directory, threads, context)

    def generate(self, request: Request, interrupted: Interrupted) -> Iterator[Delta | Completion]:
        """Yield text as it becomes certain, and at last one Completion.

        Raises RequestError: bad_request if the prompt format can't say it, too_long if the prompt leaves no
        room in the context.
        """
        manifest = self.bundle.manifest
        prompt = self._render(request)
        if len(prompt) >= self.context:
            raise RequestError(
                "too_long", f"the prompt has {len(prompt)} tokens, the context is {self.context}; shorten it"
            )
        budget = min(request.max_tokens, self.context - len(prompt))
        grammar = self._grammars.compile(request)
        constraint = None if grammar is None else grammar.constrain(budget)
        stable = self._stable_length(request, prompt)
        self._previous = prompt
        sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed)
        sampler = Sampler(sampling, manifest.architecture.logit_softcap)
        output = OutputParser(manifest.prompt_format, self.tokenizer, prompt, request.stop)
        answer = _Answer(self.decoder, prompt, stable, sampler, constraint, output, manifest.stop_ids, budget)
        return answer.run(interrupted)

    def _render(self, request: Request) -> list[int]:
        manifest = self.bundle.manifest
        return render(request, manifest.prompt_format, self.tokenizer, manifest.bos_id)

    def _stable_length(self, request: Request, prompt: list[int]) -> int:
        """How many of the prompt's first tokens later prompts are likely to begin with."""
        stable = _common(prompt, self._previous)
        if request.messages and request.messages[0].role == "system":
            other = replace(request, messages=(request.messages[0], Message("user", "\0")))
            stable = max(stable, _common(prompt, self._render(other)))
        return min(stable, len(prompt) - 1)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Answer:
    """The state of one answer in the making. `budget` is the most tokens it may have."""

    def __init__(
        self,
        decoder: Decoder,
        prompt: list[int],
        stable: int,
        sampler: Sampler,
        constraint: Constraint | None,
        output: OutputParser,
        stop_ids: tuple[int, ...],
        budget: int,
    ) -> None:
        self.decoder, self.prompt, self.stable = decoder, prompt, stable
        self.sampler, self.constraint, self.output = sampler, constraint, output
        self.stop_ids, self.budget = stop_ids, budget
        self.cached = self.generated = self.forced = 0
        self.started = self.prefilled = self.first_token = time.monotonic()

    def run(self, interrupted: Interrupted) -> Iterator[Delta | Completion]:
        """Prefill, decode, and the completion."""
        self.started = time.monotonic()
        reason = self._prefill(interrupted)
        self.prefilled = time.monotonic()
        if reason is None:
            reason = yield from self._decode(interrupted)
        last = self.output.finish()
        if last.text or last.reasoning:
            yield Delta(last.text, last.reasoning)
        yield self._completion("tool_calls" if reason == "stop" and self.output.tool_calls else reason)

    def _prefill(self, interrupted: Interrupted) -> str | None:
        """Run the prompt, as far as it is not at hand, and remember its stable part."""
        decoder, prompt = self.decoder, self.prompt
        self.cached = decoder.recall(prompt[:-1])
        if self.cached < self.stable:
            reason = decoder.prefill(prompt[self.cached : self.stable], interrupted)
            if reason is not None:
                return reason
            decoder.remember()
        return decoder.advance(prompt[len(decoder.tokens) :], interrupted)

    def _decode(self, interrupted: Interrupted) -> Coroutine[Delta, None, str]:
        """Decode until something ends the answer; returns the finish reason."""
        while True:
            tokens = self._next_tokens()
            if self.generated == 0:
                self.first_token = time.monotonic()
            for token in tokens:
                self.generated += 1
                if token in self.stop_ids:
                    return "stop"
                increment = self.output.push(token)
                yield Delta(increment.text, increment.reasoning)
                if self.output.stopped:
                    return "stop"
            if self.constraint is not None and self.constraint.complete:
                return "stop"
            if self.generated >= self.budget:
                return "length"
            reason = self.decoder.advance(tokens, interrupted)
            if reason is not None:
                return reason

    def _next_tokens(self) -> list[int]:
        """The tokens that the grammar forces, or the next one chosen; there is at least one."""
        constraint = self.constraint
        if constraint is None:
            return [self.sampler.sample(self.decoder.logits())]
        tokens = constraint.forced()
        if tokens:
            self.forced += len(tokens)
        else:
            few = constraint.allowed()
            logits = self.decoder.logits() if few is None else self.decoder.logits_for(few)
            tokens = [constraint.choose(self.sampler, logits, few)]
        for token in tokens:
            if token not in self.stop_ids:
                constraint.accept(token)
        return tokens

    def _completion(self, reason: str) -> Completion:
        now = time.monotonic()
        first = self.first_token if self.generated else now
        timings = Timings(
            queue_ms=0.0,
            prefill_ms=(self.prefilled - self.started) * 1000,
            decode_ms=(now - self.prefilled) * 1000,
            first_token_ms=(first - self.started) * 1000,
        )
        usage = Usage(len(self.prompt), self.cached, self.forced, self.generated)
        output = self.output
        return Completion(output.text, reason, usage, timings, output.reasoning or None, output.tool_calls)
