"""The commands `edge-daemon bundle`: a new bundle onto a board, into use, and back."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge.defaults import CONFIG
from edge.errors import BundleError, EdgeError

if TYPE_CHECKING:
    from edge.bundles.record import Record
    from edge.bundles.signature import TrustedKeys
    from edge.bundles.store import BundleStore

SWITCH_S = 900.0
"""How long a daemon may take to load and test a bundle; LiteRT packs the weights of a new one."""

_POLL_S = 0.2
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _config(function: _Function) -> _Function:
    path = click.Path(path_type=Path)
    option = click.option(
        "--config", type=path, default=CONFIG, show_default=True, help="The daemon's configuration."
    )
    return option(function)


@click.group()
def bundle() -> None:
    """Update the model of a board.

    The configuration's `bundle` names a link, /var/lib/edge-gemma/bundles/current; the bundles lie beside
    it. With `bundle_key_file` in the configuration only bundles signed with one of its keys are taken.

    \b
    Examples:
      sudo edge-daemon bundle install pump-model
      tar -c pump-model | ssh board sudo edge-daemon bundle install -
      sudo edge-daemon bundle activate 3fa9c1d2e4b8
      sudo edge-daemon bundle list
      sudo edge-daemon bundle rollback
    """


@bundle.command()
@_config
@click.argument("source", type=click.Path(path_type=Path, allow_dash=True))
def install(config: Path, source: Path) -> None:
    """Copy the bundle in SOURCE, a directory or a tar file (- is stdin), into the store; print its name.

    It is verified on the way and used only once it is activated. Bundles that are neither current nor
    previous go, if they are older than the last activation; without room, all but the current one go.

    \b
    Exit codes: 0 installed, or there already; 1 no room, or the disk failed; 2 wrong command line;
    3 the bundle is damaged, incomplete or not signed; 5 wrong configuration.
    """
    from edge.bundles.installation import install as run

    store, keys = _open(config)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the line to the board may break
        signal.signal(number, _interrupt)
    done = run(store, sys.stdin.buffer if str(source) == "-" else source, keys)
    signed = f", signed by {done.signed_by}" if done.signed_by else ""
    said = "installed" if done.new else "was there already"
    click.echo(f"{store.path(done.name)}: {said}, {done.bytes / 1e6:,.1f} MB{signed}", err=True)
    click.echo(done.name)


@bundle.command()
@_config
@click.argument("name")
def activate(config: Path, name: str) -> None:
    """Let the bundle NAME (or the only one that begins so) be the current one.

    A running daemon loads and tests it, and goes on with it between two requests; this command waits for
    that. If the test fails, the daemon stays with the bundle it has. Without a daemon the next start uses it.

    \b
    Exit codes: 0 in use, or to be used by the next start; 1 no such bundle, or the disk failed;
    2 wrong command line; 3 the bundle can't be used, the one before is in use; 5 wrong configuration.
    """
    store, keys = _open(config)
    _activate(store, keys, store.find(name))


@bundle.command()
@_config
def rollback(config: Path) -> None:
    """Let the previous bundle be the current one again; once more, and it is as it was.

    \b
    Exit codes: those of activate.
    """
    store, keys = _open(config)
    previous = store.previous
    if previous is None:
        raise EdgeError(f"{store.directory}: there is no previous bundle; activate another one by its name")
    _activate(store, keys, previous)


@bundle.command("list")
@_config
@click.option("--json", "as_json", is_flag=True, help="Print everything as one line of JSON.")
def list_bundles(config: Path, as_json: bool) -> None:
    """Show the bundles of the store: which is current and which previous, size, model, recipe, signature.

    `verified` are those that `install` has put there: all their bytes were what the manifest says. The daemon
    looks again when it begins to use a bundle, and `edge-daemon doctor` whenever it is called.
    """
    from edge.bundles.listing import as_text, describe
    from edge.protocol.strict_json import dumps

    store, keys = _open(config)
    found = describe(store, keys)
    click.echo(dumps(found) if as_json else as_text(found))


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _open(config: Path) -> tuple[BundleStore, TrustedKeys | None]:
    from edge.bundles.signature import TrustedKeys
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
        raise EdgeError(f"{store.link}: can't be swapped: {error.strerror}") from None
    if daemon_lives(store.directory):
        _wait(store, name, lambda: read_record(store.directory))
        click.echo(f"{name}: the daemon answers with it")
    else:
        click.echo(f"{name}: no daemon runs; the next start uses it")


def _wait(store: BundleStore, name: str, record: Callable[[], Record]) -> None:
    """Wait until the daemon has taken a bundle into use. Raises BundleError if it has refused it."""
    until = time.monotonic() + SWITCH_S
    while time.monotonic() < until:
        said = record()
        if said.running == name:
            return
        if store.settled[0] != name:
            raise BundleError(said.trouble or f"{name}: another bundle was activated meanwhile")
        time.sleep(_POLL_S)
    raise EdgeError(f"{name}: the daemon has not taken it into use in {SWITCH_S:.0f} s; see its log")
