"""The daemon's bundle: tested before use, switched between requests, replaced when it fails.

If the configuration's `bundle` is a link, the keeper follows it. When the link points to another bundle, the
keeper verifies, loads and tests that bundle while the old one answers; requests wait only during the switch.
On a board with too little memory for both, the old one is unloaded first, and requests wait until the new one
is loaded. A bundle that fails the test is refused: the old one continues to answer, and the link points to it
again.

After three failures of a bundle within an hour, the previous one runs again. A failure is an error or a crash
while the bundle is loaded and tested, or a request on which LiteRT failed. A later crash is not a failure of
the bundle: it counts against the request in work (`edge.requests.crashes`), and an idle daemon does not use
its bundle.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge.board import Board
from edge.bundles.bundle import DECODER, Bundle, read_manifest
from edge.bundles.record import MAX_FAILURES, DaemonRecord
from edge.bundles.requirements import fit_together, require_memory, requirements
from edge.bundles.signing import TrustedKeys
from edge.bundles.store import BundleStore
from edge.config import Config
from edge.errors import BundleError, EdgeError
from edge.files import matches, write_stamp
from edge.generation.generator import Generator
from edge.generation.self_test import self_test
from edge.requests.engine import Engine
from edge.runtime.weight_cache import forget_packed_weights, weight_cache_name

log = logging.getLogger(__name__)

LOAD_S = 600.0
"""Loading that takes longer counts as hung. The first load packs the weights: minutes on an SD card."""


def keeper_of(config: Config, board: Board, force: bool) -> BundleKeeper:
    """Make the keeper for a configuration; with `force` it also accepts a bundle too large for the board.

    Raises ConfigError if the key file is invalid, EdgeError if another daemon uses the same store.
    """
    if config.bundle.is_symlink():
        return StoreKeeper(config, board, force)
    return BundleKeeper(config, board, force)


class BundleKeeper:
    """Owns `generator`, the generator of the configured bundle. This class is for a fixed directory."""

    generator: Generator

    def __init__(self, config: Config, board: Board, force: bool) -> None:
        self._config, self._board, self._force = config, board, force
        self._keys = None if config.bundle_key_file is None else TrustedKeys(config.bundle_key_file)
        self._engine: Engine | None = None
        self._switched: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None
        self._loading_since: float | None = None
        self._fatal: EdgeError | None = None

    def open(self, crashed_in_work: bool = False) -> Generator:
        """Load and test the bundle. Raises BundleError or RuntimeFailure.

        `crashed_in_work`: the last run crashed while it worked on a request; the crash counts against that.
        """
        self.generator = self._load(self._verified(self._config.bundle))
        return self.generator

    def attach(self, engine: Engine, switched: Callable[[], None]) -> None:
        """Serve this engine from now on; `switched` is called when another bundle answers."""
        self._engine, self._switched = engine, switched

    def poll(self) -> None:
        """Check the packed weights while no request runs; if damaged, load the bundle again.

        Call it about twice a second. Raises EdgeError if loading hangs, or if no bundle can be loaded.
        """
        engine = self._engine
        if engine is None or self._is_loading():
            return
        if self._fatal is not None:
            raise self._fatal
        if engine.working or self.generator.decoder.check_weights():
            self._follow(engine)
        else:
            self._load_aside(self._pack_again, engine)

    def close(self) -> None:
        """Record an orderly end of the daemon."""

    def _follow(self, engine: Engine) -> None:
        """The rest of `poll`."""

    def _load_aside(self, load: Callable[..., None], *arguments: Any) -> None:
        """Run `load` in a thread of its own, which `poll` watches."""
        self._thread = threading.Thread(target=load, args=arguments, name="bundle", daemon=True)
        self._thread.start()

    def _is_loading(self) -> bool:
        """Whether a bundle is being loaded. Raises BundleError if that takes too long."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = None
            return False
        since = self._loading_since
        if since is not None and time.monotonic() - since > LOAD_S:
            raise BundleError(f"loading a bundle took longer than {LOAD_S:.0f} s; the daemon restarts")
        return True

    def _pack_again(self, engine: Engine) -> None:
        """Remove the damaged packed weights and all prefix snapshots; load the bundle again."""
        old = self.generator
        name = old.bundle.directory
        log.error("%s: the packed weights in the cache are damaged; packing them again", name)
        engine.pause()
        old.decoder.discard_cache()
        old.close()
        try:
            self.generator = self._timed(old.bundle)
        except Exception as error:
            self._fatal = BundleError(f"{name}: can't be loaded again: {error}")
            return
        engine.last_error = f"{name}: the packed weights in the cache were damaged; they were packed again"
        engine.resume(self.generator)
        log.info("%s: answering again", name)

    def _timed(self, bundle: Bundle) -> Generator:
        self._loading_since = time.monotonic()
        try:
            return self._load(bundle)
        finally:
            self._loading_since = None

    def _verified(self, directory: Path) -> Bundle:
        """Check signature, files and memory needs of a bundle and open it. Raises BundleError."""
        if self._keys is not None:
            self._keys.check(directory)
        manifest = read_manifest(directory)
        if not self._force:
            require_memory(str(directory), requirements(manifest, self._config.context), self._board)
        return Bundle.open(directory, self._config.cache_directory)

    def _load(self, bundle: Bundle) -> Generator:
        """Load a bundle, and test it unless it has passed the test on this machine before."""
        config = self._config
        generator = Generator(bundle, config.cache_directory, config.threads, config.context)
        stamp = config.cache_directory / f"{bundle.digest[:24]}.tested"
        passed = weight_cache_name(bundle.manifest.files[DECODER].sha256)  # includes LiteRT and the CPU
        if matches(stamp, passed):
            return generator
        try:
            self_test(generator)
        except BaseException:
            generator.close()
            raise
        write_stamp(stamp, passed)
        return generator


class StoreKeeper(BundleKeeper):
    """Follows the link of a bundle store."""

    def __init__(self, config: Config, board: Board, force: bool) -> None:
        super().__init__(config, board, force)
        self._store = BundleStore(config.bundle)
        self._record = DaemonRecord(self._store.directory)
        self._running = ""
        self._previous: str | None = None
        self._refused: str | None = None
        self._fell_back_to: str | None = None
        self._failures_seen = 0

    def open(self, crashed_in_work: bool = False) -> Generator:
        """Load and test the current bundle, or the previous one if that has failed too often."""
        record = self._record
        if record.content.begun is not None and not crashed_in_work:
            self._failed(record.content.begun, "the daemon was killed or crashed while it loaded the bundle")
        while True:
            name = self._store.current or self._store.link.name
            if record.content.running != name and self._fell_back_to is None:
                record.change(trouble=None)
            record.change(begun=name)
            try:
                self.generator = self._load(self._verified(self._store.path(name)))
            except Exception as error:
                record.change(begun=None)
                if not self._failed(name, str(error)):
                    raise
            else:
                record.change(running=name, begun=None)
                self._running, self._previous = name, self._store.previous
                self._forget_packed()
                return self.generator

    def attach(self, engine: Engine, switched: Callable[[], None]) -> None:
        """Serve this engine from now on; `switched` is called when another bundle answers."""
        super().attach(engine, switched)
        if self._record.content.trouble is not None:
            engine.last_error = self._record.content.trouble

    def _follow(self, engine: Engine) -> None:
        """Record new failures of this bundle, and start a switch if the link points to another one."""
        while self._failures_seen < engine.decoder_failures:
            self._failures_seen += 1
            self._failed(self._running, engine.last_error or "a request failed")
        target, previous = self._store.settled
        if target in (None, self._running):
            self._refused, self._previous = None, previous
        elif target is not None and target != self._refused:
            self._load_aside(self._switch, target, engine)

    def close(self) -> None:
        """Record an orderly end of the daemon."""
        self._record.change(begun=None)  # stopping while a bundle is loaded is not a crash
        self._record.close()

    def _switch(self, target: str, engine: Engine) -> None:
        """Switch to another bundle, or refuse it."""
        log.info("bundle %s: loading it to replace %s", target, self._running)
        self._record.change(begun=target)
        try:
            self.generator = self._replaced(target, engine)
        except Exception as error:
            if not isinstance(error, EdgeError):
                log.exception("bundle %s failed", target)
            self._refuse(target, str(error))
            return
        log.info("bundle %s has replaced %s", target, self._running)
        self._running = target
        content = self._record.content
        self._record.change(
            running=target,
            begun=None,
            failures=tuple(failure for failure in content.failures if failure.bundle != target),
            trouble=content.trouble if target == self._fell_back_to else None,
        )
        self._forget_packed()
        self._switched()

    def _replaced(self, target: str, engine: Engine) -> Generator:
        """Replace the running generator with that of another bundle; if this raises, the old one stays."""
        old, context = self.generator, self._config.context
        bundle = self._verified(self._store.path(target))
        both = requirements(old.bundle.manifest, context), requirements(bundle.manifest, context)
        if fit_together(*both, self._board):
            new = self._timed(bundle)
            engine.pause()
            engine.resume(new)
            old.close()
            return new
        log.info("bundle %s: too little memory for both; requests wait until it is loaded", target)
        engine.pause()
        old.close()
        try:
            new = self._timed(bundle)
        except Exception:
            engine.resume(self._brought_back(target))
            raise
        engine.resume(new)
        return new

    def _brought_back(self, failed: str) -> Generator:
        """Reload the old bundle after the new one failed."""
        try:
            self.generator = self._timed(self._verified(self._store.path(self._running)))
        except Exception as error:
            self._fatal = BundleError(f"neither bundle {failed} nor {self._running} can be loaded: {error}")
            raise
        return self.generator

    def _refuse(self, target: str, why: str) -> None:
        """Refuse a bundle and restore the links."""
        self._refused = target
        self._trouble(f"bundle {target} is refused: {why}; {self._running} continues to answer")
        self._record.change(begun=None)
        self._swap_back(target, self._running, self._previous)

    def _failed(self, name: str, why: str) -> bool:
        """Record a failure of a bundle; True if the limit is reached and the previous bundle must run."""
        count, previous = self._record.fail(name, why), self._store.previous
        log.error("bundle %s: failure %d of %d in an hour: %s", name, count, MAX_FAILURES, why)
        if count < MAX_FAILURES or previous is None or not self._swap_back(name, previous):
            return False
        self._fell_back_to = previous
        self._trouble(f"bundle {name} has failed {count} times in an hour ({why}); {previous} runs again")
        return True

    def _swap_back(self, failed: str, current: str, previous: str | None = None) -> bool:
        try:
            return self._store.go_back(failed, current, previous)
        except OSError as error:
            log.error("%s can't be swapped: %s", self._store.link, error.strerror)
            return False

    def _trouble(self, message: str) -> None:
        log.error("%s", message)
        self._record.change(trouble=message)
        if self._engine is not None:
            self._engine.last_error = message

    def _forget_packed(self) -> None:
        """Remove packed weights of bundles that are neither running nor current nor previous."""
        kept = []
        for name in {self._running, self._store.current, self._store.previous} - {None}:
            with contextlib.suppress(BundleError):
                kept.append(read_manifest(self._store.path(str(name))).files[DECODER].sha256)
        forget_packed_weights(self._config.cache_directory, kept)
