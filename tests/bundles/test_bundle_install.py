"""A bundle is installed completely or not at all, from a directory, tar file or pipe; signatures; removal."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner, Result

from edge.bundles.bundle import DECODER, MANIFEST, SIGNATURE, TOKENIZER, Bundle
from edge.bundles.installation import MAX_MEMBERS, RESERVE_BYTES, install
from edge.bundles.listing import as_text, describe
from edge.bundles.signing import TrustedKeys
from edge.bundles.store import BundleStore
from edge.cli.daemon import daemon
from edge.errors import BundleError, ConfigError, EdgeError
from tests.support import bundles
from tests.support.counterparts import WAIT_S, edge_command, wait_for

TarMode = Literal["w", "w:gz"]

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundles.copy_of(bundles.small_bundle("gemma4-one-kv-head", "int8"), tmp_path / "pump-model")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return bundles.copy_of(bundles.small_bundle("gemma3-one-kv-head", "int8"), tmp_path / "other-model")


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "bundles" / "current")


def name_of(bundle: Path) -> str:
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()[:12]


def packed(bundle: Path, *names: str, mode: TarMode = "w", link: tuple[str, str] | None = None) -> io.BytesIO:
    """The bundle as a tar file, its files in the order given; `link` is a name and its target."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name in names or sorted(path.name for path in bundle.iterdir()):
            archive.add(bundle / name, f"{bundle.name}/{name}")
        if link is not None:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = tarfile.SYMTYPE, link[1]
            archive.addfile(member)
    stream.seek(0)
    return stream


def left_over(store: BundleStore) -> set[str]:
    return {path.name for path in store.directory.iterdir()} - {".installing", "current", "previous"}


@pytest.mark.parametrize("way", ["directory", "tar", "gzip", "manifest last", "file"])
def test_a_bundle_is_installed_from_every_source(
    store: BundleStore, bundle: Path, tmp_path: Path, way: str
) -> None:
    (bundle / "notes.txt").write_text("not listed in the manifest")
    files = [path.name for path in bundle.iterdir() if path.name != MANIFEST]
    source: Path | io.BytesIO = bundle
    if way == "file":
        source = tmp_path / "pump.tar"
        source.write_bytes(packed(bundle).read())
    elif way != "directory":
        order = [*files, MANIFEST] if way == "manifest last" else [MANIFEST, *files]
        source = packed(bundle, *order, mode="w:gz" if way == "gzip" else "w")
    mask = os.umask(0o077)
    try:
        done = install(store, source, None)
    finally:
        os.umask(mask)
    assert (done.name, done.new) == (name_of(bundle), True)
    assert left_over(store) == {done.name}
    (bundle / "notes.txt").unlink()
    there = store.path(done.name)
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        path.name: path.read_bytes() for path in bundle.iterdir()
    }
    assert stat.S_IMODE(there.stat().st_mode) == 0o755  # readable by the daemon's user
    assert {stat.S_IMODE(path.stat().st_mode) for path in there.iterdir()} == {0o644}
    assert store.current is None


def test_an_installed_bundle_is_not_written_again(store: BundleStore, bundle: Path) -> None:
    first = install(store, bundle, None)
    before = (store.path(first.name) / DECODER).stat().st_ino
    again = install(store, packed(bundle, MANIFEST), None)  # the sender need not send the rest
    assert (again.name, again.new) == (first.name, False)
    assert (store.path(first.name) / DECODER).stat().st_ino == before


def test_a_bundle_damaged_on_the_card_is_installed_under_a_new_name(store: BundleStore, bundle: Path) -> None:
    bad = install(store, bundle, None).name
    store.activate(bad)
    (store.path(bad) / TOKENIZER).write_bytes(b"x")
    repaired = install(store, bundle, None)
    assert repaired.new
    assert repaired.name.startswith(bad)
    assert repaired.name != bad
    assert store.is_intact(repaired.name)
    assert store.current == bad


@pytest.mark.parametrize("name", [DECODER, TOKENIZER])
@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
@pytest.mark.parametrize("way", ["directory", "manifest first", "manifest last"])
def test_a_damaged_bundle_is_named_and_leaves_nothing(
    store: BundleStore, bundle: Path, name: str, damage: str, way: str
) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        (bundle / name).unlink()
    else:
        (bundle / name).write_bytes(content[:-1] if damage == "short" else content)
    said = {"missing": "is missing", "short": "the manifest says", "changed": "the SHA-256 of"}[damage]
    files = [path.name for path in bundle.iterdir() if path.name != MANIFEST]
    order = [MANIFEST, *files] if way == "manifest first" else [*files, MANIFEST]
    source = bundle if way == "directory" else packed(bundle, *order)
    with pytest.raises(BundleError, match=rf"{said}.*{name}|{name}.*{said}"):
        install(store, source, None)
    assert left_over(store) == set()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_truncated_archive_leaves_nothing(
    store: BundleStore, bundle: Path, share: float, mode: TarMode
) -> None:
    whole = packed(bundle, mode=mode).read()
    with pytest.raises(BundleError):
        install(store, io.BytesIO(whole[: int(share * len(whole))]), None)
    assert left_over(store) == set()


def test_a_tar_file_cannot_write_outside_the_store(store: BundleStore, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"'decoder.tflite' in the tar file is neither a file nor"):
        install(store, packed(bundle, MANIFEST, link=(DECODER, "/etc/passwd")), None)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for path in bundle.iterdir():
            archive.add(path, f"../../../{path.name}")
    stream.seek(0)
    done = install(store, stream, None)
    assert store.is_intact(done.name)
    assert {path.name for path in tmp_path.iterdir()} == {"pump-model", "bundles"}


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "..", "", "manifest.json", "\x1b[2J"])
def test_a_manifest_cannot_name_files_outside_the_bundle(store: BundleStore, bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"][DECODER]
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="is not a file name"):
        install(store, bundle, None)
    assert left_over(store) == set()


def test_missing_space_is_reported_before_anything_is_written(
    store: BundleStore, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(0, 0, RESERVE_BYTES + 1000)
    )
    with pytest.raises(EdgeError, match=r"0 MB free, 1\.\d MB are needed"):
        install(store, bundle, None)
    assert left_over(store) == set()


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(store: BundleStore, bundle: Path) -> None:
    """A file size limit stands for the full disk: writing fails in the middle of the weights."""
    store.create()
    limit = "import resource,signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    limit += "; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    line = edge_command("daemon", "bundle", "install", str(bundle), "--config", str(configured(store)))
    line[4] = f"{limit}; {line[4]}"
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"Error: {store.directory}: File too large; nothing was installed\n"
    assert left_over(store) == set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_leftovers_of_an_interrupted_installation_are_removed(
    store: BundleStore, bundle: Path, number: signal.Signals
) -> None:
    line = edge_command("daemon", "bundle", "install", "-", "--config", str(configured(store)))
    whole = packed(bundle).read()
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(whole[: len(whole) // 2])
    process.stdin.flush()
    wait_for(lambda: store.directory.is_dir() and list(store.directory.glob(".incoming.*/*")))
    with pytest.raises(EdgeError, match="another installation is in progress"):
        install(store, bundle, None)
    process.send_signal(number)
    process.wait(WAIT_S)
    process.stdin.close()
    assert bool(list(store.directory.glob(".incoming.*"))) == (number == signal.SIGKILL)
    assert left_over(store) - {path.name for path in store.directory.glob(".incoming.*")} == set()
    done = install(store, bundle, None)
    assert left_over(store) == {done.name}


def test_old_bundles_are_removed_and_bundles_not_yet_active_stay(
    store: BundleStore, bundle: Path, tmp_path: Path
) -> None:
    names = []
    for context in (64, 65, 66, 67):
        manifest = json.loads((bundle / MANIFEST).read_text()) | {"context": context}
        (bundle / MANIFEST).write_text(json.dumps(manifest))
        names.append(install(store, bundle, None).name)
        if context != 67:
            store.activate(names[-1])
    assert store.names() == [names[2], names[1], names[3]]
    manifest["context"] = 68
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    newest = install(store, bundle, None).name
    assert store.names() == [names[2], names[1], newest, names[3]]


def configured(store: BundleStore, *lines: str) -> Path:
    """A configuration with that store, and a password that only the unit can read."""
    path = store.directory.parent / "edge.toml"
    text = [f'bundle = "{store.link}"', *lines, "[mqtt]", 'username = "x"', 'password_file = "secret"']
    path.write_text("\n".join(text) + "\n")
    return path


def run(store: BundleStore, *arguments: str) -> Result:
    return CliRunner().invoke(
        daemon, ["bundle", *arguments, "--config", str(store.directory.parent / "edge.toml")]
    )


def test_commands_print_names_for_scripts_and_accept_name_prefixes(
    store: BundleStore, bundle: Path, other: Path
) -> None:
    configured(store)
    assert run(store, "list").stdout == f"{store.directory}: no bundle is installed\n"
    first = run(store, "install", str(bundle))
    assert first.stdout == f"{name_of(bundle)}\n"
    second = run(store, "install", str(other)).stdout.strip()
    assert run(store, "activate", name_of(bundle)[:5]).exit_code == 0
    assert store.current == name_of(bundle)
    nothing = run(store, "rollback")
    assert (nothing.exit_code, nothing.stderr) == (
        1,
        f"Error: {store.directory}: there is no previous bundle; activate another one by its name\n",
    )
    assert run(store, "activate", second).exit_code == 0
    assert run(store, "rollback").exit_code == 0
    assert (store.current, store.previous) == (name_of(bundle), second)
    unknown = run(store, "activate", "nothing")
    assert unknown.exit_code == 1
    assert unknown.stderr.startswith(f"Error: {store.directory}: bundle nothing is not one of those there: ")
    lines = run(store, "list").stdout.splitlines()
    assert lines[0].startswith(f"current  {name_of(bundle)}; gemma4 int8, ")
    assert lines[1].startswith(f"previous {second}; gemma3 int8, ")
    assert all(line.endswith("; verified") for line in lines)


def test_the_list_marks_directories_that_are_not_installed_bundles(store: BundleStore, bundle: Path) -> None:
    configured(store)
    store.create()
    shutil.copytree(bundle, store.path("by-hand"))
    store.path("broken").mkdir()
    (store.path("broken") / MANIFEST).write_text("{}")
    listed = {each["name"]: each for each in json.loads(run(store, "list", "--json").stdout)["bundles"]}
    assert (listed["by-hand"]["verified"], listed["by-hand"]["problem"]) == (False, None)
    assert "is not a bundle's manifest" in listed["broken"]["problem"]
    assert run(store, "activate", "broken").exit_code == 3
    assert run(store, "activate", "by-hand").exit_code == 0
    assert store.current == "by-hand"


def test_a_configured_bundle_that_is_not_a_link_is_an_error_with_a_fix(
    store: BundleStore, bundle: Path
) -> None:
    configured(store)
    shutil.copytree(bundle, store.link)
    result = run(store, "list")
    assert result.exit_code == 3
    assert (
        result.stderr
        == f"Error: {store.link}: is no link; in the configuration, let bundle be {store.link}\n"
    )


@pytest.fixture
def key(tmp_path: Path) -> Callable[[str], Path]:
    """Make keys as documented; returns the private key's file, with the public key next to it."""

    def make(name: str) -> Path:
        private = tmp_path / f"{name}.key"
        openssl("genpkey", "-algorithm", "ed25519", "-out", private)
        openssl("pkey", "-in", private, "-pubout", "-out", private.with_suffix(".pub"))
        return private

    return make


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def sign(bundle: Path, private: Path) -> None:
    manifest, signature = bundle / MANIFEST, bundle / SIGNATURE
    openssl("pkeyutl", "-sign", "-rawin", "-inkey", private, "-in", manifest, "-out", signature)


@needs_openssl
def test_a_signed_bundle_is_accepted_and_its_key_named(
    store: BundleStore, bundle: Path, other: Path, key: Callable[[str], Path], tmp_path: Path
) -> None:
    old, new = key("old"), key("new")
    keys = tmp_path / "release.pub"
    keys.write_text(old.with_suffix(".pub").read_text() + new.with_suffix(".pub").read_text())
    sign(bundle, new)
    sign(other, old)
    signers = {
        install(store, bundle, TrustedKeys(keys)).signed_by,
        install(store, packed(other), TrustedKeys(keys)).signed_by,
    }
    assert len(signers) == 2
    configured(store, f'bundle_key_file = "{keys}"')
    listed = json.loads(run(store, "list", "--json").stdout)["bundles"]
    assert {each["signed_by"] for each in listed} == signers
    assert run(store, "activate", name_of(bundle)).exit_code == 0


@needs_openssl
@pytest.mark.parametrize("fault", ["unsigned", "another key", "another manifest", "short"])
def test_a_bundle_without_a_signature_of_a_known_key_is_refused(
    store: BundleStore, bundle: Path, key: Callable[[str], Path], fault: str
) -> None:
    good = key("good")
    if fault != "unsigned":
        sign(bundle, key("bad") if fault == "another key" else good)
    if fault == "another manifest":
        manifest = json.loads((bundle / MANIFEST).read_text()) | {"context": 64}
        (bundle / MANIFEST).write_text(json.dumps(manifest))
    if fault == "short":
        (bundle / SIGNATURE).write_bytes(b"short")
    keys = TrustedKeys(good.with_suffix(".pub"))
    with pytest.raises(BundleError, match="must be signed" if fault == "unsigned" else "is no signature"):
        install(store, bundle, keys)
    with pytest.raises(BundleError):
        install(store, packed(bundle), keys)
    assert left_over(store) == set()
    installed = install(store, bundle, None).name
    configured(store, f'bundle_key_file = "{good.with_suffix(".pub")}"')
    assert run(store, "activate", installed).exit_code == 3
    assert store.current is None
    sign(bundle, good)
    if fault == "unsigned":  # equal manifests, so equal digests: the signed one is next to it
        assert install(store, bundle, keys).name.startswith(installed)


class Endless(io.RawIOBase):
    """A header that announces a file of `size` bytes, followed by endless zeros."""

    def __init__(self, before: bytes, name: str, size: int) -> None:
        header = tarfile.TarInfo(name)
        header.size = size
        self._head = io.BytesIO(before + header.tobuf(tarfile.GNU_FORMAT))
        self.given = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self._head.read(size) or bytes(size)
        self.given += len(content)
        return content


def before_the_end(archive: io.BytesIO) -> bytes:
    """A tar file without the zeros that end it."""
    content = archive.getvalue()
    return content[: max(at for at in range(512, len(content), 512) if any(content[at - 512 : at]))]


@pytest.mark.parametrize("files", [(), (MANIFEST,), (MANIFEST, TOKENIZER)])
def test_an_archive_that_announces_terabytes_removes_no_bundle(
    store: BundleStore, bundle: Path, other: Path, files: tuple[str, ...]
) -> None:
    for installed in (bundle, other):
        store.activate(install(store, installed, None).name)
    before = left_over(store)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"]["more.bin"] = {"size": 10 * 10**12, "sha256": "0" * 64}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    head = before_the_end(packed(bundle, *files)) if files else b""
    stream = Endless(head, "more.bin", 10 * 10**12)
    with pytest.raises(EdgeError, match=r"MB free, 10,000,00\d.\d MB are needed"):
        install(store, stream, None)  # type: ignore[arg-type]  # only read() is used
    assert left_over(store) == before
    assert store.previous in before


def test_a_file_is_copied_no_further_than_its_size_in_the_manifest(store: BundleStore, bundle: Path) -> None:
    stream = Endless(before_the_end(packed(bundle, MANIFEST)), TOKENIZER, 3 * 10**9)
    with pytest.raises(BundleError, match=r"tokenizer.model is larger than [\d,]+ bytes, its size"):
        install(store, stream, None)  # type: ignore[arg-type]  # only read() is used
    assert stream.given < (bundle / TOKENIZER).stat().st_size + 4_000_000
    assert left_over(store) == set()


def test_an_archive_of_many_members_or_a_huge_header_is_refused(store: BundleStore) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number in range(MAX_MEMBERS + 1):
            archive.addfile(tarfile.TarInfo(f"{number}/"))
    stream.seek(0)
    with pytest.raises(BundleError, match="more than 1,000 members"):
        install(store, stream, None)
    header = tarfile.TarInfo("name")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 10**10
    with pytest.raises(BundleError, match="a header too large"):
        install(store, io.BytesIO(header.tobuf(tarfile.GNU_FORMAT) + bytes(10**6)), None)


@pytest.mark.parametrize("type_", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_escape_sequences_in_an_archive_do_not_reach_a_terminal(store: BundleStore, type_: bytes) -> None:
    member = tarfile.TarInfo("\x1b]0;owned\x07")
    member.type = type_
    stream = io.BytesIO(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(EdgeError) as caught:
        install(store, stream, None)
    assert str(caught.value).isprintable()


def test_the_content_of_an_unsigned_manifest_does_not_reach_a_terminal(
    store: BundleStore, bundle: Path
) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["recipe"] = "\x1b[2Jint8"
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    install(store, bundle, None)
    assert as_text(describe(store, None)).isprintable()


@pytest.mark.parametrize("what", ["fifo", "/dev/zero"])
def test_a_manifest_that_is_not_a_regular_file_is_refused_at_once(
    store: BundleStore, bundle: Path, tmp_path: Path, what: str
) -> None:
    name = install(store, bundle, None).name
    manifest = store.path(name) / MANIFEST
    manifest.unlink()
    os.mkfifo(manifest) if what == "fifo" else manifest.symlink_to(what)
    with pytest.raises(BundleError, match=r"manifest\.json: can't be read: not a regular file"):
        Bundle.open(store.path(name), tmp_path / "cache")


@needs_openssl
@pytest.mark.parametrize("fault", ["unsigned", "another key"])
def test_nothing_is_removed_to_make_room_for_an_unsigned_bundle(
    store: BundleStore,
    bundle: Path,
    other: Path,
    key: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    for installed in (bundle, other):
        store.activate(install(store, installed, None).name)
    before = left_over(store)
    manifest = json.loads((bundle / MANIFEST).read_text()) | {"context": 64}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    if fault == "another key":
        sign(bundle, key("bad"))
    full = shutil._ntuple_diskusage(0, 0, RESERVE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: full)
    with pytest.raises(BundleError):
        install(store, bundle, TrustedKeys(key("good").with_suffix(".pub")))
    assert left_over(store) == before
    assert store.previous in before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't be read: No such file"),
        ("", "no public key is in it"),
        ("-----BEGIN PUBLIC KEY-----\n!\n-----END PUBLIC KEY-----", "a key in it is not PEM"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "a key in it is not Ed25519"),
    ],
)
def test_a_file_that_is_not_a_key_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "release.pub"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"bundle_key_file {path}: {said}"):
        TrustedKeys(path)
