"""The commands `edge-daemon bundle`: install a bundle on a board, switch to it, and switch back."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge.cli.exit_codes import ExitCode, epilog
from edge.cli.program import Group, stop_on
from edge.defaults import CONFIG
from edge.errors import BundleError, EdgeError

if TYPE_CHECKING:
    from edge.bundles.record import Record
    from edge.bundles.signing import TrustedKeys
    from edge.bundles.store import BundleStore

SWITCH_S = 900.0
"""How long a daemon can take to load and test a bundle: LiteRT packs the weights of a new one."""

_POLL_S = 0.2
_CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=CONFIG,
    show_default=True,
    help="The daemon's configuration file.",
)
_ACTIVATE_CODES = epilog(
    *(ExitCode.USAGE, ExitCode.CONFIG),
    OK="in use, or will be used at the next start",
    FAILED="no such bundle, or the disk failed",
    BUNDLE="the bundle can't be used; the current one stays in use",
)


@click.group(cls=Group)
def bundle() -> None:
    """Update the model of a board.

    `bundle` in the configuration names a link, /var/lib/edge-gemma/bundles/current; the bundles are stored
    next to it. With `bundle_key_file`, only bundles signed with one of its keys are accepted.

    \b
    Examples:
      sudo edge-daemon bundle install pump-model
      tar -c pump-model | ssh board sudo edge-daemon bundle install -
      sudo edge-daemon bundle activate 3fa9c1d2e4b8
      sudo edge-daemon bundle list
      sudo edge-daemon bundle rollback
    """


@bundle.command(
    epilog=epilog(
        *(ExitCode.USAGE, ExitCode.CONFIG),
        OK="installed, or already there",
        FAILED="too little disk space, or the disk failed",
        BUNDLE="the bundle is damaged, incomplete or not signed",
    )
)
@_CONFIG
@click.argument("source", type=click.Path(path_type=Path, allow_dash=True))
def install(config: Path, source: Path) -> None:
    """Copy the bundle in SOURCE, a directory or a tar file (- is stdin), into the store; print its name.

    It is verified while it is copied, and used only after `activate`. Bundles older than the last activation
    are removed, except the current and the previous one; if the disk is full, all but the current one are.
    """
    from edge.bundles.installation import install as run

    store, keys = _open(config)
    stop_on(signal.SIGTERM, signal.SIGHUP)  # the connection to the board may be lost
    done = run(store, sys.stdin.buffer if str(source) == "-" else source, keys)
    signed = f", signed by {done.signed_by}" if done.signed_by else ""
    state = "installed" if done.new else "already installed"
    click.echo(f"{store.path(done.name)}: {state}, {done.bytes / 1e6:,.1f} MB{signed}", err=True)
    click.echo(done.name)


@bundle.command(epilog=_ACTIVATE_CODES)
@_CONFIG
@click.argument("name")
def activate(config: Path, name: str) -> None:
    """Make the bundle NAME, or the only one with that prefix, the current one.

    A running daemon loads it, tests it and switches to it between two requests; this command waits for that.
    If the test fails, the daemon keeps its bundle. Without a running daemon, the next start uses it.
    """
    store, keys = _open(config)
    _activate(store, keys, store.find(name))


@bundle.command(epilog=_ACTIVATE_CODES)
@_CONFIG
def rollback(config: Path) -> None:
    """Make the previous bundle the current one again. A second rollback undoes the first."""
    store, keys = _open(config)
    previous = store.previous
    if previous is None:
        raise EdgeError(f"{store.directory}: there is no previous bundle; activate another one by its name")
    _activate(store, keys, previous)


@bundle.command("list")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print everything as one line of JSON.")
def list_bundles(config: Path, as_json: bool) -> None:
    """List the bundles in the store: current or previous, size, model, recipe, signature.

    `verified` marks bundles that `install` checked against their manifest, byte for byte. The daemon checks
    again before it uses a bundle, and `edge-daemon doctor` each time it is called.
    """
    from edge.bundles.listing import as_text, describe
    from edge.protocol.strict_json import dumps

    store, keys = _open(config)
    bundles = describe(store, keys)
    click.echo(dumps(bundles) if as_json else as_text(bundles))


def _open(config: Path) -> tuple[BundleStore, TrustedKeys | None]:
    from edge.bundles.signing import TrustedKeys
    from edge.bundles.store import BundleStore
    from edge.config import load

    settings = load(config, secrets=False)
    keys = None if settings.bundle_key_file is None else TrustedKeys(settings.bundle_key_file)
    return BundleStore(settings.bundle), keys


def _activate(store: BundleStore, keys: TrustedKeys | None, name: str) -> None:
    from edge.bundles.bundle import read_manifest
    from edge.bundles.record import daemon_lives, read_record

    if keys is not None:
        keys.check(store.path(name))
    read_manifest(store.path(name))
    try:
        store.activate(name)
    except OSError as error:
        raise EdgeError(f"{store.link}: the link can't be replaced: {error.strerror}") from None
    if daemon_lives(store.directory):
        _wait(store, name, lambda: read_record(store.directory))
        click.echo(f"{name}: the daemon now uses it")
    else:
        click.echo(f"{name}: no daemon is running; the next start uses it")


def _wait(store: BundleStore, name: str, record: Callable[[], Record]) -> None:
    """Wait until the daemon uses the bundle. Raises BundleError if it refused it."""
    until = time.monotonic() + SWITCH_S
    while time.monotonic() < until:
        current = record()
        if current.running == name:
            return
        if store.settled[0] != name:
            raise BundleError(current.trouble or f"{name}: another bundle was activated meanwhile")
        time.sleep(_POLL_S)
    raise EdgeError(f"{name}: the daemon did not switch to it within {SWITCH_S:.0f} s; see its log")
