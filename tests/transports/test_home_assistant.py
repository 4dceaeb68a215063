"""What Home Assistant is told, with keys that its MQTT integration accepts, and when it is told."""

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

STATUS = {"version": "1.2", "model": "gemma3", "bundle": "0123", "context": 2048}
QUESTION = Question("freezers", "left", "sensors/left", "condition", "explanations/left", Request("q1"))
HOME = HomeAssistant("homeassistant", "pump", NodeTopics("pump"), lambda: STATUS, ["freezers"])


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
        assert set(part) <= PLATFORMS[part["platform"]], key
        if "device_class" in part and part["platform"] == "sensor":
            assert part["unit_of_measurement"] == UNITS[part["device_class"]]
    ids = [part["unique_id"] for part in content["components"].values()]
    assert len(ids) == len(set(ids))


def test_every_figure_is_one_that_health_tells() -> None:
    told = health(Engine(Speller(), 1), Journal(None), Board())
    parts = described()["components"]
    figures = [part for part in parts.values() if part["state_topic"] == "edge/v1/pump/health"]
    named = {re.findall(r"value_json\.(\w+)", part["value_template"])[0] for part in figures}
    assert len(named) == len(figures)
    assert named <= set(told)
    assert {"queue", "tokens_per_s", "temperature_c", "throttling", "last_error", "journal"} <= named


def shown(answer: Final | Failure) -> dict[str, Any]:
    message = HOME.answer("freezers", answer_payload(QUESTION, answer))
    assert (message.topic, message.retain) == ("edge/v1/pump/routes/freezers", True)
    content = json.loads(message.payload)
    assert set(content) == {"state", "attributes"}
    assert isinstance(content, dict)
    return content


def final(text: str) -> Final:
    return Final("q1", text, "stop", Usage(1, 0, 0, 1), Timings(0.0, 1.0, 1.0, 1.0))


@given(st.text(st.characters(codec="utf-8"), max_size=600))
def test_a_state_fits_and_the_whole_answer_is_in_the_attributes(text: str) -> None:
    content = shown(final(text))
    assert len(content["state"]) <= MAX_STATE
    attributes = content["attributes"]
    assert (attributes["route"], attributes["sensor"]) == ("freezers", "left")
    if isinstance(attributes["answer"], str):
        assert attributes["answer"] == text
        assert content["state"] == text or content["state"] == text[:252] + "..."


def test_json_answers_are_attributes_and_errors_are_said() -> None:
    content = shown(final('{"urgent":true}'))
    assert (content["state"], content["attributes"]["answer"]) == ('{"urgent":true}', {"urgent": True})
    deep = '{"a":' + "[" * 31 + "]" * 31 + "}"
    assert shown(final(deep))["state"] == deep
    assert shown(Failure("q1", "internal", "x" * 300))["state"].startswith("internal: xxx")


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


def test_the_device_is_published_when_the_node_comes_and_again_when_home_assistant_starts(
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
    simple(topic, None, qos=1, retain=True, port=mosquitto.port)  # as if it had never been there
    wait_for(lambda: node.online)
    simple("homeassistant/status", "online", qos=1, port=mosquitto.port)
    assert mosquitto.retained(topic) == first
    node.show("freezers", answer_payload(QUESTION, final("It is open.")))
    state = mosquitto.retained(first["components"]["route-freezers"]["state_topic"])
    assert state["state"] == "It is open."
    node.stop(5)
