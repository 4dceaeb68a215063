"""The wheel and the source distribution build, pass the checks of a package index, and work."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
FIRMWARE = PROJECT / "firmware_configs"


def run(*command: object, cwd: Path) -> str:
    """Run a command that must succeed and return what it prints."""
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both distributions; the wheel is built from the source distribution, as pip would."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", directory, cwd=PROJECT)
    return directory


def the_wheel(distributions: Path) -> Path:
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_an_index_accepts_both_distributions(distributions: Path) -> None:
    files = sorted(distributions.iterdir())
    assert len(files) == 2
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=distributions)


@pytest.mark.slow
def test_the_wheel_contains_licence_type_marker_and_deployment_files(distributions: Path) -> None:
    with zipfile.ZipFile(the_wheel(distributions)) as wheel:
        names = set(wheel.namelist())
        stem = f"edge_gemma-{METADATA['version']}"
        assert wheel.read(f"{stem}.dist-info/licenses/LICENSE") == (PROJECT / "LICENSE").read_bytes()
        assert {"edge/py.typed", "converters/py.typed"} <= names
        assert {name.split("/")[0] for name in names} == {
            "edge", "converters", f"{stem}.data", f"{stem}.dist-info"
        }  # fmt: skip
        files = [file for file in FIRMWARE.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        assert FIRMWARE / "systemd/edge-daemon.service" in files
        for file in files:
            data = wheel.read(f"{stem}.data/data/share/edge-gemma/{file.relative_to(FIRMWARE)}")
            assert data == file.read_bytes()


@pytest.mark.slow
def test_the_source_distribution_has_every_documented_file_and_no_weights(distributions: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "docs/architecture.md"} <= names
    assert {"tests/conftest.py", "scripts/build-deb", "packaging/control.in"} <= names
    assert not [
        name for name in names if name.endswith("adapter_model.safetensors") and "fixtures" not in name
    ]


@pytest.mark.slow
def test_every_command_runs_in_a_new_environment(distributions: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv/bin"
    run(binaries / "pip", "install", "-q", f"{the_wheel(distributions)}[convert]", cwd=tmp_path)
    for name in METADATA["scripts"]:
        assert METADATA["version"] in run(binaries / name, "--version", cwd=tmp_path)
        assert run(binaries / name, "--help", cwd=tmp_path).startswith("Usage: ")
    assert (tmp_path / "venv/share/edge-gemma/systemd/edge-daemon.service").is_file()
    run(binaries / "pip", "check", cwd=tmp_path)
