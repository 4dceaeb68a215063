"""A bundle is verified before it is mapped, and the error names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.bundles.bundle import DECODER, MANIFEST, TOKENIZER, Bundle, Manifest, read_manifest
from edge.errors import BundleError
from tests.support import bundles


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundles.copy_of(bundles.small_bundle("gemma4-one-kv-head", "int8"), tmp_path / "bundle")


def test_the_manifest_round_trips(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("name", [DECODER, TOKENIZER, "per_layer_embedding.bin"])
@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_damage_to_any_file_is_named(bundle: Path, tmp_path: Path, name: str, damage: str) -> None:
    path = bundle / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    said = {"missing": "No such file", "short": "the manifest says", "changed": "SHA-256"}[damage]
    with pytest.raises(BundleError, match=f"{path}: .*{said}"):
        Bundle.open(bundle, tmp_path / "cache")


def test_a_verified_bundle_is_not_read_again(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bundle.open(bundle, tmp_path / "cache")
    monkeypatch.setattr(Bundle, "verify", lambda _self: pytest.fail("read again"))
    Bundle.open(bundle, tmp_path / "cache")


def test_damage_after_the_verification_is_detected(bundle: Path, tmp_path: Path) -> None:
    Bundle.open(bundle, tmp_path / "cache")
    content = bytearray((bundle / DECODER).read_bytes())
    content[-1] ^= 1
    (bundle / DECODER).write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        Bundle.open(bundle, tmp_path / "cache")


def test_a_bundle_is_verified_without_a_writable_cache(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Bundle.open(bundle, tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "", "is not a bundle's manifest"),
        (lambda text: "[]", "is not a bundle's manifest"),
        (lambda text: text[:100], "is not a bundle's manifest"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "has format 99, this version reads 1"),
        (lambda text: "[" * 10**5, "is not a bundle's manifest"),
        (lambda text: json.dumps(json.loads(text) | {"surprise\n": 1}), "has a missing or wrong entry"),
        (lambda text: json.dumps(json.loads(text) | {"files": {"a\n": {}}}), r"has .*files\.a\\n\.size is"),
        (lambda text: json.dumps(json.loads(text) | {"context": "64"}), r"has .* \(context is a string"),
        (
            lambda text: text.replace('"kv_owner": 0', '"kv_owner": null', 1),
            r"has .*layers\[0\]\.kv_owner is null",
        ),
        (lambda text: json.dumps(json.loads(text) | {"architecture": {}}), "has a missing or wrong entry"),
        (lambda text: json.dumps(json.loads(text) | {"quantization": {}}), "has a missing or wrong entry"),
    ],
)
def test_a_wrong_manifest_is_named(
    bundle: Path, tmp_path: Path, change: Callable[[str], str], said: str
) -> None:
    path = bundle / MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(BundleError, match=f"{path} {said}"):
        Bundle.open(bundle, tmp_path / "cache")


def test_a_manifest_that_is_not_text_is_named(bundle: Path, tmp_path: Path) -> None:
    (bundle / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="can't be read: not text"):
        Bundle.open(bundle, tmp_path / "cache")
