"""Bundle archives and directories made to harm a board: refused within bounds, and what was there stays."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from tests.support import bundles
from tests.support.counterparts import edge_command

LIMIT_S = 60
SMALL_DISK = 200 << 20


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info


def tar(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def header(name: str, size: int) -> bytes:
    """Only the header of a member, which says that so many bytes follow."""
    return member(name, size=size).tobuf(tarfile.GNU_FORMAT)


class Board:
    """A store with a current and a previous bundle, and the command that installs another."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.store = directory, directory / "bundles"
        self.store.mkdir()
        self.names = []
        for source in ("gemma4-one-kv-head", "gemma4-two-kv-heads"):
            bundle = bundles.small_bundle(source, "int8")
            name = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()[:12]
            shutil.copytree(bundle, self.store / name)
            self.names.append(name)
        (self.store / "previous").symlink_to(self.names[0])
        (self.store / "current").symlink_to(self.names[1])
        self.config = directory / "edge.toml"
        self.config.write_text(f'bundle = "{self.store}/current"\n[mqtt]\n')
        self.spread: list[str] = []

    def install(self, source: str | Path, *content: bytes) -> subprocess.CompletedProcess[bytes]:
        """Run the command; fails if it takes too long. `content` is what it reads from a pipe."""
        command = edge_command("daemon", "bundle", "install", "--config", str(self.config), str(source))
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            feeder = threading.Thread(target=feed, args=(process.stdin, content))
            feeder.start()
            try:
                out, err = read_all(process)
            finally:
                process.kill()
                feeder.join()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def is_unchanged(self) -> bool:
        """Whether both bundles, both links and nothing else are there."""
        found = {path.name for path in self.store.iterdir()} - {".installing", "daemon.json"}
        links = (os.readlink(self.store / "previous"), os.readlink(self.store / "current"))
        files = all((self.store / name / "decoder.tflite").is_file() for name in self.names)
        return found == {*self.names, "previous", "current"} and links == tuple(self.names) and files


def feed(pipe: IO[bytes], content: tuple[bytes, ...]) -> None:
    with contextlib.suppress(OSError):
        for part in content:
            pipe.write(part)
        pipe.close()


def read_all(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[bytes] = []
    reader = threading.Thread(target=lambda pipe: errors.append(pipe.read()), args=(process.stderr,))
    reader.start()
    watch = threading.Timer(LIMIT_S, process.kill)
    watch.start()
    out = process.stdout.read()
    process.wait()
    in_time = watch.is_alive()
    watch.cancel()
    reader.join()
    assert in_time, f"took longer than {LIMIT_S} s"
    return out, errors[0]


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def refused(done: subprocess.CompletedProcess[bytes]) -> str:
    """What a refusal says: one printable line, and not status 0."""
    said = done.stderr.decode()
    assert done.returncode not in (0, -9), said
    assert said.count("\n") == 1, said
    assert said.strip().isprintable(), repr(said)
    return said


def huge(size: int) -> tuple[bytes, ...]:
    return (header("decoder.tflite", size), bytes(1 << 20))


MANIFEST = b'{"format": 1}'
ESCAPE = "\x1b]0;owned\x07\x1b[2Jdecoder.tflite"
ARCHIVES: dict[str, tuple[bytes, ...]] = {
    "nothing": (b"",),
    "noise": (os.urandom(100_000),),
    "a cut archive": (tar((member("m/manifest.json", MANIFEST), MANIFEST))[:700],),
    "a link out": (tar((member("m/decoder.tflite", kind=tarfile.SYMTYPE, linkname="/etc/shadow"), b"")),),
    "a hard link out": (tar((member("m/x", kind=tarfile.LNKTYPE, linkname="../../../etc/passwd"), b"")),),
    "a device": (tar((member("m/decoder.tflite", kind=tarfile.BLKTYPE, devmajor=8, devminor=0), b"")),),
    "a FIFO": (tar((member("m/manifest.json", kind=tarfile.FIFOTYPE), b"")),),
    "an absolute path": (tar((member("/etc/cron.d/owned", b"x"), b"x")),),
    "a path that climbs": (tar((member("../../../../etc/cron.d/owned", b"x"), b"x")),),
    "a name that is only dots": (tar((member("..", b"x"), b"x")),),
    "a name of the store's own": (tar((member("current", b"x"), b"x")),),
    "10 TB without a manifest": huge(10 << 40),
    "a negative size": (member("decoder.tflite").tobuf()[:124] + b"\xff" * 12 + bytes(376),),
    "a manifest twice": (tar(*[(member("manifest.json", MANIFEST), MANIFEST)] * 2),),
    "a manifest of 16 MB": (tar((member("manifest.json", b" " * (16 << 20)), b" " * (16 << 20))),),
    "a long name": (tar((member("x/" * 3000 + "decoder.tflite", b"x"), b"x")),),
    "a name with escape sequences": (tar((member(ESCAPE, kind=tarfile.SYMTYPE, linkname="x"), b"")),),
    "a file with escape sequences": (tar((member(ESCAPE, b"x"), b"x")),),
    "a name that is not UTF-8": (tar((member("decoder\udcff.tflite", kind=tarfile.FIFOTYPE), b"")),),
}


FAST = (
    "10 TB without a manifest",
    "a link out",
    "a path that climbs",
    "a name with escape sequences",
    "a manifest of 16 MB",
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in ARCHIVES]
)
def test_a_hostile_archive_is_refused_and_changes_nothing(board: Board, case: str) -> None:
    refused(board.install("-", *ARCHIVES[case]))
    assert board.is_unchanged()


def manifest_of(bundle: Path, **sizes: int) -> bytes:
    """A bundle's manifest, with the sizes of some files changed."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name, size in sizes.items():
        manifest["files"][name.replace("_", ".")]["size"] = size
    return json.dumps(manifest).encode()


def test_a_file_larger_than_its_manifest_says_is_not_written(board: Board, tmp_path: Path) -> None:
    bundle = bundles.small_bundle("gemma3-one-kv-head", "int8")
    manifest = manifest_of(bundle)
    size = 3 << 30
    most = [0]

    def look() -> None:
        while most[0] >= 0:
            for scratch in board.store.glob(".incoming.*/*"):
                with contextlib.suppress(OSError):
                    most[0] = max(most[0], scratch.stat().st_size)
            time.sleep(0.002)

    looking = threading.Thread(target=look)
    looking.start()
    said = refused(
        board.install(
            "-",
            *archive_start(manifest),
            header("m/tokenizer.model", size),
            *[bytes(1 << 20)] * 64,
        )
    )
    seen, most[0] = most[0], -1
    looking.join()
    assert "tokenizer.model" in said
    assert seen <= (1 << 20) + (bundle / "tokenizer.model").stat().st_size
    assert board.is_unchanged()


def archive_start(manifest: bytes) -> tuple[bytes, ...]:
    """The manifest as the first member of an archive that goes on."""
    padding = bytes(-len(manifest) % 512)
    return header("m/manifest.json", len(manifest)), manifest, padding


def test_a_manifest_that_wants_more_than_the_disk_removes_no_bundle(board: Board) -> None:
    bundle = bundles.small_bundle("gemma3-one-kv-head", "int8")
    manifest = manifest_of(bundle, decoder_tflite=10 << 40)
    refused(board.install("-", *archive_start(manifest), *huge(10 << 40)))
    assert board.is_unchanged()


@pytest.mark.slow
def test_a_compressed_bomb_takes_no_room(board: Board, tmp_path: Path) -> None:
    """Half a gigabyte of zeros in half a megabyte, before any manifest."""
    bomb = tmp_path / "bomb.tar"
    with tarfile.open(bomb, "w:gz") as archive:
        archive.addfile(member("m/other", size=512 << 20), Zeros(512 << 20))
    assert bomb.stat().st_size < 1 << 20
    refused(board.install(bomb))
    assert board.is_unchanged()


class Zeros(io.RawIOBase):
    """So many zeros, to read."""

    def __init__(self, size: int) -> None:
        self._left = size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        count = min(self._left, size if size >= 0 else self._left)
        self._left -= count
        return bytes(count)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zero_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("decoder.tflite", "tokenizer.model")),
    ],
)
@pytest.mark.parametrize("put", [fifo, zero_device, loop, folder], ids=lambda put: put.__name__)
def test_a_bundle_whose_file_is_none_is_refused(
    board: Board, tmp_path: Path, name: str, put: Callable[[Path], None]
) -> None:
    """Neither the start of a daemon nor an installation waits for it or reads without end."""
    bundle = bundles.copy_of(bundles.small_bundle("gemma3-one-kv-head", "int8"), tmp_path / "hostile")
    (bundle / name).unlink()
    put(bundle / name)
    refused(board.install(bundle))
    assert board.is_unchanged()
    config = tmp_path / "hostile.toml"
    config.write_text(
        f'bundle = "{bundle}"\ncache_directory = "{tmp_path}/c"\nstate_directory = "{tmp_path}/s"\n[mqtt]\n'
    )
    started = subprocess.run(
        edge_command("daemon", "run", "--config", str(config)),
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    refused(started)
    assert started.returncode == 3
