"""The `edge-convert` command: common mistakes, progress, and required packages."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.cli import main
from edge.cli.exit_codes import ExitCode
from tests.support.bundles import small_bundle
from tests.support.checkpoint_files import FIXTURES, GEMMA3, GEMMA4, copy_fixture

EXTRA = ("flatbuffers", "gguf", "google.protobuf", "safetensors", "sentencepiece")


def run_without(packages: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run edge-convert in an interpreter in which `packages` can't be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))"
    command = [sys.executable, "-c", f"{blocked}; from converters.__main__ import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", EXTRA)
def test_a_missing_package_is_a_one_line_error_that_names_what_to_install(
    package: str, tmp_path: Path
) -> None:
    done = run_without((package,), str(FIXTURES / GEMMA3), "-o", str(tmp_path / "bundle"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert package in done.stderr
    assert done.stderr.endswith("run: pip install 'edge-gemma[convert]'\n")
    assert not list(tmp_path.iterdir())


def test_inspect_and_help_need_no_optional_package() -> None:
    bundle = str(small_bundle(GEMMA3, "int8"))
    for arguments in (["inspect", bundle], ["--help"], ["-h"], ["convert", "-h"], ["--version"]):
        assert run_without(EXTRA, *arguments).returncode == 0, arguments


@pytest.mark.parametrize(
    ("typed", "meant"), [("inpsect", "inspect"), ("evalute", "evaluate"), ("gloden", "golden")]
)
def test_a_misspelt_command_suggests_the_right_one(typed: str, meant: str) -> None:
    result = CliRunner().invoke(main, [typed, "bundle"])
    assert result.exit_code == ExitCode.USAGE
    assert f"Error: no such command or file: {typed}; did you mean {meant}?" in result.stderr


def test_a_checkpoint_with_a_name_similar_to_a_command_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy_fixture(GEMMA3, tmp_path / "inspects")
    result = CliRunner().invoke(main, ["inspects", "-o", "bundle", "--context", "128"])
    assert result.exit_code == 0, result.output


def made(tmp_path: Path, *names: str) -> None:
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"PK")


@pytest.mark.parametrize(
    ("files", "given", "advice"),
    [
        (
            [],
            "google/gemma-3-270m-it",
            "run: hf download google/gemma-3-270m-it --local-dir gemma-3-270m-it;",
        ),
        ([], "https://huggingface.co/google/gemma-3-1b-it", "hf download google/gemma-3-1b-it --local-dir"),
        ([], "../models/gemma", "no such file or folder; give a GGUF file or a Hugging Face folder"),
        (["gemma.task"], "gemma.task", "is a MediaPipe task, already converted for another runtime; convert"),
        (["gemma.litertlm"], "gemma.litertlm", "is a LiteRT-LM model, already converted for another runtime"),
        (["m/model.safetensors"], "m/model.safetensors", "give its folder: edge-convert m -o bundle"),
        (["m/a b.gguf"], "m", "give one of them: edge-convert 'm/a b.gguf' -o bundle"),
        (["m/snapshots/1f/config.json"], "m", "give its snapshot: edge-convert m/snapshots/1f -o bundle"),
        (["m/adapter_config.json"], "m", "give its base: edge-convert BASE --lora m -o bundle"),
        (["m/manifest.json"], "m", "is a bundle already; to see what is in it, run: edge-convert inspect m"),
    ],
)
def test_a_path_that_is_not_a_checkpoint_is_an_error_with_the_right_command(
    files: list[str], given: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, *files)
    result = CliRunner().invoke(main, [given, "-o", "x"])
    assert result.exit_code == ExitCode.CHECKPOINT
    assert result.stderr.startswith(f"Error: {Path(given)}: ")
    assert advice in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("files", "given", "advice"),
    [
        ([], "adapters/pump", "run: hf download adapters/pump --local-dir pump; then give --lora pump"),
        ([], "./a/b/c", "no such folder; give one with adapter_config.json and adapter_model.safetensors"),
        (
            ["a/adapter_model.safetensors"],
            "a/adapter_model.safetensors",
            "give the adapter's folder: --lora a",
        ),
        (["a/config.json"], "a", "is a model, not an adapter; give it as the checkpoint"),
    ],
)
def test_a_path_that_is_not_an_adapter_is_an_error_with_the_right_argument(
    files: list[str], given: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path, *files)
    result = CliRunner().invoke(main, [str(FIXTURES / GEMMA3), "-o", "x", "--lora", given])
    assert result.exit_code == ExitCode.CHECKPOINT
    assert result.stderr.startswith(f"Error: {Path(given)}: ")
    assert advice in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_checkpoint_is_reported_before_a_missing_option() -> None:
    result = CliRunner().invoke(main, ["google/gemma-3-270m"])
    assert "hf download google/gemma-3-270m" in result.stderr


def test_without_a_terminal_progress_is_one_line_for_each_tenth(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "converters", str(FIXTURES / GEMMA4), "-o", str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    shares = [int(match[1]) for line in lines if (match := re.match(r" *(\d+)%  +\d+ s left  \S+$", line))]
    assert len(shares) == len(lines) <= 10
    assert shares == sorted(shares)
    assert len({share // 10 for share in shares}) == len(shares)
    assert shares[-1] == 100


def test_ctrl_c_during_a_conversion_prints_one_line_exits_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    run = f"""
import os
from converters import convert
convert.calibrate = lambda *_: (os.write({write}, b"x"), __import__("time").sleep(60))
from converters.__main__ import main
main()"""
    command = [sys.executable, "-c", run, str(FIXTURES / GEMMA3), "-o", str(tmp_path / "b"), "--calibrate"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=(write,))
    assert os.read(read, 1) == b"x"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    os.close(read)
    os.close(write)
    assert process.returncode == ExitCode.INTERRUPTED
    assert errors == "Interrupted\n"
    assert not list(tmp_path.iterdir())
