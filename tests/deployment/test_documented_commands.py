"""Auxiliary programs named in the Makefile and the documents can be started."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from benchmarks import shortcuts
from converters.cli import RECIPES

PROJECT = Path(__file__).parents[2]
TEXTS = [
    PROJECT / "Makefile",
    *PROJECT.glob("*.md"),
    *PROJECT.glob("docs/*.md"),
    *PROJECT.glob("adapters/**/*.md"),
]
PROGRAMS = sorted(
    {
        name
        for path in TEXTS
        for name in re.findall(r"python -m\s+((?:adapters|benchmarks|fuzz)\.[\w.]+)", path.read_text())
    }
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_documented_program_starts(name: str) -> None:
    if name == "fuzz.run" and importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed; make fuzz does that")
    shown = subprocess.run(
        [sys.executable, "-m", name, "--help"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("Usage: ")


def test_shortcuts_are_compared_in_existing_recipes_by_default() -> None:
    context = click.Context(shortcuts.main)
    (option,) = [parameter for parameter in shortcuts.main.params if parameter.name == "recipes"]
    assert set(option.get_default(context) or ()) <= set(RECIPES)
