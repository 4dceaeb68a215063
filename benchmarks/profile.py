"""Where the time of an answer goes: each signature of the graph, and everything outside the graph.

    python -m benchmarks.profile [--recipe int4] [--recipe int8] [--model e2b]

For free text (64 tokens after 512) and for the workload's JSON requests of three kinds, each asked
after another one with the same system prompt. What is not in the graph is tokenizer, grammar, sampling, masks
and copies.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from unittest.mock import patch

import click

from benchmarks import models, workload
from benchmarks.speed import decode_steps
from benchmarks.tasks import CONTEXT
from edge.generation.generator import Completion, Generator
from edge.runtime.signature import Signature

Runs = dict[str, list[float]]


@contextmanager
def timed_signatures() -> Iterator[Runs]:
    """Seconds of each run of a signature, by its key, as long as the context lasts."""
    runs: Runs = defaultdict(list)
    plain = Signature.run

    def run(signature: Signature) -> None:
        started = time.perf_counter()
        plain(signature)
        runs[signature.key].append(time.perf_counter() - started)

    with patch.object(Signature, "run", run):
        yield runs


def free_text(generator: Generator) -> None:
    """64 greedy tokens after 512."""
    decoder = generator.decoder
    decoder.rewind(())
    decoder.prefill(list(range(1000, 1512)), lambda: None)
    with timed_signatures() as runs:
        started = time.perf_counter()
        decode_steps(decoder, 64)
        show("64 tokens of free text", runs, time.perf_counter() - started)


def json_answers(generator: Generator, kind: str) -> None:
    """Requests of one kind, each domain's first one not counted: it pays for the system prompt."""
    items = [item for item in workload.load() if item.kind == kind]
    seen: set[str] = set()
    with timed_signatures() as runs:
        seconds, tokens = 0.0, 0
        for item in items:
            before = {key: len(each) for key, each in runs.items()}
            started = time.perf_counter()
            *_, last = generator.generate(item.request(chat=True), lambda: None)
            assert isinstance(last, Completion)
            if item.domain in seen:
                seconds += time.perf_counter() - started
                tokens += last.usage.generated
            else:
                seen.add(item.domain)
                for key in runs:
                    del runs[key][before.get(key, 0) :]
        show(f"{kind}: {tokens} tokens in {len(items) - len(seen)} answers", runs, seconds)


def show(what: str, runs: Runs, seconds: float) -> None:
    """A block of rows: runs, milliseconds each, share."""
    click.echo(f"\n{what}, {seconds:.2f} s")
    rows = {key: (len(each), sum(each)) for key, each in sorted(runs.items()) if each}
    for key, (count, total) in rows.items():
        click.echo(f"  {key:14} {count:5} x {1000 * total / count:6.1f} ms  {total / seconds:4.0%}")
    click.echo(f"  {'the rest':14} {'':16}{1 - sum(total for _, total in rows.values()) / seconds:4.0%}")


@click.command()
@click.option("--model", type=click.Choice(sorted(models.RECIPES)), default=models.REAL, show_default=True)
@click.option("--recipe", "recipes", multiple=True, help="[default: all of the model]")
@click.option("--threads", default=2, show_default=True)
def main(model: str, recipes: tuple[str, ...], threads: int) -> None:
    """Print where the time of answers goes."""
    for recipe in recipes or models.RECIPES[model]:
        with tempfile.TemporaryDirectory(prefix="edge-profile-") as cache:
            opened = Generator.open(models.bundle(recipe, model), Path(cache), threads, CONTEXT)
            with closing(opened) as generator:
                click.echo(f"{model} {recipe}")
                free_text(generator)
                for kind in workload.KINDS:
                    json_answers(generator, kind)


if __name__ == "__main__":
    main()
