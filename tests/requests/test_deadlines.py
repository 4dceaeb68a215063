"""Deadlines and cancellation hold at every stage of a request, in front of a real generator."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest

from edge.generation.generator import Generator
from edge.protocol.messages import Answer, Final, Partial, Request
from edge.requests.engine import Engine
from tests.support import bundles
from tests.support.counterparts import WAIT_S, wait_for

DEADLINE_MS = 300
LATE_S = 2.0  # 0.1 s on an idle machine; tests run in parallel
LONG = 4000  # tokens

STAGES: dict[str, dict[str, Any]] = {
    "tokenizer": {
        "prompt": "".join(chr(97 + (i * i + i // 7) % 26) for i in range(250_000)),
        "max_tokens": 1,
    },
    "grammar": {"response_format": {"type": "regex", "regex": "(a|b)*" + "(a|b|c|ab|bc){1,900}" * 5}},
    "choices": {
        "response_format": {"type": "choice", "choice": [f"{number:06}" * 8 for number in range(4000)]}
    },
    "prefill": {"prompt": "a" * LONG, "max_tokens": 1},
    "decode": {"max_tokens": LONG},
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=8192)
    generator = Generator.open(bundle, bundles.cache_directory(), 1, None)
    engine = Engine(generator, queue_length=8)
    engine.start()
    yield engine
    engine.stop(WAIT_S)
    generator.close()


def submit(engine: Engine, name: str, **fields: Any) -> queue.Queue[Answer]:
    answers: queue.Queue[Answer] = queue.Queue()
    engine.submit("test", Request(name, **{"prompt": "Pump?", "stream": False, **fields}), answers.put)
    return answers


def final(answers: queue.Queue[Answer]) -> Answer:
    while isinstance(answer := answers.get(timeout=WAIT_S), Partial):
        pass
    return answer


@pytest.mark.parametrize("stage", STAGES)
def test_a_deadline_holds_at_every_stage(engine: Engine, stage: str) -> None:
    started = time.monotonic()
    answer = final(submit(engine, f"late-{stage}", deadline_ms=DEADLINE_MS, **STAGES[stage]))
    assert time.monotonic() - started < DEADLINE_MS / 1000 + LATE_S
    if isinstance(answer, Final) and stage in ("decode",):
        assert answer.finish_reason == "deadline"


@pytest.mark.parametrize("stage", STAGES)
def test_a_request_is_cancelled_at_every_stage_and_the_next_one_answered(engine: Engine, stage: str) -> None:
    answers = submit(engine, f"cancelled-{stage}", **STAGES[stage])
    wait_for(lambda: engine.working or not answers.empty())
    waiting = submit(engine, f"next-{stage}", max_tokens=2)
    started = time.monotonic()
    engine.cancel("test", f"cancelled-{stage}")
    final(answers)
    assert isinstance(final(waiting), Final)
    assert time.monotonic() - started < LATE_S
