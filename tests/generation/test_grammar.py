"""Grammars: sampled answers are valid and complete; unsupported formats are refused.

Logits are random, so the answers reach states that a trained model would not reach.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.errors import RequestError
from edge.generation.answer_format import AnswerFormat
from edge.generation.constraint import Step
from edge.generation.grammar import GrammarCompiler, GrammarConstraint
from edge.generation.sampling import Sampler, Sampling
from edge.generation.token_choice import choose, take
from edge.protocol.messages import Request, ToolCall, parse_request
from edge.text.prompt import OutputParser
from edge.text.tokenizer import Tokenizer
from tests.support import real_vocabulary

STOPS = (1, 106, 50)
THOUGHT, THOUGHT_END, CALL, QUOTE = 100, 101, 48, 52
SENSOR = {
    "type": "object",
    "properties": {
        "status": {"enum": ["ok", "warning", "alarm"]},
        "reason": {"type": "string"},
        "action": {"type": "string", "maxLength": 80},
        "value": {"type": "number"},
    },
    "required": ["status", "reason", "action", "value"],
}


@cache
def small_tokenizer() -> Tokenizer:
    """512 pieces with Gemma 4's control tokens."""
    folder = Path(__file__).parents[1] / "fixtures" / "gemma4-one-kv-head"
    return Tokenizer((folder / "tokenizer.model").read_bytes())


@cache
def small() -> GrammarCompiler:
    return GrammarCompiler(small_tokenizer(), STOPS)


@cache
def real() -> GrammarCompiler:
    return GrammarCompiler(real_vocabulary.tokenizer("gemma4"), STOPS)


def asked(**fields: Any) -> Request:
    return parse_request(json.dumps({"id": "t", "prompt": "x", **fields}))


def for_schema(schema: Mapping[str, Any]) -> Request:
    return asked(response_format={"type": "json_schema", "json_schema": {"schema": schema}})


def for_tool(parameters: Mapping[str, Any], **fields: Any) -> Request:
    return asked(tools=[{"function": {"name": "f", "parameters": parameters}}], **fields)


def format_of(request: Request) -> AnswerFormat:
    answer_format = AnswerFormat.of(request)
    assert answer_format is not None
    return answer_format


def constrain(
    request: Request, max_tokens: int = 400, compiler: GrammarCompiler | None = None
) -> GrammarConstraint:
    return (compiler or small()).compile(format_of(request)).constrain(max_tokens)


def follow(constraint: GrammarConstraint, tokens: list[int]) -> GrammarConstraint:
    constraint.accept(tokens)
    return constraint


def masked(constraint: GrammarConstraint, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    bits = np.frombuffer(constraint.mask(), np.uint8)
    return np.where(np.unpackbits(bits, count=len(logits), bitorder="little"), logits, -np.inf)


def drawn(
    constraint: GrammarConstraint,
    sampler: Sampler,
    logits: NDArray[np.float32],
    ids: list[int] | None = None,
    follow: bool = False,
) -> Step:
    """Choose tokens as the decoder's loop does, from the logits of `ids` or from all logits."""
    if ids is not None:
        return take(constraint, sampler.sample(logits[ids], np.asarray(ids, np.int32)), follow)
    forced = constraint.forced()
    if forced:
        return take(constraint, forced[0], follow)
    return choose(constraint, sampler, logits.copy(), follow)


def noise(random: np.random.Generator) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = (random.normal(size=small_tokenizer().vocabulary_size) * 4).astype(
        np.float32
    )
    return logits


def generate(constraint: GrammarConstraint, seed: int, start: tuple[int, ...] = ()) -> list[int]:
    """Generate as the decoder does, from random logits; forced and listed tokens are used at random."""
    random, sampler = np.random.default_rng(seed), Sampler(Sampling(1.0, 64, 1.0, seed))
    tokens = list(start)
    follow(constraint, tokens)
    while not constraint.complete and constraint.remaining:
        forced = constraint.forced() if random.random() < 0.7 else []
        follow(constraint, forced)
        tokens += forced
        if forced:
            continue
        ids, following = constraint.allowed() if random.random() < 0.5 else None, random.random() < 0.5
        step = drawn(constraint, sampler, noise(random), ids, following)
        assert step.token is not None
        if step.token in STOPS:
            break
        tokens += [step.token, *(step.forced if following else [])]
    return tokens


def text_of(constraint: GrammarConstraint, seed: int) -> str:
    return small_tokenizer().decode(generate(constraint, seed))


def valid(value: Any, schema: Mapping[str, Any]) -> bool:
    """The definition of JSON schema, for the keywords that `schemas` below uses."""
    if "anyOf" in schema:
        return any(valid(value, choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return any(value == item and type(value) is type(item) for item in schema["enum"])
    kinds = {
        "string": str,
        "array": list,
        "object": dict,
        "boolean": bool,
        "null": type(None),
        "integer": int,
    }
    if schema["type"] == "number":
        right = type(value) in (int, float)
    else:
        right = type(value) is kinds[schema["type"]]
    if not right or schema["type"] in ("boolean", "null"):
        return right
    if schema["type"] in ("number", "integer"):
        return bool(schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf))
    if schema["type"] == "object":
        properties = schema["properties"]
        listed = set(schema["required"]) <= set(value) <= set(properties)
        return listed and all(valid(item, properties[name]) for name, item in value.items())
    least = schema.get("minLength", schema.get("minItems", 0))
    most = schema.get("maxLength", schema.get("maxItems", math.inf))
    if schema["type"] == "string":
        return least <= len(value) <= most and bool(re.search(schema.get("pattern", ""), value))
    return least <= len(value) <= most and all(valid(item, schema["items"]) for item in value)


def bounded(low: str, high: str, most: int) -> st.SearchStrategy[dict[str, int]]:
    bounds = st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    return bounds.flatmap(
        lambda b: st.fixed_dictionaries({}, optional={low: st.just(b[0]), high: st.just(b[1])})
    )


texts = st.one_of(
    bounded("minLength", "maxLength", 30),
    st.sampled_from(["^[A-Z]{3}-[0-9]{2}$", r"^\d{4}-\d{2}-\d{2}$", "^[a-z]+!$"]).map(
        lambda p: {"pattern": p}
    ),
).map(lambda more: {"type": "string", **more})
numbers = st.tuples(st.sampled_from(["number", "integer"]), bounded("minimum", "maximum", 250)).map(
    lambda pair: {"type": pair[0], **pair[1]}
)
enums = st.lists(
    st.sampled_from(["ok", "okay", "warning", 'a "b"', "\u2581\x7f", "ü\n", 1, 2.5, None, True]),
    min_size=1,
    max_size=4,
).map(lambda values: {"enum": values})
scalars = st.one_of(texts, numbers, enums, st.sampled_from([{"type": "boolean"}, {"type": "null"}]))


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.dictionaries(st.sampled_from(["a", "bb", "reason", "x_y", "Z"]), inner, max_size=4)
    return names.flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties) or ["-"])).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required & set(properties)),
            }
        )
    )


schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.tuples(inner, bounded("minItems", "maxItems", 3)).map(
            lambda p: {"type": "array", "items": p[0], **p[1]}
        ),
        objects(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda choices: {"anyOf": choices}),
    ),
    max_leaves=6,
)


ENDLESS_LIST = {  # once cut off: what it forces was taken in other tokens than those planned
    "type": "object",
    "properties": {
        "a": {"type": "string"},
        "bb": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"},
        "reason": {"type": "array", "items": {"enum": ["ok"]}, "minItems": 2},
        "x_y": {"type": "string"},
    },
    "required": ["a", "bb", "reason"],
}


@given(schema=objects(schemas), seed=st.integers(0, 2**32), extra=st.integers(0, 30))
def test_json_is_valid_and_complete_within_the_shortest_budget_and_any_larger(
    schema: dict[str, Any], seed: int, extra: int
) -> None:
    completion = constrain(for_schema(schema)).completion()
    assert completion is not None
    constraint = constrain(for_schema(schema), len(completion) + extra)
    answer = text_of(constraint, seed)
    assert constraint.accepting
    assert valid(json.loads(answer), schema), answer


REPETITIONS = (
    *(
        r"^[0-9]+ (bar|psi)$",
        r"^\d+(\.\d+)? (bar|psi|kPa)$",
        r"^-?\d+(\.\d{1,2})?°C$",
        r"^\d+$",
        r"^T[0-9]+C$",
    ),
    *(
        r"^[a-z]+-[0-9]+$",
        r"^[a-z0-9]+@[a-z0-9]+\.(com|org)$",
        r"^(\d+,)*\d+;$",
        r"^([0-9]{2}:){5}[0-9]+$",
        r"^[01]+b$",
    ),
    *(
        r"^[^,]+, [^,]+$",
        r"^\d+°C$",
        r"^[A-Z]+ ?Ω$",
        r"^.*;$",
        r"^.+\.$",
        r"^(ab)+ (x|y)1$",
        r"^[a-z]+(\.[a-z]+)*@[a-z]+$",
    ),
)


@pytest.mark.parametrize("pattern", REPETITIONS)
@pytest.mark.parametrize("extra", [0, 9, 60])
def test_patterns_with_repetitions_complete_within_the_budget(pattern: str, extra: int) -> None:
    schema = {
        "type": "object",
        "properties": {"v": {"type": "string", "pattern": pattern}, "w": {"type": "string"}},
        "required": ["v", "w"],
    }
    regex = asked(response_format={"type": "regex", "regex": pattern[1:-1]})
    for request in (regex, for_schema(schema)):
        completion = constrain(request).completion()
        assert completion is not None
        for seed in range(5):
            constraint = constrain(request, len(completion) + extra)
            answer = text_of(constraint, seed)
            assert constraint.accepting
            assert re.search(pattern, answer if request is regex else json.loads(answer)["v"], re.DOTALL)
    tool = for_tool(schema)
    completion = follow(constrain(tool), [CALL]).completion()
    assert completion is not None
    parser = OutputParser("gemma4", small_tokenizer(), [])
    for token in generate(constrain(tool, 1 + len(completion) + extra), extra, start=(CALL,)):
        parser.push(token)
    parser.finish()
    assert all(re.search(pattern, call.arguments["v"], re.DOTALL) for call in parser.tool_calls)
    assert parser.tool_calls


@given(schema=objects(schemas), seed=st.integers(0, 2**32), extra=st.integers(0, 30))
@example(schema=ENDLESS_LIST, seed=0, extra=0)
def test_tool_calls_are_valid_and_complete_within_the_budget(
    schema: dict[str, Any], seed: int, extra: int
) -> None:
    completion = follow(constrain(for_tool(schema)), [CALL]).completion()
    assert completion is not None
    constraint = constrain(for_tool(schema), 1 + len(completion) + extra)
    parser = OutputParser("gemma4", small_tokenizer(), [])
    for token in generate(constraint, seed, start=(CALL,)):
        parser.push(token)
    parser.finish()
    assert parser.tool_calls, parser.text
    assert all(valid(call.arguments, schema) for call in parser.tool_calls), parser.tool_calls


@settings(max_examples=60)
@given(schema=objects(schemas), seed=st.integers(0, 2**32))
def test_mask_token_list_and_check_agree_at_every_step(schema: dict[str, Any], seed: int) -> None:
    constraint = constrain(for_schema(schema), 400)  # so many that forced tokens need not be spared
    for token in generate(constrain(for_schema(schema), 40), seed):
        logits = masked(constraint, np.zeros(small_tokenizer().vocabulary_size, np.float32))
        unmasked = set(np.flatnonzero(np.isfinite(logits)).tolist())
        forced = constraint.forced()
        checked = {i for i in range(len(logits)) if constraint.validate([i])}
        listed = constraint.allowed()
        assert unmasked == ({forced[0]} if forced else checked)
        assert checked >= unmasked
        assert listed is None or set(listed) == unmasked
        assert listed is not None or len(checked) > 100
        constraint.accept([token])


def test_a_required_control_token_is_the_only_one_listed() -> None:
    constraint = follow(constrain(for_tool({"properties": {"s": {"type": ["string", "null"]}}})), [CALL])
    follow(constraint, small_tokenizer().encode("call:f{s:"))
    listed = constraint.allowed()
    assert listed is not None
    assert [token for token in listed if small_tokenizer().is_control(token)] == [QUOTE]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [1, 5, 64, 512])
def test_sampling_draws_the_same_tokens_as_sampling_from_masked_logits(
    temperature: float, top_k: int
) -> None:
    sampling = Sampling(temperature, top_k, 0.9, seed=3)
    random = np.random.default_rng(8)
    prefix = small_tokenizer().encode('{"status":"ok","reason":"the')
    for length in range(len(prefix)):
        plain, ours, listed = Sampler(sampling), Sampler(sampling), Sampler(sampling)
        for _ in range(8):
            logits = noise(random)
            constraint = follow(constrain(for_schema(SENSOR)), prefix[:length])
            ids = constraint.allowed()
            expected = plain.sample(masked(constraint, logits))
            assert drawn(constraint, ours, logits).token == expected
            if ids is not None:
                constraint = follow(constrain(for_schema(SENSOR)), prefix[:length])
                assert drawn(constraint, listed, logits, ids).token == expected


def test_forced_tokens_equal_the_tokens_of_the_whole_text() -> None:
    tokenizer = real_vocabulary.tokenizer("gemma4")
    answer = '{"status":"alarm","reason":"pressure is low","action":"check the pump","value":-3.5}'
    expected = tokenizer.encode(answer)
    constraint = constrain(for_schema(SENSOR), 100, real())
    tokens: list[int] = []
    count = 0
    while not constraint.complete:
        forced = constraint.forced()
        following = forced or [expected[len(tokens)]]
        count += len(forced)
        follow(constraint, following)
        tokens += following
    assert tokens == expected
    assert count >= 6


def test_the_completion_of_a_sensor_answer_is_the_shortest_text() -> None:
    constraint = constrain(for_schema(SENSOR), 100, real())
    shortest = '{"status":"ok","reason":"","action":"","value":0}'
    completion = constraint.completion()
    assert completion is not None
    assert len(completion) == len(real_vocabulary.tokenizer("gemma4").encode(shortest))


def test_a_budget_that_is_too_small_gives_a_valid_prefix_and_reports_it() -> None:
    constraint = constrain(for_schema(SENSOR), 8)
    assert constraint.completion() is None
    answer = text_of(constraint, 1)
    assert not constraint.accepting
    assert constraint.remaining == 0
    assert answer.startswith('{"status":"')


@pytest.mark.parametrize("seed", range(20))
def test_json_object_regex_and_choice(seed: int) -> None:
    assert isinstance(
        json.loads(text_of(constrain(asked(response_format={"type": "json_object"}), 12), seed)), dict
    )
    regex = asked(response_format={"type": "regex", "regex": r"[A-Z]{2}/\d{1,3}(°C)?"})
    assert re.fullmatch(r"[A-Z]{2}/[0-9]{1,3}(°C)?", text_of(constrain(regex, 12), seed))
    choices = ['a"b\\', "é\n", "\x01\x7f", "x/y", "x/yz", "\u2581"]
    choice = asked(response_format={"type": "choice", "choice": choices})
    assert text_of(constrain(choice, 12), seed) in choices


def test_the_model_decides_where_an_answer_can_end_or_continue() -> None:
    constraint = constrain(asked(response_format={"type": "choice", "choice": ["yes", "yes please"]}))
    follow(constraint, small_tokenizer().encode("yes"))
    assert (constraint.accepting, constraint.complete) == (True, False)
    assert constraint.validate([106]) == 1
    follow(constraint, small_tokenizer().encode(" please"))
    assert (constraint.accepting, constraint.complete) == (True, True)


def test_a_forbidden_token_is_not_accepted() -> None:
    constraint = constrain(for_schema(SENSOR))
    with pytest.raises(ValueError, match=f"token {CALL} is not allowed"):
        constraint.accept([CALL])
    follow(constraint, small_tokenizer().encode('{"status'))


TOOL = {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}}, "required": ["n", "s"]}


def test_with_tools_the_model_chooses_between_text_and_a_call() -> None:
    constraint = constrain(for_tool(TOOL))
    assert constraint.accepting
    assert constraint.allowed() is None
    follow(constraint, small_tokenizer().encode("It is on.\n"))
    assert constraint.validate([106]) == constraint.validate([CALL]) == 1
    assert constraint.validate([QUOTE]) == constraint.validate([THOUGHT]) == 0
    follow(constraint, [CALL])
    assert small_tokenizer().decode(constraint.forced()) == "call:f{n:"


def test_a_call_is_not_started_when_the_budget_cannot_finish_it() -> None:
    logits = np.zeros(small_tokenizer().vocabulary_size, np.float32)
    logits[CALL] = 9
    greedy = Sampler(Sampling())
    assert drawn(constrain(for_tool(TOOL), 100), greedy, logits).token == CALL
    assert drawn(constrain(for_tool(TOOL), 5), greedy, logits).token in STOPS


def test_a_tool_without_parameters_is_called_without_arguments() -> None:
    constraint = constrain(asked(tools=[{"function": {"name": "ping"}}]))
    parser = OutputParser("gemma4", small_tokenizer(), [])
    for token in [CALL, *follow(constraint, [CALL]).forced()]:
        parser.push(token)
    assert parser.tool_calls == (ToolCall("ping", {}, "call_0"),)


def test_thinking_precedes_the_format_and_only_if_requested() -> None:
    schema = {"type": "json_object"}
    assert constrain(asked(response_format=schema)).validate([THOUGHT]) == 0
    constraint = follow(constrain(asked(response_format=schema, reasoning=True), 30), [THOUGHT])
    assert small_tokenizer().decode(constraint.forced()) == "thought\n"
    parser = OutputParser("gemma4", small_tokenizer(), [])
    for token in [THOUGHT, *generate(constraint, 4)]:
        parser.push(token)
    parser.finish()
    assert isinstance(json.loads(parser.text), dict)


def test_a_prompt_that_ends_in_a_thought_is_continued() -> None:
    use = {"id": "c", "function": {"name": "f", "arguments": {"s": "", "n": 1}}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [use]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ]
    request = parse_request(
        json.dumps(
            {"id": "t", "messages": messages, "reasoning": True, "response_format": {"type": "json_object"}}
        )
    )
    constraint = follow(constrain(request), small_tokenizer().encode("so"))
    assert small_tokenizer().decode(follow(constraint, [THOUGHT_END]).forced()) == "{"


def test_additional_properties_are_allowed_where_forbidding_them_excludes_valid_answers() -> None:
    base = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    more = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
    answer = small_tokenizer().encode('{"a":1,"b":2}')
    for schema in ({"allOf": [base, more]}, base | {"additionalProperties": {"type": "integer"}}):
        assert constrain(for_schema(schema)).validate(answer) == len(answer)
    assert constrain(for_schema(base)).validate(answer) < len(answer)


REFUSED = {
    "a keyword": (for_schema({"not": {}}), r'response_format\.json_schema: Unimplemented keys: \["not"\]'),
    "a hidden keyword": (
        for_schema({"x-guidance": {"lenient": True}, "if": {}}),
        r'Unimplemented keys: \["if"\]',
    ),
    "an unsatisfiable schema": (for_schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
    "a huge integer": (
        for_schema({"type": "integer", "maximum": 2**64}),
        "json_schema: .* 18446744073709551616",
    ),
    "a huge integer to choose": (
        for_schema({"enum": [1, -(2**63) - 1]}),
        "json_schema: .* -9223372036854775809",
    ),
    "an unknown type": (for_schema({"type": "objekt"}), "Invalid type: objekt"),
    "a reference to elsewhere": (for_schema({"$ref": "http://127.0.0.1:9/x"}), "not present"),
    "look-around": (asked(response_format={"type": "regex", "regex": "(?=a)"}), r"\.regex: look-around"),
    "half a class": (asked(response_format={"type": "regex", "regex": "a\n[b"}), "unclosed character class"),
    "a keyword in a tool": (
        for_tool({"properties": {"x": {"not": {}}}}),
        r"tools\[0\].*\.x: the keyword 'not'",
    ),
    "an odd name in a tool": (
        for_tool({"properties": {"a:b": {}}}),
        "properties.a:b: a name can't have spaces or",
    ),
    "no object in a tool": (for_tool({"type": "string"}), "the parameters must be an object"),
    "a lost reference in a tool": (for_tool({"properties": {"x": {"$ref": "#/y"}}}), "points to no schema"),
    "a tool's pattern": (for_tool({"properties": {"x": {"pattern": "(?=a)"}}}), "tools: look-around"),
    "an unknown required name": (for_tool({"required": ["x"]}), "required names must be in properties"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_keyword_is_refused_by_name(case: str) -> None:
    request, message = REFUSED[case]
    with pytest.raises(RequestError, match=message) as caught:
        small().compile(format_of(request))
    assert caught.value.code == "bad_request"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weird",
    [5, [], {"type": 5}, {"properties": [1]}, {"enum": 5}, {"anyOf": 5}, {"items": 5, "type": "array"}],
)
def test_malformed_schemas_are_refused_without_a_crash(weird: Any) -> None:
    for request in (for_schema({"properties": {"x": weird}}), for_tool({"properties": {"x": weird}})):
        with pytest.raises(RequestError):
            small().compile(format_of(request))


def chain(count: int, *wrapped: str) -> dict[str, Any]:
    """A schema with a chain of references, each inside `wrapped` (a key, its type, more members)."""
    definitions: dict[str, Any] = {f"a{count}": {"type": "string"}}
    for number in range(count):
        reference: Any = {"$ref": f"#/$defs/a{number + 1}"}
        for key in wrapped:
            reference = {key: [reference] if key in ("anyOf", "prefixItems") else reference}
        definitions[f"a{number}"] = reference
    return {"$defs": definitions, "$ref": "#/$defs/a0"}


def members(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(count)}}


BOMBS = {
    "references": for_schema(chain(3000)),
    "objects in objects": for_schema(chain(2000, "additionalProperties")),
    "lists in lists": for_schema(chain(2000, "items")),
    "members": for_schema(members(8000)),
    "members of a tool": for_tool(members(4000)),
    "references in a tool": for_tool({"properties": {"x": {"$ref": "#/$defs/a0"}}, **chain(900)}),
    "a multiple": for_schema({"type": "integer", "multipleOf": 9_999_991}),
    "a multiple in a tool": for_tool({"properties": {"x": {"type": "integer", "multipleOf": 9_999_991}}}),
    "multiples of multiples": for_schema(
        {"allOf": [{"type": "integer", "multipleOf": 9973}, {"type": "integer", "multipleOf": 9967}]}
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_schema_that_would_exhaust_memory_time_or_stack_is_refused(case: str) -> None:
    with pytest.raises(
        RequestError, match=r"more than 1024 objects|common multiple|chained too deep"
    ) as caught:
        small().compile(format_of(BOMBS[case]))
    assert caught.value.code == "bad_request"


LARGEST = """
import sys, threading
from tests.generation import test_grammar as tests
from edge.generation import grammar_channel

shapes = [tests.chain(1000), tests.chain(330, "x", "properties")]
shapes += [tests.chain(500, key) for key in ("items", "additionalProperties", "prefixItems", "anyOf")]

def work():
    for shape in shapes:
        tests.small().compile(tests.format_of(tests.for_schema(shape)))
        done.append(shape)

done = []
threading.stack_size(grammar_channel.STACK_BYTES // 2)
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert done == shapes
"""


def test_the_largest_accepted_schemas_use_at_most_half_of_the_stack() -> None:
    """Runs in its own process, because a stack overflow would end it."""
    ended = subprocess.run([sys.executable, "-c", LARGEST], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("multiple", [0.01, 0.25, 5, 15, 360, 1000, 86_400, 10**6, 1e-9])
def test_common_values_of_multiple_of_are_supported(multiple: float) -> None:
    assert constrain(for_schema({"type": "number", "multipleOf": multiple})).allowed() is not None


HOSTILE = [
    for_schema({"type": "array", "items": {"type": "string"}, "minItems": 10**9}),
    for_schema({"type": "string", "minLength": 10**6}),
    for_schema({"type": "string", "pattern": "^(a|b|ab)*(c|d){1000}$"}),
    for_schema({"$defs": {"a": {"properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}},
                "type": "object", "$ref": "#/$defs/a"}),
    for_schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    for_schema({"enum": [f"value{i}" for i in range(10_000)]}),
    asked(response_format={"type": "regex", "regex": "((a{100}){100}){100}"}),
    asked(response_format={"type": "regex", "regex": ".*a.{300}b"}),
    for_tool({"properties": {"y": {"type": "array", "minItems": 10**7}}}),
]  # fmt: skip


@pytest.mark.parametrize("request_", HOSTILE)
def test_hostile_formats_give_a_valid_prefix_or_a_typed_error(request_: Request) -> None:
    logits = np.random.default_rng(1).normal(size=262144).astype(np.float32)
    try:
        constraint = constrain(request_, 30, real())
        while not constraint.complete and constraint.remaining:
            if drawn(constraint, Sampler(Sampling()), logits).token in STOPS:
                break
    except RequestError as error:
        refused = error
        assert refused.code == "bad_request"


def test_requests_without_a_format_need_no_grammar() -> None:
    assert AnswerFormat.of(asked()) is None


def test_a_compiled_grammar_is_reused_until_it_is_evicted() -> None:
    compiler = GrammarCompiler(small_tokenizer(), STOPS)

    def choice(number: int) -> AnswerFormat:
        return format_of(asked(response_format={"type": "choice", "choice": [f"n{number}"]}))

    first = compiler.compile(choice(0))
    compiler.compile(choice(1))
    compiler.compile(choice(0))
    assert [compiler.forget_oldest() for _ in range(3)] == [True, True, False]
    for _ in range(2):
        assert follow(first.constrain(9), small_tokenizer().encode("n0")).complete
