"""The commands `edge-daemon` and `edge-ask`: options in, exit codes out; an EdgeError shows itself."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from edge.cli.bundle import bundle
from edge.defaults import CONFIG, DIRECTORIES

if TYPE_CHECKING:
    from edge.client.link import Link
    from edge.config import Broker
    from edge.protocol.messages import Request

FILE = click.Path(path_type=Path)

ASK_EPILOG = """
\b
Examples:
  edge-ask "Why would a pump's pressure fall at night?"
  edge-ask --host broker.lan --node pump-house --schema answer.json "12 bar, is that normal?"
  journalctl -u pump -n 50 | edge-ask --system "Summarise this log in one sentence."
  edge-ask --serial /dev/ttyUSB0 --json "Hello" | jq -r .text
  edge-ask --host broker.lan --status
  edge-ask --host broker.lan top                   (live; to ask the word "top": echo top | edge-ask)
  edge-ask --bundle ./gemma-270m --max-tokens 40 "The capital of France is"

\b
Exit codes:
  0    the answer is complete, or as long as --max-tokens lets it be
  1    --status: no node is online
  2    the command line is wrong
  3    the bundle can't be used           6   broker, node or port can't be reached
  7    LiteRT failed                      8   the request was refused: wrong or too long
  9    busy or stopping, try again later  10  the --timeout passed
  11   the daemon failed, see its log     130 cancelled (Ctrl-C; twice: at once)
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edge-gemma")
def daemon() -> None:
    """Answer field sensors with a small language model, over MQTT and serial.

    \b
    Examples:
      edge-daemon run --config edge-daemon.toml
      sudo edge-daemon doctor
      sudo edge-daemon bundle install pump-model
      edge-daemon routes test --config edge-daemon.toml readings.txt
    """


@daemon.command()
@click.option("--config", "path", type=FILE, required=True, help="The configuration, a TOML file.")
@click.option("--force", is_flag=True, help="Run a bundle that the board has too little memory for.")
def run(path: Path, force: bool) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C.

    \b
    Exit codes: 0 stopped by a signal, 1 another daemon has the store or the journal, or a thread has
    ended, 2 wrong command line, 3 the bundle can't be used, 5 wrong configuration, 6 the broker refuses,
    7 LiteRT failed.
    """
    from edge.config import load
    from edge.logs import log_to_stderr

    config = load(path)
    from edge.service.daemon import Daemon

    log_to_stderr(config.log_payloads)
    Daemon(config, force).run()


@daemon.command()
@click.option("--config", "path", type=FILE, default=CONFIG, show_default=True, help="The configuration.")
@click.option("--json", "as_json", is_flag=True, help="Print all findings as one line of JSON.")
def doctor(path: Path, as_json: bool) -> None:
    """Say what is wrong with this board, and the command that mends it. Nothing is changed.

    \b
    Exit codes: 0 no problem, 1 a problem was found, 2 wrong command line, 5 wrong configuration.
    """
    from edge.config import load
    from edge.doctor import doctor as examining

    if path.absolute() == Path(CONFIG):
        os.environ.update({name: where for name, where in DIRECTORIES.items() if name not in os.environ})
    logging.getLogger("edge").addHandler(logging.NullHandler())  # the findings say it
    findings = examining.examine(load(path))
    click.echo((examining.as_json if as_json else examining.as_text)(findings))
    sys.exit(any(finding.state == "problem" for finding in findings))


daemon.add_command(bundle)


@daemon.group()
def routes() -> None:
    """Work with the [[route]] tables of the configuration."""


@routes.command()
@click.option("--config", "path", type=FILE, default=CONFIG, show_default=True, help="The configuration.")
@click.argument("recording", type=click.File(encoding="utf-8", errors="replace"))
def test(path: Path, recording: TextIO) -> None:
    """Play a RECORDING of readings (- is stdin) through the routes; print what would be said and asked.

    \b
    Example:
      mosquitto_sub -t 'sensors/#' -F '%U %t %p' > readings.txt
      edge-daemon routes test --config edge-daemon.toml readings.txt
    """
    from edge.config import load
    from edge.routes.replay import describe, replay

    for at, outcome in replay(load(path).routes, recording, recording.name):
        click.echo(describe(at, outcome))


@click.command(epilog=ASK_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompt", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, envvar="EDGE_HOST", help="The MQTT broker.")
@click.option("--port", type=click.IntRange(1, 65535), help="Its port.  [default: 1883, with --tls 8883]")
@click.option("--node", envvar="EDGE_NODE", help="The node to ask.  [default: the only one online]")
@click.option("--username", envvar="EDGE_USERNAME", help="The name to log in to the broker with.")
@click.option("--password-file", type=FILE, help="A file with the password.")
@click.option("--tls", is_flag=True, help="Talk TLS to the broker.")
@click.option("--ca-file", type=FILE, help="Certificates to trust, with --tls.  [default: the system's]")
@click.option("--serial", metavar="PORT", help="Ask over a serial port instead.")
@click.option("--baud", default=115_200, show_default=True, help="Its speed.")
@click.option("--bundle", type=FILE, metavar="DIR", help="Ask a bundle in this process instead.")
@click.option("--system", help="Instructions for the model.")
@click.option("--max-tokens", type=int, help="Longest answer.  [default: 256]")
@click.option("--temperature", type=float, help="0 is deterministic.  [default: 0]")
@click.option("--top-k", type=int, help="Sample from that many tokens.  [default: 64]")
@click.option("--top-p", type=float, help="Sample from that much probability.  [default: 0.95]")
@click.option("--seed", type=int, help="Make sampling repeatable.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given again.")
@click.option("--schema", type=FILE, help="A file with the JSON schema that the answer must follow.")
@click.option("--reasoning", is_flag=True, help="Let the model think first (Gemma 4).")
@click.option("--timeout", type=click.FloatRange(0.001, 86_400), help="Give up after so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer as one line of JSON.")
@click.option("--status", is_flag=True, help="Ask nothing; say how the nodes at the broker are.")
@click.option("--stats", is_flag=True, help="Print token counts and times to stderr.")
def ask(prompt: str | None, as_json: bool, stats: bool, status: bool, **options: Any) -> None:
    """Ask a model on the edge. Without PROMPT, or with -, it is read from stdin.

    The PROMPT top asks nothing: it shows how the nodes are, live, until q or Ctrl-C.
    The environment's EDGE_HOST, EDGE_NODE and EDGE_USERNAME stand for the options of these names.
    """
    ways = [name for name in ("serial", "bundle") if options[name] is not None]
    if len(ways) == 2:
        raise click.UsageError("--serial and --bundle exclude each other")
    if status and (ways or prompt is not None):
        raise click.UsageError("--status goes with a broker only, and without a question")
    if prompt == "top":
        _top(options, bool(ways) or as_json)
        return
    if status:
        sys.exit(_status(_broker(options), options["node"], as_json))
    if prompt in (None, "-"):
        prompt = sys.stdin.read()
    request = _request(prompt or "", as_json, options)
    from edge.client import ask as asking

    logging.getLogger("edge").addHandler(logging.NullHandler())  # what matters is said by exceptions
    try:
        with closing(_link(options)) as link:
            sys.exit(asking.ask(link, request, as_json, stats))
    except KeyboardInterrupt:
        sys.exit(asking.EXIT_CODES["cancelled"])


def _request(prompt: str, as_json: bool, options: dict[str, Any]) -> Request:
    """Put a request together and check it as a daemon would. Raises RequestError."""
    from edge.protocol import strict_json
    from edge.protocol.messages import parse_request

    names = ("max_tokens", "temperature", "top_k", "top_p", "seed")
    data: dict[str, Any] = {name: options[name] for name in names if options[name] is not None}
    data |= {"id": uuid.uuid4().hex[:16], "stream": not as_json and sys.stdout.isatty()}
    data |= {"stop": list(options["stop"]), "reasoning": options["reasoning"]}
    if options["timeout"] is not None:
        data["deadline_ms"] = max(1, round(options["timeout"] * 1000))
    if options["schema"] is not None:
        schema = {"name": "answer", "schema": _schema(options["schema"])}
        data["response_format"] = {"type": "json_schema", "json_schema": schema}
    if options["system"] is None:
        data["prompt"] = prompt
    else:
        data["messages"] = [
            {"role": "system", "content": options["system"]},
            {"role": "user", "content": prompt},
        ]
    return parse_request(strict_json.dumps(data))


def _schema(path: Path) -> dict[str, Any]:
    from edge.protocol.strict_json import StrictJsonError, loads

    try:
        return loads(path.read_bytes(), 256 * 1024)
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}", param_hint="--schema") from None
    except StrictJsonError as error:
        raise click.BadParameter(f"{path}: {error}", param_hint="--schema") from None


def _link(options: dict[str, Any]) -> Link:
    if options["bundle"] is not None:
        from edge.client.bundle_link import (
            BundleLink,  # neither it nor a daemon's clients load what the other needs
        )

        return BundleLink(options["bundle"])
    from edge.client.links import MqttLink, SerialLink
    from edge.config import SerialConfig

    if options["serial"] is not None:
        return SerialLink(SerialConfig(options["serial"], options["baud"], "none", lenient=False))
    return MqttLink(_broker(options), options["node"])


def _broker(options: dict[str, Any]) -> Broker:
    from edge.config import Broker

    tls: bool = options["tls"]
    return Broker(
        options["host"],
        options["port"] or (8883 if tls else 1883),
        tls,
        options["ca_file"],
        username=options["username"],
        password=_password(options["password_file"]),
    )


def _status(broker: Broker, node: str | None, as_json: bool) -> bool:
    """Print how the nodes are; whether none is online. Raises TransportError."""
    from edge.client import nodes
    from edge.errors import TransportError
    from edge.protocol.strict_json import dumps

    logging.getLogger("edge").addHandler(logging.NullHandler())
    found = nodes.read_nodes(broker, node)
    if not found:
        raise TransportError(f"broker {broker.address}: it knows no node{f' {node}' if node else ''}")
    for name, said in found.items():
        click.echo(dumps({"node": name, **said}) if as_json else nodes.as_text(name, said))
    return not any(said.get("state") == "online" for said in found.values())


def _top(options: dict[str, Any], excluded: bool) -> None:
    """Show the nodes live. Raises TransportError."""
    if excluded:
        raise click.UsageError("top goes with a broker only, and has no --json; use --status --json")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("top needs a terminal; use --status")
    from edge.client.top import top

    logging.getLogger("edge").addHandler(logging.NullHandler())
    top(_broker(options), options["node"])


def _password(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise click.BadParameter(f"{path}: {said}", param_hint="--password-file") from None
