"""The bundle: a directory with a manifest, a TFLite graph, a tokenizer and, for Gemma 4, a table of rows.

    manifest.json             what this module reads and writes; see `Manifest`
    decoder.tflite            signatures as `converters.decoder_graph` documents them
    tokenizer.model           a SentencePiece model
    embedding.bin             only where the output head is a matrix of its own
    per_layer_embedding.bin   Gemma 4 only
    manifest.sig              an Ed25519 signature of manifest.json, optional; see `edge.bundles.signing`

A bundle is verified before anything of it is mapped, because LiteRT crashes on a damaged file: sizes and
SHA-256 of every file. A stamp in the cache directory spares the next start the check if no file has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge.bundles.architecture import Architecture
from edge.bundles.row_table import RowTable
from edge.errors import BundleError
from edge.files import identity, matches, open_regular, read_regular, write_stamp
from edge.protocol import strict_json, typed_json
from edge.protocol.checks import FieldError, integer
from edge.protocol.strict_json import StrictJsonError, printable

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
DECODER = "decoder.tflite"
TOKENIZER = "tokenizer.model"
EMBEDDING = "embedding.bin"
PER_LAYER = "per_layer_embedding.bin"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_SIGNATURE_BYTES = 4096  # 64 are right; a few more are read to say what is wrong

_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Golden:
    """A text, its token ids with `<bos>`, and what a bundle makes of it: see `edge.generation.self_test`.

    `loss` is the mean negative log-likelihood of all ids but the first, in nats.
    """

    text: str
    ids: tuple[int, ...]
    loss: float


@dataclass(frozen=True)
class Manifest:
    """All that a runtime needs to know about a bundle.

    `verify_width` and `prefill_widths` are the tokens per run of those signatures. `context` is the most
    tokens that a conversation may have. `quantization` describes how each group of tensors is stored.
    `embedding` and `head` are the same rows if the output head is tied. `golden` is None if it was not
    recorded.
    """

    architecture: Architecture
    context: int
    verify_width: int
    prefill_widths: tuple[int, ...]
    prompt_format: str
    bos_id: int
    stop_ids: tuple[int, ...]
    recipe: str
    quantization: Mapping[str, Any]
    embedding: RowTable
    head: RowTable
    per_layer_embedding: RowTable | None
    files: Mapping[str, FileEntry]
    source: Mapping[str, Any]
    licence: str
    made_by: str
    golden: Golden | None = None

    def to_json(self) -> str:
        """The manifest file's text: the same fields, sorted, so that equal manifests are equal bytes."""
        return json.dumps(asdict(self) | {"format": FORMAT_VERSION}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote. Raises BundleError, without the file's name, on anything else."""
        try:
            fields = strict_json.loads(text, MAX_MANIFEST_BYTES)
            version = fields.pop("format")
        except (StrictJsonError, KeyError):
            raise BundleError("is not a bundle's manifest; convert the checkpoint again") from None
        if version != FORMAT_VERSION:
            shown = printable(str(version)).strip("'")
            raise BundleError(
                f"has format {shown}, this version reads {FORMAT_VERSION}; convert the checkpoint again"
            )
        try:
            manifest = typed_json.read(cls, fields)
            for name in manifest.files:
                _check_plain(name)
            integer(0, 1 << 62)("quantization.bytes_per_token", manifest.quantization.get("bytes_per_token"))
        except FieldError as error:
            raise BundleError(
                f"has a missing or wrong entry ({error}); convert the checkpoint again"
            ) from None
        return manifest


def is_plain_name(name: str) -> bool:
    """Return whether `name` is printable and names a file in the bundle's own directory."""
    reserved = ("", ".", "..", MANIFEST, SIGNATURE)
    return name not in reserved and name.isprintable() and not any(c in name for c in "/\\")


def _check_plain(name: str) -> None:
    if not is_plain_name(name):
        raise FieldError(f"files has {printable(name)}, which is not a file name")


def read_manifest(directory: Path) -> Manifest:
    """Read a bundle's manifest and none of its other files. Raises BundleError that names the file."""
    return _read_manifest(directory)[0]


def _read_manifest(directory: Path) -> tuple[Manifest, str]:
    """Return the manifest and its SHA-256 (hex)."""
    path = directory / MANIFEST
    try:
        content = read_regular(path, MAX_MANIFEST_BYTES)
        return Manifest.from_json(content.decode()), hashlib.sha256(content).hexdigest()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise BundleError(f"{path}: can't be read: {reason}; is {directory} a bundle?") from None
    except BundleError as error:
        raise BundleError(f"{path} {error}") from None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files are complete and intact."""

    directory: Path
    manifest: Manifest
    digest: str
    """SHA-256 (hex) of the manifest, and so of every file it lists."""

    def path(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.directory / name

    @classmethod
    def open(cls, directory: Path, cache_directory: Path) -> Bundle:
        """Read the manifest and verify every file, by stamp if nothing has changed since the last time.

        Raises BundleError that names the file.
        """
        bundle = cls(directory, *_read_manifest(directory))
        bundle._verify_once(cache_directory)
        return bundle

    def verify(self, progress: Callable[[int], None] = lambda _bytes: None) -> None:
        """Compare size and SHA-256 of every file with the manifest; calls `progress` with the bytes read.

        Raises BundleError that names the first wrong file.
        """
        for name, entry in self.manifest.files.items():
            path = self.path(name)
            size = self._size(path)
            if size != entry.size:
                raise BundleError(
                    f"{path}: has {size} bytes, the manifest says {entry.size}; copy the bundle again"
                )
            try:
                digest = file_digest(path, progress)
            except OSError as error:
                raise BundleError(f"{path}: can't be read: {error.strerror}; copy the bundle again") from None
            if digest != entry.sha256:
                raise BundleError(
                    f"{path}: its SHA-256 is not the manifest's, it is damaged; copy the bundle again"
                )

    def _verify_once(self, cache_directory: Path) -> None:
        identities = [identity(self.path(n)) for n in self.manifest.files if self._size(self.path(n)) >= 0]
        content = "\n".join([str(self.directory.resolve()), *identities])
        stamp = cache_directory / f"{self.digest[:24]}.verified"
        if not matches(stamp, content):
            self.verify()
            write_stamp(stamp, content)

    @staticmethod
    def _size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}; the bundle is incomplete, copy it again") from None


def file_digest(path: Path, progress: Callable[[int], None] = lambda _bytes: None) -> str:
    """SHA-256 (hex) of a regular file; calls `progress` with the bytes read in each step. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
