"""The LoRA adapter that was merged into a bundle, as its manifest's `source` records it.

`source` is an open mapping in the format, so "adapter" (name, sha256) in it needs no new format version:
earlier versions ignore it. Their own bundles list the adapter's file among the source digests, without the
name.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge.bundles.bundle import Manifest
from edge.errors import BundleError

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter: the name of its folder ("" if unknown) and the SHA-256 (hex) of its weights."""

    name: str
    sha256: str

    def __str__(self) -> str:
        return repr(self.name) if self.name else "of unknown name"


def merged_adapter(manifest: Manifest) -> MergedAdapter | None:
    """The adapter merged into a bundle, or None. Raises BundleError if the manifest's entry is malformed."""
    entry = manifest.source.get("adapter")
    if entry is None:
        digest = (manifest.source.get("sha256") or {}).get(ADAPTER_WEIGHTS)
        return None if digest is None else MergedAdapter("", str(digest))
    try:
        return MergedAdapter(str(entry["name"]), str(entry["sha256"]))
    except (TypeError, KeyError):
        raise BundleError("source.adapter in the manifest must have name and sha256; convert again") from None
