"""`[[route]]` tables of the configuration: which readings are taken, and when they lead to what.

[[route]]
name = "freezers"
topics = ["sensors/+/temperature"]       # {sensor} is what the wildcards match
value = "celsius"                        # JMESPath into a JSON payload; without it the payload is the number
parse_text = true                        # also read "-12.5", -12,5, -12.5 °C, on and off
window = { readings = 120, seconds = 7200 }
event_topic = "alarms/{sensor}"          # published at once, without the model
answer_topic = "explanations/{sensor}"   # the model's answer

[route.trigger]                          # at least one of every_s, when and silence_s
every_s = 3600
when = "last > `-15` && trend > `0`"     # JMESPath on the statistics, payload, sensor and topic
clear = "last < `-17`"                   # hysteresis: ends the condition; by default when it no longer holds
silence_s = 600
min_interval_s = 300                     # between two questions about a sensor; events are never delayed

[route.ask]                              # also takes fields of a request
instructions = "You watch the freezers of a kitchen. ..."   # constant, so its KV cache is reused
question = "Freezer {sensor}, {reason}: {statistics}. Latest: {readings}."
limit = { above = -15 }                  # for the fields {limit} and {notes}
max_tokens = 120
[route.ask.schema]                       # JSON schema of the answer
type = "object"
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jmespath.parser import ParsedResult

from edge.errors import ConfigError
from edge.protocol import checks, strict_json
from edge.protocol.checks import FieldError
from edge.protocol.request_fields import CHECKS, MAX_REQUEST_BYTES
from edge.protocol.strict_json import StrictJsonError, printable
from edge.protocol.topic_filter import TopicFilter
from edge.routes.expressions import ExpressionError, compile_expression
from edge.routes.notes import Limit

MAX_ROUTES = 64
MAX_READINGS_HELD = 500_000  # by all sensors of a route together, 16 MB
MAX_TOPIC_BYTES = 256

TOPIC_FIELDS = ("sensor",)
QUESTION_FIELDS = (
    *("sensor", "topic", "reason", "statistics", "readings", "notes", "limit", "payload"),
    *("count", "minimum", "mean", "maximum", "last", "trend", "gaps", "age"),
)
STATISTICS = (
    *("count", "minimum", "mean", "maximum", "last", "trend", "gaps", "longest_pause_s", "span_s", "age_s"),
)
CONDITION_NAMES = (*STATISTICS, "sensor", "topic", "payload")
ASK_KEYS = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "reasoning", "deadline_ms")
ROUTE_KEYS = (
    *("name", "topics", "value", "parse_text", "window", "max_sensors"),
    *("event_topic", "answer_topic", "trigger", "ask"),
)
TRIGGER_KEYS = ("every_s", "when", "clear", "silence_s", "min_interval_s")


@dataclass(frozen=True)
class Trigger:
    """When a route acts; times are in seconds, conditions are compiled."""

    every_s: float | None
    when: ParsedResult | None
    clear: ParsedResult | None
    silence_s: float | None
    min_interval_s: float


@dataclass(frozen=True)
class Ask:
    """A route's questions: constant `instructions`, a `question` template, and fields of the request.

    `limit` is for the template fields `{limit}` and `{notes}`. `state` is a template over the fields of a
    JSON answer, for Home Assistant; None shows the first field.
    """

    instructions: str
    question: str
    limit: Limit | None = None
    state: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """One `[[route]]` table, checked. Either `event_topic`, or `ask` and `answer_topic`, can be None."""

    name: str
    topics: tuple[TopicFilter, ...]
    value: ParsedResult | None
    parse_text: bool
    window_readings: int
    window_seconds: float
    max_sensors: int
    event_topic: str | None
    answer_topic: str | None
    trigger: Trigger
    ask: Ask | None


def parse_routes(tables: Sequence[Any]) -> tuple[Route, ...]:
    """Check the `[[route]]` tables of a parsed TOML file.

    Raises ConfigError; its message starts with the path of the wrong key, e.g. `route[0].trigger.when`.
    """
    try:
        checked = checks.array("route", list(tables), MAX_ROUTES)
        routes = tuple(_route(f"route[{index}]", table) for index, table in enumerate(checked))
        _check_names(routes)
        _check_loops(routes)
    except FieldError as error:
        raise ConfigError(str(error)) from None
    return routes


def _route(path: str, value: Any) -> Route:
    table = checks.mapping(path, value, ROUTE_KEYS, ("name", "topics", "trigger"))
    window = checks.mapping(f"{path}.window", table.get("window", {}), ("readings", "seconds"))
    readings = checks.integer(1, 10_000)(f"{path}.window.readings", window.get("readings", 120))
    sensors = checks.integer(1, 10_000)(f"{path}.max_sensors", table.get("max_sensors", 64))
    if readings * sensors > MAX_READINGS_HELD:
        raise FieldError(
            f"{path}.max_sensors is {sensors} with a window of {readings} readings; "
            f"allowed: {MAX_READINGS_HELD} readings in all"
        )
    topics = checks.array(f"{path}.topics", table["topics"], 16, least=1)
    route = Route(
        name=_name(f"{path}.name", table["name"]),
        topics=tuple(_filter(f"{path}.topics[{index}]", topic) for index, topic in enumerate(topics)),
        value=_expression(f"{path}.value", table.get("value")),
        parse_text=checks.flag(f"{path}.parse_text", table.get("parse_text", False)),
        window_readings=readings,
        window_seconds=checks.number(1, 31 * 86_400)(f"{path}.window.seconds", window.get("seconds", 3600)),
        max_sensors=sensors,
        event_topic=_output_topic(f"{path}.event_topic", table.get("event_topic")),
        answer_topic=_output_topic(f"{path}.answer_topic", table.get("answer_topic")),
        trigger=_trigger(f"{path}.trigger", table["trigger"], "value" in table),
        ask=_ask(f"{path}.ask", table["ask"]) if "ask" in table else None,
    )
    if (route.ask is None) != (route.answer_topic is None):
        raise FieldError(f"{path}.ask and answer_topic are only valid together")
    if route.ask is None and route.event_topic is None:
        raise FieldError(f"{path} publishes nothing; it needs event_topic, or ask with answer_topic, or both")
    return route


def _trigger(path: str, value: Any, json_payload: bool) -> Trigger:
    table = checks.mapping(path, value, TRIGGER_KEYS)
    scalars = (*STATISTICS, "sensor", "topic", *(() if json_payload else ("payload",)))
    if not any(key in table for key in ("every_s", "when", "silence_s")):
        raise FieldError(f"{path} never triggers; it needs at least one of every_s, when, silence_s")
    if "clear" in table and "when" not in table:
        raise FieldError(f"{path}.clear needs trigger.when, the condition that it ends")
    seconds = checks.number(1, 31 * 86_400)
    return Trigger(
        every_s=seconds(f"{path}.every_s", table["every_s"]) if "every_s" in table else None,
        when=_expression(f"{path}.when", table.get("when"), CONDITION_NAMES, scalars),
        clear=_expression(f"{path}.clear", table.get("clear"), CONDITION_NAMES, scalars),
        silence_s=seconds(f"{path}.silence_s", table["silence_s"]) if "silence_s" in table else None,
        min_interval_s=checks.number(0, 31 * 86_400)(
            f"{path}.min_interval_s", table.get("min_interval_s", 60)
        ),
    )


def _ask(path: str, value: Any) -> Ask:
    known = ("instructions", "question", "limit", "schema", "state", *ASK_KEYS)
    table = checks.mapping(path, value, known, ("question",))
    request = {key: CHECKS[key](f"{path}.{key}", table[key]) for key in ASK_KEYS if key in table}
    if "schema" in table:
        request["response_format"] = _schema(f"{path}.schema", table["schema"])
    limit = _limit(f"{path}.limit", table["limit"]) if "limit" in table else None
    fields = tuple(name for name in QUESTION_FIELDS if limit is not None or name != "limit")
    return Ask(
        instructions=checks.text(f"{path}.instructions", table.get("instructions", "")),
        question=_template(f"{path}.question", table["question"], fields),
        limit=limit,
        state=_state(f"{path}.state", table["state"]) if "state" in table else None,
        request=request,
    )


def _state(path: str, value: Any) -> str:
    """Check a template whose fields are those of the answer, which are not known yet."""
    names = tuple(name for name in re.findall(r"{(\w+)}", checks.text(path, value)) if name.isidentifier())
    if not names:
        raise FieldError(f"{path} names no field of the answer; allowed: text with {{name}}")
    return _template(path, value, names)


def _limit(path: str, value: Any) -> Limit:
    table = checks.mapping(path, value, ("above", "below"))
    if len(table) != 1:
        raise FieldError(f"{path} is not valid; allowed: either above or below")
    ((side, size),) = table.items()
    return Limit(side == "above", checks.number(-1e12, 1e12)(f"{path}.{side}", size))


def _schema(path: str, value: Any) -> dict[str, Any]:
    """Turn a schema into a request's response_format; TOML has dates and infinities, which JSON lacks."""
    response_format = {"type": "json_schema", "json_schema": {"schema": checks.mapping(path, value)}}
    try:
        strict_json.loads(strict_json.dumps({"response_format": response_format}), MAX_REQUEST_BYTES)
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, StrictJsonError) else "it has a value that JSON lacks"
        raise FieldError(f"{path} is not a JSON schema: {reason}") from None
    return response_format


def _name(path: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", value):
        raise FieldError(f"{path} is not valid; allowed: 1 to 32 characters A-Z a-z 0-9 _ -")
    return value


def _filter(path: str, value: Any) -> TopicFilter:
    topic = checks.text(path, value)
    try:
        if len(topic.encode()) > MAX_TOPIC_BYTES:
            raise ValueError(f"at most {MAX_TOPIC_BYTES} bytes")
        return TopicFilter(topic)
    except ValueError as error:
        raise FieldError(f"{path} is {printable(topic)}; allowed: a topic filter ({error})") from None


def _output_topic(path: str, value: Any) -> str | None:
    if value is None:
        return None
    topic = _template(path, value, TOPIC_FIELDS)
    if (
        not topic
        or len(topic.encode()) > MAX_TOPIC_BYTES
        or set(topic) & set("+#\0")
        or topic.startswith("$")
    ):
        raise FieldError(f"{path} is {printable(topic)}; allowed: a topic without + and #")
    return topic


def _template(path: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Check a template: text with {name} for names in `allowed`, and {{ and }} for braces."""
    template = checks.text(path, value)
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise FieldError(f"{path}: {error}; write {{{{ and }}}} for braces") from None
    for _, name, spec, conversion in pieces:
        if name is not None and (name not in allowed or spec or conversion):
            shown = printable(name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else ""))
            raise FieldError(f"{path} has the unknown field {shown}; allowed: {', '.join(allowed)}")
    return template


def _expression(
    path: str, value: Any, names: tuple[str, ...] | None = None, scalars: tuple[str, ...] = ()
) -> ParsedResult | None:
    if value is None:
        return None
    try:
        return compile_expression(checks.text(path, value), names, scalars)
    except ExpressionError as error:
        raise FieldError(f"{path} {error}") from None


def _check_names(routes: Sequence[Route]) -> None:
    seen: set[str] = set()
    for index, route in enumerate(routes):
        if route.name in seen:
            raise FieldError(f"route[{index}].name is {printable(route.name)}, the name of another route")
        seen.add(route.name)


def _check_loops(routes: Sequence[Route]) -> None:
    """Refuse a route whose events or answers would reach a route as readings."""
    for index, route in enumerate(routes):
        for key, template in (("event_topic", route.event_topic), ("answer_topic", route.answer_topic)):
            reader = template and _reader(routes, template)
            if reader:
                raise FieldError(
                    f"route[{index}].{key} is {printable(template or '')}, which route {reader} reads; "
                    f"use a topic that no route reads"
                )


def _reader(routes: Sequence[Route], template: str) -> str | None:
    for sensor in ("x", "x/x", "x/x/x"):
        for route in routes:
            if any(topic.match(template.format(sensor=sensor)) is not None for topic in route.topics):
                return route.name
    return None
