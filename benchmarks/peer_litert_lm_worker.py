"""LiteRT-LM in a process of its own. Needs `litert-lm-api` and nothing of this project.

python peer_litert_lm_worker.py serve MODEL CACHE THREADS             JSON lines in, JSON lines out
python peer_litert_lm_worker.py first MODEL CACHE THREADS TEXT        print the first token of an answer
python peer_litert_lm_worker.py bench MODEL CACHE THREADS PREFILL DECODE    its own benchmark, once
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

lm: Any = importlib.import_module("litert_lm")

# The text is the prompt, as it is.
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}{% endfor %}"
)


class Work:
    """An engine that answers each request in a conversation of its own, as the server of LiteRT-LM does."""

    def __init__(self, model: str, cache: str, threads: int) -> None:
        backend = lm.Backend.CPU(thread_count=threads)
        self._engine = lm.Engine(model, backend=backend, cache_dir=cache)

    def answer(self, text: str, schema: dict[str, Any] | None, max_tokens: int) -> dict[str, Any]:
        """The greedy answer, by a JSON schema if there is one.

        `seconds` is what the message took, `setup` what its conversation took before: with a grammar that is
        seconds, because the vocabulary is prepared again for each.
        """
        constrained = lm.ConstrainedDecodingConfig(provider=lm.LiteRtLmConstraintProviderType.LL_GUIDANCE)
        started = time.perf_counter()
        conversation = self._engine.create_conversation(
            chat_template=TEMPLATE,
            sampler_config=lm.SamplerConfig(top_k=1, temperature=0.0),
            constrained_decoding_config=constrained if schema else None,
        )
        created = time.perf_counter()
        with conversation:
            message = conversation.send_message(
                text,
                max_output_tokens=max_tokens,
                response_format=lm.ResponseFormat.json(schema) if schema else None,
            )
        taken = time.perf_counter() - created
        return {"seconds": taken, "setup": created - started, "text": str(message.contents)}


def bench(model: str, cache: str, threads: int, prefill: int, decode: int) -> dict[str, Any]:
    """Tokens per second of a prefill and of decode steps after it."""
    backend = lm.Backend.CPU(thread_count=threads)
    info = lm.Benchmark(model, backend, prefill_tokens=prefill, decode_tokens=decode, cache_dir=cache).run()
    return {
        "prefill_tps": info.last_prefill_tokens_per_second,
        "decode_tps": info.last_decode_tokens_per_second,
    }


def serve(work: Work) -> None:
    """Answer lines until there are no more."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = getattr(work, arguments.pop("what"))(**arguments)
        except Exception as error:  # the parent shows it and ends the run
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def main(mode: str, model: str, cache: str, threads: str, *rest: str) -> None:
    if mode == "serve":
        serve(Work(model, cache, int(threads)))
    elif mode == "first":
        print(json.dumps(Work(model, cache, int(threads)).answer(rest[0], None, 1)), flush=True)
    else:
        print(json.dumps(bench(model, cache, int(threads), *map(int, rest))))


if __name__ == "__main__":
    lm.set_min_log_severity(lm.LogSeverity.ERROR)
    main(*sys.argv[1:])
