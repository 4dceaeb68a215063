"""An MQTT connection with a thread of its own that reconnects after every failure.

The thread connects, reads, writes and calls the Listener. After any failure it connects again, with backoff.
Other threads only `post` work to it. A Listener must not block.

Acknowledgements are manual. A delivery's token names its connection, because a packet identifier is not valid
on the next one (MQTT 5, 4.4). The broker redelivers unacknowledged messages.

The broker's Receive Maximum, Maximum Packet Size and Server Keep Alive are honoured, and our own limits are
announced. The protocol is MQTT 5, or 3.1.1 if the broker refuses version 5.
"""

from __future__ import annotations

import logging
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from edge.endpoints import Broker
from edge.transports.mqtt import codec, reasons
from edge.transports.mqtt.codec import Acknowledgement, Connack, MalformedPacket
from edge.transports.mqtt.messages import Listener, Outgoing, Token
from edge.transports.mqtt.outgoing import Done, OutgoingQueue
from edge.transports.mqtt.problems import Problems
from edge.transports.mqtt.stream import CHUNK_BYTES, Stream, tls_context

log = logging.getLogger(__name__)

TICK_S = 1.0  # the thread reports progress at least this often
CONNACK_S = 10.0  # time for the broker to answer CONNECT
CONNECTING_S = 120.0  # no progress for this long is not a hang: resolving a name can take a minute
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.5, 10.0
RESUBSCRIBE_S = 10.0  # until a refused subscription is tried again
READ_S = 0.05  # the longest time spent reading a stream of messages before answers are sent
MAX_PACKET_BYTES = 1024 * 1024  # our Maximum Packet Size; the broker drops longer requests
MAX_UNSENT_BYTES = 1024 * 1024  # waiting for the network; above this, QoS 0 messages are dropped
RECEIVE_MAXIMUM = 2048  # our Receive Maximum: twice the longest queue


class ConnectionEnded(Exception):
    """The connection has ended; the message says why. `reason` is that of the broker's DISCONNECT."""

    def __init__(self, why: str, reason: int | None = None) -> None:
        super().__init__(why)
        self.reason = reason


class MqttConnection:
    """Keeps a connection to one broker.

    `refused` is the broker's reason if it refused the first connection permanently, e.g. for a wrong
    password. `problem` is the present problem, or None.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        listener: Listener,
        session_expiry_s: int,
        will: Outgoing | None = None,
        problems: Problems | None = None,
    ) -> None:
        """Prepare a connection with a persistent session of `session_expiry_s` seconds (0: a clean start).

        Connections to the same broker share `problems`. Raises TransportError if a TLS file can't be used.
        """
        self.connected = False
        self.refused: str | None = None
        self._broker, self._listener = broker, listener
        self._client_id, self._session_expiry_s, self._will = client_id, session_expiry_s, will
        self._problems = problems or Problems()
        self._context = tls_context(broker)
        self._version = codec.V5
        self._stream: Stream | None = None
        self._received = bytearray()
        self._queue = OutgoingQueue()
        self._outbox: deque[Callable[[], None]] = deque()
        self._generation = 0  # of connections
        self._max_packet_bytes = codec.NO_LIMIT
        self._keepalive_s = broker.keepalive_s
        self._read_at = self._wrote_at = self._connected_at = self._stop_by = 0.0
        self._ping_at: float | None = None  # when the unanswered PINGREQ was sent
        self._subscribed = False  # over this connection
        self._subscribe_at = float("inf")  # when to subscribe again after a refusal
        self._ever_connected = self._stopping = self._warned = False
        self._backoff_s = FIRST_BACKOFF_S
        self._steps = 0
        self._connecting: float | None = None  # when the wait for DNS, TCP or TLS began
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)

    def start(self) -> None:
        """Start the thread; it connects as soon as the broker is reachable."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Send waiting messages, disconnect and end the thread; takes at most about `timeout_s` seconds."""
        self._stop_by = time.monotonic() + timeout_s
        self._stopping = True
        self.post(lambda: None)
        self._thread.join(timeout_s)

    @property
    def problem(self) -> str | None:
        """The problem of the connection, in one line; None if there is none."""
        return self._problems.of(self)

    @property
    def progress(self) -> float:
        """Grows while the thread works, and for up to CONNECTING_S while it connects."""
        since = self._connecting
        return self._steps + (0 if since is None else min(time.monotonic() - since, CONNECTING_S))

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def post(self, work: Callable[[], None]) -> None:
        """Run `work` in the connection's thread; callable from any thread, never blocks."""
        self._outbox.append(work)
        if threading.current_thread() is not self._thread:
            try:
                self._wake_in.send(b"\0")
            except OSError:
                return  # full: the thread is already awake; closed: it has ended

    # The rest is for the connection's own thread: listeners and posted work.

    def publish(self, message: Outgoing, keep: bool = False, done: Done | None = None) -> bool:
        """Publish a message. At QoS 1 it is queued, and `done` is called with the outcome.

        Returns False if it is dropped: at QoS 0 if it can't be sent now, at QoS 1 if too many messages wait.
        With `keep` it is never dropped; the caller limits the number of such messages.
        """
        if message.qos:
            return self._queue.add(message, done, keep)
        if not self.connected or self._queue.suspicious or self._unsent_bytes > MAX_UNSENT_BYTES:
            return False
        packet = codec.publish(message, self._version)
        if len(packet) > self._max_packet_bytes:
            return False
        self._write(packet)
        return True

    def packet_bytes(self, message: Outgoing) -> int:
        """Return the size of a message's packet in bytes."""
        return len(codec.publish(message, self._version))

    @property
    def max_packet_bytes(self) -> int:
        """The largest packet that the broker accepts, in bytes."""
        return self._max_packet_bytes

    def subscribe(self, *topics: str, retained: bool = False, at_most_once: Sequence[str] = ()) -> None:
        """Subscribe at QoS 1; retained messages are sent only on request (MQTT 5, 3.8.3.1; always in 3.1.1).

        Topics `at_most_once` use QoS 0: the broker stores no messages on them for an absent client.
        """
        filters = [(topic, 1) for topic in topics] + [(topic, 0) for topic in at_most_once]
        self._write(codec.subscribe(self._version, self._queue.new_identifier(), filters, retained))

    def acknowledge(self, token: Token | None) -> None:
        """Acknowledge a delivery, unless it arrived on an earlier connection."""
        if token is not None and self.can_acknowledge(token):
            self._write(codec.puback(token[1]))

    def can_acknowledge(self, token: Token | None) -> bool:
        """Whether a delivery can be acknowledged: it arrived on this connection."""
        return token is not None and token[0] == self._generation and self.connected

    def shut_down(self) -> None:
        """End the connection as a network failure would, from any thread; the thread connects again."""
        stream = self._stream
        if stream is not None:
            stream.shut_down()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._serve()
                if self.connected:
                    self._ended("we disconnected")
            except ConnectionEnded as error:
                self._ended(str(error), error.reason)
            except OSError as error:
                self._ended(error.strerror or type(error).__name__)
            except MalformedPacket as error:
                self._write(codec.disconnect(self._version, reasons.MALFORMED_PACKET))
                self._ended(f"the broker sent a malformed packet: {error}")
            except Exception:
                log.exception("broker %s: the connection failed", self._broker.address)
                self._ended("internal error")
            finally:
                if self._stream is not None:
                    self._stream.close()
                self._stream = None
            if not self._stopping:
                self._wait(self._backoff_s * random.uniform(0.8, 1.2))
                self._backoff_s = min(2 * self._backoff_s, LAST_BACKOFF_S)
        self._wake_in.close()
        self._wake_out.close()

    def _serve(self) -> None:
        """Connect and serve until it ends. Raises ConnectionEnded, OSError or MalformedPacket."""
        self._connecting = time.monotonic()
        try:
            self._stream = Stream(self._broker, self._context)
        except OSError as error:
            self._trouble(*reasons.diagnose(error))
            return
        finally:
            self._connecting = None
        self._begin()
        asked = time.monotonic()
        while True:
            self._steps += 1
            self._exchange(self._stream)
            self._work()
            if self._stream is None:
                return  # refused
            if self.connected:
                self._send_waiting()
                self._stream.flush()  # answers do not wait for the disk
                self._listener.tick()
                self._subscribe_again()
                self._send_waiting()
            elif time.monotonic() - asked > CONNACK_S:
                self._trouble("no answer to CONNECT", "is it an MQTT broker?")
                return
            self._keep_alive()
            if self._stopping and self._may_stop:
                self._write(codec.disconnect(self._version))
                return
            self._stream.flush()

    @property
    def _may_stop(self) -> bool:
        """Whether everything is sent, or the time for it has run out."""
        unsent = self._unsent_bytes > 0 or (self.connected and self._queue.waiting)
        return not unsent or time.monotonic() > self._stop_by

    @property
    def _unsent_bytes(self) -> int:
        return 0 if self._stream is None else len(self._stream.unsent)

    def _begin(self) -> None:
        """Send CONNECT."""
        self._received.clear()
        self._ping_at, self._keepalive_s = None, self._broker.keepalive_s
        self._read_at = time.monotonic()
        broker = self._broker
        limits = {codec.RECEIVE_MAXIMUM: RECEIVE_MAXIMUM, codec.MAXIMUM_PACKET_SIZE: MAX_PACKET_BYTES}
        self._write(
            codec.connect(
                *(self._version, self._client_id, broker.keepalive_s, self._session_expiry_s),
                *(broker.username, broker.password, self._will, limits),
            )
        )

    def _write(self, packet: bytes) -> None:
        """Send a packet; without a connection it is dropped."""
        if self._stream is not None:
            self._stream.unsent += packet
            self._wrote_at = time.monotonic()

    def _exchange(self, stream: Stream) -> None:
        """Wait until there is something to read, write or do; then read, for at most READ_S."""
        silence_s = max(0.0, self._silence_left()) if self.connected else TICK_S
        wait_s = 0.0 if self._outbox or stream.pending else min(TICK_S, silence_s)
        ends: tuple[Stream | socket.socket, ...] = (stream, self._wake_out)
        readable, writable, _ = select.select(ends, ends[:1] if stream.unsent else (), (), wait_s)
        if self._wake_out in readable:
            self._wake_out.recv(4096)
        if writable:
            stream.flush()
        if stream not in readable and not stream.pending:
            return
        until = time.monotonic() + READ_S
        more = True
        while more and self._stream is stream and (data := stream.read()) is not None:
            if not data:
                raise ConnectionEnded("the broker closed it")
            self._received += data
            self._read_at = time.monotonic()
            limit = MAX_PACKET_BYTES if self._version == codec.V5 else codec.NO_LIMIT
            for first, body in codec.split(self._received, limit):
                self._take(first, body)
            more = (len(data) == CHUNK_BYTES or stream.pending) and self._read_at < until

    def _take(self, first: int, body: bytes) -> None:
        """Handle a packet. Raises MalformedPacket or ConnectionEnded."""
        kind = first & 0xF0
        if kind == codec.CONNACK and not self.connected:
            self._on_connack(codec.read_connack(body))
        elif not self.connected:
            return  # no other packet is valid before CONNACK
        elif kind == codec.PUBLISH:
            self._on_publish(first, body)
        elif kind == codec.PUBACK:
            self._on_puback(codec.read_puback(body))
        elif kind == codec.SUBACK:
            self._on_suback(codec.read_suback(body, self._version))
        elif kind == codec.PINGRESP:
            self._ping_at = None
        elif kind == codec.DISCONNECT:
            reason = codec.read_disconnect(body)
            raise ConnectionEnded(reasons.name(reason), reason)
        else:
            raise MalformedPacket(f"packet type {first >> 4} is unexpected")

    def _on_connack(self, answer: Connack) -> None:
        if reasons.is_failure(answer.reason):
            self._on_refusal(answer)
            return
        self._generation += 1
        self.connected = self._ever_connected = True
        self._subscribed = self._warned = False
        self._problems.clear(self)
        self._connected_at, self._subscribe_at = time.monotonic(), float("inf")
        self._max_packet_bytes = answer.number(codec.MAXIMUM_PACKET_SIZE, codec.NO_LIMIT)
        wanted_s = answer.number(codec.SERVER_KEEP_ALIVE, 0)
        self._keepalive_s = min(self._broker.keepalive_s, wanted_s or self._broker.keepalive_s)
        self._queue.opened(answer.number(codec.RECEIVE_MAXIMUM, 0xFFFF))
        if not answer.session_present:
            self._queue.forget_session()
        session = "resumed" if answer.session_present else "new"
        log.info("broker %s: connected as %s, session %s", self._broker.address, self._client_id, session)
        self._listener.connected()

    def _on_refusal(self, answer: Connack) -> None:
        """Close a refused connection; the next one can use the older version."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        reason = answer.reason
        if reason == reasons.UNSUPPORTED_VERSION and self._version == codec.V5 and not self._ever_connected:
            log.info("broker %s: it does not support MQTT 5; using 3.1.1", self._broker.address)
            self._version = codec.V311
            return
        what = f"it refuses the connection: {reasons.name(reason)}"
        fix = reasons.advice(reason, answer.text(codec.SERVER_REFERENCE), self._client_id)
        final = not self._ever_connected and reason not in reasons.NO_ROOM
        self._trouble(what, fix, trying_again=not final)
        if final:
            self.refused = self.problem

    def _on_publish(self, first: int, body: bytes) -> None:
        try:
            received = codec.read_publish(first, body, self._version, self._generation)
        except MalformedPacket as error:
            self._drop(first, body, error)
            return
        try:
            self._listener.received(received)
        except Exception:
            log.exception("broker %s: a message could not be handled", self._broker.address)
            self.acknowledge(received.token)

    def _drop(self, first: int, body: bytes, error: MalformedPacket) -> None:
        """Acknowledge a malformed message; otherwise it is redelivered on each new connection."""
        if not self._warned:
            log.warning("broker %s: a malformed message is dropped: %s", self._broker.address, error)
            self._warned = True
        identifier = codec.publish_identifier(first, body)
        if identifier is not None:
            self._write(codec.puback(identifier))

    def _on_puback(self, answer: Acknowledgement) -> None:
        entry = self._queue.acknowledged(answer.identifier)
        if entry is not None:
            reason = answer.reasons[0]
            entry.finish(reasons.name(reason) if reasons.is_failure(reason) else None)

    def _on_suback(self, answer: Acknowledgement) -> None:
        self._subscribed = True
        refusals = sorted({reasons.name(reason) for reason in answer.reasons if reasons.is_failure(reason)})
        if refusals:
            self._trouble(f"it refuses a subscription: {', '.join(refusals)}", "check its access list")
            self._subscribe_at = time.monotonic() + RESUBSCRIBE_S
        else:
            self._problems.clear(self)
            self._listener.subscribed()

    def _subscribe_again(self) -> None:
        """Repeat refused subscriptions when due: the access list can have been corrected."""
        if time.monotonic() >= self._subscribe_at:
            self._subscribe_at = float("inf")
            self._listener.connected()

    def _send_waiting(self) -> None:
        """Send as many messages as the broker accepts now."""
        if self._queue.suspicious and not self._subscribed:
            return  # until the subscriptions are acknowledged, they are what the broker would reject
        while (entry := self._queue.next()) is not None:
            packet = codec.publish(entry.message, self._version, entry.identifier, entry.duplicate)
            if len(packet) > self._max_packet_bytes:
                self._queue.acknowledged(entry.identifier)
                entry.finish(f"its packet has {len(packet)} bytes, {self._max_packet_bytes} are allowed")
            else:
                self._write(packet)

    def _silence_left(self) -> float:
        """Seconds until a PINGREQ is due or its answer is overdue."""
        since = min(self._read_at, self._wrote_at) if self._ping_at is None else self._ping_at
        return since + self._keepalive_s - time.monotonic()

    def _keep_alive(self) -> None:
        """Send a PINGREQ after silence. Raises ConnectionEnded if the last one has no answer."""
        if not self.connected or self._silence_left() > 0:
            return
        if self._ping_at is not None:
            raise ConnectionEnded("no answer to PINGREQ")
        self._ping_at = time.monotonic()
        self._write(codec.pingreq())

    def _wait(self, seconds: float) -> None:
        """Run posted work for `seconds`; messages that it publishes are queued."""
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

    def _trouble(self, what: str, fix: str, trying_again: bool = True) -> None:
        """Record a problem of the connection; it is logged once, unless it ends the daemon."""
        problem = f"broker {self._broker.address}: {what}; {fix}"
        if trying_again:
            self._problems.report(self, problem)
        else:
            self._problems.note(self, problem)

    def _ended(self, why: str, reason: int | None = None) -> None:
        """Record that the connection has ended; `reason` is that of the broker's DISCONNECT."""
        if not self.connected:
            if not self._stopping:
                self._trouble(f"the connection was lost ({why})", "look at the broker's log if it stays away")
            return
        self.connected = False
        lasted = time.monotonic() - self._connected_at > LAST_BACKOFF_S
        if lasted:  # otherwise two nodes with one name could take over each other's session
            self._backoff_s = FIRST_BACKOFF_S
        blamed = reason in reasons.BLAMED
        if blamed:
            self._backoff_s = FIRST_BACKOFF_S
        for entry in self._queue.closed(blamed):
            log.error("broker %s: a message to %r is given up", self._broker.address, entry.message.topic)
            entry.finish(f"it ended the connection: {why}")
        self._listener.disconnected()
        if self._stopping:
            return
        if reason == reasons.SESSION_TAKEN_OVER:
            self._backoff_s = LAST_BACKOFF_S
            self._trouble("another client took over this session", "give each node its own name")
            return
        fix = "look at the broker's log"
        fix += " if it stays away" if lasted else "; if it happens often, has another node the same name?"
        self._trouble(f"the connection was lost ({why})", fix)
