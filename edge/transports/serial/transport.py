"""Requests and answers over a serial port, one frame each (`edge.protocol.framing`).

From the sensor: a request; `{"type": "cancel", "id": ...}`; `{"type": "hello"}`; and
`{"type": "reading", "topic": ..., "payload": ...}` for the routes. To the sensor: `hello` with the protocol's
version, when the port is opened and in reply to `hello`; `ack` with the id of a request that arrived intact;
`nak` for a damaged line, which the sensor sends again; `partial`, `final`, `error`; and
`{"type": "message", "topic": ..., "payload": ...}`, a message of a route if there is no broker.

A sensor that gets neither `ack` nor `nak` sends the request again with the same id. A duplicate of a request
in work is acknowledged and changes nothing; later it gets the same answer again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from edge.endpoints import SerialConfig
from edge.errors import RequestError
from edge.logs import RepeatedLog, place_of
from edge.protocol.checks import FieldError, mapping, one_of
from edge.protocol.framing import Damaged
from edge.protocol.messages import Answer, Failure, Partial, PeekedRequest, peek_request
from edge.protocol.request_fields import request_id, response_topic
from edge.protocol.strict_json import dumps
from edge.requests.engine import Sink
from edge.requests.journaled_engine import JournaledEngine
from edge.transports.routes import Routes
from edge.transports.serial.port import SerialPort

log = logging.getLogger(__name__)

PROTOCOL = 1
MAX_LINE_BYTES = 16 * 1024  # of a request; answers have no limit
NOISE = ("crc", "no_crc")  # damage that the same line sent again may not have
OWN = ("ack", "nak", "partial", "final", "error", "message")  # types that only a daemon sends


class SerialTransport:
    """Serves one node on one port."""

    def __init__(
        self, config: SerialConfig, node: str, engine: JournaledEngine, routes: Routes | None = None
    ) -> None:
        self.client = f"serial:{config.port}"
        self._engine = engine
        self._routes = routes
        self._noise = RepeatedLog(log)
        self._hello = dumps({"type": "hello", "protocol": PROTOCOL, "node": node})
        self.port = SerialPort(config, MAX_LINE_BYTES, self._greet, self._received)

    def start(self) -> None:
        """Start the port's thread."""
        self.port.start()

    def stop(self, timeout_s: float) -> None:
        """Write the queued answers and close the port."""
        self.port.stop(timeout_s)

    def sink(self, _client: str, _request_id: str, _note: str) -> Sink:
        """Make a sink for a request of an earlier run."""
        return self._answer

    def publish(self, topic: str, payload: str, written: Callable[[], None] | None) -> None:
        """Write a message of a route as a frame, from any thread. `payload` is JSON."""
        frame = f'{{"type":"message","topic":{dumps(topic)},"payload":{payload}}}'
        self.port.send(frame, written=written or (lambda: None))

    def _greet(self) -> None:
        self.port.send(self._hello, droppable=True)

    def _received(self, item: str | Damaged) -> None:
        """Handle a line, in the port's thread."""
        if isinstance(item, Damaged) and item.reason in NOISE:
            self._noise.warning("%s: a damaged line was refused: %s", self.client, item.why)
            self.port.send(dumps({"type": "nak", "reason": item.reason}), droppable=True)
        elif isinstance(item, Damaged):
            self._answer(Failure(None, "bad_request", str(item)))
        else:
            peeked = peek_request(item)
            if "type" in peeked.content:
                self._control(peeked)
            else:
                self._request(peeked)

    def _control(self, frame: PeekedRequest) -> None:
        """Do what a frame with a `type` asks for."""
        data = frame.content
        if data["type"] in OWN or (data["type"] == "hello" and "protocol" in data):
            return  # the line echoes; an answer would be echoed in turn, without end
        try:
            kind = one_of("cancel", "hello", "reading")("type", data["type"])
            if kind == "hello":
                self._greet()
            elif kind == "reading":
                self._reading(mapping("reading", data, ("type", "topic", "payload"), ("topic", "payload")))
            else:
                mapping("cancel", data, ("type", "id"), ("id",))
                self._engine.cancel(self.client, request_id("id", data["id"]))
        except FieldError as error:
            self._answer(Failure(frame.id, "bad_request", str(error)))

    def _reading(self, data: Mapping[str, Any]) -> None:
        topic = response_topic("reading.topic", data["topic"])
        if self._routes is not None:
            self._routes.reading(topic, dumps(data["payload"]).encode())

    def _request(self, frame: PeekedRequest) -> None:
        try:
            request = frame.parse()
        except RequestError as error:
            self._answer(Failure(frame.id, error.code, str(error)))
            return
        self.port.send(dumps({"type": "ack", "id": request.id}), droppable=True)
        try:
            self._engine.submit(self.client, request, self._answer)
        except Exception as error:
            log.error("request %s could not be accepted: %s", request.id, place_of(error))
            self._answer(Failure(request.id, "internal", "the daemon failed; see its log"))

    def _answer(self, answer: Answer) -> None:
        """Send an answer, from any thread."""
        if isinstance(answer, Partial):
            self.port.send(answer.to_json(), droppable=True)
        else:
            self.port.send(answer.to_json(), written=lambda: self._delivered(answer.id))

    def _delivered(self, request_id: str | None) -> None:
        if request_id is not None:
            self._engine.delivered(self.client, request_id)
