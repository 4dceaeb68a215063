"""Gemma 4 at full size: conversion, start, prefill, decode and memory, also within 2 GB.

    make bench-e2b                              random E2B-shaped weights; 30 GB of disk, half an hour
    python -m benchmarks.e2b --shape e4b --recipes mobile
    python -m benchmarks.e2b --checkpoint DIR   an existing checkpoint

Prints a table in Markdown. Rates are the best of several runs, since other programs only make a run slower.
What the prefill shortcut saves is measured on two signatures of one width: the layers that own KV, and all.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import models
from benchmarks.capped import drop_from_page_cache, memory_cap
from benchmarks.processes import Worker
from benchmarks.random_checkpoint import SHAPES, write_checkpoint
from benchmarks.speed import read_bandwidth, seconds
from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from converters.decoder_graph import Widths, widths_of
from edge.bundles.bundle import DECODER, Bundle, read_manifest
from edge.runtime.compiled_model import CompiledModel
from edge.runtime.signature import Signature, aligned_array

CONTEXT, PROMPT, ANSWER, ROUNDS = 2048, 512, 64, 3
CAP = 2 << 30


@click.command()
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="e2b", show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Use this one instead of random weights.")
@click.option("--recipes", default="int4,mobile", show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(shape: str, checkpoint: Path | None, recipes: str, threads: int) -> None:
    """Measure a Gemma 4 of full size."""
    scratch = models.CACHE / shape
    if checkpoint is None:
        checkpoint = scratch / "checkpoint"
        if not checkpoint.exists():
            click.echo(f"writing {checkpoint}", err=True)
            write_checkpoint(checkpoint, shape, models.checkpoint())
    columns = {}
    for recipe in recipes.split(","):
        columns[recipe] = measure(checkpoint, recipe, scratch / "work", threads)
        click.echo(json.dumps({recipe: columns[recipe]}), err=True)
    click.echo(markdown(columns))


def measure(checkpoint: Path, recipe: str, work: Path, threads: int) -> dict[str, str]:
    """All rows of one recipe, formatted."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    bundle, cache = work / "bundle", work / "cache"
    try:
        rows = conversion(checkpoint, recipe, bundle)
        rows |= running(bundle, cache, threads)
        rows |= shortcut(checkpoint, recipe, work / "whole", work / "whole-cache", threads)
        return rows | under_a_cap(bundle, cache, threads)
    finally:
        shutil.rmtree(work)


def conversion(checkpoint: Path, recipe: str, bundle: Path) -> dict[str, str]:
    """Time and memory of a conversion, and the time only to read its input and write its output."""
    inputs = open_checkpoint(checkpoint).source_files
    drop_from_page_cache(inputs)
    reading = sum(seconds(partial(_read, path)) for path in inputs)
    drop_from_page_cache(inputs)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "converters.cli", checkpoint, "-o", bundle, "--recipe", recipe]
    said = subprocess.run([*map(str, command), "--json"], check=True, stdout=subprocess.PIPE).stdout
    after, summary = resource.getrusage(resource.RUSAGE_CHILDREN), json.loads(said)
    writing = seconds(lambda: _write(bundle.with_name("written"), summary["bytes"]))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "checkpoint": f"{sum(path.stat().st_size for path in inputs) / 1e9:.2f} GB",
        "bundle": f"{summary['bytes'] / 1e9:.2f} GB",
        "conversion": f"{summary['seconds']:.0f} s",
        "  on the CPU": f"{cpu:.0f} s",
        "  reading and writing alone": f"{reading:.0f} + {writing:.0f} s",
        "  peak memory": f"{summary['peak_memory_bytes'] / 1e6:.0f} MB",
    }


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


def _write(path: Path, size: int) -> None:
    block = bytes(1 << 22)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    path.unlink()


def running(bundle: Path, cache: Path, threads: int) -> dict[str, str]:
    """Starts, prefill, decode and memory as in the daemon: graph, tokenizer and KV cache."""
    command = [sys.executable, "-m", "benchmarks.edge_worker", *map(str, (bundle, cache, threads, CONTEXT))]
    with closing(Worker(command)) as first:
        first_start = first.ready_s
    opened = min(_open_seconds(bundle, cache, threads) for _ in range(ROUNDS))
    bandwidth = read_bandwidth(threads)
    with closing(Worker(command)) as worker:
        prefill = max(worker.ask("prefill", tokens=PROMPT)["tps"] for _ in range(ROUNDS))
        decode = max(worker.ask("decode", tokens=ANSWER, after=PROMPT)["tps"] for _ in range(ROUNDS))
        worker.ask("prefill", tokens=CONTEXT - 1)
        anonymous = worker.memory().anonymous
    step = read_manifest(bundle).quantization["bytes_per_token"]
    return {
        "first start (packs the weights)": f"{first_start:.1f} s",
        "model load, weights packed": f"{opened:.2f} s",
        "prefill of 512": f"{prefill:.0f} tok/s",
        "decode after 512": f"{decode:.1f} tok/s",
        "  weights read for a token": f"{step / 1e6:.0f} MB",
        "  that is": f"{decode * step / 1e9:.1f} of {bandwidth / 1e9:.1f} GB/s",
        "RssAnon at 2,048 tokens": f"{anonymous / 1e6:.0f} MB",
    }


def _open_seconds(bundle: Path, cache: Path, threads: int) -> float:
    """Seconds to verify (by stamp), map and compile a bundle, in a process of its own."""
    code = """
import sys, time
from pathlib import Path
from edge.bundles.bundle import Bundle
from edge.runtime.decoder import Decoder
started = time.perf_counter()
bundle, cache = Path(sys.argv[1]), Path(sys.argv[2])
Decoder(Bundle.open(bundle, cache), cache, int(sys.argv[3]), int(sys.argv[4]))
print(time.perf_counter() - started)"""
    command = [sys.executable, "-c", code, *map(str, (bundle, cache, threads, CONTEXT))]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def shortcut(checkpoint: Path, recipe: str, bundle: Path, cache: Path, threads: int) -> dict[str, str]:
    """Tokens per second of one chunk with 512 tokens in the cache: the layers that own KV, and all layers."""
    opened = open_checkpoint(checkpoint)
    width = max(widths_of(opened.architecture).prefill)
    convert(opened, bundle, recipe, widths=Widths(width, (width,)))
    digest = Bundle.open(bundle, cache).manifest.files[DECODER].sha256
    signatures = CompiledModel(bundle / DECODER, digest, cache, threads).signatures
    rates = [width / _run_seconds(signatures[key]) for key in (f"prefill_{width}", "verify")]
    shutil.rmtree(bundle)
    shutil.rmtree(cache)
    return {
        f"a chunk of {width}, layers that own KV": f"{rates[0]:.0f} tok/s",
        f"a chunk of {width}, all layers": f"{rates[1]:.0f} tok/s",
    }


def _run_seconds(signature: Signature) -> float:
    """The best of several runs over caches of `PROMPT` rows."""
    width = signature.shape("embeddings")[1]
    noise = np.random.default_rng(0)
    for name in signature.inputs:
        rows = PROMPT + width if name.startswith("mask") else PROMPT
        array = aligned_array(tuple(rows if size < 0 else size for size in signature.shape(name)))
        if not name.startswith("mask"):
            array[:] = noise.standard_normal(array.shape, np.float32)
        signature.bind(name, array)
    for name in signature.outputs:
        signature.bind_new(name)
    return min(seconds(signature.run) for _ in range(2 * ROUNDS))


def under_a_cap(bundle: Path, cache: Path, threads: int) -> dict[str, str]:
    """An answer within 2 GB in total: anonymous memory and all file pages that are read."""
    row = "decode with 2 GB in all"
    command = [sys.executable, "-m", "benchmarks.edge_worker", *map(str, (bundle, cache, threads, CONTEXT))]
    drop_from_page_cache(path for folder in (bundle, cache) for path in folder.rglob("*") if path.is_file())
    try:
        with memory_cap(CAP) as cap:
            with closing(Worker([*cap.prefix, *command])) as worker:
                decode = max(worker.ask("decode", tokens=ANSWER, after=64)["tps"] for _ in range(ROUNDS))
                worker.ask("prefill", tokens=CONTEXT - 1)
                anonymous, peak = worker.memory().anonymous, cap.peak
            time.sleep(0.5)  # until the group is empty
    except OSError as error:
        return {row: f"not measured ({error.strerror}; needs root)"}
    return {row: f"{decode:.1f} tok/s, {anonymous / 1e6:.0f} MB anonymous, peak {peak / 1e6:.0f} MB"}


def markdown(columns: dict[str, dict[str, str]]) -> str:
    """The table: a row a measure, a column a recipe."""
    recipes: Sequence[str] = list(columns)
    lines = [f"| | {' | '.join(recipes)} |", "|---" * (len(recipes) + 1) + "|"]
    rows: dict[str, Any] = columns[recipes[0]]
    lines += [f"| {row} | {' | '.join(columns[recipe][row] for recipe in recipes)} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
