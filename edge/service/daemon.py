"""The daemon: connects the bundle, engine, journal, routes and transports, and supervises their threads.

SIGTERM and SIGINT drain: new requests are refused, accepted ones are answered for up to `drain_s` seconds,
and the rest after the next start. A second signal ends the process at once.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edge.board import Board
from edge.config import Config
from edge.errors import EdgeError, TransportError
from edge.requests.engine import ABANDON_S, Engine
from edge.requests.journal import Journal
from edge.requests.journaled_engine import JournaledEngine, Origin
from edge.routes.display import Display
from edge.service import route_runner
from edge.service.bundle_keeper import keeper_of
from edge.service.health import health
from edge.service.metrics import MetricsFile
from edge.service.route_runner import RouteRunner
from edge.service.systemd import Part, Watchdog, notify, watchdog_s
from edge.transports.mqtt import transport as mqtt
from edge.transports.mqtt.transport import MqttTransport
from edge.transports.serial.transport import SerialTransport

log = logging.getLogger(__name__)

CHECK_S = 0.5  # between two checks whether a thread has ended
WATCH_S = 5.0  # between two checks of progress; each thread shows some about once a second
JOURNAL = "journal.sqlite"  # in the state directory
SENSORS = "sensors.json"  # likewise: the sensors that routes know
JUMP_S = 10.0  # of the clock; smaller ones are not logged
DAY_S = 86_400
CLOSE_S = 5.0  # for a transport to send its queue


class Daemon:
    """All the parts of a running daemon."""

    def __init__(self, config: Config, force: bool = False) -> None:
        """Open the bundle, unless the board is too small for it and `force` is not set; prepare the rest.

        Raises BundleError, RuntimeFailure, ConfigError (the key file), TransportError (a TLS file that can't
        be used), or EdgeError if another process has the journal or the bundle store open.
        """
        self._config = config
        self._watched, self._clock = time.monotonic(), time.time() - time.monotonic()
        self._watch_s = min(WATCH_S, (watchdog_s() or 4 * WATCH_S) / 4)
        self._stop = threading.Event()
        self._board = Board()
        self._keeper = keeper_of(config, self._board, force)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
        try:
            self._prepare()
        except BaseException:
            self._keeper.close()
            raise

    def _prepare(self) -> None:
        config = self._config
        self._journal = Journal(config.state_directory / JOURNAL)
        try:
            generator = self._keeper.open(self._journal.crashed_in_work)
        except BaseException:
            self._journal.close()
            raise
        self._engine = Engine(generator, config.queue)
        self._keeper.attach(self._engine, self._switched)
        self._journaled = JournaledEngine(self._engine, self._journal)
        self._routes: RouteRunner | None = None
        if config.routes:
            memory = config.state_directory / SENSORS
            self._routes = RouteRunner(
                config.routes, self._plain, self._journaled, self._publish, self._show, memory
            )
        self._mqtt: MqttTransport | None = None
        if config.mqtt is not None:
            self._mqtt = MqttTransport(
                config.mqtt, config.node, self._journaled, self._status, self._health, self._routes
            )
        self._ports = [
            SerialTransport(port, config.node, self._journaled, self._routes) for port in config.serial
        ]
        self._metrics: MetricsFile | None = None
        if config.metrics_file is not None:
            self._metrics = MetricsFile(config.metrics_file, config.node, self._status, self._health)
        self._watchdog = Watchdog(self._parts())

    def run(self) -> None:
        """Serve until a signal. Raises EdgeError if a thread has ended."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._journaled.resume(self._origin)
        self._engine.start()
        if self._routes is not None:
            self._routes.start()
        for transport in self._transports():
            transport.start()
        log.info("node %s answers with %s", self._config.node, self._config.bundle)
        notify("READY=1", f"STATUS=Answering as {self._config.node}")
        try:
            self._supervise(self._stop)
        finally:
            self._drain()

    def _on_signal(self, number: int, _frame: Any) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        log.info("%s: stopping", signal.Signals(number).name)
        self._stop.set()

    def _supervise(self, until: threading.Event) -> None:
        """Watch the threads until the event is set."""
        while not until.wait(CHECK_S):
            for name, part in self._parts().items():
                if not part.alive:
                    raise EdgeError(f"{name}: its thread has ended; see the log above")
            for connection in self._mqtt.connections.values() if self._mqtt else ():
                if connection.refused:
                    raise TransportError(connection.refused)
            self._keeper.poll()
            self._watch()

    def _watch(self) -> None:
        """Check the progress of all parts, well within systemd's watchdog time; write metrics and sensors."""
        if self._metrics is not None:
            self._metrics.update()
        if self._routes is not None:
            self._routes.keep()
        if time.monotonic() - self._watched >= self._watch_s:
            self._watched = time.monotonic()
            self._watchdog.check()
            self._watch_clock()

    def _watch_clock(self) -> None:
        """Log that the time of day was set; only the journal and the log depend on it."""
        clock = time.time() - time.monotonic()
        jump_s, self._clock = clock - self._clock, clock
        if abs(jump_s) >= JUMP_S:
            size = f"{abs(jump_s):.0f} s" if abs(jump_s) < DAY_S else f"{abs(jump_s) / DAY_S:.0f} days"
            log.warning("the clock was set %s by %s", "back" if jump_s < 0 else "forward", size)

    def _drain(self) -> None:
        waiting = self._engine.waiting + self._engine.working
        closing_s = ABANDON_S + 3 * CLOSE_S * (1 + len(self._transports()))
        limit_us = round((self._config.drain_s + closing_s) * 1e6)  # whatever the unit's TimeoutStopSec is
        status = f"STATUS=Stopping, {waiting} requests to answer"
        notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={limit_us}", status)
        self._keeper.close()
        done = threading.Event()
        drainer = threading.Thread(target=self._stop_parts, args=(done,), name="drain", daemon=True)
        try:
            drainer.start()
        except RuntimeError:  # no memory for a thread: stop in this one, without a look at the clock
            self._stop_parts(done)
        while not done.wait(CHECK_S):
            self._watch()
        if self._metrics is not None:
            self._metrics.remove()
        log.info("stopped")

    def _stop_parts(self, done: threading.Event) -> None:
        try:
            if self._routes is not None:
                self._routes.stop(CLOSE_S)
            self._engine.stop(self._config.drain_s)
            for transport in self._transports():
                transport.stop(CLOSE_S)
            self._journal.close()
        finally:
            done.set()

    def _publish(self, topic: str, payload: str, delivered: Callable[[], None] | None) -> None:
        """Publish a message of a route: on the broker, or on every port if there is none."""
        if self._mqtt is not None:
            self._mqtt.publish(topic, payload, delivered)
        else:
            for port in self._ports:
                port.publish(topic, payload, delivered)

    def _show(self, display: Display) -> None:
        """Show a sensor of a route in Home Assistant."""
        if self._mqtt is not None:
            self._mqtt.show(display)

    def _origin(self, client: str) -> Origin | None:
        """Find where the requests of a client come from."""
        if client.startswith(mqtt.CLIENT):
            return self._mqtt
        if client.startswith(route_runner.CLIENT):
            return self._routes
        return next((port for port in self._ports if port.client == client), None)

    def _transports(self) -> list[MqttTransport | SerialTransport]:
        return [*([self._mqtt] if self._mqtt else []), *self._ports]

    def _parts(self) -> dict[str, Part]:
        """All threads, by name."""
        parts: dict[str, Part] = {"decoder": self._engine, **(self._mqtt.connections if self._mqtt else {})}
        if self._routes is not None:
            parts["routes"] = self._routes
        return parts | {f"port {transport.port.name}": transport.port for transport in self._ports}

    @property
    def _plain(self) -> bool:
        return self._keeper.generator.bundle.manifest.prompt_format == "plain"

    def _switched(self) -> None:
        """Inform all parts that another bundle answers."""
        if self._routes is not None:
            self._routes.use_format(self._plain)
        if self._mqtt is not None:
            self._mqtt.announce()

    def _status(self) -> Mapping[str, Any]:
        bundle = self._keeper.generator.bundle
        return {
            "version": _version(),
            "model": bundle.manifest.architecture.family,
            "bundle": bundle.digest[:12],
            "context": self._keeper.generator.context,
        }

    def _health(self) -> Mapping[str, Any]:
        return health(self._engine, self._journal, self._board)


def _end(_number: int, _frame: Any) -> None:
    """End cleanly while the bundle is loaded; there is nothing to drain yet."""
    raise SystemExit(0)


def _version() -> str:
    try:
        return version("edge-gemma")
    except PackageNotFoundError:
        return "unknown"
