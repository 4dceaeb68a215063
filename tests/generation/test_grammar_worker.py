"""Grammars in a worker: the answers equal those in this process; no format affects another request."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.errors import EdgeError, Interruption, RequestError
from edge.generation.answer_format import AnswerFormat
from edge.generation.constraint import Constraint
from edge.generation.grammar_channel import MEMORY_BYTES, STACK_BYTES
from edge.generation.grammar_client import GrammarWorker, RemoteConstraint
from edge.generation.grammar_worker import CACHE_BYTES
from edge.generation.sampling import Sampler, Sampling
from edge.generation.token_choice import TokenChooser
from edge.runtime.kv_cache import Floats
from tests.generation import test_grammar as local
from tests.support.counterparts import wait_for

MODEL = Path(__file__).parents[1] / "fixtures" / "gemma4-one-kv-head" / "tokenizer.model"
DIGEST = hashlib.sha256(MODEL.read_bytes()).hexdigest()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
YES_OR_NO = local.format_of(local.asked(response_format={"type": "choice", "choice": ["yes", "no"]}))


def of_schema(schema: Any) -> AnswerFormat:
    return local.format_of(local.for_schema(schema))


def of_regex(regex: str) -> AnswerFormat:
    return local.format_of(local.asked(response_format={"type": "regex", "regex": regex}))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarWorker]:
    worker = GrammarWorker(MODEL, DIGEST, tmp_path_factory.mktemp("cache"), local.STOPS)
    yield worker
    worker.close()


def begun(worker: GrammarWorker, answer_format: AnswerFormat, max_tokens: int = 60) -> RemoteConstraint:
    return worker.constrain(answer_format, max_tokens, lambda: None)


def answers(worker: GrammarWorker) -> bool:
    """Whether the worker serves a simple format."""
    constraint = begun(worker, YES_OR_NO)
    constraint.follow()
    return constraint.validate(local.small_tokenizer().encode("yes")) > 0


def child_of(worker: GrammarWorker) -> int:
    (child,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    return int(child)


class Noise:
    """Random logits from a seed: the n-th call returns the same values for equal seeds."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def logits(self) -> Floats:
        return local.noise(self._random)

    def logits_for(self, ids: Any) -> Floats:
        logits: Floats = local.noise(self._random)[ids]
        return logits


def answer_of(constraint: Constraint, sampling: Sampling, seed: int, most: int) -> list[int]:
    """Generate as the decoder's loop does; some steps check drafts as after a verify pass."""
    decoder: Any = Noise(seed)
    chooser = TokenChooser(Sampler(sampling), constraint, local.STOPS, formatted=True)
    tokens = chooser.forced_here()
    random = np.random.default_rng(seed)
    while not chooser.complete and len(tokens) < most and tokens[-1:] != [local.STOPS[0]]:
        if random.random() < 0.3:
            guesses = chooser.possible(random.integers(200, 500, 3).tolist())
            rows = np.stack([decoder.logits() for _ in range(len(guesses) + 1)])
            tokens += chooser.check(guesses, rows)
            tokens += chooser.forced_here()
        else:
            tokens += chooser.next(decoder)
        if tokens[-1] in local.STOPS:
            break
    return tokens


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schema=local.objects(local.schemas),
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([1, 5, 64, 2000]),
    tool=st.booleans(),
)
def test_answers_equal_those_of_a_constraint_in_this_process(
    worker: GrammarWorker, schema: dict[str, Any], seed: int, temperature: float, top_k: int, tool: bool
) -> None:
    sampling = Sampling(temperature, top_k, 0.95, seed)
    request = local.for_tool(schema) if tool else local.for_schema(schema)
    answer_format = local.format_of(request)
    expected = answer_of(local.small().compile(answer_format).constrain(60), sampling, seed, 60)
    assert answer_of(begun(worker, answer_format), sampling, seed, 60) == expected


TOO_COMPLEX = {
    "an intersection of patterns": of_schema(
        {"type": "string", "allOf": [{"pattern": f"[a-z]*{letter}[a-z]*"} for letter in LETTERS]}
    ),
    "a long count": of_regex("a{2000000000}"),
    "a long value": of_schema({"enum": ["x" * 200_000]}),
    "a long choice": local.format_of(
        local.asked(response_format={"type": "choice", "choice": ["x" * 200_000]})
    ),
    "a large multiple": of_schema({"type": "integer", "multipleOf": 99_991}),
    "a common multiple": of_schema(
        {"allOf": [{"type": "integer", "multipleOf": n} for n in (7, 11, 13, 97)]}
    ),
}
COMPLEX_LATER = {
    "a distant end": of_regex(".*a.{1000}b"),
    "classes of many characters": of_regex(r"\p{L}{1,1000}\P{Lu}{1000}"),
}


@pytest.mark.parametrize("case", TOO_COMPLEX)
def test_a_format_that_is_too_complex_is_refused_and_the_next_request_is_served(
    worker: GrammarWorker, case: str
) -> None:
    constraint = begun(worker, TOO_COMPLEX[case])
    with pytest.raises(RequestError) as caught:
        answer_of(constraint, Sampling(1.0, seed=1), 1, 60)
    assert caught.value.code == "bad_request"
    assert str(caught.value).startswith("response_format.")
    assert "too complex" in str(caught.value)
    assert str(caught.value).isprintable()
    assert answers(worker)


@pytest.mark.parametrize("case", COMPLEX_LATER)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_format_that_becomes_too_complex_during_generation_is_refused(
    worker: GrammarWorker, case: str, temperature: float
) -> None:
    constraint = begun(worker, COMPLEX_LATER[case], 400)
    with contextlib.suppress(RequestError):  # a typed refusal; anything else fails
        answer_of(constraint, Sampling(temperature, seed=1), 1, 400)
    assert answers(worker)


@pytest.mark.parametrize("killed", ["child", "worker"])
def test_an_answer_continues_after_the_worker_is_killed(worker: GrammarWorker, killed: str) -> None:
    answer_format = of_schema(local.SENSOR)
    tokens = local.small_tokenizer().encode('{"status":"ok","reason":"the pump')
    constraint = begun(worker, answer_format)
    for token in tokens[:5]:
        constraint.take(token, follow=False)
    victims = [child_of(worker)] if killed == "child" else [child_of(worker), worker.pid or 0]
    for victim in reversed(victims):
        os.kill(victim, signal.SIGKILL)
    for token in tokens[5:]:
        assert constraint.take(token, follow=False).token == token
    assert constraint.allowed() is None


def test_two_answers_can_be_generated_alternately(worker: GrammarWorker) -> None:
    first, second = begun(worker, YES_OR_NO), begun(worker, of_schema({"type": "boolean"}))
    assert first.follow().forced == second.follow().forced == []
    for constraint, text in ((first, "no"), (second, "true")):
        for token in local.small_tokenizer().encode(text):
            step = constraint.take(token, follow=False)
        assert step.complete


def test_an_interruption_takes_effect_while_a_format_is_compiled(worker: GrammarWorker) -> None:
    assert answers(worker)
    polls = iter([None, None, "cancelled"])
    with pytest.raises(Interruption, match="cancelled"):
        worker.constrain(TOO_COMPLEX["a long count"], 60, lambda: next(polls)).follow()
    assert answers(worker)


def test_the_worker_ignores_the_signals_that_stop_the_daemon(worker: GrammarWorker) -> None:
    assert answers(worker)
    before = child_of(worker)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid or 0, number)
        os.kill(before, number)
    assert answers(worker)
    assert child_of(worker) == before


DAEMON = """
import sys, time
from tests.generation import test_grammar_worker as tests
worker = tests.GrammarWorker(tests.MODEL, tests.DIGEST, tests.Path(sys.argv[1]), tests.local.STOPS)
assert tests.answers(worker)
print(worker.pid, tests.child_of(worker), flush=True)
time.sleep(600)
"""


def test_the_worker_ends_when_its_daemon_is_killed(tmp_path: Path) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout is not None
    processes = [Path("/proc", each, "stat") for each in daemon.stdout.readline().split()]
    assert len(processes) == 2
    daemon.kill()
    daemon.communicate()
    wait_for(lambda: not any(_runs(each) for each in processes))


def _runs(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_grammar_cache_is_bounded_in_bytes(worker: GrammarWorker) -> None:
    assert answers(worker)
    before = _anonymous(child_of(worker))
    for number in range(40):
        names = [f"{number}-{member}-{'x' * 300}" for member in range(200)]
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        begun(worker, of_schema(schema)).follow()
    assert answers(worker)
    grown = _anonymous(child_of(worker)) - before
    print(f"the worker grew by {grown / 2**20:.1f} MiB")
    assert grown < CACHE_BYTES + MEMORY_BYTES / 2


def _anonymous(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_the_memory_limit_of_a_request_is_the_one_in_the_messages() -> None:
    assert MEMORY_BYTES + STACK_BYTES == 64 * 1024 * 1024


def test_a_worker_that_cannot_start_is_reported_by_name(tmp_path: Path) -> None:
    worker = GrammarWorker(tmp_path / "missing", DIGEST, tmp_path, local.STOPS)
    with pytest.raises(EdgeError, match="the grammar worker ended"):
        answers(worker)
    worker.close()


def test_a_format_survives_serialisation_unchanged(worker: GrammarWorker) -> None:
    for answer_format in TOO_COMPLEX.values():
        assert AnswerFormat.from_json(answer_format.to_json()).to_json() == answer_format.to_json()
    assert json.loads(YES_OR_NO.to_json())[0]["type"] == "choice"
