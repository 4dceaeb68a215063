"""Check the Ed25519 signature of a bundle's manifest with public keys in OpenSSL's PEM format.

The manifest has the SHA-256 of every file, so its signature covers the whole bundle. Bundles are signed with
OpenSSL (docs/deployment.md has the commands).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from pathlib import Path

from edge.bundles.bundle import MANIFEST, MAX_MANIFEST_BYTES, MAX_SIGNATURE_BYTES, SIGNATURE
from edge.errors import BundleError, ConfigError
from edge.files import read_regular

_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----(.*?)-----END PUBLIC KEY-----", re.DOTALL)
_MAX_KEY_FILE_BYTES = 1 << 20
_ED25519 = bytes.fromhex("302a300506032b6570032100")
"""Precedes the 32 bytes of a key in DER (RFC 8410)."""


class TrustedKeys:
    """The public keys in a PEM file, one or several; a bundle may be signed with any of them."""

    def __init__(self, path: Path) -> None:
        """Read the keys. Raises ConfigError."""
        self._path = path
        try:
            blocks = _PEM.findall(read_regular(path, _MAX_KEY_FILE_BYTES).decode("ascii"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not PEM"
            raise ConfigError(f"bundle_key_file {path}: can't be read: {reason}") from None
        self._keys = [self._key(block) for block in blocks]
        if not self._keys:
            raise self._wrong("no public key is in it")

    def check(self, directory: Path) -> str:
        """Return the fingerprint of the key that signed a bundle. Raises BundleError if none of them did."""
        try:
            manifest = read_regular(directory / MANIFEST, MAX_MANIFEST_BYTES)
            signature = read_regular(directory / SIGNATURE, MAX_SIGNATURE_BYTES)
        except OSError as error:
            raise BundleError(f"{error.filename}: {error.strerror}; the bundle must be signed") from None
        return self.check_bytes(str(directory), manifest, signature)

    def check_bytes(self, origin: str, manifest: bytes, signature: bytes | None) -> str:
        """Do what `check` does, for files not yet on the disk; `origin` is named in the message."""
        from nacl.exceptions import BadSignatureError  # only where keys are configured
        from nacl.signing import VerifyKey

        if signature is None:
            raise BundleError(f"{origin}: has no {SIGNATURE}; the bundle must be signed")
        for key in self._keys:
            try:
                VerifyKey(key).verify(manifest, signature)
            except (BadSignatureError, ValueError):  # the latter: not 64 bytes
                continue
            return fingerprint(key)
        known = ", ".join(map(fingerprint, self._keys))
        raise BundleError(
            f"{origin}: {SIGNATURE} is no signature of its {MANIFEST} by a key of {self._path} ({known})"
        )

    def _key(self, block: str) -> bytes:
        try:
            encoded = base64.b64decode("".join(block.split()), validate=True)
        except binascii.Error:
            raise self._wrong("a key in it is not PEM") from None
        if len(encoded) != len(_ED25519) + 32 or not encoded.startswith(_ED25519):
            raise self._wrong("a key in it is not Ed25519")
        return encoded[len(_ED25519) :]

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"bundle_key_file {self._path}: {what}; openssl pkey -pubout writes such a file")


def fingerprint(key: bytes) -> str:
    """Name a public key: the first 16 digits of its SHA-256."""
    return hashlib.sha256(key).hexdigest()[:16]
