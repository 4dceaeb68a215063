"""The command `edge-daemon`: run, doctor, bundle and routes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

import click

from edge.cli.bundle import bundle
from edge.cli.exit_codes import ExitCode, epilog
from edge.cli.program import Group, silence_logging
from edge.defaults import CONFIG, DIRECTORIES
from edge.errors import ConfigError

FILE = click.Path(path_type=Path)
CONFIG_OPTION = click.option(
    "--config", "path", type=FILE, default=CONFIG, show_default=True, help="The configuration file."
)


@click.group(cls=Group)
def daemon() -> None:
    """Answer field sensors with a small language model, over MQTT and serial.

    \b
    Examples:
      edge-daemon run --config edge-daemon.toml
      sudo edge-daemon doctor
      sudo edge-daemon bundle install pump-model
      edge-daemon routes test --config edge-daemon.toml readings.txt
    """


daemon.add_command(bundle)


@daemon.command(
    epilog=epilog(
        *(ExitCode.USAGE, ExitCode.BUNDLE, ExitCode.CONFIG, ExitCode.UNREACHABLE, ExitCode.RUNTIME),
        OK="stopped by a signal",
        FAILED="another daemon uses the store or the journal, or a thread ended unexpectedly",
    )
)
@click.option("--config", "path", type=FILE, required=True, help="The configuration file, in TOML.")
@click.option("--force", is_flag=True, help="Run a bundle even if the board has too little memory for it.")
def run(path: Path, force: bool) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C."""
    from edge.config import load
    from edge.files import keep_private
    from edge.logs import log_to_stderr

    keep_private()
    config = load(path)
    from edge.service.daemon import Daemon  # only now: it loads the runtime

    log_to_stderr(config.log_payloads)
    Daemon(config, force).run()


@daemon.command(
    epilog=epilog(ExitCode.USAGE, ExitCode.CONFIG, OK="no problem found", FAILED="at least one problem found")
)
@CONFIG_OPTION
@click.option("--json", "as_json", is_flag=True, help="Print all findings as one line of JSON.")
@click.pass_context
def doctor(ctx: click.Context, path: Path, as_json: bool) -> None:
    """Check this board and print each problem with the command that fixes it. Changes nothing."""
    from edge.config import load
    from edge.doctor import doctor as examination

    if path.absolute() == Path(CONFIG):
        os.environ.update({name: place for name, place in DIRECTORIES.items() if name not in os.environ})
    silence_logging()
    findings = examination.examine(load(path))
    click.echo((examination.as_json if as_json else examination.as_text)(findings))
    if any(finding.state == "problem" for finding in findings):
        ctx.exit(ExitCode.FAILED)


@daemon.group()
def routes() -> None:
    """Work with the [[route]] tables of the configuration."""


@routes.command(
    epilog=epilog(
        *(ExitCode.USAGE, ExitCode.CONFIG),
        OK="at least one reading was used",
        FAILED="no reading was used, or a line is not a reading",
    )
)
@CONFIG_OPTION
@click.argument("recording", type=click.File(encoding="utf-8", errors="replace"))
@click.pass_context
def test(ctx: click.Context, path: Path, recording: TextIO) -> None:
    """Play a RECORDING of readings (- is stdin) through the routes; print events and questions.

    Nothing is sent, and no model is needed. A summary on stderr counts the lines that match a route.

    \b
    Example:
      mosquitto_sub -t 'sensors/#' -F '%U %t %p' > readings.txt
      edge-daemon routes test --config edge-daemon.toml readings.txt
    """
    from edge.config import load
    from edge.routes.replay import Replay, describe

    tables = load(path).routes
    if not tables:
        raise ConfigError(f"{path}: there is no [[route]] to test")
    replay = Replay(tables, recording.name)
    for at, outcome in replay.play(recording):
        click.echo(describe(at, outcome))
    click.echo(replay.summary(), err=True)
    ctx.exit(ExitCode.OK if replay.used else ExitCode.FAILED)
