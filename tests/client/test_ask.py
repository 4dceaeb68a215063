"""edge-ask as a shell runs it: over MQTT, over a serial port and in process, with its exit codes."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from paho.mqtt import publish
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from edge.client.ask import _Text
from edge.protocol.messages import Final, Partial, Timings, Usage
from tests.conftest import Field
from tests.support.counterparts import WAIT_S, Mosquitto, PtyPair, edge_command, free_port, wait_for

LONG = ("--max-tokens", "2000")  # seconds of work


def run(*arguments: str, text: str = "", timeout: float = WAIT_S) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_")}
    return subprocess.run(
        edge_command("ask", *arguments),
        input=text,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


@pytest.fixture(params=["mqtt", "serial", "bundle"])
def connection(request: pytest.FixtureRequest, served: Field) -> list[str]:
    """Options for each connection to the model."""
    options = {
        "mqtt": ["--port", str(served.mosquitto.port)],
        "serial": ["--serial", str(served.ptys.far)],
        "bundle": ["--bundle", str(served.bundle)],
    }
    return options[request.param]


def test_the_same_request_gets_the_same_answer_over_every_connection(
    connection: list[str], served: Field
) -> None:
    in_process = run("--bundle", str(served.bundle), "--max-tokens", "8", "--json", "Pump?")
    done = run(*connection, "--max-tokens", "8", "--json", "Pump?")
    assert done.returncode == 0, done.stderr
    answer, expected = json.loads(done.stdout), json.loads(in_process.stdout)
    assert answer["type"] == "final"
    assert answer["usage"]["generated"] == 8
    assert answer["text"] == expected["text"]


def test_text_is_printed_and_the_prompt_can_come_from_stdin(connection: list[str]) -> None:
    given = run(*connection, "--max-tokens", "8", "Pump?")
    piped = run(*connection, "--max-tokens", "8", text="Pump?")
    assert given.stdout == piped.stdout
    assert given.stdout.strip()
    assert given.stderr.replace(LITERT, "") == ""


LITERT = "INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n"


def test_statistics_go_to_stderr(connection: list[str]) -> None:
    done = run(*connection, "--max-tokens", "8", "--stats", "Pump?")
    assert "8 generated at" in done.stderr
    assert "generated" not in done.stdout


def test_a_refused_request_has_an_exit_code_and_one_line(connection: list[str]) -> None:
    done = run(*connection, "word " * 3000)
    assert done.returncode == 8
    assert done.stdout == ""
    assert done.stderr.replace(LITERT, "").count("\n") == 1
    assert "shorten" in done.stderr


def test_a_timeout_has_its_own_exit_code(connection: list[str]) -> None:
    done = run(*connection, *LONG, "--timeout", "0.3", "Pump?")
    assert done.returncode == 10
    assert "deadline" in done.stderr


def test_ctrl_c_cancels_the_request(connection: list[str]) -> None:
    master, slave = pty.openpty()
    command = edge_command("ask", *connection, *LONG, "Pump?")
    process = subprocess.Popen(command, stdout=slave, stderr=subprocess.PIPE, text=True)
    os.close(slave)
    os.read(master, 1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_S)
    os.close(master)
    assert process.returncode == 130
    assert errors.endswith("Error: the answer is not complete: cancelled\n")


def test_on_a_terminal_the_answer_streams_and_is_whole(connection: list[str]) -> None:
    plain = run(*connection, "--max-tokens", "200", "Pump?")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        edge_command("ask", *connection, "--max-tokens", "200", "Pump?"),
        stdout=slave,
        stderr=subprocess.DEVNULL,
    )
    os.close(slave)
    shown = b""
    pieces = 0
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not piece:
            break
        shown += piece
        pieces += 1
    assert process.wait(WAIT_S) == 0
    os.close(master)
    assert shown.decode().replace("\r\n", "\n") == plain.stdout
    assert pieces > 1


def test_the_only_node_online_is_found_or_one_is_named(served: Field) -> None:
    port = str(served.mosquitto.port)
    assert run("--port", port, "--node", "pump", "--max-tokens", "1", "x").returncode == 0
    done = run("--port", port, "--node", "tank", "x")
    assert done.returncode == 6
    assert done.stderr == f"Error: node tank at broker 127.0.0.1:{port} is not known; online: pump\n"


def test_status_shows_the_state_of_the_nodes(served: Field) -> None:
    port = str(served.mosquitto.port)
    publish.single("edge/v1/tank/status", '{"state":"offline"}', qos=1, retain=True, port=int(port))
    run("--port", port, "--node", "pump", "--max-tokens", "8", "x")
    wait_for(lambda: served.mosquitto.retained("edge/v1/pump/health")["tokens_per_s"])
    done = run("--port", port, "--status")
    assert done.returncode == 0
    pump, tank = done.stdout.splitlines()
    assert pump.startswith("pump: online; gemma4 ")
    assert re.search(r"; \d waiting, (idle|working); \d+ answered, ", pump)
    assert " tokens/s; first token after " in pump
    assert tank == "tank: offline"
    done = run("--port", port, "--status", "--json", "--node", "pump")
    found = json.loads(done.stdout)
    assert (found["node"], found["state"], found["context"]) == ("pump", "online", 2048)
    assert found["memory_mib"] > 10
    assert run("--port", port, "--status", "--node", "tank").returncode == 1
    done = run("--port", port, "--status", "--node", "well")
    assert (done.returncode, done.stderr) == (6, f"Error: broker 127.0.0.1:{port}: it knows no node well\n")
    publish.single("edge/v1/tank/status", None, qos=1, retain=True, port=int(port))


def test_a_node_that_is_offline_is_named(mosquitto: Mosquitto) -> None:
    topic = "edge/v1/tank/status"
    publish.single(topic, '{"state":"offline"}', qos=1, retain=True, port=mosquitto.port)
    done = run("--port", str(mosquitto.port), "--node", "tank", "x")
    assert done.returncode == 6
    assert "node tank at broker" in done.stderr
    assert "is offline; none is online" in done.stderr
    assert "which node" in run("--port", str(mosquitto.port), "x").stderr


def test_a_broker_that_is_missing_or_refuses_the_login_is_named(
    start_mosquitto: Callable[..., Mosquitto], tmp_path: Path
) -> None:
    port = free_port()
    done = run("--port", str(port), "x")
    assert done.returncode == 6
    assert done.stderr == (
        f"Error: broker 127.0.0.1:{port}: can't be reached: Connection refused; "
        "check that it is running, and that host and port are right\n"
    )
    (tmp_path / "passwords").touch(mode=0o600)
    broker = start_mosquitto("allow_anonymous false", f"password_file {tmp_path / 'passwords'}")
    (tmp_path / "secret").write_text("wrong\n")
    secret = ("--username", "edge", "--password-file", str(tmp_path / "secret"))
    done = run("--port", str(broker.port), *secret, "x")
    assert done.returncode == 6
    assert "refuses the connection: Not authorized" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--serial", "/dev/nothing", "x"], 6, "port /dev/nothing: it does not exist; plug it in"),
        (["--bundle", "/nowhere", "x"], 3, "/nowhere/manifest.json"),
        (["--max-tokens", "0", "x"], 8, "max_tokens is 0; allowed: an integer from 1 to"),
        (["--schema", "/nowhere/s.json", "x"], 2, "/nowhere/s.json: No such file or directory"),
        (["--password-file", "/nowhere/p", "x"], 2, "/nowhere/p: No such file or directory"),
        (["--serial", "/dev/nothing", "--bundle", "b", "x"], 2, "exclude each other"),
        (["--status", "x"], 2, "without a prompt"),
        (["--ca-file", "/nowhere/ca", "--tls", "x"], 6, "a TLS file can't be used"),
    ],
)
def test_errors_are_named_without_a_traceback(arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_serial_line_without_a_daemon_is_reported(ptys: PtyPair) -> None:
    done = run("--serial", str(ptys.far), "x")
    assert done.returncode == 6
    assert "no acknowledgement; is edge-daemon running, at the same baud rate?" in done.stderr


def test_the_word_top_is_a_prompt_after_two_dashes(served: Field) -> None:
    options = ("--port", str(served.mosquitto.port), "--max-tokens", "1", "--json")
    done = run(*options, "--", "top")
    assert done.returncode == 0, done.stderr
    answer, piped = json.loads(done.stdout), json.loads(run(*options, text="top").stdout)
    assert (answer["text"], answer["usage"]["prompt"]) == (piped["text"], piped["usage"]["prompt"])


def test_ctrl_c_while_the_broker_does_not_answer_ends_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as broker:
        command = edge_command("ask", "--port", str(broker.getsockname()[1]), "x")
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = broker.accept()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=WAIT_S)
            connection.close()
    assert (process.returncode, errors) == (130, "Interrupted\n")


def test_ctrl_c_ends_a_request_that_a_node_neither_answers_nor_cancels(mosquitto: Mosquitto) -> None:
    publish.single("edge/v1/tank/status", '{"state":"online"}', qos=1, retain=True, port=mosquitto.port)
    subscribed, asked, cancelled = threading.Event(), threading.Event(), threading.Event()
    node = Client(CallbackAPIVersion.VERSION2)
    node.on_subscribe = lambda *_: subscribed.set()
    node.on_message = lambda _c, _u, message: (
        asked if message.topic.endswith("request") else cancelled
    ).set()
    node.connect("127.0.0.1", mosquitto.port)
    node.subscribe([("edge/v1/tank/request", 1), ("edge/v1/tank/cancel", 1)])
    node.loop_start()
    try:
        assert subscribed.wait(WAIT_S)
        command = edge_command("ask", "--port", str(mosquitto.port), "--node", "tank", "x")
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert asked.wait(WAIT_S)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=WAIT_S)
        assert (process.returncode, errors) == (130, "Interrupted\n")
        assert cancelled.wait(WAIT_S)
    finally:
        node.loop_stop()
        node.disconnect()


def test_a_host_with_a_port_is_asked(served: Field) -> None:
    done = run("--host", f"127.0.0.1:{served.mosquitto.port}", "--max-tokens", "1", "x")
    assert done.returncode == 0, done.stderr


def test_help_has_examples_and_exit_codes() -> None:
    done = run("--help")
    assert "edge-ask --serial /dev/ttyUSB0 --json" in done.stdout
    assert "130 cancelled" in done.stdout


def test_the_final_fills_in_for_lost_partials(capsys: pytest.CaptureFixture[str]) -> None:
    text = _Text(live=True)
    text.partial(Partial("a", 0, "one "))
    text.partial(Partial("a", 2, "three"))
    text.end(Final("a", "one two three", "stop", Usage(1, 0, 0, 3), Timings(0, 0, 0, 0)))
    assert capsys.readouterr().out == "one two three\n"


def test_an_answer_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = _Text(live=True)
    text.partial(Partial("a", 0, "a\x1b[2J\x9b1mb\tc\n"))
    text.end(Final("a", "a\x1b[2J\x9b1mb\tc\nd", "stop", Usage(1, 0, 0, 3), Timings(0, 0, 0, 0)))
    assert capsys.readouterr().out == "a[2J1mb\tc\nd\n"
