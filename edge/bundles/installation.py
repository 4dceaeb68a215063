"""Install a bundle from a directory, a tar file or a pipe into the store: the whole of it, or nothing.

Files are copied into a scratch directory, hashed meanwhile and synced. The scratch directory gets its name
when all files match the manifest. A file is copied up to the size that the manifest gives it. A tar file is
untrusted input: names, headers and their number are bounded.

Other bundles are removed only for one whose manifest has been read, and whose signature has been checked if
keys are configured, and only if that makes enough room. Of the bundles that are neither current nor
previous, those from before the last activation go; if more room is needed, the newer ones too, and the
previous one last.

What is copied does not stay in the page cache, where it would displace the weights of the running model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Self

from edge.bundles.bundle import (
    DECODER,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    FileEntry,
    Manifest,
    is_plain_name,
)
from edge.bundles.record import read_record
from edge.bundles.signing import TrustedKeys
from edge.bundles.store import BundleStore, size_of
from edge.errors import BundleError, EdgeError
from edge.files import sync_directory
from edge.protocol.strict_json import printable

RESERVE_BYTES = 64 << 20
"""Stays free for the journal, logs and the system."""
MAX_MEMBERS = 1000
"""Of a tar file; a bundle has half a dozen."""

_MAX_HEADER_BYTES = 65_536
"""Of a tar header's extension (a long name, pax records), which `tarfile` reads into memory."""
_BLOCK = 1 << 20
_SYNC_EVERY = 16 * _BLOCK
Items = Generator[tuple[str, int, IO[bytes]], None, None]
"""Name, size and content of the files of a bundle; the content must be read before the next item."""


@dataclass(frozen=True)
class Installed:
    """What an installation did. `signed_by` is a key's fingerprint, None where no keys are configured."""

    name: str
    new: bool
    bytes: int
    signed_by: str | None


def install(store: BundleStore, source: Path | BinaryIO, keys: TrustedKeys | None) -> Installed:
    """Install the bundle in `source`: a directory, a tar file, or a stream of one.

    A bundle that is there and whole already is left as it is. Raises BundleError or EdgeError; then nothing
    has changed, but for bundles that were removed to make room.
    """
    origin = str(source) if isinstance(source, Path) else "standard input"
    try:
        store.create()
        with store.installing():
            store.clean()
            scratch = Path(tempfile.mkdtemp(prefix=".incoming.", dir=store.directory))
            try:
                texts_first = isinstance(source, Path) and source.is_dir()
                incoming = _Incoming(store, origin, scratch, keys, texts_first)
                with contextlib.closing(_items(source)) as items:
                    for name, size, stream in items:
                        if incoming.take(name, size, stream):
                            break
                return incoming.finish()
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except tarfile.TarError as error:
        raise BundleError(f"{origin}: not a complete tar file: {error}; send it again") from None
    except OSError as error:
        where = printable(str(error.filename or store.directory), 200).strip("'")
        raise EdgeError(f"{where}: {error.strerror or error}; nothing was installed") from None


class _Incoming:
    """A bundle that is being received; its files come in any order.

    It is trusted once its manifest has been read and, if there are keys, its signature has been checked.
    """

    def __init__(
        self, store: BundleStore, origin: str, scratch: Path, keys: TrustedKeys | None, texts_first: bool
    ) -> None:
        """With `texts_first`, the manifest and the signature, if there is one, precede all other files."""
        self._store, self._origin, self._scratch, self._keys = store, origin, scratch, keys
        self._texts_first, self._reserved = texts_first, False
        self._texts: dict[str, bytes] = {}
        self._manifest: Manifest | None = None
        self._found: dict[str, FileEntry] = {}
        self._there: str | None = None
        self._signer: str | None = None

    def take(self, name: str, size: int, stream: IO[bytes]) -> bool:
        """Take a file; what the manifest does not list is ignored. Returns True if no more is needed."""
        if name in (MANIFEST, SIGNATURE):
            self._take_text(name, stream)
        elif self._manifest is None:
            if is_plain_name(name):
                self._require_room(size)
                self._found[name] = self._copy(name, stream, size)
        elif name in self._manifest.files:
            limit = self._manifest.files[name].size
            if self._texts_first:
                self._check_signature()
            if self._is_trusted:
                self._reserve()
            else:
                self._require_room(limit)
            self._found[name] = self._copy(name, stream, limit)
            self._compare(name)
        return self._there is not None

    def _take_text(self, name: str, stream: IO[bytes]) -> None:
        limit = MAX_MANIFEST_BYTES if name == MANIFEST else MAX_SIGNATURE_BYTES
        text = self._texts[name] = stream.read(limit + 1)
        if len(text) > limit:
            raise BundleError(f"{self._origin}: {name} is larger than {limit:,} bytes; is it a bundle?")
        if name == MANIFEST:
            self._read_manifest()
        if len(self._texts) == 2 and self._there is None:
            self._check_signature()

    @property
    def _is_trusted(self) -> bool:
        return self._manifest is not None and (self._keys is None or self._signer is not None)

    def finish(self) -> Installed:
        """Give the bundle its name if it is whole."""
        manifest = self._manifest
        if manifest is None:
            raise BundleError(f"{self._origin}: has no {MANIFEST}; is it a bundle?")
        if self._there is not None:
            return Installed(self._there, False, size_of(manifest), self._signer)
        self._check_signature()
        self._reserve()
        for name in manifest.files:
            self._compare(name)
        for name in self._found.keys() - manifest.files.keys():
            (self._scratch / name).unlink()
        for name, text in self._texts.items():
            self._write(name, [text])
        self._scratch.chmod(0o755)
        sync_directory(self._scratch)
        name = self._store.add(self._scratch, self._digest)
        return Installed(name, True, size_of(manifest), self._signer)

    @property
    def _digest(self) -> str:
        return hashlib.sha256(self._texts[MANIFEST]).hexdigest()

    def _read_manifest(self) -> None:
        try:
            self._manifest = Manifest.from_json(self._texts[MANIFEST].decode())
        except UnicodeDecodeError:
            raise BundleError(f"{self._origin}: {MANIFEST} is not text; copy the bundle again") from None
        except BundleError as error:
            raise BundleError(f"{self._origin}: {MANIFEST} {error}") from None
        self._there, self._signer, self._reserved = None, None, False
        self._there = self._find()

    def _reserve(self) -> None:
        """Make room, once, for all that a trusted manifest lists."""
        if self._manifest is None or self._reserved:
            return
        self._reserved = True
        packed = self._manifest.files[DECODER].size if DECODER in self._manifest.files else 0
        self._make_room(size_of(self._manifest) + packed - sum(e.size for e in self._found.values()))

    def _find(self) -> str | None:
        """Name the same bundle in the store, if it is whole and signed."""
        name = self._store.whole(self._digest)
        if name is not None and self._keys is not None:
            try:
                self._signer = self._keys.check(self._store.path(name))
            except BundleError:
                return None
        return name

    def _check_signature(self) -> None:
        if self._keys is not None:
            texts = self._texts
            self._signer = self._keys.check_bytes(self._origin, texts[MANIFEST], texts.get(SIGNATURE))

    def _copy(self, name: str, stream: IO[bytes], limit: int) -> FileEntry:
        """Copy a file. Raises BundleError as soon as it is larger than `limit`."""
        digest, size = hashlib.sha256(), 0

        def blocks() -> Iterator[bytes]:
            nonlocal size
            while block := stream.read(_BLOCK):
                size += len(block)
                if size > limit:
                    raise BundleError(
                        f"{self._origin}: {name} is larger than {limit:,} bytes, its size in {MANIFEST};"
                        " copy the bundle again"
                    )
                digest.update(block)
                yield block

        self._write(name, blocks())
        return FileEntry(size, digest.hexdigest())

    def _write(self, name: str, blocks: Iterator[bytes] | list[bytes]) -> None:
        """Write a file that anybody may read, and wait until it is on the disk."""
        descriptor = os.open(
            self._scratch / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644
        )
        try:
            os.fchmod(descriptor, 0o644)
            unsynced = 0
            for block in blocks:
                view = memoryview(block)
                while view:
                    view = view[os.write(descriptor, view) :]
                unsynced += len(block)
                if unsynced >= _SYNC_EVERY:
                    _to_disk(descriptor)
                    unsynced = 0
            _to_disk(descriptor)
        finally:
            os.close(descriptor)

    def _compare(self, name: str) -> None:
        """Raise BundleError if a file is not what the manifest says, once there is a manifest."""
        if self._manifest is None:
            return
        expected, found = self._manifest.files[name], self._found.get(name)
        if found is None:
            raise BundleError(f"{self._origin}: {name} is missing; the bundle is incomplete, copy it again")
        if found.size != expected.size:
            raise BundleError(
                f"{self._origin}: {name} has {found.size} bytes, the manifest says {expected.size};"
                " copy the bundle again"
            )
        if found.sha256 != expected.sha256:
            raise BundleError(
                f"{self._origin}: the SHA-256 of {name} is not the manifest's, it is damaged;"
                " copy the bundle again"
            )

    def _make_room(self, needed: int) -> None:
        """Remove bundles that are not needed; none if even that would not make room. Raises EdgeError."""
        store = self._store
        used = {store.current, store.previous, read_record(store.directory).running}
        unused = [name for name in reversed(store.names()) if name not in used]  # the oldest first
        removable = {*unused, *([store.previous] if store.previous is not None else [])}
        self._require_room(needed, self._free() + sum(map(store.stored_bytes, removable)))
        for name in unused:
            if store.is_superseded(name) or self._free() < needed:
                store.remove(name)
        if self._free() < needed and store.previous is not None:
            store.remove(store.previous)
        self._require_room(needed)

    def _require_room(self, needed: int, room: int | None = None) -> None:
        """Raise EdgeError if there is less room than `needed` bytes (None: on the disk, as it is)."""
        if (self._free() if room is None else room) < needed:
            free = max(0, self._free()) / 1e6
            raise EdgeError(
                f"{self._store.directory}: {free:,.0f} MB free, {needed / 1e6:,.1f} MB are needed"
                " (for the bundle and its packed weights); free some"
            )

    def _free(self) -> int:
        return shutil.disk_usage(self._store.directory).free - RESERVE_BYTES


def _to_disk(descriptor: int) -> None:
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _items(source: Path | BinaryIO) -> Items:
    if isinstance(source, Path) and source.is_dir():
        return _files(source)
    return _members(source)


def _files(directory: Path) -> Items:
    """Files of a directory, the manifest first."""
    paths = [path for path in directory.iterdir() if path.is_file()]
    for path in sorted(paths, key=lambda path: (path.name != MANIFEST, path.name != SIGNATURE, path.name)):
        with path.open("rb") as file:
            yield path.name, path.stat().st_size, file
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _members(source: Path | BinaryIO) -> Items:
    """Files of a tar stream, compressed or not, in their order; the directories they are in are ignored."""
    opened = source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source)
    with opened as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as archive:
        for number, member in enumerate(archive):
            if number >= MAX_MEMBERS:
                raise BundleError(f"the tar file has more than {MAX_MEMBERS:,} members; is it a bundle?")
            if member.isfile():
                content = archive.extractfile(member)
                assert content is not None  # it is a file
                yield Path(member.name).name, member.size, content
            elif not member.isdir():
                raise BundleError(
                    f"{printable(member.name)} in the tar file is neither a file nor a directory;"
                    " pack the bundle again"
                )


class _Header(tarfile.TarInfo):
    """A header of a tar file, refused if it announces an extension too large to be read into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        extends = not (header.isreg() or header.isdir())
        if header.type == tarfile.GNUTYPE_SPARSE or (extends and header.size > _MAX_HEADER_BYTES):
            raise BundleError("the tar file has a sparse file or a header too large; pack the bundle again")
        return header
