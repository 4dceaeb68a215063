"""The queue of messages of QoS 1: order, packet identifiers and the broker's limits, without a network."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge.transports.mqtt.messages import Outgoing
from edge.transports.mqtt.outgoing import Entry, OutgoingQueue


class QueueMachine(RuleBasedStateMachine):
    """A broker that acknowledges, rejects and loses connections; checks the result of each message."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = OutgoingQueue()
        self.window = 20
        self.added = 0
        self.sent: list[Entry] = []  # over this connection and not acknowledged
        self.finished: list[int] = []
        self.highest = -1  # of all messages sent so far

    @rule()
    def add(self) -> None:
        number = self.added
        self.added += 1
        assert self.queue.add(Outgoing("t", str(number)), lambda _: self.finished.append(number), keep=True)

    @rule(count=st.integers(1, 30))
    def send(self, count: int) -> None:
        for _ in range(count):
            entry = self.queue.next()
            if entry is None:
                break
            number = int(entry.message.payload)
            assert entry.duplicate == (number <= self.highest)
            assert entry.identifier not in {other.identifier for other in self.sent}
            assert not self.sent or number > int(self.sent[-1].message.payload)
            self.highest = max(self.highest, number)
            self.sent.append(entry)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        entry = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        assert self.queue.acknowledged(entry.identifier) is entry
        entry.finish(None)
        assert self.queue.acknowledged(entry.identifier) is None

    @rule(blamed=st.booleans(), window=st.integers(1, 30))
    def lose_connection(self, blamed: bool, window: int) -> None:
        for entry in self.queue.closed(blamed):
            entry.finish("given up")
        self.sent.clear()
        self.window = min(window, 20)
        self.queue.opened(window)

    @invariant()
    def no_more_are_on_their_way_than_the_broker_takes(self) -> None:
        assert len(self.sent) <= max(self.window, 1)

    @invariant()
    def each_message_is_finished_once(self) -> None:
        assert len(set(self.finished)) == len(self.finished)

    def teardown(self) -> None:
        self.lose_connection(False, 20)
        while (entry := self.queue.next()) is not None:
            assert self.queue.acknowledged(entry.identifier) is entry
            entry.finish(None)
        assert sorted(self.finished) == list(range(self.added))


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_every_message_is_sent_in_order_until_it_is_acknowledged_or_given_up = QueueMachine.TestCase


def test_a_packet_identifier_is_not_used_twice_after_65535() -> None:
    queue = OutgoingQueue()
    queue.add(Outgoing("t", "first"), None, keep=True)
    first = queue.next()
    assert first is not None
    for _ in range(0xFFFF - 1):
        queue.new_identifier()
    queue.add(Outgoing("t", "second"), None, keep=True)
    second = queue.next()
    assert second is not None
    assert (first.identifier, second.identifier) == (1, 2)
