"""Power cuts at every step of a bundle switch: a valid bundle remains, and the next attempt succeeds."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from edge.bundles import installation
from edge.bundles import store as bundle_store
from edge.bundles.bundle import MANIFEST, FileEntry, Manifest, read_manifest
from edge.bundles.installation import install
from edge.bundles.store import BundleStore
from tests.support import bundles
from tests.support.power_cut import Disk, write_tree

FILES = {"decoder.tflite": 5000, "tokenizer.model": 700}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, if available: the tests write many small files and need no real disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="edge-gemma-tests-", dir=memory) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def template() -> Manifest:
    return read_manifest(bundles.small_bundle("gemma3-one-kv-head", "int8"))


@pytest.fixture
def make(tmp_path: Path, template: Manifest) -> Callable[[str], Path]:
    """Make bundles that are complete but contain no model: a switch does not read the files' content."""

    def make_one(name: str) -> Path:
        directory = tmp_path / "made" / name
        directory.mkdir(parents=True)
        files = {}
        for file, size in FILES.items():
            content = hashlib.shake_128(f"{name} {file}".encode()).digest(size)
            (directory / file).write_bytes(content)
            files[file] = FileEntry(size, hashlib.sha256(content).hexdigest())
        fields = vars(template) | {"files": files}
        (directory / MANIFEST).write_text(Manifest(**fields).to_json())
        return directory

    return make_one


@pytest.fixture
def store(tmp_path: Path, make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> BundleStore:
    """A store with a current and a previous bundle."""
    monkeypatch.setattr(installation, "_BLOCK", 2000)  # several writes for a file
    monkeypatch.setattr(installation, "_SYNC_EVERY", 4000)
    store = BundleStore(tmp_path / "store" / "current")
    with mock.patch.object(os, "fsync"), mock.patch.object(os, "posix_fadvise"):  # for speed
        for name in ("first", "second"):
            update(store, make(name))
    (store.directory / ".installing").unlink()  # Python's own open, which is not recorded, creates it again
    return store


def survived(disk: Disk, tmp_path: Path, valid: set[str | None], then: Callable[[BundleStore], None]) -> int:
    """Check every state: `current` is complete and in `valid`, and `then` works. Returns their number."""
    for number, tree in enumerate(disk.states.values()):
        place = tmp_path / "states" / str(number)
        write_tree(tree, place)
        store = BundleStore(place / "current")
        current, previous = store.current, store.previous
        assert current in valid, (current, sorted(tree))
        for name in {current, previous} - {None}:
            assert store.is_intact(str(name)), (name, sorted(tree))
        then(store)
        shutil.rmtree(place)
    return len(disk.states)


def swapped(source: Path) -> Callable[[BundleStore], None]:
    """Repeat the update after the power cut; nothing is left of the first attempt."""

    def again(store: BundleStore) -> None:
        with mock.patch.object(os, "fsync"), mock.patch.object(os, "posix_fadvise"):
            name = install(store, source, None).name
            store.activate(name)
        assert store.current == name
        assert store.is_intact(name)
        left = {path.name for path in store.directory.iterdir()} - set(store.names())
        assert left <= {"current", "previous", ".installing"}

    return again


def report(title: str, disk: Disk, states: int) -> None:
    print(
        f"{title}: {len(disk.log)} steps, {disk.choices:,} power cuts, {states:,} different disks, all valid"
    )


def update(store: BundleStore, source: Path) -> str:
    name = install(store, source, None).name
    store.activate(name)
    return name


def test_an_update_from_a_directory(store: BundleStore, make: Callable[[str], Path], tmp_path: Path) -> None:
    source, old = make("third"), store.current
    disk = Disk(store.directory)
    with disk.recording():
        new = update(store, source)
    assert (store.current, store.previous) == (new, old)
    report("update", disk, survived(disk, tmp_path, {old, new}, swapped(source)))


def test_an_update_from_a_pipe_with_the_manifest_last(
    store: BundleStore, make: Callable[[str], Path], tmp_path: Path
) -> None:
    source, old, packed = make("third"), store.current, io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in (*FILES, MANIFEST):
            archive.add(source / name, f"third/{name}")
    packed.seek(0)
    disk = Disk(store.directory)
    with disk.recording():
        new = install(store, packed, None).name
        store.activate(new)
    report("update from a pipe", disk, survived(disk, tmp_path, {old, new}, swapped(source)))


def test_an_update_that_must_make_room(
    store: BundleStore, make: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for two bundles, so the previous one is removed before the new one is written."""
    source, old = make("third"), store.current

    def disk_usage(_path: Path) -> object:
        room = 2 * (sum(FILES.values()) + FILES["decoder.tflite"])
        used = sum(sum(FILES.values()) for _ in store.names())
        return shutil._ntuple_diskusage(0, 0, installation.RESERVE_BYTES + room - used)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    disk = Disk(store.directory)
    with disk.recording():
        new = update(store, source)
    assert set(store.names()) == {old, new}
    monkeypatch.undo()
    report("update with two places", disk, survived(disk, tmp_path, {old, new}, swapped(source)))


def test_a_rollback(store: BundleStore, make: Callable[[str], Path], tmp_path: Path) -> None:
    old, new = store.current, store.previous
    assert new is not None
    disk = Disk(store.directory)
    with disk.recording():
        store.activate(new)
    assert (store.current, store.previous) == (new, old)
    report("rollback", disk, survived(disk, tmp_path, {old, new}, swapped(make("third"))))


def test_a_fallback_and_a_refusal(store: BundleStore, make: Callable[[str], Path], tmp_path: Path) -> None:
    bad, good = store.current, store.previous
    assert bad is not None
    assert good is not None
    disk = Disk(store.directory)
    with disk.recording():
        assert store.go_back(bad, good)
        assert not store.go_back(bad, good)
        store.activate(bad)
        assert store.go_back(bad, good, None)
    assert (store.current, store.previous) == (good, None)
    report("fallback", disk, survived(disk, tmp_path, {bad, good}, swapped(make("third"))))


def test_the_first_installation(make: Callable[[str], Path], tmp_path: Path) -> None:
    source, store = make("third"), BundleStore(tmp_path / "store" / "current")
    store.directory.mkdir()
    disk = Disk(store.directory)
    with disk.recording():
        new = update(store, source)
    report("first installation", disk, survived(disk, tmp_path, {None, new}, swapped(source)))


@pytest.mark.parametrize("forgotten", ["files", "scratch directory", "store"])
def test_a_missing_sync_is_detected(
    store: BundleStore,
    make: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forgotten: str,
) -> None:
    source, old = make("third"), store.current
    if forgotten == "files":
        monkeypatch.setattr(installation, "_to_disk", lambda _descriptor: None)
    else:
        module = installation if forgotten == "scratch directory" else bundle_store
        monkeypatch.setattr(module, "sync_directory", lambda _directory: None)
    disk = Disk(store.directory)
    with disk.recording():
        new = update(store, source)
    with pytest.raises(AssertionError):
        survived(disk, tmp_path, {old, new}, lambda _store: None)
