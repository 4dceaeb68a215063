"""A request in, a stream of text out.

`Generator` owns a bundle's decoder and tokenizer. A prefix that a prompt shares with the one before it is not
computed again as long as the KV cache holds it. What precedes a request's first user message (its system
prompt, its tools) is stored on disk when it is first seen. So is a prefix that two consecutive prompts share,
if it is a few dozen tokens longer.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge.bundles.bundle import TOKENIZER, Bundle
from edge.errors import RequestError
from edge.generation.answer import AnswerLoop, Completion, Delta, Interrupted
from edge.generation.answer_format import AnswerFormat
from edge.generation.client_prefixes import ClientPrefixes
from edge.generation.drafting import Drafter, DraftGate
from edge.generation.grammar_client import GrammarWorker
from edge.generation.sampling import Sampler, Sampling
from edge.generation.token_choice import TokenChooser
from edge.protocol.messages import Message, Request
from edge.runtime.decoder import Decoder
from edge.runtime.memory import return_free_memory
from edge.text.prompt import OutputParser, render
from edge.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edge.runtime.compiled_model import CompiledModel

__all__ = ["Completion", "Delta", "Generator", "Interrupted"]

log = logging.getLogger(__name__)

_EARLIER_ANSWERS = 4
"""Answers that guesses are looked up in, in addition to the prompt."""

_VERIFY_COST = 1.8
"""A verify pass in decode steps, until both have been measured."""


class Generator:
    """Answers one request at a time from an opened bundle. Not thread-safe."""

    def __init__(
        self,
        bundle: Bundle,
        cache_directory: Path,
        threads: int,
        context: int | None,
        compiled: CompiledModel | None = None,
    ) -> None:
        """`compiled` is the bundle's graph if it was compiled already. Raises RuntimeFailure."""
        manifest = bundle.manifest
        self.bundle = bundle
        self.context = min(context or manifest.context, manifest.context)
        if context is not None and context > manifest.context:
            log.warning("context = %d is more than the bundle has; using its %d", context, manifest.context)
        digest = manifest.files[TOKENIZER].sha256
        self.tokenizer = Tokenizer.open(bundle.path(TOKENIZER), digest, cache_directory)
        self.grammars = GrammarWorker(bundle.path(TOKENIZER), digest, cache_directory, manifest.stop_ids)
        self._previous: list[int] = []
        self._clients = ClientPrefixes()
        self._answers: deque[list[int]] = deque(maxlen=_EARLIER_ANSWERS)
        self._gate = DraftGate(_VERIFY_COST)
        self.decoder = Decoder(bundle, cache_directory, threads, self.context, compiled)

    @classmethod
    def open(cls, directory: Path, cache_directory: Path, threads: int, context: int | None) -> Generator:
        """Verify and map a bundle. `context` None takes the bundle's.

        Raises BundleError or RuntimeFailure.
        """
        return cls(Bundle.open(directory, cache_directory), cache_directory, threads, context)

    def close(self) -> None:
        """Release all memory; the generator can't be used after that."""
        self.grammars.close()
        self.decoder.close()

    def generate(
        self, request: Request, interrupted: Interrupted, client: str | None = None
    ) -> Iterator[Delta | Completion]:
        """Yield text as it becomes certain, and finally one Completion.

        A named `client` is told of cached tokens only where it may know of them (`client_prefixes`).
        Raises RequestError: bad_request if the prompt format can't express the request or its answer format
        can't be followed, too_long if the prompt leaves no room in the context; and Interruption
        before there is an answer to end.
        """
        manifest = self.bundle.manifest
        prompt = self.prompt_of(request, interrupted)
        if len(prompt) >= self.context:
            raise RequestError(
                "too_long", f"the prompt has {len(prompt)} tokens, the context is {self.context}; shorten it"
            )
        budget = min(request.max_tokens, self.context - len(prompt))
        answer_format = AnswerFormat.of(request)
        stable = self._stable_length(request, prompt, interrupted)
        sampling = Sampling(request.temperature, request.top_k, request.top_p, request.seed)
        chooser = TokenChooser(
            Sampler(sampling, manifest.architecture.logit_softcap),
            None if answer_format is None else self.grammars.constrain(answer_format, budget, interrupted),
            manifest.stop_ids,
            request.response_format is not None,
        )
        output = OutputParser(manifest.prompt_format, self.tokenizer, prompt, request.stop)
        drafter = Drafter([*self._answers, prompt], self._gate)
        answer = AnswerLoop(self.decoder, prompt, stable, chooser, output, drafter, budget)
        return self._remembering(answer, prompt, interrupted, client)

    def _remembering(
        self, answer: AnswerLoop, prompt: list[int], interrupted: Interrupted, client: str | None
    ) -> Iterator[Delta | Completion]:
        self._previous = prompt
        for item in answer.run(interrupted):
            if not isinstance(item, Completion):
                yield item
                continue
            self._answers.append(answer.tokens)
            return_free_memory()  # of the graph's scratch tensors from before the caches grew
            yield item if client is None else self._for_client(item, client, prompt, answer.tokens)

    def _for_client(
        self, completion: Completion, client: str, prompt: list[int], tokens: list[int]
    ) -> Completion:
        """Count only cached tokens that the client may know of, and note what it may know from now on."""
        usage = completion.usage
        cached = min(usage.cached, self._clients.known(client, prompt))
        self._clients.remember(client, prompt + tokens)
        return replace(completion, usage=replace(usage, cached=cached))

    def prompt_of(self, request: Request, interrupted: Interrupted = lambda: None) -> list[int]:
        """Return a request's token ids.

        Raises RequestError if the prompt format can't express it, and Interruption.
        """
        manifest, tokenizer = self.bundle.manifest, self.tokenizer.interruptible(interrupted)
        return render(request, manifest.prompt_format, tokenizer, manifest.bos_id)

    def _stable_length(self, request: Request, prompt: list[int], interrupted: Interrupted) -> int:
        """Return how many of the prompt's first tokens later prompts are likely to start with."""
        stable = _common(prompt, self._previous)
        if request.messages and request.messages[0].role == "system":
            other = replace(request, messages=(request.messages[0], Message("user", "\0")))
            stable = max(stable, _common(prompt, self.prompt_of(other, interrupted)))
        return min(stable, len(prompt) - 1)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
