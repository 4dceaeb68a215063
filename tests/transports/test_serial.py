"""The serial transport over real ptys: frames, noise, unplugged cables and missing ports."""

import json
import os
import select
import threading
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import serial

from benchmarks.startup import ask_over
from edge.client import links
from edge.client.links import SerialLink
from edge.endpoints import SerialConfig
from edge.errors import TransportError
from edge.protocol.framing import encode
from edge.protocol.messages import Answer, Final, Request, Timings, Usage
from edge.requests.engine import Engine
from edge.requests.journal import Journal
from edge.requests.journaled_engine import JournaledEngine
from edge.transports.serial import port as serial_port
from edge.transports.serial.port import MAX_WAITING_BYTES
from edge.transports.serial.transport import MAX_LINE_BYTES, SerialTransport
from tests.support.counterparts import WAIT_S, PtyPair, wait_for
from tests.support.serial_board import SerialBoard
from tests.support.speller import Speller


@dataclass
class Node:
    """A transport with an engine and a Speller behind it."""

    speller: Speller
    engine: Engine
    transport: SerialTransport

    @classmethod
    def start(cls, port: Path, lenient: bool = False, flow_control: str = "none") -> "Node":
        speller = Speller()
        engine = Engine(speller, queue_length=3, partial_interval_s=0)
        config = SerialConfig(str(port), 115_200, flow_control, lenient)
        node = cls(speller, engine, SerialTransport(config, "pump", JournaledEngine(engine, Journal(None))))
        engine.start()
        node.transport.start()
        return node

    def stop(self, timeout_s: float = WAIT_S) -> None:
        self.speller.gate.set()
        self.engine.stop(WAIT_S)
        self.transport.stop(timeout_s)
        wait_for(lambda: not self.transport.port.alive)


@pytest.fixture
def board(ptys: PtyPair) -> Iterator[SerialBoard]:
    board = SerialBoard(ptys.far)
    yield board
    board.close()


@pytest.fixture
def node(ptys: PtyPair, board: SerialBoard) -> Iterator[Node]:
    node = Node.start(ptys.near)
    wait_for(lambda: node.transport.port.is_open)  # opening it discards what came before
    yield node
    node.stop()


def request(name: str, prompt: str = "abc def", **fields: Any) -> str:
    return Request(name, prompt, **fields).to_json()


def test_the_daemon_sends_hello_when_the_port_opens_and_on_request(node: Node, board: SerialBoard) -> None:
    hello = {"type": "hello", "protocol": 1, "node": "pump"}
    assert board.receive() == hello
    board.send('{"type":"hello"}')
    assert board.receive() == hello


def test_a_request_is_acknowledged_and_gets_partials_and_one_final(node: Node, board: SerialBoard) -> None:
    board.receive("hello")
    board.send(request("7"))
    assert board.receive() == {"type": "ack", "id": "7"}
    assert board.receive() == {"type": "partial", "id": "7", "seq": 0, "text": "cba "}
    assert board.receive() == {"type": "partial", "id": "7", "seq": 1, "text": "fed "}
    final = board.receive()
    assert (final["type"], final["id"], final["text"]) == ("final", "7", "cba fed ")


def test_a_corrupt_frame_is_refused_so_that_it_is_sent_again(node: Node, board: SerialBoard) -> None:
    frame = encode(request("7"))
    board.write(frame.replace(b"abc", b"abd"))
    assert board.receive("nak", "ack") == {"type": "nak", "reason": "crc"}
    board.write(frame[:-9] + b"\n" + frame)
    assert board.receive("nak", "ack") == {"type": "nak", "reason": "no_crc"}
    assert board.receive("nak", "ack") == {"type": "ack", "id": "7"}
    assert board.receive("final")["text"] == "cba fed "


def test_noise_and_half_lines_do_not_corrupt_the_next_frame(node: Node, board: SerialBoard) -> None:
    board.write(b"\x00\xff\x11{{" + bytes(range(128, 256)) + b"\n\n\r\n" + encode(request("7")))
    assert board.receive("final")["id"] == "7"


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("{", None, "not JSON"),
        ('{"id":"a","prompt":"x","max_token":1}', "a", "unknown key 'max_token'"),
        ('{"type":"reboot","id":"a"}', "a", "type is 'reboot'; allowed: cancel, hello"),
        ('{"type":"cancel"}', None, "cancel.id is missing"),
        ('{"id":"a","prompt":"' + "x" * MAX_LINE_BYTES + '"}', None, "it is too long; shorten the request"),
    ],
)
def test_a_malformed_or_oversized_request_is_a_typed_error(
    node: Node, board: SerialBoard, text: str, name: str | None, said: str
) -> None:
    board.send(text)
    error = board.receive("error")
    assert (error["id"], error["code"]) == (name, "bad_request")
    assert said in error["message"]


def test_a_client_that_repeats_on_hello_loses_no_request_sent_before_the_port_opened() -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    answers: list[Final] = []
    asking = threading.Thread(target=lambda: answers.append(ask_over(master, Request("7", "abc def"))))
    asking.start()
    wait_for(lambda: select.select([slave], [], [], 0)[0])  # it has been sent: opening the port discards it
    node = Node.start(Path(os.ttyname(slave)))
    wait_for(lambda: answers)
    assert answers[0].text == "cba fed "
    assert node.speller.asked == ["7"]
    node.stop()
    os.close(master)
    os.close(slave)


def test_an_echo_of_the_daemons_own_frames_is_ignored(node: Node, board: SerialBoard) -> None:
    said = [board.receive("hello")]
    board.send(request("7"))
    said += [board.receive(kind) for kind in ("ack", "partial", "final")]
    others = [{"type": "error", "id": None}, {"type": "nak", "reason": "crc"}, {"type": "message"}]
    for frame in said + others:
        board.send(json.dumps(frame))
    board.send(request("8"))
    frame = board.receive("ack", "nak", "error", "hello")
    assert frame == {"type": "ack", "id": "8"}


def test_a_cancel_frame_cancels_a_request(node: Node, board: SerialBoard) -> None:
    node.speller.gate.clear()
    board.send(request("7"))
    node.speller.wait_until_held()
    board.send('{"type":"cancel","id":"7"}')
    assert board.receive("final")["finish_reason"] == "cancelled"


def test_a_duplicate_of_a_request_in_work_is_acknowledged_and_answered_once(
    node: Node, board: SerialBoard
) -> None:
    node.speller.gate.clear()
    board.send(request("7"))
    node.speller.wait_until_held()
    board.send(request("7"))
    assert [board.receive("ack"), board.receive("ack")] == [{"type": "ack", "id": "7"}] * 2
    node.speller.gate.set()
    assert board.receive("final")["id"] == "7"
    assert node.speller.asked == ["7"]


def test_a_duplicate_after_the_answer_gets_it_again(node: Node, board: SerialBoard) -> None:
    for _ in range(2):
        board.send(request("7"))
        assert board.receive("final")["text"] == "cba fed "
    assert node.speller.asked == ["7"]


def test_a_lenient_port_accepts_typed_text(ptys: PtyPair, board: SerialBoard) -> None:
    node = Node.start(ptys.near, lenient=True)
    wait_for(lambda: node.transport.port.is_open)
    board.write('{"id":"a","prompt":"größe"}\r\n'.encode())
    assert board.receive("final")["text"] == "eßörg "
    node.stop()


def test_a_board_that_resets_when_the_port_opens_sends_hello_when_it_is_ready(ptys: PtyPair) -> None:
    node, board = Node.start(ptys.near), SerialBoard(ptys.far)
    wait_for(lambda: node.transport.port.is_open)
    while board.read():  # the first hello, sent before the board was ready
        pass
    board.write(b"\xfe\x00ets Jun  8 2016\r\nrst:0x1 (POWERON_RESET)\r\nload:0x3f")
    board.send('{"type":"hello"}')  # corrupted by the half line before it
    assert board.receive("hello", "nak")["type"] == "nak"
    board.send('{"type":"hello"}')
    assert board.receive("hello")["protocol"] == 1
    board.send(request("7"))
    assert board.receive("final")["text"] == "cba fed "
    assert node.speller.asked == ["7"]
    board.close()
    node.stop()


def test_after_xoff_nothing_is_written_until_xon(ptys: PtyPair) -> None:
    board, node = SerialBoard(ptys.far), Node.start(ptys.near, flow_control="xonxoff")
    board.receive("hello")
    board.write(b"\x13")
    board.send(request("7"))
    wait_for(lambda: node.engine.answered == 1)
    assert board.read() == b""
    board.write(b"\x11")
    assert board.receive("final")["text"] == "cba fed "
    board.close()
    node.stop()


def _has_answered(node: Node, count: int) -> bool:
    return node.engine.answered == count


def test_a_request_after_xoff_is_accepted_at_once_and_a_lost_xon_times_out(
    ptys: PtyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serial_port, "XOFF_S", 1.5)
    board, node = SerialBoard(ptys.far), Node.start(ptys.near, flow_control="xonxoff")
    for number in range(10):  # XOFF as early as can be: with the last byte that was written
        board.receive("hello")
        board.write(b"\x13")
        board.send(request(str(number)))
        wait_for(partial(_has_answered, node, number + 1))
        board.write(b"\x11")
        assert board.receive("final")["id"] == str(number)
        board.send('{"type": "hello"}')
    board.receive("hello")
    board.write(b"\x13")
    board.send(request("lost"))
    assert board.receive("final")["id"] == "lost"
    board.close()
    node.stop()


def test_ports_have_separate_ids_and_answers(ptys: PtyPair, tmp_path: Path) -> None:
    second = PtyPair(tmp_path / "near-2", tmp_path / "far-2")
    second.plug()
    boards = [SerialBoard(pair.far) for pair in (ptys, second)]
    engine = Engine(Speller(), queue_length=3, partial_interval_s=0)
    journaled = JournaledEngine(engine, Journal(None))
    engine.start()
    ports = [
        SerialTransport(SerialConfig(str(pair.near), 115_200, "none", lenient=False), "pump", journaled)
        for pair in (ptys, second)
    ]
    for port in ports:
        port.start()
    for board, prompt in zip(boards, ("one", "two"), strict=True):
        board.receive("hello")
        board.send(request("7", prompt))
    assert [board.receive("final")["text"] for board in boards] == ["eno ", "owt "]
    engine.stop(WAIT_S)
    for port, board in zip(ports, boards, strict=True):
        port.stop(WAIT_S)
        board.close()
    second.unplug()


def test_an_answer_waits_until_an_unplugged_cable_is_back(ptys: PtyPair) -> None:
    board, node = SerialBoard(ptys.far), Node.start(ptys.near)
    board.receive("hello")
    node.speller.gate.clear()
    board.send(request("7"))
    node.speller.wait_until_held()
    ptys.unplug()
    board.close()
    wait_for(lambda: not node.transport.port.is_open)
    node.speller.gate.set()
    wait_for(lambda: node.engine.answered == 1)
    ptys.plug()
    board = SerialBoard(ptys.far)
    assert board.receive("hello", "final")["type"] == "final"
    board.close()
    node.stop()


def test_a_missing_port_is_logged_once_and_opened_when_it_appears(
    ptys: PtyPair, caplog: pytest.LogCaptureFixture
) -> None:
    ptys.unplug()
    node = Node.start(ptys.near)
    wait_for(lambda: node.transport.port.progress > 2)
    assert caplog.text.count(f"port {ptys.near}: it does not exist; plug it in") == 1
    ptys.plug()
    board = SerialBoard(ptys.far)
    wait_for(lambda: node.transport.port.is_open)
    board.send(request("7"))
    assert board.receive("final")["id"] == "7"
    board.close()
    node.stop()


def test_a_port_in_use_by_another_program_is_named(ptys: PtyPair, board: SerialBoard) -> None:
    holder = serial.Serial(str(ptys.near), 115_200, exclusive=True)
    node = Node.start(ptys.near)
    wait_for(lambda: node.transport.port.problem)
    assert "another program has it open" in str(node.transport.port.problem)
    holder.close()
    wait_for(lambda: node.transport.port.is_open)
    node.stop()


def test_senders_do_not_wait_for_a_blocked_port(ptys: PtyPair) -> None:
    node = Node.start(ptys.near)  # nothing reads at the far end
    wait_for(lambda: node.transport.port.is_open)
    senders = [
        threading.Thread(target=node.transport.port.send, args=(json.dumps("x" * 20_000), droppable))
        for droppable in [True, False] * 100
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(WAIT_S)
        assert not sender.is_alive()
    assert node.transport.port._waiting_bytes <= MAX_WAITING_BYTES
    node.stop(timeout_s=0)


@pytest.fixture
def link(ptys: PtyPair, board: SerialBoard) -> Iterator[SerialLink]:
    """The near end as edge-ask opens it."""
    link = SerialLink(SerialConfig(str(ptys.near), 115_200, "none", lenient=False))
    yield link
    link.close()


def test_edge_ask_repeats_a_request_whose_answer_was_lost(
    link: SerialLink, board: SerialBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "REMIND_S", 0.1)
    answers: list[Answer] = []
    threading.Thread(target=lambda: answers.extend(link.ask(Request("7", "x"), WAIT_S))).start()
    final = Final("7", "y", "stop", Usage(1, 0, 0, 1), Timings(0.0, 0.0, 0.0, 0.0))
    for data in (encode(final.to_json())[:-1], b"\n" + encode(final.to_json())):
        board.wait_for_request()
        board.send('{"type":"ack","id":"7"}')
        board.write(data)
    wait_for(lambda: answers)
    assert answers == [final]


def test_edge_ask_does_not_wait_for_a_daemon_that_has_ended(
    link: SerialLink, board: SerialBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "REMIND_S", 0.1)
    monkeypatch.setattr(links, "LOST_S", 1.0)
    answers = link.ask(Request("7", "x"))
    threading.Timer(0.2, partial(board.send, '{"type":"ack","id":"7"}')).start()
    with pytest.raises(
        TransportError, match=r"port .*near: nothing received for 1 s; is edge-daemon running"
    ):
        next(answers)
