"""This project's side of the comparison, in a process of its own: JSON lines in, JSON lines out.

    python -m benchmarks.edge_worker BUNDLE CACHE THREADS CONTEXT

The first output line reports that the model is loaded. Each input line then names one of the functions below
in `what`, with its arguments; the result is printed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed import decode_steps, seconds
from edge.generation.generator import Completion, Generator
from edge.protocol.messages import Message, Request


class Work:
    """The measurements."""

    def __init__(self, bundle: Path, cache: Path, threads: int, context: int) -> None:
        self._generator = Generator.open(bundle, cache, threads, context)
        self._count = 0

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Tokens per second of a prefill into an empty KV cache."""
        decoder = self._generator.decoder
        decoder.rewind(())
        ids = np.random.default_rng(tokens).integers(300, 200_000, tokens).tolist()
        return {"tps": tokens / seconds(lambda: decoder.prefill(ids, lambda: None))}

    def decode(self, tokens: int, after: int) -> dict[str, Any]:
        """Tokens per second of greedy steps, head included, after `after` tokens."""
        self.prefill(after)
        return {"tps": tokens / sum(decode_steps(self._generator.decoder, tokens))}

    def answer(
        self, system: str, user: str, schema: dict[str, Any] | None, max_tokens: int
    ) -> dict[str, Any]:
        """The greedy answer, by a JSON schema if there is one, and the seconds it took."""
        started = time.perf_counter()
        completion = self._answer(system, user, schema, max_tokens)
        usage = completion.usage
        return {
            "seconds": time.perf_counter() - started,
            "text": completion.text,
            "tokens": usage.generated,
            "forced": usage.forced,
            "cached": usage.cached,
        }

    def _answer(self, system: str, user: str, schema: dict[str, Any] | None, max_tokens: int) -> Completion:
        self._count += 1
        messages = (Message("system", system), Message("user", user))
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        request = Request(
            str(self._count),
            messages=messages,
            max_tokens=max_tokens,
            response_format=wanted if schema else None,
        )
        *_, last = self._generator.generate(request, lambda: None)
        assert isinstance(last, Completion)
        return last


def serve(work: object) -> None:
    """Answer lines until there are no more."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        arguments = json.loads(line)
        function: Callable[..., dict[str, Any]] = getattr(work, arguments.pop("what"))
        try:
            answer = function(**arguments)
        except Exception as error:  # the parent shows it and ends the run
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(Work(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
