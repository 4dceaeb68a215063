"""The whole service on the real 270M under a cap on memory: everybody is answered, and nothing is killed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.capped import Cap, drop_from_page_cache, memory_cap
from edge.client.links import MqttLink, SerialLink
from edge.endpoints import SerialConfig
from edge.protocol.messages import Answer, Final, Request
from tests.service.test_route_runner import House
from tests.support.counterparts import WAIT_S, DaemonProcess, Mosquitto, PtyPair
from tests.support.real_bundle import CONTEXT, real_bundle

CAP = 300 * 10**6  # bytes: of the bundle's 270 MB of weights, the packed copy, and everything else
PATIENCE_S = 8 * WAIT_S  # weights are packed, and read again from the disk after each eviction
ROUTE = """
[[route]]
name = "freezers"
topics = ["sensors/+/temperature"]
event_topic = "alarms/{sensor}"
answer_topic = "explanations/{sensor}"
[route.trigger]
when = "last > `-15`"
[route.ask]
instructions = "You watch freezers."
question = "Freezer {sensor}, {reason}: {statistics}."
max_tokens = 60
[route.ask.schema]
type = "object"
properties = { urgent = { type = "boolean" } }
required = ["urgent"]
additionalProperties = false
"""


@pytest.fixture
def cap() -> Iterator[Cap]:
    with contextlib.ExitStack() as stack:
        try:
            cap = stack.enter_context(memory_cap(CAP))
        except OSError as error:
            pytest.skip(f"control groups can't be made here: {error}")
        yield cap


@pytest.fixture
def daemon(tmp_path: Path, mosquitto: Mosquitto, ptys: PtyPair, cap: Cap) -> Iterator[DaemonProcess]:
    bundle = real_bundle()
    drop_from_page_cache(path for path in bundle.iterdir() if path.is_file())
    metrics = f'metrics_file = "{tmp_path}/edge.prom"\n'
    config = f'{metrics}[mqtt]\nport = {mosquitto.port}\n[[serial]]\nport = "{ptys.near}"\n{ROUTE}'
    daemon = DaemonProcess(tmp_path, bundle, config)
    daemon.within = tuple(cap.prefix)
    yield daemon
    daemon.close()


@pytest.mark.slow
def test_all_of_the_service_answers_under_300_mb(
    daemon: DaemonProcess, mosquitto: Mosquitto, ptys: PtyPair, cap: Cap
) -> None:
    daemon.start("--force", wait=False)
    for _ in range(8):  # packing the weights takes longer than a start does otherwise
        with contextlib.suppress(AssertionError):
            daemon.notice("READY=1")
            break
    mosquitto.retained("edge/v1/pump/status")  # a request before that would find no subscriber
    assert daemon.process is not None
    process = daemon.process.pid
    line = SerialLink(SerialConfig(str(ptys.far), 115_200, "none", lenient=False))
    for request in requests():
        for answer in (over_mqtt(mosquitto, request), *line.ask(request, PATIENCE_S)):
            assert isinstance(answer, Final), answer
            if request.response_format is not None and answer.finish_reason == "stop":
                wanted = request.response_format["json_schema"]["schema"]["properties"]
                assert set(json.loads(answer.text)) == set(wanted)
    house = House(mosquitto)
    house.publish("sensors/left/temperature", "-12")
    assert house.receive()[0] == "alarms/left"
    topic, explained = house.received.get(timeout=PATIENCE_S)
    assert (topic, set(explained["answer"])) == ("explanations/left", {"urgent"})
    assert daemon.process.poll() is None
    assert process == daemon.process.pid
    print(f"peak {cap.peak / 1e6:.0f} MB with file pages, anonymous {daemon.memory() / 1e6:.0f} MB")
    assert daemon.stop() == 0
    line.close()
    house.close()


def over_mqtt(mosquitto: Mosquitto, request: Request) -> Answer:
    with contextlib.closing(MqttLink(mosquitto.broker, "pump")) as link:
        (answer,) = link.ask(request, PATIENCE_S)
    return answer


def requests() -> Iterator[Request]:
    """A prompt that fills the context, two with a common prefix that is stored, and several grammars."""
    words = " ".join(f"reading {number} is {number * 7 % 50} bar," for number in range(CONTEXT // 14))
    yield Request("long", words, max_tokens=40, stream=False)
    for question in ("12 bar?", "13 bar?"):
        yield Request(question[:2], "You watch a pump. " * 40 + question, max_tokens=20, stream=False)
    for number in range(4):
        fields = {f"field{number}_{index}": {"type": "string", "maxLength": 20} for index in range(8)}
        schema = {"type": "object", "properties": fields, "required": list(fields)}
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        yield Request(f"s{number}", "Pump?", max_tokens=120, stream=False, response_format=form)
