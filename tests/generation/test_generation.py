"""The generation loop on small real bundles: limits, interruptions, reuse, and grammars."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.errors import Interruption, RequestError
from edge.generation.answer_format import AnswerFormat
from edge.generation.generator import Completion, Delta, Generator
from edge.generation.grammar import GrammarCompiler
from edge.protocol.messages import Message, Request
from tests.support import bundles

SCHEMA = {
    "type": "object",
    "properties": {
        "status": {"enum": ["ok", "warning", "alarm"]},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["status", "note"],
    "additionalProperties": False,
}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


@cache
def generator(name: str = "gemma3-one-kv-head", recipe: str = "float32") -> Generator:
    return Generator.open(bundles.small_bundle(name, recipe), bundles.cache_directory(), 2, None)


@cache
def compiler(g: Generator) -> GrammarCompiler:
    return GrammarCompiler(g.tokenizer, g.bundle.manifest.stop_ids)


def run(
    g: Generator, request: Request, interrupted: Callable[[], str | None] = lambda: None
) -> tuple[list[Delta], Completion]:
    *deltas, completion = g.generate(request, interrupted)
    assert isinstance(completion, Completion)
    assert all(isinstance(delta, Delta) for delta in deltas)
    return [delta for delta in deltas if isinstance(delta, Delta)], completion


def test_partials_add_up_to_the_text() -> None:
    deltas, completion = run(generator(), Request("1", prompt="pump 7", max_tokens=30))
    assert "".join(delta.text for delta in deltas) == completion.text
    assert completion.usage.generated == 30
    assert completion.finish_reason == "length"
    assert completion.timings.first_token_ms >= completion.timings.prefill_ms > 0


def test_equal_seeds_give_equal_answers_and_different_seeds_different_ones() -> None:
    def answer(seed: int) -> str:
        return run(generator(), Request("1", prompt="x", max_tokens=20, temperature=2.0, seed=seed))[1].text

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it() -> None:
    whole = run(generator(), Request("1", prompt="abc", max_tokens=30))[1].text
    stop = whole[5:8]
    deltas, completion = run(generator(), Request("1", prompt="abc", max_tokens=30, stop=(stop,)))
    assert completion.finish_reason == "stop"
    assert completion.text == whole[: whole.index(stop)]
    assert "".join(delta.text for delta in deltas) == completion.text


def test_a_prompt_that_leaves_no_room_is_too_long() -> None:
    with pytest.raises(RequestError, match="tokens, the context is 128") as caught:
        generator().generate(Request("1", prompt="word " * 200), lambda: None)
    assert caught.value.code == "too_long"


def test_a_context_beyond_the_bundles_limit_is_reported_and_reduced_to_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    larger = Generator.open(bundles.small_bundle(bundles.SMALL[0]), bundles.cache_directory(), 1, 4096)
    assert larger.context == 128
    assert caplog.messages == ["context = 4096 is more than the bundle has; using its 128"]
    larger.close()


def test_an_answer_that_fills_the_context_ends_with_length() -> None:
    _, completion = run(generator(), Request("1", prompt="word " * 30, max_tokens=4000))
    assert completion.finish_reason == "length"
    assert completion.usage.prompt + completion.usage.generated == 128


@pytest.mark.parametrize("polls", range(3, 24, 3))
def test_an_interruption_takes_effect_within_one_step(polls: int) -> None:
    asked = count()

    def interrupted() -> str | None:
        return "deadline" if next(asked) >= polls else None

    _, completion = run(generator(), Request("1", prompt=f"{polls:02} " * 16, max_tokens=500), interrupted)
    assert completion.finish_reason == "deadline"
    assert next(asked) == polls + 1
    assert completion.usage.generated <= polls * generator().decoder.verify_width


def test_an_interruption_before_the_answer_begins_is_raised() -> None:
    with pytest.raises(Interruption, match="deadline"):
        run(generator(), Request("1", prompt="pump", max_tokens=5), lambda: "deadline")


def test_a_repeated_prompt_prefix_is_not_computed_again() -> None:
    g = generator("gemma3-two-kv-heads")
    first = run(g, Request("1", prompt="same text. one", max_tokens=1))[1].usage
    again = run(g, Request("2", prompt="same text. two", max_tokens=1))[1].usage
    assert first.cached == 0
    assert 0 < again.cached < again.prompt


def test_usage_reports_only_cached_tokens_that_the_client_itself_sent_or_received() -> None:
    g = generator("gemma3-one-kv-head")

    def cached(client: str | None, text: str) -> int:
        *_, last = g.generate(Request("1", prompt=text, max_tokens=1), lambda: None, client)
        assert isinstance(last, Completion)
        return last.usage.cached

    assert cached("alice", "same text. one") == 0
    assert cached("mallory", "same text. two") == 0
    assert cached("mallory", "same text. two") > 0
    assert cached("alice", "same text. three") > 0
    assert cached(None, "same text. four") > 0


def test_an_answer_is_stored_for_lookup_when_its_caller_stops_at_the_completion() -> None:
    g = Generator.open(bundles.small_bundle("gemma3-one-kv-head"), bundles.cache_directory(), 2, None)
    answer = g.generate(Request("1", prompt="pump", max_tokens=5), lambda: None)
    completion = next(item for item in answer if isinstance(item, Completion))
    assert [len(tokens) for tokens in g._answers] == [completion.usage.generated]


def test_a_system_prompt_is_remembered_behind_a_wrapped_ring() -> None:
    g = Generator.open(bundles.small_bundle("gemma3-two-kv-heads"), bundles.cache_directory(), 2, None)
    system = Message("system", "You watch pumps and freezers in a long cold valley of machines. " * 2)

    def ask(text: str) -> Completion:
        return run(g, Request("1", messages=(system, Message("user", text)), max_tokens=30))[1]

    ask("first")
    second = ask("second")
    assert second.usage.cached >= 32
    fresh = Generator.open(bundles.small_bundle("gemma3-two-kv-heads"), bundles.cache_directory(), 2, None)
    third = run(fresh, Request("1", messages=(system, Message("user", "second")), max_tokens=30))[1]
    assert third.usage.cached == second.usage.cached
    assert third.text == second.text


def test_quantised_logits_after_a_snapshot_are_bit_identical(tmp_path: Path) -> None:
    system = Message("system", "You watch pumps and freezers in a long cold valley of machines. " * 2)

    def logits(cache: Path) -> tuple[int, NDArray[np.float32]]:
        g = Generator.open(bundles.small_bundle("gemma3-two-kv-heads", "int8"), cache, 2, None)
        asked = Request("1", messages=(system, Message("user", "which of them is loud?")), max_tokens=1)
        return run(g, asked)[1].usage.cached, g.decoder.logits().copy()

    (at_first, computed), (then, restored) = logits(tmp_path), logits(tmp_path)
    assert at_first == 0 < then
    np.testing.assert_array_equal(restored, computed)


def test_a_short_common_prefix_of_two_prompts_gets_no_snapshot(tmp_path: Path) -> None:
    g = Generator.open(bundles.small_bundle("gemma3-two-kv-heads"), tmp_path, 2, None)
    system = Message("system", "You watch pumps and freezers in a long cold valley of machines. " * 2)
    for text in ("pump one", "pump two"):
        run(g, Request("1", messages=(system, Message("user", text)), max_tokens=1))
    assert len(list((tmp_path / "prefixes").iterdir())) == 1


@pytest.mark.parametrize("name", ["gemma3-one-kv-head", "gemma4-two-kv-heads"])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_answers_follow_their_schema(name: str, temperature: float) -> None:
    for seed in range(3):
        request = Request(
            "1",
            prompt="state",
            max_tokens=60,
            temperature=temperature,
            seed=seed,
            response_format=schema_format(SCHEMA),
        )
        completion = run(generator(name), request)[1]
        answer = json.loads(completion.text)
        assert answer["status"] in ("ok", "warning", "alarm")
        assert len(answer["note"]) <= 12
        assert completion.finish_reason == "stop"
        assert completion.usage.forced > 0


def test_an_answer_that_cannot_be_completed_ends_with_length() -> None:
    request = Request("1", prompt="state", max_tokens=4, response_format=schema_format(SCHEMA))
    assert run(generator(), request)[1].finish_reason == "length"


class _Plain:
    """A generator without shortcuts: full logits, a mask for every step, one token at a time."""

    def __init__(self, g: Generator) -> None:
        self.g = g

    def answer(self, request: Request) -> str:
        g = self.g
        prompt = g.prompt_of(request)
        answer_format = AnswerFormat.of(request)
        assert answer_format is not None
        constraint = compiler(g).compile(answer_format).constrain(request.max_tokens)
        d = g.decoder
        d.rewind(())
        for token in prompt:
            d.advance([token], lambda: None)
        tokens: list[int] = []
        while not constraint.complete and len(tokens) < request.max_tokens:
            forced = constraint.forced()
            logits: NDArray[np.float32] = d.logits()
            bits = np.frombuffer(constraint.mask(), np.uint8)
            allowed = np.unpackbits(bits, count=len(logits), bitorder="little")
            token = forced[0] if forced else int(np.where(allowed, logits, -np.inf).argmax())
            if token in g.bundle.manifest.stop_ids:
                break
            constraint.accept([token])
            tokens.append(token)
            d.advance([token], lambda: None)
        return g.tokenizer.decode(tokens)


@pytest.mark.parametrize("name", bundles.SMALL)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("schema", [None, SCHEMA])
def test_drafting_does_not_change_answers(
    name: str, temperature: float, schema: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = generator(name)
    request = Request(
        "1",
        prompt="pump 7: 3 bar, pump 8: 3 bar, pump 9: 3 bar, pump",
        max_tokens=40,
        temperature=temperature,
        seed=5,
        response_format=None if schema is None else schema_format(schema),
    )
    checked: list[int] = []
    verify = g.decoder.verify

    def counted(ids: Sequence[int]) -> NDArray[np.float32]:
        checked.append(len(ids))
        return verify(ids)

    monkeypatch.setattr(g.decoder, "verify", counted)
    monkeypatch.setattr("edge.generation.drafting.DraftGate.allows", lambda _self: True)
    drafted = run(g, request)[1]
    monkeypatch.setattr("edge.generation.drafting.PromptLookup.guess", lambda _self, _count: [])
    assert run(g, request)[1].text == drafted.text
    assert checked or schema is not None


words = st.text("abcdefgh -", min_size=1, max_size=8)
schemas = st.recursive(
    st.one_of(
        st.lists(words, min_size=1, max_size=4, unique=True).map(lambda options: {"enum": options}),
        st.just({"type": "boolean"}),
        st.integers(1, 6).map(lambda n: {"type": "string", "maxLength": n, "pattern": f"^[a-z]{{1,{n}}}$"}),
    ),
    lambda inner: st.dictionaries(words, inner, min_size=1, max_size=3).map(
        lambda properties: {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    ),
    max_leaves=4,
)


@settings(max_examples=25)
@given(schema=schemas, prompt=words)
def test_forced_tokens_and_gathered_head_rows_do_not_change_greedy_answers(
    schema: dict[str, Any], prompt: str
) -> None:
    request = Request("1", prompt=prompt, max_tokens=90, response_format=schema_format(schema))
    g = generator()
    fast = run(g, request)[1]
    if fast.finish_reason == "stop":
        assert fast.text == _Plain(g).answer(request)
        json.loads(fast.text)
