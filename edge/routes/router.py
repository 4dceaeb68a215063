"""From sensor readings to events and questions: windows, triggers and prompts; no I/O and no threads.

The call that notices an alarm, its end or a silence returns the event; events never wait for the model. It
also returns the question about it, unless the last question about the sensor is less than `min_interval_s`
old: then the question follows later, with the statistics of that moment. At most one question waits for each
sensor, and a route has at most `max_sensors` sensors, so memory is bounded whatever topics arrive.

`now` is in seconds of a monotonic clock and never decreases. The caller calls `tick` at `next_due`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edge.protocol import strict_json
from edge.protocol.messages import Failure, Final, Message, Request
from edge.protocol.strict_json import StrictJsonError, printable
from edge.routes.config import MAX_TOPIC_BYTES, Route
from edge.routes.expressions import ExpressionError, holds
from edge.routes.notes import Limit, notes, number
from edge.routes.statistics import Statistics, Window
from edge.routes.values import UnusableError, read_value

READINGS_SHOWN = 12
PAYLOAD_CHARACTERS_SHOWN = 400
FORGET_S = 86_400.0  # a sensor that has been silent this long makes room for a new one


@dataclass(frozen=True)
class Event:
    """A message to publish at once. `payload` is JSON."""

    route: str
    topic: str
    payload: str


@dataclass(frozen=True)
class Question:
    """A request for the model; `answer_payload` of its answer is published on `answer_topic`."""

    route: str
    sensor: str
    topic: str
    reason: str
    answer_topic: str
    request: Request


@dataclass(frozen=True)
class Ignored:
    """A reading that could not be used, and why."""

    route: str
    topic: str
    why: str


Outcome = Event | Question | Ignored


@dataclass(frozen=True)
class Known:
    """The state of a sensor of a route that outlives a run.

    `silent_since` is in seconds since the epoch; None if the sensor is not silent.
    """

    route: str
    topic: str
    alarmed: bool
    silent_since: float | None


@dataclass
class _Sensor:
    """The state of one topic."""

    topic: str
    name: str
    window: Window
    heard: float
    payload: str = ""
    alarmed: bool = False
    alarmed_before: bool = False  # in an earlier run; reported again, or as cleared
    silent: bool = False
    silent_since: float | None = None  # wall clock; also set if only an earlier run reported it
    next_regular: float = math.inf
    may_ask: float = -math.inf
    pending: str | None = None  # reason of the waiting question


class Router:
    """Applies the routes to readings. `wall_clock` (seconds since the epoch) gives the time in events.

    `plain` is for models without a chat format: a question is then one `prompt`. It can be set at any time.
    """

    def __init__(
        self, routes: Sequence[Route], plain: bool = False, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._wall_clock, self.plain = wall_clock, plain
        self._asked = 0
        self._next_due = math.inf  # never later than something is due
        self._listening = -math.inf  # since when readings can arrive; infinity if they can't
        self._states = {route.name: _RouteState(route) for route in routes}

    @property
    def filters(self) -> tuple[str, ...]:
        """All topic filters to subscribe to, without repetitions."""
        return tuple(dict.fromkeys(f.text for s in self._states.values() for f in s.route.topics))

    def readers(self, topic: str) -> list[str]:
        """Return the names of the routes that read a topic."""
        states = self._states.values()
        return [state.route.name for state in states if _name(state.route, topic) is not None]

    def reading(self, topic: str, payload: bytes, now: float) -> list[Outcome]:
        """Apply the routes to one message of a sensor."""
        if not topic or set(topic) & set("+#\0") or len(topic.encode(errors="replace")) > MAX_TOPIC_BYTES:
            return [Ignored("", printable(topic), "not a valid topic of a sensor")]
        outcomes: list[Outcome] = []
        for state in self._states.values():
            name = _name(state.route, topic)
            if name is not None:
                outcomes.extend(self._apply(state, topic, name, payload, now))
        return outcomes

    def listen(self, since: float) -> None:
        """Set the time `since` when readings can arrive; infinity if they can't.

        A sensor does not count as silent while its readings can't arrive.
        """
        self._listening = since
        self._plan()

    def known(self) -> list[Known]:
        """Return what the next run has to `recall`: sensors that can become silent, or are alarmed."""
        return [
            Known(route.name, sensor.topic, sensor.alarmed or sensor.alarmed_before, sensor.silent_since)
            for route, sensor in self._sensors()
            if route.trigger.silence_s is not None or sensor.alarmed or sensor.alarmed_before
        ]

    def names(self, known: Sequence[Known]) -> list[tuple[str, str]]:
        """Give route and sensor of what is known, as events and answers name them."""
        found = [(one.route, self._name_of(one)) for one in known]
        return [(route, sensor) for route, sensor in found if sensor is not None]

    def _name_of(self, known: Known) -> str | None:
        state = self._states.get(known.route)
        return None if state is None else _name(state.route, known.topic)

    def recall(self, known: Sequence[Known], now: float) -> None:
        """Continue from the state of an earlier run; called before anything else.

        An alarm or silence that still holds is reported again, because the first report may have been lost;
        the end of one that no longer holds is reported. A sensor that was silent for a day is forgotten.
        """
        for one in known:
            state = self._states.get(one.route)
            name = state and _name(state.route, one.topic)
            forgotten = one.silent_since is not None and self._wall_clock() - one.silent_since >= FORGET_S
            if state is None or not name or forgotten:
                continue
            sensor = state.sensor(one.topic, name, now)
            if sensor is not None:
                sensor.alarmed_before, sensor.silent_since = one.alarmed, one.silent_since
        self._plan()

    def tick(self, now: float) -> list[Outcome]:
        """Return what is due: regular questions, silences, and questions that had to wait."""
        outcomes = [outcome for route, sensor in self._sensors() for outcome in self._due(route, sensor, now)]
        self._plan()
        return outcomes

    def next_due(self) -> float:
        """Return when to call `tick`, at the latest when something is due; infinity if nothing will be."""
        return self._next_due

    def _sensors(self) -> Iterator[tuple[Route, _Sensor]]:
        return ((state.route, sensor) for state in self._states.values() for sensor in state.sensors.values())

    def _plan(self) -> None:
        self._next_due = min((self._due_time(*each) for each in self._sensors()), default=math.inf)

    def _plan_for(self, route: Route, sensor: _Sensor) -> None:
        """Let `tick` be called in time for a sensor that may have changed."""
        self._next_due = min(self._next_due, self._due_time(route, sensor))

    def _due_time(self, route: Route, sensor: _Sensor) -> float:
        times = [sensor.next_regular]
        if sensor.pending:
            times.append(sensor.may_ask)
        if not sensor.silent:
            times.append(self._silence_time(route, sensor))
        return min(times)

    def _silence_time(self, route: Route, sensor: _Sensor) -> float:
        """Return when the sensor becomes silent without a reading; infinity without `silence_s`."""
        silence_s = route.trigger.silence_s
        return math.inf if silence_s is None else max(sensor.heard, self._listening) + silence_s

    def postpone(self, question: Question, until: float) -> None:
        """Ask a question that was refused as busy again at `until`, with newer statistics."""
        state = self._states[question.route]
        sensor = state.sensors.get(question.topic)
        if sensor is not None:
            sensor.pending = sensor.pending or question.reason
            sensor.may_ask = until  # nothing was asked, so min_interval_s does not apply
            self._plan_for(state.route, sensor)

    def _apply(
        self, state: _RouteState, topic: str, name: str, payload: bytes, now: float
    ) -> Iterator[Outcome]:
        route = state.route
        try:
            value, content = read_value(route.value, route.parse_text, payload)
        except UnusableError as error:
            yield Ignored(route.name, topic, str(error))
            return
        sensor = state.sensor(topic, name, now)
        if sensor is None:
            yield Ignored(
                route.name, topic, f"the route already has max_sensors ({route.max_sensors}) sensors"
            )
            return
        sensor.window.add(now, value)
        sensor.heard, sensor.payload = now, strict_json.dumps(content)[:PAYLOAD_CHARACTERS_SHOWN]
        if sensor.silent_since is not None:
            sensor.silent, sensor.silent_since = False, None
            yield from self._event(route, sensor, "back", now)
        if route.trigger.when is not None:
            yield from self._condition(route, sensor, _facts(sensor, content, now), now)
        yield from self._due(route, sensor, now)
        self._plan_for(route, sensor)

    def _condition(
        self, route: Route, sensor: _Sensor, facts: dict[str, Any], now: float
    ) -> Iterator[Outcome]:
        trigger = route.trigger
        try:
            if not sensor.alarmed and holds(trigger.when, facts):
                sensor.alarmed, sensor.alarmed_before, sensor.pending = True, False, "condition"
                yield from self._event(route, sensor, "condition", now)
            elif (sensor.alarmed or sensor.alarmed_before) and (
                holds(trigger.clear, facts) if trigger.clear is not None else not holds(trigger.when, facts)
            ):
                sensor.alarmed = sensor.alarmed_before = False
                yield from self._event(route, sensor, "cleared", now)
        except ExpressionError as error:
            yield Ignored(route.name, sensor.topic, f"trigger: {error}")

    def _due(self, route: Route, sensor: _Sensor, now: float) -> Iterator[Outcome]:
        trigger = route.trigger
        if not sensor.silent and now >= self._silence_time(route, sensor):
            sensor.silent, sensor.pending = True, "silence"
            sensor.silent_since = sensor.silent_since or self._wall_clock()
            yield from self._event(route, sensor, "silence", now)
        if now >= sensor.next_regular and trigger.every_s is not None:
            missed = (now - sensor.next_regular) // trigger.every_s
            sensor.next_regular += (missed + 1) * trigger.every_s
            sensor.window.expire(now)
            if len(sensor.window):
                sensor.pending = sensor.pending or "regular"
        if sensor.pending and route.ask is None:
            sensor.pending = None
        if sensor.pending and now >= sensor.may_ask:
            reason, sensor.pending = sensor.pending, None
            sensor.may_ask = now + trigger.min_interval_s
            yield self._question(route, sensor, reason, now)

    def _event(self, route: Route, sensor: _Sensor, event: str, now: float) -> Iterator[Event]:
        if route.event_topic is None:
            return
        statistics = sensor.window.statistics(now)
        content = {
            "route": route.name,
            "sensor": sensor.name,
            "topic": sensor.topic,
            "event": event,
            "at": round(self._wall_clock(), 3),
            "statistics": None if statistics is None else _rounded(asdict(statistics)),
        }
        yield Event(route.name, route.event_topic.format(sensor=sensor.name), strict_json.dumps(content))

    def _question(self, route: Route, sensor: _Sensor, reason: str, now: float) -> Question:
        assert route.ask is not None
        assert route.answer_topic is not None
        self._asked += 1
        question = route.ask.question.format(**_fields(sensor, reason, now, route.ask.limit))
        messages = [Message("system", route.ask.instructions)] if route.ask.instructions else []
        prompt = "\n\n".join([*(message.content for message in messages), question])
        request = Request(
            id=f"{route.name}.{int(self._wall_clock() * 1000)}.{self._asked}",
            prompt=prompt if self.plain else None,
            messages=() if self.plain else (*messages, Message("user", question)),
            stream=False,
            **route.ask.request,
        )
        topic = route.answer_topic.format(sensor=sensor.name)
        return Question(route.name, sensor.name, sensor.topic, reason, topic, request)


class _RouteState:
    """A route and its sensors, by topic."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.sensors: dict[str, _Sensor] = {}

    def sensor(self, topic: str, name: str, now: float) -> _Sensor | None:
        """Find or add the sensor of a topic; None if there are max_sensors, all heard within a day."""
        known = self.sensors.get(topic)
        if known is not None:
            return known
        if len(self.sensors) >= self.route.max_sensors:
            stalest = min(self.sensors.values(), key=lambda sensor: sensor.heard)
            if now - stalest.heard < FORGET_S:
                return None
            del self.sensors[stalest.topic]
        every = self.route.trigger.every_s
        window = Window(self.route.window_readings, self.route.window_seconds)
        sensor = _Sensor(topic, name, window, now)
        sensor.next_regular = math.inf if every is None else now + every
        self.sensors[topic] = sensor
        return sensor


def _name(route: Route, topic: str) -> str | None:
    """Return the value of {sensor} for a topic; None if the route does not read it."""
    matched = next((m for m in (f.match(topic) for f in route.topics) if m is not None), None)
    return None if matched is None else "/".join(matched) or topic


def answer_payload(question: Question, answer: Final | Failure) -> str:
    """Write the JSON for the answer topic; an answer that is a JSON object is embedded as such."""
    content: dict[str, Any] = {
        "route": question.route,
        "sensor": question.sensor,
        "reason": question.reason,
        "request": question.request.id,
    }
    if isinstance(answer, Failure):
        return strict_json.dumps(content | {"error": {"code": answer.code, "message": answer.message}})
    try:
        content["answer"] = strict_json.loads(answer.text, len(answer.text.encode()))
    except StrictJsonError:
        content["answer"] = answer.text
    return strict_json.dumps(content | {"finish_reason": answer.finish_reason})


def _facts(sensor: _Sensor, payload: Any, now: float) -> dict[str, Any]:
    """Collect the names that conditions can use."""
    statistics = sensor.window.statistics(now)
    assert statistics is not None  # a reading has just been added
    return {
        "sensor": sensor.name,
        "topic": sensor.topic,
        "payload": payload,
        **asdict(statistics),
    }


def _fields(sensor: _Sensor, reason: str, now: float, limit: Limit | None) -> dict[str, str]:
    """Collect the fields that a question's template can use, as text."""
    sensor.window.expire(now)
    statistics = sensor.window.statistics(now)
    shown = statistics and {name: _number(value) for name, value in asdict(statistics).items()}
    names = ("count", "minimum", "mean", "maximum", "last", "trend", "gaps")
    latest = sensor.window.latest(READINGS_SHOWN)
    readings = [f"{_number(v)} ({_number(now - t)} s ago)" for t, v in latest]
    return {
        "sensor": sensor.name,
        "topic": sensor.topic,
        "reason": reason,
        "statistics": _sentence(statistics, now - sensor.heard),
        "readings": ", ".join(readings) or "none",
        "notes": notes(latest, now, limit),
        "limit": str(limit),
        "payload": sensor.payload,
        **{name: shown[name] if shown else "unknown" for name in names},
        "age": _number(now - sensor.heard),
    }


def _sentence(statistics: Statistics | None, age: float) -> str:
    if statistics is None:
        return f"no readings for {_number(age)} s"
    shown = {name: _number(value) for name, value in asdict(statistics).items()}
    return (
        f"{statistics.count} readings in {shown['span_s']} s, minimum {shown['minimum']}, "
        f"mean {shown['mean']}, maximum {shown['maximum']}, last {shown['last']}, "
        f"trend {shown['trend']} per hour, {statistics.gaps} gaps (longest pause "
        f"{shown['longest_pause_s']} s), last reading {_number(age)} s ago"
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else number(value)


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
