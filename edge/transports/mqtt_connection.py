"""A supervised MQTT 5 connection: paho-mqtt, all of it in one thread of our own.

paho is not given its own thread, because an exception in a callback would end that thread while
`is_connected()` stays true. Here one thread connects, reads, writes, calls the Listener and comes back with
backoff from whatever happens; other threads only `post` work to it. Nothing in a Listener may block.

Acknowledgements are manual. A delivery's token names its connection, because a packet identifier means
nothing on the next one (MQTT 5, 4.4): the broker delivers again what was not acknowledged.
"""

from __future__ import annotations

import logging
import random
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge.config import Broker
from edge.errors import TransportError

log = logging.getLogger(__name__)

TICK_S = 1.0  # the thread shows that it lives at least this often
CONNACK_S = 10.0  # a broker that has not answered CONNECT by then is given up
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.5, 20.0
MAX_PACKET_BYTES = 1024 * 1024  # what the broker may send us; a longer request is dropped by the broker
MAX_INFLIGHT = 8  # QoS 1 messages without an acknowledgement; brokers' Receive Maximum is 16 or more
MAX_QUEUED = 1024  # QoS 1 messages that wait for the broker
SESSION_TAKEN_OVER = 0x8E

Token = tuple[int, int]
_Properties: Any = Properties  # paho leaves its constructor untyped


@dataclass(frozen=True)
class Received:
    """A message that arrived. `expiry_s`: the rest of its Message Expiry. `token` is None at QoS 0."""

    topic: str
    payload: bytes
    retained: bool
    repeated: bool
    response_topic: str | None
    correlation: bytes | None
    expiry_s: int | None
    token: Token | None


@dataclass(frozen=True)
class Outgoing:
    """A message to publish; `correlation` is sent as Correlation Data."""

    topic: str
    payload: str
    qos: int = 1
    retain: bool = False
    correlation: bytes | None = None
    response_topic: str | None = None
    expiry_s: int | None = None


class Listener(Protocol):
    """What happens on a connection, told in its thread."""

    def connected(self) -> None:
        """Subscriptions are to be made now, on every connection again."""

    def subscribed(self) -> None:
        """The broker has accepted the subscriptions."""

    def disconnected(self) -> None:
        """The connection has ended."""

    def received(self, message: Received) -> None:
        """A message came; it is acknowledged by `acknowledge(message.token)`."""

    def published(self, mid: int, refused: str | None) -> None:
        """The broker has acknowledged a message of QoS 1, or refuses it for the reason given."""

    def tick(self) -> None:
        """Called at least every TICK_S seconds while connected."""


class MqttConnection:
    """Keeps a connection to one broker. `progress` grows while its thread lives.

    `refused` is the broker's reason if it has refused the very first connection, as for a wrong password.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        listener: Listener,
        session_expiry_s: int,
        will: Outgoing | None = None,
    ) -> None:
        """Prepare a connection with a persistent session of `session_expiry_s` seconds (0: a clean one).

        Raises TransportError if a TLS file can't be used.
        """
        self.progress = 0
        self.connected = False
        self.refused: str | None = None
        self.problem: str | None = None
        self.max_packet_bytes = 2**28
        self._broker = broker
        self._listener = listener
        self._generation = 0
        self._ever_connected = self._stopping = self._rejected = False
        self._connecting_since = 0.0
        self._backoff_s = FIRST_BACKOFF_S
        self._outbox: deque[Callable[[], None]] = deque()
        self._client = self._make_client(client_id, session_expiry_s, will)
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)

    def start(self) -> None:
        """Start the thread; the connection comes when the broker is there."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Disconnect and end the thread."""
        self._stopping = True
        self.post(lambda: None)
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def post(self, work: Callable[[], None]) -> None:
        """Have `work` done in the connection's thread; callable from any thread, never blocks."""
        self._outbox.append(work)
        try:
            self._wake_in.send(b"\0")
        except OSError:
            return  # full: the thread is awake already; closed: it has ended

    # The rest is for the connection's own thread: listeners and posted work.

    def publish(self, message: Outgoing) -> int | None:
        """Hand a message to paho, which keeps QoS 1 over reconnects. Returns its id, or None if it can't."""
        if message.qos == 0 and not self.connected:
            return None
        info = self._client.publish(
            message.topic,
            message.payload,
            message.qos,
            message.retain,
            _properties(message, PacketTypes.PUBLISH),
        )
        return (
            info.mid if info.rc in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN) else None
        )

    def subscribe(self, *topics: str, retained: bool = False, at_most_once: Sequence[str] = ()) -> None:
        """Subscribe at QoS 1; what is retained there comes only if wanted (MQTT 5, 3.8.3.1).

        Topics `at_most_once` are subscribed to at QoS 0: nothing of them is kept for an absent client.
        """
        handling = (
            SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE if retained else SubscribeOptions.RETAIN_DO_NOT_SEND
        )
        wanted = [(topic, 1) for topic in topics] + [(topic, 0) for topic in at_most_once]
        self._client.subscribe(
            [(topic, SubscribeOptions(qos=qos, retainHandling=handling)) for topic, qos in wanted]
        )

    def acknowledge(self, token: Token | None) -> None:
        """Acknowledge a delivery, unless it came over an earlier connection."""
        if token is not None and token[0] == self._generation and self.connected:
            self._client.ack(token[1], 1)

    def _make_client(self, client_id: str, session_expiry_s: int, will: Outgoing | None) -> Client:
        broker = self._broker
        client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTv5, manual_ack=True)
        client.connect_timeout = 5.0
        client.max_queued_messages_set(MAX_QUEUED)
        client.max_inflight_messages_set(MAX_INFLIGHT)
        if broker.username is not None:
            client.username_pw_set(broker.username, broker.password)
        if broker.tls:
            files = [
                str(f) if f else None for f in (broker.ca_file, broker.certificate_file, broker.key_file)
            ]
            try:
                client.tls_set(files[0], files[1], files[2])
            except (OSError, ValueError) as error:
                raise TransportError(f"broker {broker.address}: a TLS file can't be used: {error}") from None
        if will is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        client.on_socket_open = _send_at_once
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        properties = _Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = session_expiry_s
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        client.connect_async(
            broker.host,
            broker.port,
            broker.keepalive_s,
            clean_start=session_expiry_s == 0,
            properties=properties,
        )
        return client

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._serve()
            except Exception:
                log.exception("broker %s: the connection failed", self._broker.address)
            self.connected = False
            if not self._stopping:
                self._wait(self._backoff_s * random.uniform(0.8, 1.2))
                self._backoff_s = min(2 * self._backoff_s, LAST_BACKOFF_S)
        self._wake_in.close()
        self._wake_out.close()

    def _serve(self) -> None:
        """Connect and stay until the connection ends."""
        self._rejected = False
        self._connecting_since = time.monotonic()
        try:
            self._client.reconnect()
        except OSError as error:
            self._trouble(*_diagnose(error))
            return
        while (sock := self._client.socket()) is not None:
            self.progress += 1
            self._exchange(sock)
            self._work()
            self._client.loop_misc()
            if self.connected:
                self._listener.tick()
            elif time.monotonic() - self._connecting_since > CONNACK_S:
                self._trouble("no answer to CONNECT", "is it an MQTT broker?")
                return
            if self._stopping and not self._client.want_write():
                self._client.disconnect()

    def _exchange(self, sock: Any) -> None:
        pending = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
        writing = [sock] if self._client.want_write() else []
        readable, writable, _ = select.select([sock, self._wake_out], writing, [], 0 if pending else TICK_S)
        if self._wake_out in readable:
            self._wake_out.recv(4096)
        if sock in readable or pending:
            self._client.loop_read()
        if writable and self._client.socket() is not None:
            self._client.loop_write()

    def _wait(self, seconds: float) -> None:
        """Do posted work for `seconds`; what it publishes waits in paho."""
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            self.progress += 1
            if select.select([self._wake_out], [], [], min(left, TICK_S))[0]:
                self._wake_out.recv(4096)
            self._work()

    def _work(self) -> None:
        while self._outbox:
            try:
                self._outbox.popleft()()
            except Exception:
                log.exception("broker %s: posted work failed", self._broker.address)

    def _trouble(self, what: str, advice: str) -> None:
        """Log what is wrong with the connection, once as long as it stays the same."""
        said = f"broker {self._broker.address}: {what}; {advice}"
        if said != self.problem:
            log.warning("%s Trying again.", said)
        self.problem = said

    def _on_connect(
        self,
        _client: Client,
        _data: Any,
        flags: ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._rejected = True
            self._trouble(
                f"it refuses the connection: {reason}", "check user name, password and its access list."
            )
            if not self._ever_connected:
                self.refused = self.problem
            return
        self._generation += 1
        self.connected = self._ever_connected = True
        self.problem = None
        self._backoff_s = FIRST_BACKOFF_S
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", 2**28)
        log.info(
            "broker %s: connected, session %s",
            self._broker.address,
            "resumed" if flags.session_present else "new",
        )
        self._listener.connected()

    def _on_disconnect(
        self,
        _client: Client,
        _data: Any,
        _flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self.connected = False
        self._listener.disconnected()
        if self._stopping or self._rejected:
            return
        if reason.value == SESSION_TAKEN_OVER:
            self._backoff_s = LAST_BACKOFF_S
            self._trouble("another client took over this session", "give each node its own name.")
        else:
            self._trouble(f"the connection was lost ({reason})", "look at the broker's log if it stays away.")

    def _on_subscribe(
        self,
        _client: Client,
        _data: Any,
        _mid: int,
        reasons: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        refusals = {str(reason) for reason in reasons if reason.is_failure}
        if refusals:
            self._trouble(f"it refuses a subscription: {', '.join(refusals)}", "check its access list.")
        else:
            self._listener.subscribed()

    def _on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        properties = message.properties
        received = Received(
            topic=message.topic,
            payload=bytes(message.payload),
            retained=message.retain,
            repeated=message.dup,
            response_topic=getattr(properties, "ResponseTopic", None),
            correlation=getattr(properties, "CorrelationData", None),
            expiry_s=getattr(properties, "MessageExpiryInterval", None),
            token=(self._generation, message.mid) if message.qos else None,
        )
        try:
            self._listener.received(received)
        except Exception:
            log.exception("broker %s: a message could not be handled", self._broker.address)
            self.acknowledge(received.token)

    def _on_publish(
        self, _client: Client, _data: Any, mid: int, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._listener.published(mid, str(reason) if reason.is_failure else None)


def _send_at_once(_client: Client, _data: Any, sock: Any) -> None:
    """Switch Nagle's algorithm off: with delayed acknowledgements it adds 40 ms to each small packet."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _properties(message: Outgoing, kind: int) -> Properties:
    properties: Properties = _Properties(kind)
    properties.PayloadFormatIndicator = 1  # UTF-8
    properties.ContentType = "application/json"
    if message.correlation is not None:
        properties.CorrelationData = message.correlation
    if message.response_topic is not None:
        properties.ResponseTopic = message.response_topic
    if message.expiry_s is not None:
        properties.MessageExpiryInterval = message.expiry_s
    return properties


def _diagnose(error: OSError) -> tuple[str, str]:
    """Say what is wrong, and what to do about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}", "set ca_file to its authority's."
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason}", "check that its port is the one with TLS, and the certificates."
    said = error.strerror or str(error)
    return f"can't be reached: {said}", "is it running, and are host and port right?"
