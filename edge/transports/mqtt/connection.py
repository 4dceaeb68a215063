"""A supervised MQTT connection: paho-mqtt, all of it in one thread of our own.

paho is not given its own thread, because an exception in a callback would end that thread while
`is_connected()` stays true. Here one thread connects, reads, writes, calls the Listener and comes back with
backoff from whatever happens; other threads only `post` work to it. Nothing in a Listener may block.

Acknowledgements are manual. A delivery's token names its connection, because a packet identifier means
nothing on the next one (MQTT 5, 4.4): the broker delivers again what was not acknowledged.

The broker's Receive Maximum, Maximum Packet Size and Server Keep Alive, which paho never reads, are honoured,
and our own limits announced. A message that it ends the connection for, and would again each time that it
is sent, is found by sending one at a time, and given up. MQTT 5 is spoken, and 3.1.1 with a broker that
refuses version 5.
"""

from __future__ import annotations

import contextlib
import logging
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge.endpoints import Broker
from edge.errors import TransportError
from edge.transports.mqtt.messages import Listener, Outgoing, Received, Token, connect_properties
from edge.transports.mqtt.paho_client import PahoClient
from edge.transports.mqtt.reasons import (
    BLAMED,
    NO_ROOM,
    SESSION_TAKEN_OVER,
    UNSUPPORTED_VERSION,
    advice,
    diagnose,
)

log = logging.getLogger(__name__)

TICK_S = 1.0  # the thread shows that it lives at least this often
CONNACK_S = 10.0  # a broker that has not answered CONNECT by then is given up
CONNECTING_S = 120.0  # it is not hung before that: a name that no name server answers for takes a minute
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.5, 10.0
RESUBSCRIBE_S = 10.0  # after the broker has refused a subscription
READ_S = 0.05  # what comes without end is read for so long before answers go out
MAX_PACKET_BYTES = 1024 * 1024  # what the broker may send us; a longer request is dropped by the broker
RECEIVE_MAXIMUM = 2048  # unacknowledged messages that the broker may send us: twice the longest queue
MAX_INFLIGHT = 20  # QoS 1 messages without an acknowledgement, if the broker takes so many
MAX_QUEUED = 1024  # QoS 1 messages that wait for the broker
NO_LIMIT_BYTES = 2**28  # of a packet, by MQTT's own encoding


class MqttConnection:
    """Keeps a connection to one broker.

    `refused` is the broker's reason if it has refused the very first connection, as for a wrong password, and
    not only for now.
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
        self.connected = False
        self.refused: str | None = None
        self.problem: str | None = None
        self._broker = broker
        self._client_id, self._session_expiry_s, self._will = client_id, session_expiry_s, will
        self.max_packet_bytes = NO_LIMIT_BYTES
        self._window = MAX_INFLIGHT
        self._steps = self._count = 0
        self._connecting: float | None = None  # since when it waits for a name, the network or TLS
        self._waiting: deque[tuple[int, Outgoing]] = deque()
        self._inflight: dict[int, tuple[int, Outgoing]] = {}  # by paho's message id
        self._suspects = 0  # of those that wait, the first so many; they go out one at a time
        self._subscribed = False  # the subscriptions, over this connection
        self._listener = listener
        self._generation = 0
        self._ever_connected = self._stopping = self._rejected = self._renew = False
        self._connected_at = self._stop_by = 0.0
        self._subscribe_at = float("inf")  # once more, after a refusal
        self._backoff_s = FIRST_BACKOFF_S
        self._outbox: deque[Callable[[], None]] = deque()
        self._version: MQTTProtocolVersion = MQTTv5
        self._client = self._make_client()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)

    def start(self) -> None:
        """Start the thread; the connection comes when the broker is there."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Send what waits, disconnect and end the thread; at most about `timeout_s` seconds."""
        self._stop_by = time.monotonic() + timeout_s
        self._stopping = True
        self.post(lambda: None)
        self._thread.join(timeout_s)

    @property
    def progress(self) -> float:
        """Grows while the thread lives, also while it waits to be connected, for up to CONNECTING_S."""
        since = self._connecting
        return self._steps + (0 if since is None else min(time.monotonic() - since, CONNECTING_S))

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

    def publish(self, message: Outgoing, keep: bool = False) -> int | None:
        """Publish a message; at QoS 1 it waits for the broker and gets a number, which `published` is told.

        Returns None at QoS 0, and at QoS 1 if it is dropped because MAX_QUEUED messages wait already; with
        `keep` it is not: then it is the caller who bounds them.
        """
        if message.qos == 0:
            if self.connected and not self._suspects and message.packet_bytes <= self.max_packet_bytes:
                self._hand_over(message)
            return None
        if len(self._waiting) >= MAX_QUEUED and not keep:
            return None
        self._count += 1
        self._waiting.append((self._count, message))
        return self._count

    def subscribe(self, *topics: str, retained: bool = False, at_most_once: Sequence[str] = ()) -> None:
        """Subscribe at QoS 1; what is retained there comes only if wanted (MQTT 5, 3.8.3.1; always in 3.1.1).

        Topics `at_most_once` are subscribed to at QoS 0: nothing of them is kept for an absent client.
        """
        handling = (
            SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE if retained else SubscribeOptions.RETAIN_DO_NOT_SEND
        )
        wanted = [(topic, 1) for topic in topics] + [(topic, 0) for topic in at_most_once]
        if self._version == MQTTv311:
            self._client.subscribe(wanted)
            return
        self._client.subscribe(
            [(topic, SubscribeOptions(qos=qos, retainHandling=handling)) for topic, qos in wanted]
        )

    def acknowledge(self, token: Token | None) -> None:
        """Acknowledge a delivery, unless it came over an earlier connection."""
        if token is not None and self.pending(token):
            self._client.ack(token[1], 1)

    def pending(self, token: Token | None) -> bool:
        """Whether a delivery can be acknowledged: there is one, and it came over this connection."""
        return token is not None and token[0] == self._generation and self.connected

    def _make_client(self) -> PahoClient:
        broker, will, clean = self._broker, self._will, self._session_expiry_s == 0
        client = PahoClient(
            self._on_message,
            CallbackAPIVersion.VERSION2,
            self._client_id,
            clean_session=clean if self._version == MQTTv311 else None,
            protocol=self._version,
            manual_ack=True,
        )
        client.connect_timeout = 5.0
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
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        if self._version == MQTTv311:
            client.connect_async(broker.host, broker.port, broker.keepalive_s)
            return client
        properties = connect_properties(self._session_expiry_s, MAX_PACKET_BYTES, RECEIVE_MAXIMUM)
        client.connect_async(
            broker.host, broker.port, broker.keepalive_s, clean_start=clean, properties=properties
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
        if self._renew:
            self._start_over()
        self._connecting = time.monotonic()
        try:
            self._client.reconnect()
        except OSError as error:
            self._trouble(*diagnose(error))
            return
        finally:
            self._connecting = None
        asked = time.monotonic()
        while (sock := self._client.socket()) is not None:
            self._steps += 1
            self._exchange(sock)
            self._work()
            self._client.loop_misc()
            if self.connected:
                self._listener.tick()
                self._subscribe_again()
                self._send_waiting()
            elif time.monotonic() - asked > CONNACK_S:
                self._trouble("no answer to CONNECT", "is it an MQTT broker?")
                return
            if self._stopping and (not self._unsent or time.monotonic() > self._stop_by):
                self._client.disconnect()
            self._flush()

    @property
    def _unsent(self) -> bool:
        return self._to_write or (self.connected and bool(self._waiting))

    @property
    def _to_write(self) -> bool:
        sock: Any = self._client.socket()
        return self._client.want_write() or (sock is not None and bool(sock.unsent))

    def _exchange(self, sock: Any) -> None:
        """Wait for something to read, to write or to do; read what has come at once, for a moment at most."""
        pending = sock.pending() > 0
        writing = [sock] if self._to_write else []
        readable, writable, _ = select.select([sock, self._wake_out], writing, [], 0 if pending else TICK_S)
        if self._wake_out in readable:
            self._wake_out.recv(4096)
        if sock in readable or pending:
            until = time.monotonic() + READ_S
            self._client.loop_read()
            while sock.pending() and self._client.socket() is sock and time.monotonic() < until:
                self._client.loop_read()
        if writable and self._client.socket() is not None:
            self._client.loop_write()

    def _subscribe_again(self) -> None:
        """Try again what the broker has refused, when it is time: its access list may have been mended."""
        if time.monotonic() >= self._subscribe_at:
            self._subscribe_at = float("inf")
            self._listener.connected()

    def _flush(self) -> None:
        """Write what paho has handed over; a connection that has ended is noticed when it is read."""
        sock: Any = self._client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.flush()

    def _send_waiting(self) -> None:
        """Hand over as many messages as the broker takes without an acknowledgement (its Receive Maximum)."""
        if self._suspects and not self._subscribed:
            return  # were the connection to end now, it would be for the subscriptions
        while self._waiting and len(self._inflight) < (1 if self._suspects else self._window):
            number, message = self._waiting.popleft()
            if message.packet_bytes > self.max_packet_bytes:
                self._suspects = max(0, self._suspects - 1)
                refusal = f"its packet has {message.packet_bytes} bytes, {self.max_packet_bytes} are allowed"
                self._listener.published(number, refusal)
            else:
                self._inflight[self._hand_over(message)] = number, message

    def _start_over(self) -> None:
        """Take a new client of paho's; what the old one has still to send waits once more."""
        self._client = self._make_client()
        self._waiting.extendleft(reversed(self._inflight.values()))
        self._inflight.clear()
        self._renew = False

    def _hand_over(self, message: Outgoing) -> int:
        """Give a message to paho, which keeps one of QoS 1 over reconnects until it is acknowledged."""
        properties = message.properties() if self._version == MQTTv5 else None
        return self._client.publish(
            message.topic, message.payload, message.qos, message.retain, properties
        ).mid

    def _wait(self, seconds: float) -> None:
        """Do posted work for `seconds`; what it publishes waits."""
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            self._steps += 1
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
        if reason.value == UNSUPPORTED_VERSION and self._version == MQTTv5 and not self._ever_connected:
            log.info("broker %s: it knows no MQTT 5; going on with 3.1.1", self._broker.address)
            self._version, self._rejected, self._renew = MQTTv311, True, True
            return
        if reason.is_failure:
            self._rejected = True
            self._trouble(f"it refuses the connection: {reason}", advice(reason, properties, self._client_id))
            if not self._ever_connected and reason.value not in NO_ROOM:
                self.refused = self.problem
            return
        self._client.keep_alive(getattr(properties, "ServerKeepAlive", 0))
        self._window = min(MAX_INFLIGHT, getattr(properties, "ReceiveMaximum", MAX_INFLIGHT))
        if len(self._inflight) > self._window:  # paho is about to send all of them again, whatever is allowed
            self._rejected = self._renew = True
            self._client.disconnect()
            return
        self._generation += 1
        self.connected = self._ever_connected = True
        self._subscribed = False
        self.problem = None
        self._connected_at, self._subscribe_at = time.monotonic(), float("inf")
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", NO_LIMIT_BYTES)
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
        flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        lasted = time.monotonic() - self._connected_at > LAST_BACKOFF_S
        if self.connected:
            self.connected = False
            if lasted:  # else two nodes of one name may be taking the session from each other
                self._backoff_s = FIRST_BACKOFF_S
            self._listener.disconnected()
            if flags.is_disconnect_packet_from_server and reason.value in BLAMED:
                self._suspect(str(reason))
        if self._stopping or self._rejected:
            return
        if reason.value == SESSION_TAKEN_OVER:
            self._backoff_s = LAST_BACKOFF_S
            self._trouble("another client took over this session", "give each node its own name.")
        else:
            often = "look at the broker's log; if it happens often, has another node the same name?"
            rare = "look at the broker's log if it stays away."
            self._trouble(f"the connection was lost ({reason})", rare if lasted else often)

    def _suspect(self, reason: str) -> None:
        """Send what was on its way one at a time from now on; give it up if it was the only one already."""
        if self._suspects:
            for number, message in self._inflight.values():
                log.error("broker %s: a message to %r is given up", self._broker.address, message.topic)
                self._listener.published(number, f"it ended the connection: {reason}")
            self._suspects -= len(self._inflight)
            self._inflight.clear()
        else:
            self._suspects = len(self._inflight)
        self._backoff_s = FIRST_BACKOFF_S
        self._renew = True  # or paho would send all of them at once

    def _on_subscribe(
        self,
        _client: Client,
        _data: Any,
        _mid: int,
        reasons: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        self._subscribed = True
        refusals = {str(reason) for reason in reasons if reason.is_failure}
        if refusals:
            self._trouble(f"it refuses a subscription: {', '.join(refusals)}", "check its access list.")
            self._subscribe_at = time.monotonic() + RESUBSCRIBE_S
        else:
            self.problem = None
            self._listener.subscribed()

    def _on_message(self, first: int, packet: bytes) -> None:
        received = Received.read(first, packet, self._version == MQTTv5, self._generation)
        try:
            self._listener.received(received)
        except Exception:
            log.exception("broker %s: a message could not be handled", self._broker.address)
            self.acknowledge(received.token)

    def _on_publish(
        self, _client: Client, _data: Any, mid: int, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if mid in self._inflight:
            self._suspects = max(0, self._suspects - 1)
            self._listener.published(self._inflight.pop(mid)[0], str(reason) if reason.is_failure else None)
