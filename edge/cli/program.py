"""What all commands have in common: `-h`, `--version`, errors as one line, suggestions, Ctrl-C.

`Command` and `Group` are click's, with these. An EdgeError becomes `Error: ...` and its exit code.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import click
from click.exceptions import Exit

from edge.cli.entry import report_interrupt
from edge.cli.exit_codes import ExitCode, of_error
from edge.errors import EdgeError

HELP = {"help_option_names": ["-h", "--help"]}


class Command(click.Command):
    """One command."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["context_settings"] = HELP | (options.get("context_settings") or {})
        super().__init__(*arguments, **options)
        click.version_option(package_name="edge-gemma")(self)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse the command line."""
        with _shown():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _shown():
            return super().invoke(ctx)


class Group(Command, click.Group):
    """A command with subcommands, which get the same behaviour."""

    command_class = Command
    group_class = type

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand. Raises UsageError naming the one that was probably meant."""
        name = args[0]
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(f"no such command: {name}; {suggestion(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def suggestion(name: str, commands: Any) -> str:
    """Ask whether a similar command was meant, or list all of them."""
    import difflib  # only now: it would be a part of each start

    similar = difflib.get_close_matches(name, commands, n=1)
    return f"did you mean {similar[0]}?" if similar else f"commands: {', '.join(sorted(commands))}"


def silence_logging() -> None:
    """Keep log lines off the terminal; errors reach the person as exceptions or findings."""
    logging.getLogger("edge").addHandler(logging.NullHandler())


def stop_on(*signals: signal.Signals) -> None:
    """Let each of `signals` end the command as Ctrl-C does, so that `finally` runs, with exit code 1."""

    def on_signal(number: int, _frame: object) -> None:
        raise _Stopped(f"stopped by {signal.Signals(number).name}")

    for number in signals:
        previous = signal.signal(number, on_signal)
        click.get_current_context().call_on_close(partial(signal.signal, number, previous))


class _Stopped(KeyboardInterrupt):
    """A signal. It is not an Exception, so code that handles errors does not catch it."""


@contextmanager
def _shown() -> Iterator[None]:
    """Write the project's exceptions and Ctrl-C as one line to stderr, and exit with their codes."""
    try:
        yield
    except EdgeError as error:
        click.echo(f"Error: {error}", err=True)
        raise Exit(of_error(error)) from error
    except _Stopped as stopped:
        click.echo(f"Error: {stopped}", err=True)
        raise Exit(ExitCode.FAILED) from None
    except KeyboardInterrupt:
        report_interrupt()
        raise Exit(ExitCode.INTERRUPTED) from None
