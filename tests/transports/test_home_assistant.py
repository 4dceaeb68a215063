"""What is published for Home Assistant, with keys that its MQTT integration accepts, and when."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import publish

from edge.board import Board
from edge.config import MqttConfig
from edge.protocol.messages import Failure, Final, Request, Timings, Usage
from edge.protocol.topics import NodeTopics
from edge.requests.engine import Engine
from edge.requests.journal import Journal
from edge.requests.journaled_engine import JournaledEngine
from edge.routes.config import parse_routes
from edge.routes.display import Alarms, Display, answer_display
from edge.routes.router import Question, answer_payload
from edge.service.health import health
from edge.service.route_runner import RouteRunner
from edge.transports.mqtt.home_assistant import MAX_STATE, HomeAssistant
from edge.transports.mqtt.transport import MqttTransport
from tests.support.counterparts import Mosquitto, wait_for
from tests.support.speller import Speller

# Of homeassistant/components/mqtt: schemas.py (device discovery), sensor.py, binary_sensor.py, entity.py.
AVAILABILITY = {"availability_topic", "availability_template", "payload_available", "payload_not_available"}
DEVICE_DISCOVERY = AVAILABILITY | {"device", "components", "origin", "state_topic", "qos", "encoding"}
DEVICE = {"identifiers", "name", "manufacturer", "model", "model_id", "sw_version", "hw_version"}
ORIGIN = {"name", "sw_version", "support_url"}
ENTITY = AVAILABILITY | {
    *("platform", "unique_id", "name", "icon", "entity_category", "enabled_by_default", "device_class"),
    *("state_topic", "value_template", "qos", "json_attributes_topic", "json_attributes_template"),
}
PLATFORMS = {
    "sensor": ENTITY | {"unit_of_measurement", "state_class", "expire_after", "force_update"},
    "binary_sensor": ENTITY | {"payload_on", "payload_off", "off_delay", "expire_after", "force_update"},
}
UNITS = {"temperature": "°C", "data_size": "MiB", "duration": "ms"}  # that go with a device class of ours


class SomeRoutes:
    """A route that asks, and one that only raises events."""

    asking = frozenset({"freezers"})
    displayed = [("freezers", "left"), ("doors", "hall/front")]  # noqa: RUF012
    filters = ()

    def listen(self, on: bool) -> None:
        pass

    def reading(self, topic: str, payload: bytes) -> None:
        pass


STATUS = {"version": "1.2", "model": "gemma3", "bundle": "0123", "context": 2048}
QUESTION = Question("freezers", "left", "sensors/left", "condition", "explanations/left", Request("q1"))
HOME = HomeAssistant("homeassistant", "pump", NodeTopics("pump"), lambda: STATUS, SomeRoutes())


def described(home: HomeAssistant = HOME) -> dict[str, Any]:
    content = json.loads(home.device().payload)
    assert isinstance(content, dict)
    return content


def test_the_device_has_only_keys_that_home_assistant_accepts() -> None:
    message = HOME.device()
    assert (message.topic, message.retain, message.qos) == ("homeassistant/device/edge-pump/config", True, 1)
    assert re.fullmatch(r"[a-zA-Z0-9_-]+", message.topic.split("/")[2])
    content = described()
    assert set(content) <= DEVICE_DISCOVERY
    assert {"device", "origin", "components"} <= set(content)
    assert set(content["device"]) <= DEVICE
    assert content["device"]["identifiers"] == ["edge-pump"]
    assert set(content["origin"]) <= ORIGIN
    for key, part in content["components"].items():
        if key == "route-freezers":
            assert part == {"platform": "sensor"}  # the entity of an earlier version is removed
            continue
        assert set(part) <= PLATFORMS[part["platform"]], key
        if "device_class" in part and part["platform"] == "sensor":
            assert part["unit_of_measurement"] == UNITS[part["device_class"]]
    ids = [part["unique_id"] for key, part in content["components"].items() if key != "route-freezers"]
    assert len(ids) == len(set(ids))


def test_every_figure_is_a_field_of_health() -> None:
    told = health(Engine(Speller(), 1), Journal(None), Board())
    parts = described()["components"]
    figures = [part for part in parts.values() if part.get("state_topic") == "edge/v1/pump/health"]
    named = {re.findall(r"value_json\.(\w+)", part["value_template"])[0] for part in figures}
    assert len(named) == len(figures)
    assert named <= set(told)
    assert {"queue", "tokens_per_s", "temperature_c", "throttling", "last_error", "journal"} <= named


def shown(answer: Final | Failure, template: str | None = None) -> dict[str, Any]:
    messages = HOME.show(answer_display(json.loads(answer_payload(QUESTION, answer)), template))
    topics = ["edge/v1/pump/routes/freezers.left", "edge/v1/pump/routes/freezers"]
    assert [(message.topic, message.retain) for message in messages] == [(topic, True) for topic in topics]
    content = json.loads(messages[0].payload)
    assert content == json.loads(messages[1].payload)
    assert set(content) == {"state", "attributes"}
    assert isinstance(content, dict)
    return content


def final(text: str) -> Final:
    return Final("q1", text, "stop", Usage(1, 0, 0, 1), Timings(0.0, 1.0, 1.0, 1.0))


@given(st.text(st.characters(codec="utf-8"), max_size=600))
def test_a_state_is_shortened_and_the_attributes_have_the_complete_answer(text: str) -> None:
    content = shown(final(text))
    assert len(content["state"]) <= MAX_STATE
    attributes = content["attributes"]
    assert (attributes["route"], attributes["sensor"]) == ("freezers", "left")
    if isinstance(attributes["answer"], str):
        assert attributes["answer"] == text
        assert content["state"] == text or content["state"] == text[:252] + "..."


@pytest.mark.parametrize(
    ("answer", "template", "state"),
    [
        ('{"verdict":"open door","urgent":true}', None, "open door"),
        ('{"urgent":true}', None, "true"),
        ('{"verdict":"open","minutes":5}', "{verdict} for {minutes} min{missing}", "open for 5 min"),
        ('{"verdict":"open"}', "{{{verdict}}}", "{open}"),
        ('{"causes":["door","fan"]}', None, '["door","fan"]'),
        ('{"verdict":null}', None, ""),
        ("{}", None, "{}"),
        ("It is open.", "{verdict}", "It is open."),
    ],
)
def test_a_json_answer_is_shown_as_its_first_field_or_by_the_template(
    answer: str, template: str | None, state: str
) -> None:
    content = shown(final(answer), template)
    assert content["state"] == state
    if answer.startswith("{"):
        assert content["attributes"]["answer"] == json.loads(answer)


def test_an_error_is_shown_with_its_code() -> None:
    assert shown(Failure("q1", "internal", "x" * 300))["state"].startswith("internal: xxx")


def test_each_sensor_of_a_route_has_an_entity_which_is_binary_where_the_route_does_not_ask() -> None:
    parts = described()["components"]
    left, front = parts["route-freezers-left"], parts["route-doors-hall_front-6fd30878"]
    assert (left["platform"], left["name"], left["state_topic"]) == (
        *("sensor", "freezers left"),
        "edge/v1/pump/routes/freezers.left",
    )
    assert (front["platform"], front["name"], front["device_class"]) == (
        *("binary_sensor", "doors hall/front"),
        "problem",
    )


def test_a_new_sensor_is_described_before_its_state_is_published() -> None:
    home = HomeAssistant("homeassistant", "pump", NodeTopics("pump"), lambda: STATUS, SomeRoutes())
    display = Display("doors", "back", True, {"event": "condition"})
    first, second = home.show(display), home.show(display)
    assert first[0].topic == "homeassistant/device/edge-pump/config"
    assert "route-doors-back" in json.loads(first[0].payload)["components"]
    assert first[1:] == second
    assert json.loads(second[0].payload) == {"state": "ON", "attributes": {"event": "condition"}}


@given(st.lists(st.text(max_size=80), min_size=2, max_size=2, unique=True))
def test_sensors_of_any_name_have_distinct_topics(sensors: list[str]) -> None:
    topics = [HOME.show(Display("doors", sensor, False, {}))[-1].topic for sensor in sensors]
    assert len(set(topics)) == 2
    assert all(re.fullmatch(r"edge/v1/pump/routes/doors\.[A-Za-z0-9_-]*", topic) for topic in topics)


def test_a_sensor_is_on_while_its_condition_is_true_or_it_is_silent() -> None:
    alarms = Alarms()
    events = ["condition", "silence", "cleared", "back", "condition", "condition", "cleared", "cleared"]
    states = [alarms.display({"route": "doors", "sensor": "x", "event": event}).state for event in events]
    assert states == [True, True, True, False, True, True, False, False]


ROUTE = {
    "name": "freezers",
    "topics": ["homeassistant/#"],
    "answer_topic": "explanations/{sensor}",
    "trigger": {"every_s": 3600},
    "ask": {"question": "{last}?"},
}


@pytest.fixture
def engine() -> Any:
    engine = Engine(Speller(), queue_length=3)
    engine.start()
    yield engine
    engine.stop(1)


def test_the_device_is_published_when_the_node_connects_and_when_home_assistant_starts(
    mosquitto: Mosquitto, engine: Engine
) -> None:
    journaled = JournaledEngine(engine, Journal(None))
    routes = RouteRunner(parse_routes([ROUTE]), True, journaled, lambda *_: None)
    config = MqttConfig(mosquitto.broker, 60, (), "homeassistant")
    node = MqttTransport(config, "pump", journaled, lambda: STATUS, lambda: {"queue": 0}, routes)
    node.start()
    topic = "homeassistant/device/edge-pump/config"
    first = mosquitto.retained(topic)
    assert set(first["components"]) >= {"queue", "route-freezers"}
    assert mosquitto.retained(first["availability_topic"])["state"] == "online"
    simple: Any = publish.single  # paho leaves it untyped
    simple(topic, None, qos=1, retain=True, port=mosquitto.port)  # as if it had never been published
    wait_for(lambda: node.online)
    simple("homeassistant/status", "online", qos=1, port=mosquitto.port)
    assert mosquitto.retained(topic) == first
    node.show(answer_display(json.loads(answer_payload(QUESTION, final("It is open."))), None))
    wait_for(lambda: "route-freezers-left" in mosquitto.retained(topic)["components"])
    parts = mosquitto.retained(topic)["components"]
    state = mosquitto.retained(parts["route-freezers-left"]["state_topic"])
    assert state["state"] == "It is open."
    node.stop(5)
