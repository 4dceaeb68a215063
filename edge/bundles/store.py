"""The bundle store: a directory of bundles, with links that name the current and the previous one.

    current -> 3fa9c1d2e4b8     the bundle to run; the configuration's `bundle` names this link
    previous -> 81c03a7fe0d1    the bundle to fall back to; none if it is the same as `current`
    3fa9c1d2e4b8/               a complete bundle, named by the first digits of its digest
    .incoming.XXXX/             an installation in progress, or what a power cut left of one

A link is swapped by rename and the directory synced, so after a power cut at any moment each link names the
old bundle or the new one. A bundle gets its name when all of it is on the disk, and loses it before the first
of its files goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from edge.bundles.bundle import MANIFEST, Manifest, file_digest, read_manifest
from edge.errors import BundleError, EdgeError
from edge.files import sync_directory

PREVIOUS = "previous"
NAME_DIGITS = 12


class BundleStore:
    """The store whose current bundle is named by the link `link`. Methods that change it take a lock."""

    def __init__(self, link: Path) -> None:
        """Raises BundleError if `link` exists and is not a link, EdgeError if the store can't be read."""
        self.link, self.directory = link, link.parent
        try:
            wrong = link.exists() and not link.is_symlink()
        except OSError as error:
            raise EdgeError(f"{link}: {error.strerror}; be root, or the daemon's user") from None
        if wrong:
            raise BundleError(
                f"{link}: is no link; in the configuration, let bundle be {link.parent / 'current'}"
            )

    @property
    def current(self) -> str | None:
        """The bundle to run: its name, or the path that the link was given by hand."""
        return self._target(self.link.name)

    @property
    def previous(self) -> str | None:
        """The bundle to fall back to, None if there is none."""
        name = self._target(PREVIOUS)
        return None if name is None or name == self.current or not self.path(name).is_dir() else name

    @property
    def settled(self) -> tuple[str | None, str | None]:
        """The current and the previous bundle, but not in the middle of a change."""
        with self.locked():
            return self.current, self.previous

    def path(self, name: str) -> Path:
        """Directory of a bundle."""
        return self.directory / name

    def names(self) -> list[str]:
        """Names of all bundles: the current one, the previous one, then the newest first."""
        first = [self.current, self.previous]
        found = [path for path in self._entries() if not path.is_symlink() and (path / MANIFEST).is_file()]
        found.sort(key=lambda path: (path.name not in first, path.name != first[0], -path.stat().st_mtime))
        return [path.name for path in found if not path.name.startswith(".")]

    def is_superseded(self, name: str) -> bool:
        """Return whether a bundle was installed before the last change of `current`."""
        try:
            return self.path(name).stat().st_mtime < self.link.lstat().st_mtime
        except OSError:
            return False

    def find(self, name: str) -> str:
        """Complete a name or a prefix of one. Raises EdgeError unless exactly one bundle matches."""
        found = [each for each in self.names() if each == name] or [
            each for each in self.names() if each.startswith(name)
        ]
        if len(found) != 1:
            there = ", ".join(found or self.names()) or "none"
            raise EdgeError(f"{self.directory}: bundle {name} is not one of those there: {there}")
        return found[0]

    def create(self) -> None:
        """Create the store's directory; if root creates it, its owner is that of the parent directory."""
        if self.directory.is_dir():
            return
        self.directory.mkdir(0o755, parents=True, exist_ok=True)
        if os.geteuid() == 0:  # so that the daemon, another user, can change links there
            owner = self.directory.parent.stat()
            os.chown(self.directory, owner.st_uid, owner.st_gid)
        sync_directory(self.directory.parent)

    def activate(self, name: str) -> None:
        """Point `current` to another bundle and `previous` to the old one; both are valid at any moment."""
        with self.locked():
            old = self.current
            if old == name:
                return
            if old is not None and self.path(old).is_dir():
                self._point(PREVIOUS, old)
            self._point(self.link.name, name)

    def go_back(self, failed: str, current: str, previous: str | None = None) -> bool:
        """Point `current` to bundle `current` again if it names `failed`; returns whether it did.

        Without `previous`, there is no bundle to fall back to afterwards.
        """
        with self.locked():
            if self.current != failed:
                return False
            self._point(self.link.name, current)
            self._point(PREVIOUS, previous or current)
            return True

    def add(self, scratch: Path, digest: str) -> str:
        """Make a scratch directory, already synced, a bundle; returns its name."""
        with self.locked():
            name = self._free_name(digest)
            os.rename(scratch, self.path(name))
            sync_directory(self.directory)
            return name

    def whole(self, digest: str) -> str | None:
        """Find an intact bundle by its digest; None if there is none."""
        for name in self.names():
            path = self.path(name) / MANIFEST
            if digest.startswith(name) and file_digest(path) == digest and self.is_intact(name):
                return name
        return None

    def is_intact(self, name: str) -> bool:
        """Return whether the files of a bundle match its manifest; reads all of them."""
        try:
            manifest = read_manifest(self.path(name))
            return all(
                file_digest(self.path(name) / file) == entry.sha256 for file, entry in manifest.files.items()
            )
        except (BundleError, OSError):
            return False

    def stored_bytes(self, name: str) -> int:
        """Size of a bundle's files on the disk."""
        with contextlib.suppress(OSError):
            return sum(path.lstat().st_size for path in self.path(name).iterdir())
        return 0

    def remove(self, name: str) -> None:
        """Remove a bundle unless it is the current one."""
        gone = self.directory / f".removed.{name}"
        with self.locked():
            if name == self.current:
                return
            os.rename(self.path(name), gone)  # first, so that a partly removed bundle is never used
            sync_directory(self.directory)
        shutil.rmtree(gone)

    def clean(self) -> None:
        """Remove what interrupted installations and swaps left. Call it under `installing` only."""
        with self.locked():
            for path in self._entries():
                if path.name.startswith(".link."):
                    path.unlink()
        for path in self._entries():
            if path.name.startswith((".incoming.", ".removed.")):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def installing(self) -> Iterator[None]:
        """Exclude other installations. Raises EdgeError if one is in progress."""
        with (self.directory / ".installing").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise EdgeError(
                    f"{self.directory}: another installation is in progress; wait for it"
                ) from None
            yield

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other changes of links and names; hold it briefly."""
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _point(self, link: str, name: str) -> None:
        """Swap a link atomically, also if the power is cut."""
        if self._target(link) == name:
            return
        scratch = self.directory / f".link.{secrets.token_hex(4)}"
        os.symlink(name, scratch)
        try:
            os.replace(scratch, self.directory / link)
        except OSError:
            scratch.unlink()
            raise
        sync_directory(self.directory)

    def _target(self, link: str) -> str | None:
        try:
            return os.readlink(self.directory / link)
        except OSError:
            return None

    def _free_name(self, digest: str) -> str:
        """Shorten a digest; a damaged bundle of the same digest keeps its name."""
        lengths = range(NAME_DIGITS, len(digest) + 1)
        return next(digest[:n] for n in lengths if not self.path(digest[:n]).exists())

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.directory.iterdir())
        except OSError:
            return []


def size_of(manifest: Manifest) -> int:
    """Bytes of a bundle's files."""
    return sum(entry.size for entry in manifest.files.values())
