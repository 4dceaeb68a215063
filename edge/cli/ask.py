"""The command `edge-ask`: one request to a daemon or a bundle, or how the nodes of a broker are."""

from __future__ import annotations

import sys
import uuid
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge.cli.exit_codes import ExitCode, epilog, of_answer
from edge.cli.program import Command, silence_logging
from edge.errors import TransportError

if TYPE_CHECKING:
    from edge.client.link import Link
    from edge.endpoints import Broker
    from edge.protocol.messages import Request

FILE = click.Path(path_type=Path)

EXAMPLES = """
\b
Examples:
  edge-ask "Why would a pump's pressure fall at night?"
  edge-ask --host broker.lan --node pump-house --schema answer.json "12 bar, is that normal?"
  journalctl -u pump -n 50 | edge-ask --system "Summarise this log in one sentence."
  edge-ask --serial /dev/ttyUSB0 --json "Hello" | jq -r .text
  edge-ask --host broker.lan --status
  edge-ask --host broker.lan top        (live view)
  edge-ask -- top                       (asks the word "top")
  edge-ask --bundle ./gemma-270m --max-tokens 40 "The capital of France is"
"""
EXIT_CODES = epilog(
    *(ExitCode.USAGE, ExitCode.BUNDLE, ExitCode.UNREACHABLE, ExitCode.RUNTIME, ExitCode.REFUSED),
    *(ExitCode.BUSY, ExitCode.INTERNAL),
    OK="the answer is complete, or as long as --max-tokens allows",
    FAILED="--status: no node is online",
    TIMEOUT="the --timeout passed",
    INTERRUPTED="cancelled (Ctrl-C; press it twice to stop at once)",
)
_AFTER_DASHES = "edge.cli.ask.after_dashes"


class _Ask(Command):
    """Notes which arguments follow `--`: they are a prompt even if they spell a word with a meaning."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_AFTER_DASHES] = args[args.index("--") + 1 :] if "--" in args else []
        return super().parse_args(ctx, args)


@click.command(cls=_Ask, epilog=f"{EXAMPLES}\n{EXIT_CODES}")
@click.argument("prompt", required=False)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="EDGE_HOST",
    metavar="HOST[:PORT]",
    help="The MQTT broker. With a port, an IPv6 address needs brackets: [::1]:1884.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Its port.  [default: 1883, with --tls 8883]")
@click.option("--node", envvar="EDGE_NODE", help="The node to ask.  [default: the only one online]")
@click.option("--username", envvar="EDGE_USERNAME", help="The username at the broker.")
@click.option("--password-file", type=FILE, help="A file with the password.")
@click.option("--tls", is_flag=True, help="Connect to the broker with TLS.")
@click.option("--ca-file", type=FILE, help="CA certificates to trust, with --tls.  [default: the system's]")
@click.option("--serial", metavar="PORT", help="Ask over a serial port instead.")
@click.option("--baud", default=115_200, show_default=True, help="Its baud rate.")
@click.option("--bundle", type=FILE, metavar="DIR", help="Run a bundle in this process instead.")
@click.option("--system", help="System instructions for the model.")
@click.option("--max-tokens", type=int, help="Most tokens in the answer.  [default: 256]")
@click.option("--temperature", type=float, help="0 is deterministic.  [default: 0]")
@click.option("--top-k", type=int, help="Sample from this many tokens.  [default: 64]")
@click.option("--top-p", type=float, help="Sample from this much probability.  [default: 0.95]")
@click.option("--seed", type=int, help="Make sampling repeatable.")
@click.option("--stop", multiple=True, help="Text that ends the answer; can be given several times.")
@click.option("--schema", type=FILE, help="A file with a JSON schema that the answer must follow.")
@click.option("--reasoning", is_flag=True, help="Let the model think first (Gemma 4).")
@click.option("--timeout", type=click.FloatRange(0.001, 86_400), help="Give up after this many seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer as one line of JSON.")
@click.option("--status", is_flag=True, help="Ask nothing; print the state of the broker's nodes.")
@click.option("--stats", is_flag=True, help="Print token counts and times to stderr.")
@click.pass_context
def ask(ctx: click.Context, /, prompt: str | None, **options: Any) -> None:
    """Ask a model on the edge. Without PROMPT, or with -, the prompt is read from stdin.

    The word top asks nothing: it shows the state of all nodes, live, until q or Ctrl-C. After -- it is a
    prompt like any other. The environment variables EDGE_HOST, EDGE_NODE and EDGE_USERNAME set these options.
    """
    silence_logging()
    top = prompt == "top" and "top" not in ctx.meta[_AFTER_DASHES]
    _check(options, prompt, top)
    if top:
        _top(options)
    elif options["status"]:
        ctx.exit(_status(options))
    else:
        ctx.exit(_ask(prompt, options))


def _check(options: dict[str, Any], prompt: str | None, top: bool) -> None:
    """Refuse options that contradict each other. Raises UsageError."""
    without_broker = options["serial"] is not None or options["bundle"] is not None
    if options["serial"] is not None and options["bundle"] is not None:
        raise click.UsageError("--serial and --bundle exclude each other")
    if options["status"] and (without_broker or prompt is not None):
        raise click.UsageError("--status works with a broker only, and without a prompt")
    if top and (without_broker or options["as_json"]):
        raise click.UsageError("top works with a broker only, and has no --json; use --status --json")
    if top and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("top needs a terminal; use --status")


def _ask(prompt: str | None, options: dict[str, Any]) -> ExitCode:
    """Send the prompt and show the answer. Raises EdgeError."""
    request = _request(_from_stdin() if prompt in (None, "-") else str(prompt), options)
    from edge.client import ask as client

    with closing(_link(options)) as link:
        return of_answer(client.ask(link, request, options["as_json"], options["stats"]))


def _from_stdin() -> str:
    if sys.stdin.isatty():
        click.echo("Type the prompt, then press Enter and Ctrl-D.", err=True)
    return sys.stdin.read()


def _request(prompt: str, options: dict[str, Any]) -> Request:
    """Put a request together and check it as a daemon would. Raises RequestError."""
    from edge.protocol import strict_json
    from edge.protocol.messages import parse_request

    names = ("max_tokens", "temperature", "top_k", "top_p", "seed")
    data: dict[str, Any] = {name: options[name] for name in names if options[name] is not None}
    data |= {"id": uuid.uuid4().hex, "stream": not options["as_json"] and sys.stdout.isatty()}
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
    """Connect as the options ask for; clients of a daemon load no runtime, and a bundle no transport."""
    if options["bundle"] is not None:
        from edge.client.bundle_link import BundleLink

        return BundleLink(options["bundle"])
    from edge.client.links import MqttLink, SerialLink
    from edge.endpoints import SerialConfig

    if options["serial"] is not None:
        return SerialLink(SerialConfig(options["serial"], options["baud"]))
    return MqttLink(_broker(options), options["node"])


def _broker(options: dict[str, Any]) -> Broker:
    from edge.endpoints import Broker

    host, port = _host_and_port(options["host"])
    if port is not None and options["port"] not in (None, port):
        raise click.UsageError(f"--host {options['host']} and --port {options['port']} contradict each other")
    tls: bool = options["tls"]
    return Broker(
        host,
        options["port"] or port or (8883 if tls else 1883),
        tls,
        options["ca_file"],
        username=options["username"],
        password=_password(options["password_file"]),
    )


def _host_and_port(text: str) -> tuple[str, int | None]:
    """Split `host`, `host:port`, `[address]:port` or a bare IPv6 address. Raises BadParameter."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        colon, port = rest[:1], rest[1:]
    elif text.count(":") > 1:
        return text, None
    else:
        (host, colon, port), bracket = text.partition(":"), "]"
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0
    if not host or not bracket or colon not in ("", ":") or (colon and not 0 < number < 65536):
        raise click.BadParameter(f"{text!r} is not HOST, HOST:PORT or [IPV6]:PORT", param_hint="--host")
    return host, number or None


def _status(options: dict[str, Any]) -> ExitCode:
    """Print the state of the nodes. Raises TransportError."""
    from edge.client import nodes
    from edge.protocol.strict_json import dumps

    broker, node = _broker(options), options["node"]
    states = nodes.read_nodes(broker, node)
    if not states:
        raise TransportError(f"broker {broker.address}: it knows no node{f' {node}' if node else ''}")
    for name, state in states.items():
        click.echo(dumps({"node": name, **state}) if options["as_json"] else nodes.as_text(name, state))
    online = any(state.get("state") == "online" for state in states.values())
    return ExitCode.OK if online else ExitCode.FAILED


def _top(options: dict[str, Any]) -> None:
    """Show the nodes live. Raises TransportError."""
    from edge.client.top import top

    top(_broker(options), options["node"])


def _password(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise click.BadParameter(f"{path}: {reason}", param_hint="--password-file") from None
