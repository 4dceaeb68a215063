"""The Debian package: built here, unpacked, and checked against the rules of dpkg and Debian policy."""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
AARCH64 = 183  # e_machine of ELF

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed"),
]


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def package(request: pytest.FixtureRequest) -> Path:
    """The .deb of a release."""
    built = subprocess.run(
        [PROJECT / "scripts" / "build-deb", request.param], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (deb,) = (PROJECT / "dist").glob(f"edge-gemma_*~{request.param}_arm64.deb")
    return deb


@pytest.fixture(scope="module")
def tree(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the package holds, with its control files in DEBIAN."""
    directory = tmp_path_factory.mktemp("package")
    subprocess.run(["dpkg-deb", "--raw-extract", package, directory], check=True)
    return directory


def field(package: Path, name: str) -> str:
    done = subprocess.run(["dpkg-deb", "-f", package, name], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_control_file_declares_its_dependencies(package: Path) -> None:
    version = field(package, "Version")
    python = {"bookworm": ("3.11", "3.12"), "trixie": ("3.13", "3.14")}[version.partition("~")[2]]
    assert field(package, "Architecture") == "arm64"
    assert f"python3 (>= {python[0]}), python3 (<< {python[1]})" in field(package, "Depends")
    assert re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", field(package, "Package"))
    assert all(len(line) <= 80 for line in field(package, "Description").splitlines())


def test_all_files_belong_to_root_and_none_can_be_changed_by_others(package: Path) -> None:
    done = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        mode, owner, path = line.split()[0], line.split()[1], line.split(None, 5)[5]
        assert owner == "root/root", path
        assert mode[5] == mode[8] == "-", path
        assert mode[3] in "x-", path  # no setuid


def test_the_package_has_no_file_where_a_package_must_not_write(tree: Path) -> None:
    assert {path.name for path in tree.iterdir()} == {"DEBIAN", "usr"}
    assert not list(tree.rglob("__pycache__"))
    assert {path.name for path in (tree / "usr").iterdir()} == {"bin", "lib", "share"}


def test_every_library_is_for_aarch64(tree: Path) -> None:
    libraries = [path for path in tree.rglob("*.so*") if path.is_file()]
    assert len(libraries) > 20
    for library in libraries:
        head = library.read_bytes()[:20]
        assert head[:4] == b"\x7fELF", library
        assert int.from_bytes(head[18:20], "little") == AARCH64, library


def test_extension_modules_match_the_python_of_the_release(package: Path, tree: Path) -> None:
    version = "311" if "bookworm" in package.name else "313"
    tags = {match[1] for path in tree.rglob("*.so") if (match := re.search(r"\.cpython-(\d+)-", path.name))}
    assert tags == {version}


def test_checksums_match_the_files(tree: Path) -> None:
    lines = (tree / "DEBIAN/md5sums").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    files = {str(path.relative_to(tree)) for path in (tree / "usr").rglob("*") if path.is_file()}
    assert set(listed) == files
    for name in sorted(files)[::50]:
        assert hashlib.md5((tree / name).read_bytes()).hexdigest() == listed[name]


def test_the_package_contains_the_project_and_its_files_for_the_board(tree: Path) -> None:
    library = tree / "usr/lib/edge-gemma"
    for name in (
        "edge/service/daemon.py",
        "edge/transports/mqtt/transport.py",
        "ai_edge_litert/libLiteRt.so",
    ):
        assert (library / name).is_file(), name
    assert not (library / "converters").exists()
    shipped = tree / "usr/share/edge-gemma"
    for path in (PROJECT / "firmware_configs").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (shipped / path.relative_to(PROJECT / "firmware_configs")).is_file(), path
    assert (tree / "usr/lib/systemd/system/edge-daemon.service").is_file()
    for name in ("copyright", "changelog.gz", "deployment.md"):
        assert (tree / "usr/share/doc/edge-gemma" / name).is_file(), name


def test_the_package_contains_every_file_named_in_the_guide(tree: Path) -> None:
    guide = (tree / "usr/share/doc/edge-gemma/deployment.md").read_text()
    named = set(re.findall(r"/usr/(?:share|lib)/edge-gemma[\w/.-]*", guide))
    assert len(named) >= 6
    for path in named:
        assert (tree / path.lstrip("/")).exists(), path


@pytest.mark.parametrize("name", ["edge-daemon", "edge-ask"])
def test_commands_use_only_the_python_of_the_system(tree: Path, name: str) -> None:
    command = tree / "usr/bin" / name
    assert command.stat().st_mode & stat.S_IXUSR
    text = command.read_text()
    assert text.startswith("#!/usr/bin/python3 -I\n")
    compile(text, name, "exec")
    (module,) = re.findall(r"^from ([\w.]+) import", text, re.MULTILINE)
    assert (tree / "usr/lib/edge-gemma" / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("name", ["postinst", "prerm", "postrm"])
def test_maintainer_scripts_parse_and_stop_at_errors(tree: Path, name: str) -> None:
    script = tree / "DEBIAN" / name
    assert script.read_text().startswith("#!/bin/sh\nset -e\n")
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0


def test_every_vendored_package_has_its_metadata(tree: Path) -> None:
    library = tree / "usr/lib/edge-gemma"
    names = {path.name.partition("-")[0] for path in library.glob("*.dist-info")}
    assert {"numpy", "ai_edge_litert", "pyserial", "edge_gemma"} <= names


def test_the_licence_of_every_vendored_package_is_included(tree: Path) -> None:
    copyright_ = (tree / "usr/share/doc/edge-gemma/copyright").read_text()
    for folder in (tree / "usr/lib/edge-gemma").glob("*.dist-info"):
        name = folder.name.partition("-")[0]
        brought = [path for path in folder.rglob("*") if re.match(r"(?i)licen[cs]e|copying", path.name)]
        assert brought or f" {name} " in copyright_ or name == "edge_gemma", name
