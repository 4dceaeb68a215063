"""Routes: readings lead to events at once and to questions in time; memory is bounded for any input."""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
import tracemalloc
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge.cli.daemon import daemon
from edge.errors import ConfigError, EdgeError
from edge.protocol.messages import Failure, Final, Timings, Usage, parse_request
from edge.protocol.topic_filter import TopicFilter, disjoint
from edge.routes.config import CONDITION_NAMES, STATISTICS, parse_routes
from edge.routes.replay import Replay
from edge.routes.router import Event, Ignored, Known, Outcome, Question, Router, answer_payload
from edge.routes.statistics import Statistics, Window

FREEZER = """
[[route]]
name = "freezers"
topics = ["sensors/+/temperature"]
window = { readings = 10, seconds = 3600 }
event_topic = "alarms/{sensor}"
answer_topic = "explanations/{sensor}"

[route.trigger]
when = "last > `-15`"
clear = "last < `-17`"
min_interval_s = 300

[route.ask]
instructions = "You watch freezers."
question = "Freezer {sensor}, {reason}: {statistics}. Latest: {readings}."
max_tokens = 80

[route.ask.schema]
type = "object"
properties = { cause = { type = "string" } }
required = ["cause"]
"""


def router(toml: str, plain: bool = False) -> Router:
    return Router(parse_routes(tomllib.loads(toml)["route"]), plain, wall_clock=lambda: 1_700_000_000.25)


def variant(**changes: Any) -> str:
    """A route for plain numbers; `changes` are TOML values of its trigger."""
    trigger = "\n".join(f"{key} = {value}" for key, value in changes.items())
    return f"""
[[route]]
name = "r"
topics = ["s/#"]
max_sensors = 4
event_topic = "events"
answer_topic = "answers"
[route.trigger]
{trigger}
[route.ask]
question = "{{reason}} {{last}}"
"""


def kinds(outcomes: Sequence[Outcome]) -> list[str]:
    """Event names, and questions as ?reason."""
    shown = {Event: lambda o: json.loads(o.payload)["event"], Question: lambda o: "?" + o.reason}
    return [shown[type(o)](o) if type(o) in shown else "ignored" for o in outcomes]


def test_a_condition_gives_an_event_and_a_question_at_once() -> None:
    freezers = router(FREEZER)
    assert freezers.filters == ("sensors/+/temperature",)
    assert freezers.reading("sensors/left/temperature", b"-20", 0.0) == []
    event, question = freezers.reading("sensors/left/temperature", b"-12.5", 60.0)
    assert isinstance(event, Event)
    assert event.topic == "alarms/left"
    content = json.loads(event.payload)
    assert (content["event"], content["sensor"], content["at"]) == ("condition", "left", 1_700_000_000.25)
    assert content["statistics"]["last"] == -12.5
    assert isinstance(question, Question)
    assert question.answer_topic == "explanations/left"
    system, user = question.request.messages
    assert (system.role, system.content) == ("system", "You watch freezers.")
    assert user.content == (
        "Freezer left, condition: 2 readings in 60 s, minimum -20, mean -16.25, maximum -12.5, last -12.5, "
        "trend 450 per hour, 0 gaps (longest pause 60 s), last reading 0 s ago. "
        "Latest: -20 (60 s ago), -12.5 (0 s ago)."
    )
    assert question.request.max_tokens == 80
    assert question.request.response_format is not None
    assert parse_request(question.request.to_json()) == question.request


def test_instructions_come_first_in_a_plain_prompt() -> None:
    (_, question) = router(FREEZER, plain=True).reading("sensors/a/temperature", b"1", 0.0)
    assert isinstance(question, Question)
    assert question.request.prompt is not None
    assert question.request.prompt.startswith("You watch freezers.\n\nFreezer a, condition: ")


def test_hysteresis_keeps_a_value_at_the_threshold_quiet() -> None:
    freezers = router(FREEZER)
    outcomes = [
        kinds(freezers.reading("sensors/a/temperature", str(value).encode(), 10.0 * step))
        for step, value in enumerate([-14, -16, -14, -16, -18, -16, -14])
    ]
    assert outcomes == [["condition", "?condition"], [], [], [], ["cleared"], [], ["condition"]]


def test_without_clear_the_condition_ends_when_it_no_longer_holds() -> None:
    one = router(variant(when="'last > `5`'", min_interval_s=0))
    outcomes = [
        kinds(one.reading("s/a", value, float(step))) for step, value in enumerate([b"6", b"7", b"5", b"6"])
    ]
    assert outcomes == [["condition", "?condition"], [], ["cleared"], ["condition", "?condition"]]


def test_questions_keep_the_minimum_interval_and_events_do_not() -> None:
    one = router(variant(when="'last > `5`'", min_interval_s=100))
    one.reading("s/a", b"6", 0.0)
    one.reading("s/a", b"1", 10.0)
    assert kinds(one.reading("s/a", b"7", 20.0)) == ["condition"]
    one.reading("s/a", b"8.5", 30.0)
    assert one.next_due() == 100.0
    assert one.tick(99.0) == []
    (question,) = one.tick(100.0)
    assert isinstance(question, Question)
    assert question.request.messages[-1].content == "condition 8.5"
    assert one.tick(500.0) == []


def test_regular_questions_come_at_their_interval_and_missed_ones_are_skipped() -> None:
    one = router(variant(every_s=60, min_interval_s=0))
    assert kinds(one.reading("s/a", b"1", 0.0)) == []
    assert one.next_due() == 60.0
    assert kinds(one.tick(60.0)) == ["?regular"]
    assert one.next_due() == 120.0
    one.reading("s/a", b"2", 305.0)
    assert one.tick(305.0) == []
    assert one.next_due() == 360.0


def test_there_are_no_regular_questions_about_an_empty_window() -> None:
    one = router(variant(every_s=60).replace("max_sensors", "window = {seconds = 30}\nmax_sensors"))
    one.reading("s/a", b"1", 0.0)
    assert one.tick(60.0) == []


def test_a_silence_and_its_end_are_reported_once() -> None:
    one = router(variant(silence_s=30, min_interval_s=0))
    one.reading("s/a", b"1", 0.0)
    assert one.next_due() == 30.0
    assert one.tick(29.9) == []
    assert kinds(one.tick(30.0)) == ["silence", "?silence"]
    assert one.tick(1000.0) == []
    assert kinds(one.reading("s/a", b"1", 1001.0)) == ["back"]
    assert kinds(one.tick(1031.0)) == ["silence", "?silence"]


@pytest.mark.parametrize("silence_s", [600.1, 1.3])
def test_a_silence_is_reported_exactly_when_it_is_due(silence_s: float) -> None:
    for start in (1_700_000_000.123 + 0.37 * step for step in range(200)):  # sums are rounded at this size
        one = router(variant(silence_s=silence_s))
        one.reading("s/a", b"1", start)
        assert kinds(one.tick(one.next_due())) == ["silence", "?silence"]


def test_no_sensor_is_silent_while_readings_cannot_arrive() -> None:
    one = router(variant(silence_s=30))
    one.reading("s/a", b"1", 0.0)
    one.listen(math.inf)
    assert (one.next_due(), one.tick(1000.0)) == (math.inf, [])
    one.listen(1000.0)
    assert one.next_due() == 1030.0
    assert one.tick(1029.0) == []
    one.reading("s/b", b"1", 1020.0)
    assert kinds(one.tick(1030.0)) == ["silence", "?silence"]
    assert one.next_due() == 1050.0


def restarted(one: Router, toml: str, now: float) -> Router:
    again = router(toml)
    again.recall(one.known(), now)
    return again


def test_a_sensor_that_does_not_come_back_after_a_restart_is_silent() -> None:
    toml = variant(silence_s=30, min_interval_s=0)
    one = router(toml)
    one.reading("s/a", b"1", 0.0)
    again = restarted(one, toml, 100.0)
    assert again.next_due() == 130.0
    assert kinds(again.tick(130.0)) == ["silence", "?silence"]
    third = restarted(again, toml, 10.0)  # a silence is reported again
    assert kinds(third.tick(40.0)) == ["silence", "?silence"]
    assert kinds(third.reading("s/a", b"1", 50.0)) == ["back"]
    assert kinds(restarted(again, toml, 10.0).reading("s/a", b"1", 11.0)) == ["back"]
    assert kinds(restarted(third, toml, 10.0).reading("s/a", b"1", 11.0)) == []


def test_after_a_restart_an_alarm_is_cleared_or_reported_again() -> None:
    one = router(FREEZER)
    one.reading("sensors/a/temperature", b"-10", 0.0)
    for values, expected in {
        (b"-18",): [["cleared"]],
        (b"-16", b"-18", b"-18"): [[], ["cleared"], []],
        (b"-16", b"-14", b"-14"): [[], ["condition", "?condition"], []],
        (b"-10", b"-18"): [["condition", "?condition"], ["cleared"]],
    }.items():
        again = restarted(restarted(one, FREEZER, 0.0), FREEZER, 0.0)
        at = enumerate(values)
        assert [kinds(again.reading("sensors/a/temperature", value, now)) for now, value in at] == expected


def test_a_restart_forgets_removed_routes_and_sensors_silent_for_a_day() -> None:
    one = router(variant(silence_s=30))
    now = 1_700_000_000.25  # the wall clock of `router`
    one.recall(
        [
            Known("gone", "s/a", True, None),
            Known("r", "elsewhere", True, None),
            Known("r", "s/old", False, now - 86_400),
            Known("r", "s/later", False, now + 1e6),
            *(Known("r", f"s/{number}", False, now - 86_000) for number in range(9)),
        ],
        0.0,
    )
    assert [known.topic for known in one.known()] == ["s/later", "s/0", "s/1", "s/2"]


def test_a_question_about_a_long_silence_has_no_readings() -> None:
    one = router(variant(silence_s=7200).replace("{reason} {last}", "{statistics}; {last}; {age}"))
    one.reading("s/a", b"1", 0.0)
    question = one.tick(7200.0)[-1]
    assert isinstance(question, Question)
    assert question.request.messages[-1].content == "no readings for 7200 s; unknown; 7200"


@pytest.mark.parametrize("min_interval_s", [0, 3600])
def test_a_postponed_question_is_asked_again_with_newer_statistics(min_interval_s: int) -> None:
    one = router(variant(when="'last > `5`'", min_interval_s=min_interval_s))
    question = one.reading("s/a", b"6", 0.0)[-1]
    assert isinstance(question, Question)
    one.postpone(question, until=5.0)
    assert kinds(one.reading("s/a", b"9", 4.0)) == []
    (again,) = one.tick(5.0)
    assert isinstance(again, Question)
    assert again.request.messages[-1].content == "condition 9"
    assert again.request.id != question.request.id


def test_jmespath_finds_values_and_conditions_in_json() -> None:
    one = router(
        """
[[route]]
name = "air"
topics = ["air/+/state", "outside"]
value = "co2.ppm"
event_topic = "alarm"
[route.trigger]
when = "last > `1000` && payload.window == 'shut'"
"""
    )
    shut = b'{"co2":{"ppm":1200},"window":"shut"}'
    assert kinds(one.reading("air/room/state", b'{"co2":{"ppm":1200},"window":"open"}', 0.0)) == []
    assert kinds(one.reading("air/room/state", shut, 1.0)) == ["condition"]
    (event,) = one.reading("outside", shut, 2.0)
    assert isinstance(event, Event)
    assert json.loads(event.payload)["sensor"] == "outside"


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "not a number: ''"),
        (b"12 C", "not a number: '12 C'; parse_text = true in the route reads it"),
        (b"nan", "the value is nan; a reading must be a finite number"),
        (b"-inf", "the value is too large; a reading must be a finite number"),
        (b"1e999", "the value is too large; a reading must be a finite number"),
        (b"1_000", "not a number"),
        ("\N{ARABIC-INDIC DIGIT THREE}".encode(), "not a number"),
        (b"\xff\xfe", "not a number"),
        (b"1" * 9000, "more than 8192 bytes"),
    ],
)
def test_a_payload_without_a_number_is_ignored_with_a_reason(payload: bytes, why: str) -> None:
    (ignored,) = router(variant(every_s=60)).reading("s/a", payload, 0.0)
    assert isinstance(ignored, Ignored)
    assert ignored.why.startswith(why)


@pytest.mark.parametrize(
    "payload", [b"{}", b'{"v":"1"}', b'{"v":true}', b'{"v":null}', b'{"v":NaN}', b"[1]", b"{" * 5000]
)
def test_json_without_a_number_is_ignored(payload: bytes) -> None:
    one = router(variant(every_s=60).replace("max_sensors", 'value = "v"\nmax_sensors'))
    assert kinds(one.reading("s/a", payload, 0.0)) == ["ignored"]


def test_a_condition_that_fails_on_a_payload_keeps_the_reading() -> None:
    one = router(variant(when="'length(topic) > `1` && abs(payload) > `3`'", min_interval_s=0))
    assert kinds(one.reading("s/a", b"4", 0.0)) == ["condition", "?condition"]
    bad = router(variant(when="'length(last) > `1`'", every_s=60, min_interval_s=0))
    (ignored,) = bad.reading("s/a", b"4", 0.0)
    assert isinstance(ignored, Ignored)
    assert ignored.why.startswith("trigger: ")
    assert kinds(bad.tick(60.0)) == ["?regular"]


@pytest.mark.parametrize(
    "payload", [b'{"v":6,"level":"low"}', b'{"v":6,"level":null}', b'{"v":6,"level":[]}']
)
def test_a_text_compared_with_a_number_does_not_hold_and_blocks_no_other_alarm(payload: bytes) -> None:
    json_of = "max_sensors", 'value = "v"\nmax_sensors'
    level = variant(when="'payload.level < `20` || last > `5`'").replace(*json_of)
    odd = variant(when="'contains(payload.text, last)'").replace(*json_of).replace('"r"', '"odd"')
    both = router(odd + level)
    assert kinds(both.reading("s/a", payload, 0.0)) == ["ignored", "condition", "?condition"]
    odd_text = payload.replace(b"{", b'{"text":"12.1 bar",')
    assert kinds(router(odd + level).reading("s/a", odd_text, 0.0)) == ["ignored", "condition", "?condition"]


@pytest.mark.parametrize("expression", ["floor(to_number(v))", "merge(v, @)", "to_number(v)"])
def test_a_value_that_jmespath_fails_on_is_ignored(expression: str) -> None:
    one = router(variant(every_s=60).replace("max_sensors", f'value = "{expression}"\nmax_sensors'))
    for text in ("nan", "inf", "1" + 400 * "0", "12.1 bar", ""):
        assert kinds(one.reading("s/a", json.dumps({"v": text}).encode(), 0.0)) == ["ignored"]


@pytest.mark.parametrize("topic", ["", "a/+", "a/#", "a\0b", "x" * 300])
def test_readings_with_invalid_topics_are_ignored(topic: str) -> None:
    assert kinds(router(variant(every_s=60)).reading(topic, b"1", 0.0)) == ["ignored"]


def test_a_flood_of_new_sensors_neither_grows_memory_nor_displaces_known_sensors() -> None:
    one = router(variant(when="'last > `5`'", min_interval_s=0))
    for name in "abcd":
        one.reading(f"s/{name}", b"1", 0.0)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(20_000):
        assert kinds(one.reading(f"s/{number}", b"1", 1.0)) == ["ignored"]
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 500_000
    assert kinds(one.reading("s/a", b"6", 2.0)) == ["condition", "?condition"]


def test_a_sensor_silent_for_a_day_makes_room() -> None:
    one = router(variant(every_s=60))
    for name in "abcd":
        one.reading(f"s/{name}", b"1", 0.0)
    assert kinds(one.reading("s/new", b"1", 80_000.0)) == ["ignored"]
    assert kinds(one.reading("s/new", b"1", 86_400.0)) == []


def test_one_reading_serves_all_routes_that_match() -> None:
    two = FREEZER + FREEZER.replace('"freezers"', '"second"').replace("sensors/+/temperature", "sensors/#")
    outcomes = router(two).reading("sensors/a/temperature", b"0", 0.0)
    assert [o.route for o in outcomes] == ["freezers", "freezers", "second", "second"]
    assert [o.topic for o in outcomes if isinstance(o, Event)] == ["alarms/a", "alarms/a/temperature"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "freezers"', 'name = "a b"', "route[0].name is not valid"),
        ('name = "freezers"\n', "", "route[0].name is missing"),
        ('"sensors/+/temperature"', '"sensors/a+/x"', "route[0].topics[0] is 'sensors/a+/x'"),
        ('"sensors/+/temperature"', '"#/x"', "route[0].topics[0] is '#/x'"),
        ('"sensors/+/temperature"', "5", "route[0].topics[0] is a number; allowed: a string"),
        ("readings = 10", "readings = 0", "route[0].window.readings is 0"),
        ("readings = 10", "redings = 0", "route[0].window has the unknown key 'redings'"),
        ("readings = 10", "readings = 9999", "route[0].max_sensors is 64 with a window of 9999"),
        ('when = "last > `-15`"', 'when = "last\\u0085"', r"Unknown token \x85:; write numbers in backticks"),
        ('when = "last > `-15`"', 'when = "last > -15"', "route[0].trigger.when is not JMESPath"),
        ('when = "last > `-15`"\n', "", "route[0].trigger never triggers"),
        ('when = "last > `-15`"', "silence_s = 9", "route[0].trigger.clear needs trigger.when"),
        (
            '"last > `-15`"',
            f'"{"(" * 5000}"',
            "route[0].trigger.when is not JMESPath: maximum recursion depth",
        ),
        ("min_interval_s = 300", "min_interval_s = -1", "route[0].trigger.min_interval_s is -1"),
        ("{readings}", "{reading}", "route[0].ask.question has the unknown field 'reading'"),
        ("{readings}", "{readings.__class__}", "route[0].ask.question has the unknown field"),
        ("{readings}", "{readings:99999}", "route[0].ask.question has the unknown field"),
        ("{readings}", "{readings", "route[0].ask.question: expected '}'"),
        ("max_tokens = 80", "max_tokens = 0", "route[0].ask.max_tokens is 0"),
        (
            'type = "object"',
            "type = 1979-05-27",
            "route[0].ask.schema is not a JSON schema: it has a value that JSON",
        ),
        (
            'type = "object"',
            "minimum = -inf",
            "route[0].ask.schema is not a JSON schema: it has a value that JSON",
        ),
        (
            'type = "object"',
            f"{'not.' * 40}type = 1",
            "route[0].ask.schema is not a JSON schema: nested deeper",
        ),
        ('"alarms/{sensor}"', '"alarms/+"', "route[0].event_topic is 'alarms/+'"),
        ('"alarms/{sensor}"', '"sensors/{sensor}/temperature"', "which route freezers reads"),
        (
            'answer_topic = "explanations/{sensor}"\n',
            "",
            "route[0].ask and answer_topic are only valid together",
        ),
    ],
)
def test_a_wrong_key_is_named_with_what_is_allowed(old: str, new: str, message: str) -> None:
    assert old in FREEZER
    with pytest.raises(ConfigError) as caught:
        router(FREEZER.replace(old, new))
    assert message in str(caught.value)
    assert str(caught.value).startswith("route[0]")
    assert "\n" not in str(caught.value)


def documented() -> Router:
    """The routes of docs/routes.md."""
    guide = (Path(__file__).parents[2] / "docs" / "routes.md").read_text()
    return router("\n".join(re.findall(r"^```toml\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)))


def test_the_documented_routes_are_accepted_and_fire() -> None:
    routes = documented()
    assert kinds(routes.reading("stat/well/POWER", b"ON", 0.0)) == ["condition"]
    assert kinds(routes.reading("stat/well/POWER", b"OFF", 1.0)) == ["cleared"]
    window = b'{"contact":false,"battery":87}'
    assert kinds(routes.reading("zigbee2mqtt/kitchen", window, 2.0)) == ["condition"]
    assert kinds(routes.reading("sensors/left/temperature", b"-16", 3.0)) == []
    assert kinds(routes.reading("sensors/left/temperature", b"-12", 4.0)) == ["condition", "?condition"]


def test_a_route_that_publishes_nothing_is_refused() -> None:
    silent = FREEZER[: FREEZER.index("[route.ask]")].replace('event_topic = "alarms/{sensor}"\n', "")
    with pytest.raises(ConfigError, match=r"route\[0\] publishes nothing; it needs event_topic, or ask"):
        router(silent.replace('answer_topic = "explanations/{sensor}"\n', ""))


def test_two_routes_with_the_same_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"route\[1\]\.name is 'freezers', the name of another route"):
        router(FREEZER + FREEZER)


def test_an_answer_is_published_with_the_names_of_its_question() -> None:
    question = router(FREEZER).reading("sensors/a/temperature", b"0", 0.0)[-1]
    assert isinstance(question, Question)
    usage, timings = Usage(1, 0, 0, 1), Timings(0, 0, 0, 0)
    final = Final(question.request.id, '{"cause":"door"}', "stop", usage, timings)
    content = json.loads(answer_payload(question, final))
    assert (content["sensor"], content["reason"], content["answer"]) == ("a", "condition", {"cause": "door"})
    free = Final(question.request.id, "The door.", "length", usage, timings)
    assert json.loads(answer_payload(question, free))["answer"] == "The door."
    failed = Failure(question.request.id, "busy", "later")
    assert json.loads(answer_payload(question, failed))["error"] == {"code": "busy", "message": "later"}


def test_conditions_know_every_statistic() -> None:
    assert tuple(field.name for field in fields(Statistics)) == STATISTICS
    for name in CONDITION_NAMES:
        one = router(variant(when=f"'{name} == {name}'"))
        assert kinds(one.reading("s/a", b"1", 0.0))[0] == "condition"


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("lats > `1`", "uses the unknown name 'lats'; did you mean last? known: count, minimum, mean, "),
        ("last > `1` && !pay", "uses the unknown name 'pay'; did you mean payload? known: "),
        ("[last, max][0] > `1`", "uses the unknown name 'max'; did you mean maximum? known: "),
        ("@.lats > `1`", "uses the unknown name 'lats'"),
        ("@ | [last, lats]", "uses the unknown name 'lats'"),
        ("abs(lats) > `1`", "uses the unknown name 'lats'"),
        ("max_by([lats], &x)", "uses the unknown name 'lats'"),
        ("{a: lats}.a", "uses the unknown name 'lats'"),
        ("asb(last) > `1`", "calls the unknown function 'asb'; did you mean abs? known: abs, avg, "),
        ("payload[?asb(x)]", "calls the unknown function 'asb'"),
        ("abs(last, mean) > `1`", "calls abs with 2 arguments; it takes 1"),
        ("not_null()", "calls not_null with 0 arguments; it takes at least 1"),
        ("last.value > `1`", "looks for a field in last, which is a single value"),
        ("payload.v > `1`", "looks for a field in payload, which is a single value"),
    ],
)
@pytest.mark.parametrize("key", ["when", "clear"])
def test_a_condition_that_could_never_hold_is_refused(key: str, condition: str, message: str) -> None:
    changes = {"when": "'last > `1`'"} | {key: f"'{condition}'"}
    with pytest.raises(ConfigError) as caught:
        router(variant(**changes))
    assert str(caught.value).startswith(f"route[0].trigger.{key} {message}")


@pytest.mark.parametrize(
    "condition",
    [
        "payload.temperature.inside > `1`",
        "payload.rooms[0].windows[?open].count > `1`",
        "length(payload.rooms[?floor > `1`]) > `1`",
        "payload | inside > `1`",
        "max_by(payload.rooms, &celsius).celsius > `1`",
        "payload.*.celsius | [0] > last",
        "payload.[a, b][0] > `1`",
        "payload.rooms[].celsius | [0]",
        "payload.rooms[0:2].celsius | [0]",
        "not_null(payload.a, payload.b, last) > `1`",
        "@.last > `1`",
        "sensor == 'left' || starts_with(topic, 's/')",
    ],
)
def test_fields_of_a_json_payload_are_not_restricted(condition: str) -> None:
    toml = variant(when=f"'''{condition}'''").replace("max_sensors", 'value = "v"\nmax_sensors')
    assert router(toml).filters == ("s/#",)


def test_a_condition_that_is_nested_too_deeply_is_refused() -> None:
    for depth in (10, 100):
        assert kinds(router(variant(when=f"'{'!!' * depth}last'")).reading("s/a", b"1", 0.0))
    with pytest.raises(ConfigError, match="is not JMESPath: maximum recursion depth"):
        router(variant(when=f"'{'!!' * 2000}last'"))


def parsed(payload: bytes, value: str = "") -> float | str:
    """The reading in a payload with `parse_text`, or why it is ignored; `value` is the route's."""
    lines = f'parse_text = true\nvalue = "{value}"\n' if value else "parse_text = true\n"
    one = router(variant(when="'count > `0`'").replace("max_sensors", f"{lines}max_sensors"))
    outcome = one.reading("s/a", payload, 0.0)[0]
    if isinstance(outcome, Ignored):
        return outcome.why
    assert isinstance(outcome, Event)
    return float(json.loads(outcome.payload)["statistics"]["last"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-12.5", -12.5),
        ('"-12.5"', -12.5),
        ("-12,5", -12.5),
        ("-12.5 °C", -12.5),
        ("-12,5°C", -12.5),
        ("\N{MINUS SIGN}3 K", -3.0),
        ('" 7 %"', 7.0),
        ("1.5e3 W/m2", 1500.0),
        ("12 m³/h", 12.0),
        ("20 µg/m3", 20.0),
        ("4.5 kΩ", 4.5),
        (",5", 0.5),
        ("5.", 5.0),
        ("+3", 3.0),
        ("ON", 1.0),
        ("off", 0.0),
        ("true", 1.0),
        ('"False"', 0.0),
        ("yes", 1.0),
        ("No", 0.0),
    ],
)
def test_parse_text_reads_numbers_in_text_and_words(text: str, number: float) -> None:
    assert parsed(text.encode()) == number
    assert parsed(json.dumps({"v": text}).encode(), "v") == number


def test_parse_text_reads_json_booleans_json_numbers_and_latin_1() -> None:
    assert parsed(b'{"v":true}', "v") == 1.0
    assert parsed(b'{"v":false}', "v") == 0.0
    assert parsed(b'{"v":-12.5}', "v") == -12.5
    assert parsed(b"21,5 \xb0C") == 21.5


OTHER_TEXT = [
    *("", '"', '""', "-", "on fire", "12:30", "2026-11-25", "192.168.1.1", "1.234,5", "1,234.5", "1 000"),
    *("12 V 3 A", "0x1F", "3 _", "\N{ARABIC-INDIC DIGIT THREE}", "1_000", "5 \x1b[2J", "1e999"),
]


@pytest.mark.parametrize("text", OTHER_TEXT)
def test_parse_text_ignores_other_text(text: str) -> None:
    assert isinstance(parsed(text.encode()), str)
    assert isinstance(parsed(json.dumps({"v": text}).encode(), "v"), str)


@pytest.mark.parametrize("payload", [b'{"v":"-12,5"}', b'{"v":true}'])
def test_without_parse_text_the_option_is_named(payload: bytes) -> None:
    one = router(variant(every_s=60).replace("max_sensors", 'value = "v"\nmax_sensors'))
    (ignored,) = one.reading("s/a", payload, 0.0)
    assert isinstance(ignored, Ignored)
    assert ignored.why.endswith(", not a number; parse_text = true in the route reads it")


@given(st.text(max_size=20))
def test_parse_text_reads_any_text_as_a_finite_number_or_ignores_it(text: str) -> None:
    result = parsed(text.encode(errors="surrogatepass"))
    assert isinstance(result, str) or math.isfinite(result)


def test_a_recording_shows_events_and_questions_with_their_times() -> None:
    routes = parse_routes(tomllib.loads(variant(silence_s=30, every_s=100, min_interval_s=0))["route"])
    recording = ["1000.5 s/a 1\n", "1010.5 s/a 2 C\n", "\n", "1200.5 s/b 3\n"]
    replay = Replay(routes, "x.txt")
    shown = [(time, kinds([outcome])[0]) for time, outcome in replay.play(recording)]
    assert shown == [
        (1010.5, "ignored"),
        (1030.5, "silence"),
        (1030.5, "?silence"),
        (1100.5, "?regular"),
    ]
    assert replay.used
    assert replay.summary() == (
        "x.txt: 3 of 3 lines match a route\n  r: 3 readings, 1 ignored, 1 events, 2 questions"
    )


@pytest.mark.parametrize(
    ("recording", "code", "summary"),
    [
        ("5 s/a 1\n", 0, "1 of 1 lines match a route\n  r: 1 readings, 0 ignored, 0 events, 0 questions\n"),
        ("5 t/a 1\n6 t/b 2\n", 1, "0 of 2 lines match a route\n  r: 0 readings, 0 ignored, "),
        ("5 s/a warm\n", 1, "1 of 1 lines match a route\n  r: 1 readings, 1 ignored, "),
        ("", 1, "0 of 0 lines match a route\n  r: 0 readings, "),
    ],
)
def test_a_replay_counts_the_lines_that_match(
    tmp_path: Path, recording: str, code: int, summary: str
) -> None:
    (tmp_path / "edge.toml").write_text(f'bundle = "b"\n[mqtt]\n{variant(every_s=60)}')
    (tmp_path / "readings.txt").write_text(recording)
    arguments = ["routes", "test", "--config", str(tmp_path / "edge.toml"), str(tmp_path / "readings.txt")]
    result = CliRunner().invoke(daemon, arguments)
    assert result.exit_code == code
    assert result.stderr.startswith(f"{tmp_path / 'readings.txt'}: {summary}")


def test_a_replay_prints_events_questions_and_ignored_readings(tmp_path: Path) -> None:
    toml = variant(when="'last > `5`'")
    (tmp_path / "edge.toml").write_text(f'bundle = "b"\n[mqtt]\n{toml}')
    (tmp_path / "readings.txt").write_text("5 s/a 6\n6 s/b warm\n7 s/+ 1\n")
    arguments = ["routes", "test", "--config", str(tmp_path / "edge.toml"), str(tmp_path / "readings.txt")]
    result = CliRunner().invoke(daemon, arguments)
    assert result.exit_code == 0, result.stderr
    event, question, prompt, unusable, topic = result.stdout.splitlines()
    assert event.startswith('1970-01-01 00:00:05.000 event    events {"route":"r","sensor":"a",')
    assert question == "1970-01-01 00:00:05.000 question s/a by route r, condition; answer to answers"
    assert prompt == "    condition 6"
    assert unusable == "1970-01-01 00:00:06.000 ignored  s/b by route r: not a number: 'warm'"
    assert topic.startswith("1970-01-01 00:00:07.000 ignored  's/+': not a valid topic")


def test_a_replay_needs_a_route(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text('bundle = "b"\n[mqtt]\n')
    result = CliRunner().invoke(daemon, ["routes", "test", "--config", str(tmp_path / "edge.toml"), "-"])
    assert (result.exit_code, result.stderr) == (
        5,
        f"Error: {tmp_path / 'edge.toml'}: there is no [[route]] to test\n",
    )


@pytest.mark.parametrize("line", ["abc s/a 1", "1000", "1000 s/a", "12 s/a 1"])
def test_a_line_that_is_not_a_reading_is_named(line: str) -> None:
    routes = parse_routes(tomllib.loads(variant(every_s=100))["route"])
    with pytest.raises(EdgeError, match=r"^x\.txt:2: "):
        list(Replay(routes, "x.txt").play(["500 s/a 1", line]))


values = st.floats(allow_nan=False, allow_infinity=False)


@given(
    readings=st.lists(st.tuples(st.floats(0, 1000), values), max_size=60),
    most=st.integers(1, 40),
    seconds=st.floats(1, 5000),
)
def test_statistics_are_those_of_the_readings_in_the_window(
    readings: list[tuple[float, float]], most: int, seconds: float
) -> None:
    window = Window(most, seconds)
    now, kept = 0.0, []
    for pause, value in readings:
        now += pause
        window.add(now, value)
        kept.append((now, value))
    kept = [(t, v) for t, v in kept[-most:] if t >= now - seconds]
    found = window.statistics(now)
    if not kept:
        assert found is None
        return
    assert found is not None
    numbers = [v for _, v in kept]
    assert (found.count, found.minimum, found.maximum) == (len(kept), min(numbers), max(numbers))
    assert (found.last, found.age_s, found.span_s) == (numbers[-1], 0.0, kept[-1][0] - kept[0][0])
    assert found.minimum <= found.mean <= found.maximum
    rounding = 1e-9 * max(map(abs, numbers)) + sys.float_info.min  # the terms below can underflow
    assert found.mean == pytest.approx(math.fsum(v / len(numbers) for v in numbers), rel=1e-9, abs=rounding)
    assert window.latest(5) == kept[-5:]


@given(st.floats(-1e6, 1e6), st.floats(-100, 100), st.integers(2, 50), st.floats(0.5, 600))
def test_the_trend_of_a_straight_line_is_its_slope(
    start: float, slope: float, count: int, step: float
) -> None:
    window = Window(100, 1e6)
    for index in range(count):
        window.add(index * step, start + slope * index * step / 3600)
    found = window.statistics(count * step)
    assert found is not None
    assert found.trend == pytest.approx(slope, rel=1e-6, abs=1e-9 * abs(start) * 3600 / step + 1e-9)


def test_gaps_are_pauses_of_more_than_three_times_the_median_interval() -> None:
    window = Window(100, 1e6)
    for time in [0, 10, 20, 30, 61, 70, 80, 180, 190]:
        window.add(time, 1.0)
    found = window.statistics(200.0)
    assert found is not None
    assert (found.gaps, found.longest_pause_s, found.age_s) == (2, 100.0, 10.0)


def test_a_window_holds_32_bytes_a_reading_at_most() -> None:
    window = Window(1000, 1e9)
    for index in range(50_000):
        window.add(float(index), 1.0)
    assert len(window) == 1000
    buffers = [value for value in vars(window).values() if isinstance(value, np.ndarray)]
    assert sum(buffer.nbytes for buffer in buffers) <= 32_000


@pytest.mark.parametrize(
    ("text", "topic", "wild"),
    [
        ("a/b", "a/b", ()),
        ("a/b", "a/b/c", None),
        ("a/+", "a/", ("",)),
        ("+/+", "/finance", ("", "finance")),
        ("+", "/finance", None),
        ("a/#", "a", ()),
        ("a/#", "a/b/c", ("b/c",)),
        ("a/#", "ab", None),
        ("#", "a/b", ("a/b",)),
        ("#", "$SYS/x", None),
        ("+/x", "$SYS/x", None),
        ("$SYS/#", "$SYS/x", ("x",)),
        ("a.c/+/d", "abc/x/d", None),
        ("a/+/c/#", "a/b/c", ("b",)),
    ],
)
def test_topic_filters_match_as_mqtt_specifies(text: str, topic: str, wild: tuple[str, ...] | None) -> None:
    assert TopicFilter(text).match(topic) == wild


filters = st.lists(st.sampled_from(["a", "b", "+", "#", "$c"]), min_size=1, max_size=4).map(
    lambda levels: "/".join(
        "+" if level == "#" and place < len(levels) - 1 else level for place, level in enumerate(levels)
    )
)
topics = st.lists(st.sampled_from(["a", "b", "x", "", "$c"]), min_size=1, max_size=5).map("/".join)


@given(st.lists(filters, max_size=6), topics)
def test_disjoint_filters_match_the_same_topics_and_none_twice(given_ones: list[str], topic: str) -> None:
    matches = [one for one in disjoint(given_ones) if TopicFilter(one).match(topic) is not None]
    assert len(matches) <= 1
    if any(TopicFilter(one).match(topic) is not None for one in given_ones):
        assert matches


def test_filters_that_do_not_overlap_stay_as_they_are() -> None:
    assert disjoint(["s/+/t", "s/+/u", "s/a/#"]) == ("s/+/#",)
    assert disjoint(["s/+/t", "s/+/u", "s", "$SYS/#"]) == ("s/+/t", "s/+/u", "s", "$SYS/#")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["s/a", "s/b", "s/c", "s/d", "s/e", "t"]),
            st.one_of(values.map(lambda v: repr(v).encode()), st.binary(max_size=12)),
            st.floats(0, 4000),
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_for_any_readings_questions_keep_their_interval_and_output_is_valid(
    messages: list[tuple[str, bytes, float, bool]],
) -> None:
    one = router(variant(when="'last > `5` || trend < `-1`'", every_s=700, silence_s=900, min_interval_s=250))
    now = 0.0
    asked: dict[str, float] = {}
    for topic, payload, pause, tick in messages:
        now += pause
        outcomes = one.reading(topic, payload, now) + (one.tick(now) if tick else [])
        for outcome in outcomes:
            if isinstance(outcome, Question):
                assert now - asked.get(outcome.topic, -math.inf) >= 250
                asked[outcome.topic] = now
                assert parse_request(outcome.request.to_json()) == outcome.request
            elif isinstance(outcome, Event):
                json.loads(outcome.payload)
        if tick:
            assert one.next_due() > now
