"""Where the installed commands start: Ctrl-C ends them with one line and exit code 130, also during imports.

This module imports nothing, so that nearly all of a command's start is inside `run`.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def daemon() -> NoReturn:
    """Run `edge-daemon`."""
    run("edge.cli.daemon", "daemon")


def ask() -> NoReturn:
    """Run `edge-ask`."""
    run("edge.cli.ask", "ask")


def run(module: str, command: str) -> NoReturn:
    """Import `command` from `module`, call it without arguments and exit."""
    interrupted = False
    try:
        import signal

        def on_interrupt(_number: int, _frame: object) -> None:
            nonlocal interrupted
            interrupted = True
            raise KeyboardInterrupt

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the caller ignores it
            signal.signal(signal.SIGINT, on_interrupt)
        from importlib import import_module

        getattr(import_module(module), command)()
    except SystemExit:
        raise
    except BaseException as error:  # an extension module's import turns KeyboardInterrupt into other errors
        if not interrupted and not isinstance(error, KeyboardInterrupt):
            raise
        report_interrupt()
        sys.exit(INTERRUPTED)
    sys.exit()


def report_interrupt() -> None:
    """Write one line; on a terminal below the line that shows ^C."""
    sys.stderr.write("\nInterrupted\n" if sys.stderr.isatty() else "Interrupted\n")
