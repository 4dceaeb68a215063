"""Shell completion as docs/configuration.md installs it: it completes, and loads nothing heavy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
MODULES = {
    "edge-daemon": "edge.cli.entry",
    "edge-ask": "edge.cli.entry",
    "edge-convert": "converters.__main__",
}
HEAVY = (
    "numpy",
    "paho",
    "llguidance",
    "ai_edge_litert",
    "jmespath",
    "serial",
    "safetensors",
    "gguf",
    "asyncio",
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory with the three commands in `bin`, as pip writes them."""
    (tmp_path / "bin").mkdir()
    for command, module in MODULES.items():
        function = "main" if command == "edge-convert" else command.removeprefix("edge-")
        script = tmp_path / "bin" / command
        script.write_text(f"#!{sys.executable}\nfrom {module} import {function}\n{function}()\n")
        script.chmod(0o755)
    return tmp_path


def bash(home: Path, script: str) -> str:
    environment = os.environ | {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("edge-daemon bun", {"bundle"}),
        ("edge-daemon bundle roll", {"rollback"}),
        ("edge-daemon run --f", {"--force"}),
        ("edge-ask --pass", {"--password-file"}),
        ("edge-convert insp", {"inspect"}),
        ("edge-convert convert --recipe int4", {"int4", "int4-all"}),
    ],
)
def test_the_documented_commands_complete_subcommands_options_and_values(
    home: Path, words: str, expected: set[str]
) -> None:
    (install,) = re.findall(r"^(    mkdir -p .*?^    done)$", DOCUMENT, re.MULTILINE | re.DOTALL)
    command = words.split(maxsplit=1)[0]
    function = f"_{command.replace('-', '_')}_completion"
    completed = bash(
        home,
        f"{install}\n. ~/.local/share/bash-completion/completions/{command}\n"
        f"COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}\n"
        f'{function} {command}; printf "%s\\n" "${{COMPREPLY[@]}}"',
    )
    assert set(completed.split()) == expected


@pytest.mark.parametrize("command", MODULES)
@pytest.mark.parametrize("instruction", ["bash_source", "zsh_source", "fish_source", "bash_complete"])
def test_completion_loads_nothing_heavy(home: Path, command: str, instruction: str) -> None:
    variable = f"_{command.upper().replace('-', '_')}_COMPLETE"
    environment = os.environ | {variable: instruction, "COMP_WORDS": f"{command} ", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(home / "bin" / command)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in loaded
    assert loaded.isdisjoint(HEAVY)
