"""Conversion: complete or not at all, reproducible bytes, and errors that name the cause."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.checkpoints.opening import open_checkpoint
from converters.cli import main
from converters.convert import convert
from converters.progress import Progress
from edge.bundles.bundle import read_manifest
from edge.errors import EdgeError
from tests.support import bundles
from tests.support.checkpoint_files import FIXTURES, copy_fixture, read_arrays, real_model, write_safetensors

GEMMA3 = FIXTURES / "gemma3-one-kv-head"
GEMMA4 = FIXTURES / "gemma4-one-kv-head"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("checkpoint", [GEMMA3, GEMMA4], ids=lambda path: path.name)
@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path, recipe: str, tmp_path: Path) -> None:
    for target in ("a", "b"):
        convert(open_checkpoint(checkpoint), tmp_path / target, recipe, 128)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_an_existing_bundle_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(EdgeError, match=f"{target}: already exists"):
        convert(open_checkpoint(GEMMA3), target, "int8", 128)
    assert content(target) == {"precious": b"x"}


def test_a_dangling_link_at_the_target_is_refused_before_the_conversion_starts(tmp_path: Path) -> None:
    target = tmp_path / "current"
    target.symlink_to(tmp_path / "gone")
    with pytest.raises(EdgeError, match=f"{target}: already exists"):
        convert(open_checkpoint(GEMMA3), target, "int8", 128)


def test_a_checkpoint_in_the_working_directory_gets_the_name_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(GEMMA3)
    convert(open_checkpoint(Path()), tmp_path / "bundle", "int8", 128)
    assert read_manifest(tmp_path / "bundle").source["name"] == GEMMA3.name


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_conversion_that_ends_early_leaves_nothing(failure: BaseException, tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            raise failure

    with pytest.raises((KeyboardInterrupt, EdgeError)):
        convert(open_checkpoint(GEMMA3), tmp_path / "bundle", "int8", 128, fail)
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_ends_early_does_not_wait_for_the_digest_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_digest(_path: Path, progress: Callable[[int], None] = lambda _bytes: None) -> str:
        for _ in range(3000):
            progress(1)
            time.sleep(0.01)
        return ""

    def interrupt(_progress: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("converters.source_digests.file_digest", slow_digest)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        convert(open_checkpoint(GEMMA3), tmp_path / "bundle", "int8", 128, interrupt)
    assert time.monotonic() - started < 15


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: writing fails in the middle of a weight."""
    limit = "import resource,signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    limit += "; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    run = f"{limit}; from converters.cli import main; main()"
    command = [sys.executable, "-c", run, str(GEMMA3), "-o", str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error == f"Error: {tmp_path}/bundle: can't be written: File too large; nothing was kept"
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_reported_before_the_conversion_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 100_000))
    with pytest.raises(EdgeError, match=f"{tmp_path}: 0.1 MB free, the bundle needs 0.[4-7] MB"):
        convert(open_checkpoint(GEMMA3), tmp_path / "bundle", "int8", 128)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_conversion_ended_by_a_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    checkpoint = real_model()
    command = [sys.executable, "-m", "converters.cli", str(checkpoint), "-o", str(tmp_path / "bundle")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if any(path.name.startswith(".bundle.") for path in tmp_path.iterdir()):
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors == f"Error: stopped by {number.name}\n"
    assert not list(tmp_path.iterdir())


def test_on_a_terminal_an_error_is_on_a_separate_line(tmp_path: Path) -> None:
    folder = copy_fixture(GEMMA3.name, tmp_path / "model")
    arrays = read_arrays(folder / "model.safetensors")
    table = arrays["model.embed_tokens.weight"].copy()
    table[1, 1] = 0x7FC0  # a NaN in the tensor that is written last
    write_safetensors(folder / "model.safetensors", arrays | {"model.embed_tokens.weight": table})
    ours, terminal = os.openpty()
    command = [sys.executable, "-m", "converters.cli", str(folder), "-o", str(tmp_path / "bundle")]
    subprocess.run(command, stderr=terminal, check=False)
    os.close(terminal)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert " s left " in shown
    assert shown.split("\r\x1b[K")[-1].startswith(f"Error: {folder}/model.safetensors: tensor")


def test_converting_loads_no_inference_library(tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    run = f"""
from converters.cli import main
main([{str(GEMMA4)!r}, "-o", {str(tmp_path / "bundle")!r}], standalone_mode=False)
print(open("/proc/self/maps").read())"""
    maps = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True).stdout
    assert "libLiteRt" not in maps
    assert "_pywrap" not in maps


def test_the_command_prints_a_summary_for_scripts(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    result = CliRunner().invoke(main, [str(GEMMA4), "-o", str(target), "--recipe", "int4", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["bytes"] == sum(path.stat().st_size for path in target.iterdir())
    assert summary["bytes_per_token"] > 0
    assert any("per_layer_embedding" in line for line in summary["errors"])


def test_inspect_shows_the_manifest(tmp_path: Path) -> None:
    directory = bundles.small_bundle("gemma4-one-kv-head", "int4")
    text = CliRunner().invoke(main, ["inspect", str(directory)]).output
    assert "gemma4, recipe int4, context 128" in text
    assert "int4 in blocks of 32" in text
    as_json = CliRunner().invoke(main, ["inspect", str(directory), "--json"]).output
    assert json.loads(as_json)["files"].keys() == read_manifest(directory).files.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.gguf", "-o", "x"], "missing.gguf: no such file"),
        (["inspect", "missing"], "missing/manifest.json: can't be read: No such file or directory"),
        ([str(GEMMA3), "-o", "x", "--context", "999999"], "--context 999999: the model has at most"),
        ([str(GEMMA3), "-o", "/proc/x/bundle"], "/proc/x/bundle: can't be written"),
    ],
)
def test_bad_input_is_a_one_line_error(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0
    assert result.stderr.startswith(f"Error: {said}")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_model_converts_in_bounded_memory(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "converters.cli",
        str(real_model()),
        "-o",
        str(tmp_path / "b"),
    ]
    done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    assert 0 < json.loads(done.stdout)["peak_memory_bytes"] < 400_000_000
