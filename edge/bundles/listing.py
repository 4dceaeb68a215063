"""The contents of a bundle store, for `edge-daemon bundle list`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge.bundles.bundle import MANIFEST, Manifest, file_digest, read_manifest
from edge.bundles.record import MAX_FAILURES, daemon_lives, read_record
from edge.bundles.signing import TrustedKeys
from edge.bundles.store import BundleStore, size_of
from edge.errors import BundleError
from edge.protocol.strict_json import printable

_FIELDS = (
    *("name", "state", "digest", "model", "recipe", "context", "source", "bytes"),
    *("verified", "signed_by", "problem"),
)


def describe(store: BundleStore, keys: TrustedKeys | None) -> dict[str, Any]:
    """Describe all bundles, for JSON output. `signed_by` is also null if no keys are configured.

    `state` is current, previous or null; `problem` is the reason why a bundle can't be used, or null.
    """
    record = read_record(store.directory)
    running = record.running if daemon_lives(store.directory) else None
    found = [_bundle(store, name, keys) for name in store.names()]
    for each in found:
        each["running"] = each["name"] == running
        each["failures"] = [failure.why for failure in record.recent(each["name"])]
    return {"store": str(store.directory), "trouble": record.trouble, "bundles": found}


def as_text(found: dict[str, Any]) -> str:
    """One line for each bundle, then the last problem, if any."""
    lines = [_line(each) for each in found["bundles"]] or [f"{found['store']}: no bundle is installed"]
    if found["trouble"]:
        lines.append(found["trouble"])
    return "\n".join(lines)


def _bundle(store: BundleStore, name: str, keys: TrustedKeys | None) -> dict[str, Any]:
    states = {store.previous: "previous", store.current: "current"}
    fields: dict[str, Any] = dict.fromkeys(_FIELDS) | {"name": name, "state": states.get(name)}
    path = store.path(name)
    try:
        manifest = read_manifest(path)
        fields |= {
            "digest": file_digest(path / MANIFEST),
            "model": manifest.architecture.family,
            "recipe": manifest.recipe,
            "context": manifest.context,
            "source": manifest.source.get("name"),
            "bytes": size_of(manifest),
        }
        fields["verified"] = fields["digest"].startswith(name) and _sizes_are_right(path, manifest)
        fields["signed_by"] = None if keys is None else keys.check(path)
    except BundleError as error:
        fields["problem"] = str(error)
    return fields


def _sizes_are_right(path: Path, manifest: Manifest) -> bool:
    try:
        return all((path / name).stat().st_size == entry.size for name, entry in manifest.files.items())
    except OSError:
        return False


def _line(each: dict[str, Any]) -> str:
    parts = [f"{each['state'] or '-':8} {each['name']}"]
    if each["model"]:
        model, recipe, source = (_plain(each[field]) for field in ("model", "recipe", "source"))
        parts.append(f"{model} {recipe}, {each['bytes'] / 1e6:,.1f} MB, from {source}")
        parts.append("verified" if each["verified"] else "not verified")
    if each["signed_by"]:
        parts.append(f"signed by {each['signed_by']}")
    if each["running"]:
        parts.append("answers")
    if each["failures"]:
        parts.append(f"{len(each['failures'])} of {MAX_FAILURES} failures in an hour: {each['failures'][-1]}")
    if each["problem"]:
        parts.append(each["problem"])
    return "; ".join(parts)


def _plain(text: object) -> str:
    """Text of a manifest that nobody may have signed, so that it can't disturb a terminal."""
    return printable(str(text), 80).strip("'\"")
