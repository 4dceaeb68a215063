"""Requests and answers: what is accepted, what is refused and how it is said, and that JSON round-trips."""

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge.errors import RequestError, TransportError
from edge.protocol.messages import (
    MAX_REQUEST_BYTES,
    Failure,
    Final,
    Message,
    Partial,
    Request,
    Timings,
    ToolCall,
    Usage,
    parse_answer,
    parse_request,
    peek_request,
)

unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ids = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64)
names = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | unicode_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(unicode_text, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(unicode_text, json_values, max_size=4)
tool_calls = st.lists(st.builds(ToolCall, names, json_objects, st.uuids().map(str)), max_size=3).map(tuple)
plain_messages = st.builds(Message, st.sampled_from(["system", "user", "assistant"]), unicode_text)
messages = (
    plain_messages
    | st.builds(Message, st.just("assistant"), unicode_text, st.none() | unicode_text, tool_calls)
    | st.builds(Message, st.just("tool"), unicode_text, tool_name=names)
)
formats = (
    st.just({"type": "json_object"})
    | json_objects.map(lambda schema: {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    | st.just({"type": "regex", "regex": "[0-9]+"})
    | st.lists(unicode_text.filter(bool), min_size=1, max_size=4).map(
        lambda c: {"type": "choice", "choice": c}
    )
)
tool = st.builds(
    lambda name, parameters: {"type": "function", "function": {"name": name, "parameters": parameters}},
    names,
    json_objects,
)
optional: dict[str, st.SearchStrategy[Any]] = {
    "id": ids,
    "max_tokens": st.integers(1, 131_072),
    "temperature": st.floats(0, 2),
    "top_k": st.integers(1, 262_144),
    "top_p": st.floats(1e-6, 1),
    "seed": st.none() | st.integers(0, 2**63 - 1),
    "stop": st.lists(unicode_text.filter(bool), max_size=4).map(tuple),
    "stream": st.booleans(),
    "response_format": st.none() | formats,
    "tools": st.lists(tool, max_size=2).map(tuple),
    "reasoning": st.booleans(),
    "deadline_ms": st.none() | st.integers(1, 86_400_000),
    "reply_to": st.none() | st.just("sensors/7/answer"),
}
requests = st.builds(Request, prompt=unicode_text, **optional) | st.builds(
    Request, messages=st.lists(messages, min_size=1, max_size=4).map(tuple), **optional
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # an emulated processor takes a second for nine
@given(requests)
def test_a_request_reads_back_as_it_was_written(request: Request) -> None:
    assert parse_request(request.to_json()) == request
    assert request.to_json().isascii()


@given(st.binary(max_size=200) | st.text(max_size=200))
@example(b"\xff")
@example("\ud800")
@example("[" * 100_000)
@example('{"a":' * 900 + "1" + "}" * 900)
@example('{"id":"a","prompt":"' + "x" * MAX_REQUEST_BYTES + '"}')
@example('{"id":"a","prompt":"x","seed":' + "1" * 5000 + "}")
def test_noise_is_refused_in_one_line_with_the_code_bad_request(raw: bytes | str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(raw)
    assert caught.value.code == "bad_request"
    assert str(caught.value).isprintable()
    peek_request(raw)


@given(requests, st.sampled_from([*sorted(optional), "prompt", "messages"]), json_values)
def test_any_value_under_any_key_is_accepted_or_refused_in_one_line(
    request: Request, key: str, value: Any
) -> None:
    try:
        parse_request(json.dumps(json.loads(request.to_json()) | {key: value}))
    except RequestError as error:
        refusal = error
    else:
        return
    assert refusal.code == "bad_request"
    assert key in str(refusal) or "number" in str(refusal)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_token": 3}, "unknown key 'max_token'; allowed: id, prompt, messages, max_tokens"),
        ({"max_tokens": 0}, "max_tokens is 0; allowed: an integer from 1 to"),
        ({"max_tokens": 3.0}, "max_tokens is 3.0; allowed: an integer"),
        ({"max_tokens": True}, "max_tokens is a boolean"),
        ({"temperature": -0.1}, "temperature is -0.1; allowed: a number from 0 to 2"),
        ({"temperature": "0"}, "temperature is a string"),
        ({"stream": 1}, "stream is a number; allowed: true or false"),
        ({"stop": ["a", ""]}, "stop[1] has 0 characters"),
        ({"seed": None}, "seed is null"),
        ({"messages": []}, "messages has 0 items"),
        ({"messages": [{"role": "user", "content": "x"}]}, "exactly one of prompt and messages"),
        ({"id": "a b"}, "id is not valid; allowed: 1 to 64 printable ASCII"),
        ({"id": 7}, "id is not valid"),
        ({"deadline_ms": 0}, "deadline_ms is 0"),
        ({"reply_to": "a/#"}, "reply_to is not a topic"),
        ({"response_format": {"type": "yaml"}}, "response_format.type is not valid; allowed: json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "json_schema.schema is missing",
        ),
        ({"response_format": {"type": "choice", "choice": []}}, "response_format.choice has 0 items"),
        ({"response_format": {"type": "regex", "regex": ""}}, "response_format.regex is empty"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format has the unknown key 'x'"),
        ({"tools": [{"type": "retrieval", "function": {"name": "a"}}]}, "tools[0].type is not valid"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name is not valid"),
        ({"tools": {}}, "tools is an object; allowed: an array"),
    ],
)
def test_a_wrong_key_is_named_with_what_is_allowed(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(json.dumps({"id": "a", "prompt": "x"} | fields))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ('{"id":"a","prompt":"x","temperature":NaN}', "NaN is not a JSON number"),
        ('{"id":"a","prompt":"x","temperature":1e999}', "number '1e999' is too large"),
        ('{"id":"a","prompt":"x","id":"b"}', "duplicate key 'id'"),
        ('{"id":"a","prompt":"x","response_format":{"type":"a","type":"b"}}', "duplicate key 'type'"),
        ('{"id":"a","prompt":"\\ud83d"}', "a lone surrogate"),
        ('{"id":"a","prompt":"x","\\udc00":1}', "a lone surrogate"),
        ('{"id":"a","prompt":"x"} {}', "not JSON: Extra data at character 24"),
        ('{"id":"a","prompt":"x"', "not JSON"),
        ("[]", "a JSON object is required, not an array"),
        ('{"prompt":"x"}', "id is missing"),
        ('{"id":"a"}', "exactly one of prompt and messages"),
    ],
)
def test_text_that_is_not_one_unambiguous_object_is_refused(raw: str, said: str) -> None:
    with pytest.raises(RequestError, match=r"^request: ") as caught:
        parse_request(raw)
    assert said in str(caught.value)


@pytest.mark.parametrize("levels", [31, 32, 33, 40])
def test_nesting_is_bounded(levels: int) -> None:
    schema: dict[str, Any] = {}
    for _ in range(levels - 4):
        schema = {"properties": schema}
    request = Request("a", "x", response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    if levels <= 32:
        assert parse_request(request.to_json()) == request
    else:
        with pytest.raises(RequestError, match="nested deeper than 32 levels"):
            parse_request(request.to_json())


def test_a_tool_message_gets_the_name_of_the_call_it_answers() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": '{"pin": 4}'}}
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3.3"},
    ]
    parsed = parse_request(json.dumps({"id": "a", "messages": turns})).messages
    assert parsed[1] == Message("assistant", "", tool_calls=(ToolCall("read", {"pin": 4}, "c1"),))
    assert parsed[2] == Message("tool", "3.3", tool_name="read")


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (
            {"role": "robot", "content": ""},
            "messages[0].role is not valid; allowed: system, user, assistant, tool",
        ),
        ({"role": "user"}, "messages[0].content is null"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content is an array"),
        ({"role": "user", "content": "", "tool_calls": []}, "messages[0] has the unknown key 'tool_calls'"),
        ({"role": "tool", "content": "", "tool_call_id": "x"}, "messages[0] answers no tool call"),
        ({"content": "x"}, "messages[0].role is missing"),
        ("hello", "messages[0] is a string"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments: not JSON",
        ),
    ],
)
def test_a_wrong_message_is_named(turn: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(json.dumps({"id": "a", "messages": [turn]}))
    assert said in str(caught.value)


def test_one_stop_string_needs_no_array() -> None:
    assert parse_request('{"id":"a","prompt":"x","stop":"\\n"}').stop == ("\n",)


def test_the_text_format_means_no_constraint() -> None:
    assert parse_request('{"id":"a","prompt":"x","response_format":{"type":"text"}}').response_format is None


@given(requests)
def test_peeking_at_a_request_gives_its_id_and_reply_to(request: Request) -> None:
    peeked = peek_request(request.to_json().encode())
    assert (peeked.id, peeked.reply_to) == (request.id, request.reply_to)
    assert peeked.parse() == request


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"\xff", b'"id"', b"{}", b'{"id":7}', b'{"id":"a b"}',
     b"[" * 100_000, b'{"id":"a","n":' + b"9" * 9999 + b"}"],
)  # fmt: skip
def test_peeking_at_something_else_gives_nothing(raw: bytes) -> None:
    peeked = peek_request(raw)
    assert (peeked.id, peeked.reply_to) == (None, None)
    with pytest.raises(RequestError):
        peeked.parse()


@pytest.mark.parametrize(
    ("raw", "request_id", "reply_to"),
    [
        ('{"id":"a1","nonsense":true}', "a1", None),
        ('{"id":"a b","reply_to":"a/b"}', None, "a/b"),
        ('{"id":"a1","reply_to":"a/#"}', "a1", None),
        ("{", None, None),
    ],
)
def test_id_and_reply_to_of_a_refused_request_are_known_where_they_are_valid(
    raw: str, request_id: str | None, reply_to: str | None
) -> None:
    peeked = peek_request(raw)
    assert (peeked.id, peeked.reply_to) == (request_id, reply_to)
    with pytest.raises(RequestError):
        peeked.parse()


tenths = st.integers(0, 10**6).map(lambda n: n / 10)
usages = st.builds(Usage, *[st.integers(0, 10**6)] * 4)
finals = st.builds(
    Final,
    ids,
    unicode_text,
    st.sampled_from(["stop", "length", "deadline", "cancelled", "tool_calls"]),
    usages,
    st.builds(Timings, tenths, tenths, tenths, tenths),
    st.none() | unicode_text,
    tool_calls,
)
partials = st.builds(Partial, ids, st.integers(0, 10**6), unicode_text, st.none() | unicode_text)
failures = st.builds(
    Failure,
    st.none() | ids,
    st.sampled_from(["busy", "expired"]),
    unicode_text,
    st.none() | st.integers(0, 10**6),
)


@given(finals | partials | failures)
def test_an_answer_reads_back_as_it_was_written(answer: Final | Partial | Failure) -> None:
    assert answer.to_json().isascii()
    assert parse_answer(answer.to_json()) == answer


def test_timings_are_written_to_a_tenth_of_a_millisecond() -> None:
    final = Final("a", "x", "stop", Usage(1, 0, 0, 1), Timings(0.04, 1.26, math.pi, 2.0))
    assert json.loads(final.to_json())["timings"] == {
        "queue_ms": 0.0,
        "prefill_ms": 1.3,
        "decode_ms": 3.1,
        "first_token_ms": 2.0,
    }


@given(st.binary(max_size=100))
@example(b'{"type":"final"}')
@example(b'{"type":["final"]}')
@example(b'{"type":"partial","id":"a"}')
@example(b'{"type":"partial","id":"a","seq":0,"text":null}')
@example(b'{"type":"partial","id":7,"seq":0,"text":""}')
@example(b'{"type":"error","id":null,"code":"busy","message":["x"]}')
@example(b'{"type":"final","id":"a","text":"","finish_reason":"stop","usage":3,"timings":{}}')
def test_an_unreadable_answer_is_a_typed_error(raw: bytes) -> None:
    with pytest.raises(TransportError, match="can't be read"):
        parse_answer(raw)


def test_an_answer_of_a_later_version_may_have_more_keys() -> None:
    partial = Partial("a", 0, "x")
    assert parse_answer(partial.to_json()[:-1] + ',"mood":"fine"}') == partial
    final = Final("a", "x", "stop", Usage(1, 0, 0, 1), Timings(0.0, 0.0, 0.0, 0.0))
    assert parse_answer(final.to_json().replace('"cached"', '"guessed":2,"cached"')) == final
