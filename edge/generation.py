"""The loop: a request in, a stream of text out, one token at a time.

`Generator` owns a bundle's decoder and tokenizer. What a request has in common with the one before it, from
the start of the prompt on, is not computed again as far as the KV cache still holds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Generator as Coroutine
from dataclasses import dataclass
from pathlib import Path

from edge.bundle import TOKENIZER, Bundle
from edge.decoder import Decoder
from edge.errors import RequestError
from edge.messages import Request, Timings, ToolCall, Usage
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
        prompt = render(request, manifest.prompt_format, self.tokenizer, manifest.bos_id)
        if len(prompt) >= self.context:
            raise RequestError(
                "too_long", f"the prompt has {len(prompt)} tokens, the context is {self.context}; shorten it"
            )
        return _Generation(self, request, prompt, interrupted).run()


class _Generation:
    """The state of one request."""

    def __init__(
        self, owner: Generator, request: Request, prompt: list[int], interrupted: Interrupted
    ) -> None:
        manifest = owner.bundle.manifest
        self.decoder, self.prompt, self.interrupted = owner.decoder, prompt, interrupted
        self.stop_ids = manifest.stop_ids
        self.budget = min(request.max_tokens, owner.context - len(prompt))
        sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed)
        self.sampler = Sampler(sampling, manifest.architecture.logit_softcap)
        self.output = OutputParser(manifest.prompt_format, owner.tokenizer, prompt, request.stop)
        self.cached = self.generated = 0
        self.started = self.prefilled = self.first_token = time.monotonic()

    def run(self) -> Iterator[Delta | Completion]:
        """Prefill, decode, and the completion."""
        self.started = time.monotonic()
        self.cached = self.decoder.rewind(self.prompt[:-1])
        reason = self.decoder.prefill(self.prompt[self.cached : -1], self.interrupted)
        self.prefilled = time.monotonic()
        if reason is None:
            reason = yield from self._decode()
        last = self.output.finish()
        if last.text or last.reasoning:
            yield Delta(last.text, last.reasoning)
        yield self._completion("tool_calls" if reason == "stop" and self.output.tool_calls else reason)

    def _decode(self) -> Coroutine[Delta, None, str]:
        """Decode until something ends the answer; returns the finish reason."""
        token = self.prompt[-1]
        while True:
            reason = self.interrupted()
            if reason is not None:
                return reason
            self.decoder.step(token)
            token = self.sampler.sample(self.decoder.logits())
            self.generated += 1
            if self.generated == 1:
                self.first_token = time.monotonic()
            if token in self.stop_ids:
                return "stop"
            increment = self.output.push(token)
            yield Delta(increment.text, increment.reasoning)
            if self.output.stopped:
                return "stop"
            if self.generated >= self.budget:
                return "length"

    def _completion(self, reason: str) -> Completion:
        now = time.monotonic()
        first = self.first_token if self.generated else now
        timings = Timings(
            queue_ms=0.0,
            prefill_ms=(self.prefilled - self.started) * 1000,
            decode_ms=(now - self.prefilled) * 1000,
            first_token_ms=(first - self.started) * 1000,
        )
        usage = Usage(len(self.prompt), self.cached, 0, self.generated)
        output = self.output
        return Completion(output.text, reason, usage, timings, output.reasoning or None, output.tool_calls)
