"""What all commands have in common: help, version, suggestions, exit codes, Ctrl-C; and what they import."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from converters.cli import main as convert
from edge import errors
from edge.cli.ask import _host_and_port, ask
from edge.cli.daemon import daemon
from edge.cli.exit_codes import ExitCode, of_error
from edge.cli.main import main
from edge.cli.program import Command
from edge.endpoints import Broker
from tests.support.bundles import small_bundle
from tests.support.counterparts import WAIT_S, edge_command, free_port, wait_for


def commands(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words that name each command below `command`, and itself."""
    children = command.commands.items() if isinstance(command, click.Group) else ()
    return [path, *(each for name, child in children for each in commands(child, (*path, name)))]


EVERY = [
    pytest.param(command, words, id=" ".join((name, *words)))
    for name, command in (("edge-daemon", daemon), ("edge-ask", ask), ("edge-convert", convert))
    for words in commands(command)
]


@pytest.mark.parametrize(("command", "words"), EVERY)
def test_every_command_has_h_help_and_version(command: click.Command, words: tuple[str, ...]) -> None:
    version = CliRunner().invoke(command, [*words, "--version"], prog_name="edge")
    assert (version.exit_code, version.stdout[:14]) == (0, "edge, version ")
    short, long = (CliRunner().invoke(command, [*words, option]).stdout for option in ("-h", "--help"))
    assert short == long
    assert "-h, --help" in long


@pytest.mark.parametrize(
    ("command", "words", "answer"),
    [
        (daemon, "bundl", "Error: no such command: bundl; did you mean bundle?"),
        (daemon, "bundle rolback", "Error: no such command: rolback; did you mean rollback?"),
        (daemon, "zzz", "Error: no such command: zzz; commands: bundle, doctor, routes, run"),
        (main, "aks", "Error: no such command: aks; did you mean ask?"),
    ],
)
def test_an_unknown_command_names_the_one_that_was_meant(
    command: click.Command, words: str, answer: str
) -> None:
    result = CliRunner().invoke(command, words.split())
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr.splitlines()[-1] == answer


@pytest.mark.parametrize("arguments", [["daemon", "doctor", "--help"], ["ask", "--version"], ["--help"]])
def test_both_commands_run_as_a_module(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m edge" in done.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.EdgeError("x"), 1),
        (errors.BundleError("x"), 3),
        (errors.CheckpointError("x"), 4),
        (errors.ConfigError("x"), 5),
        (errors.TransportError("x"), 6),
        (errors.RuntimeFailure("x"), 7),
        (errors.RequestError("too_long", "x"), 8),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(error: errors.EdgeError, code: int) -> None:
    @click.command(cls=Command)
    def fail() -> None:
        raise error

    assert of_error(error) == code
    result = CliRunner().invoke(fail)
    assert (result.exit_code, result.output) == (code, "Error: x\n")


def interrupted_after(module: str, *arguments: str) -> tuple[int, list[str]]:
    """Press Ctrl-C when `edge-ask` has imported `module`; give its exit code and what it wrote to stderr."""
    command = edge_command("ask", *arguments)
    process = subprocess.Popen(
        [command[0], "-X", "importtime", *command[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if re.fullmatch(rf"import time:.*\| +{re.escape(module)}\n", line):
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=WAIT_S)
    return process.returncode, [line for line in rest.splitlines() if not line.startswith("import time:")]


@pytest.mark.parametrize(
    "module",
    ["signal", "click.core", "edge.cli.program", "edge.protocol.messages", "edge.transports.mqtt.codec"],
)
def test_ctrl_c_during_imports_is_one_line_and_130(module: str) -> None:
    port = str(free_port())
    assert interrupted_after(module, "--port", port, "--timeout", "60", "x") == (130, ["Interrupted"])


@pytest.mark.parametrize("library", ["libLiteRt", "_multiarray_umath", "_umath_linalg"])
def test_ctrl_c_while_a_bundle_is_opened_is_one_line_and_130(library: str) -> None:
    bundle = str(small_bundle("gemma3-one-kv-head", context=2048))
    command = edge_command("ask", "--bundle", bundle, "--max-tokens", "2000", "x")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: library in Path(f"/proc/{process.pid}/maps").read_text())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    last = ("Interrupted", "Error: the answer is not complete: cancelled")  # on a busy machine it had begun
    assert (process.returncode, errors.splitlines()[-1] in last) == (130, True)
    assert "Traceback" not in errors


def test_at_a_terminal_it_asks_for_the_prompt_and_ctrl_c_is_one_line_and_130() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        edge_command("ask"), stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "Type the prompt, then press Enter and Ctrl-D.\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=WAIT_S) == ("", "Interrupted\n")
    assert process.returncode == 130
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("broker.lan", "broker.lan", None),
        ("broker.lan:1884", "broker.lan", 1884),
        ("127.0.0.1:1", "127.0.0.1", 1),
        ("::1", "::1", None),
        ("[::1]", "::1", None),
        ("[fe80::1%eth0]:8883", "fe80::1%eth0", 8883),
    ],
)
def test_a_host_can_have_a_port(text: str, host: str, port: int | None) -> None:
    assert _host_and_port(text) == (host, port)


@pytest.mark.parametrize(
    "text", ["", ":1", "a:", "a:b", "a:0", "a:65536", "a:٣", "[::1", "[::1]1", "[]:1", "[::1]:"]
)
def test_other_text_is_not_a_host(text: str) -> None:
    result = CliRunner().invoke(ask, ["--host", text, "x"])
    assert result.exit_code == ExitCode.USAGE
    assert "is not HOST, HOST:PORT or [IPV6]:PORT" in result.stderr


def test_two_ports_contradict_each_other() -> None:
    result = CliRunner().invoke(ask, ["--host", "a:1", "--port", "2", "x"])
    assert result.exit_code == ExitCode.USAGE
    assert "--host a:1 and --port 2 contradict each other" in result.stderr


def test_an_ipv6_address_is_in_brackets_in_messages() -> None:
    port = free_port()
    done = CliRunner().invoke(ask, ["--host", f"[::1]:{port}", "x"])
    assert done.exit_code == ExitCode.UNREACHABLE
    assert done.stderr.startswith(f"Error: broker [::1]:{port}: ")
    assert Broker("broker.lan").address == "broker.lan:1883"


def test_a_client_imports_neither_routes_nor_jmespath_nor_numpy() -> None:
    code = "import sys, edge.cli.ask, edge.client.links, edge.client.nodes; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "edge.transports.mqtt.codec" in loaded
    assert loaded.isdisjoint({"edge.routes", "edge.config", "jmespath", "numpy", "edge.runtime", "ssl"})
