"""How fast, how large: this project on the real Gemma 3 270M, beside its peers if they are given.

    make bench                     our rows alone, about four minutes on two cores
    python -m benchmarks.bench --llama-cpp DIR --litert-lm MODEL ...

Everything is measured in rounds, and in each round every engine does one thing after the other does the
same, so that other programs disturb all alike. Only ratios within one run mean anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Protocol

import click

from benchmarks import models
from benchmarks.ours import Ours
from benchmarks.results import MACHINE, MEASURES, Results, table
from benchmarks.speed import read_bandwidth, seconds
from benchmarks.tasks import Tasks


class Engine(Protocol):
    """Something that runs the 270M. `facts` has its `bits`; `measures` gives functions by key."""

    name: str
    facts: Mapping[str, Any]

    def measures(self) -> dict[str, Callable[[int], float]]:
        """By key of `results.MEASURES`: a function from the round to a value."""

    def close(self) -> None:
        """End its processes."""


def measure(engines: Sequence[Engine], rounds: int, threads: int) -> Results:
    """Measure all engines, interleaved."""
    results = Results(facts={engine.name: dict(engine.facts) for engine in engines})
    functions = [(engine, engine.measures()) for engine in engines]
    for turn in range(rounds):
        results.add(MACHINE, "interpreter", seconds(_bare_interpreter))
        for row in MEASURES:
            if row.once and turn:
                continue
            click.echo(f"round {turn + 1} of {rounds}: {row.label.strip()}", err=True)
            for engine, by_key in functions:
                if row.key in by_key:
                    bandwidth = read_bandwidth(threads) if row.key == "decode" else 0.0
                    results.add(engine.name, row.key, by_key[row.key](turn))
                    if "bytes_per_token" in engine.facts and bandwidth:
                        _add_bound(results, engine, bandwidth)
    return results


def _add_bound(results: Results, engine: Engine, bandwidth: float) -> None:
    """Put the last decode beside what a read bandwidth measured just before it allows."""
    read = engine.facts["bytes_per_token"]
    bound = bandwidth / read
    share = 100 * results.of(engine.name, "decode")[-1] / bound
    values = {"bytes_per_token": read, "bandwidth": bandwidth, "bound": bound, "share": share}
    for key, value in values.items():
        results.add(engine.name, key, value)


def _bare_interpreter() -> None:
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often everything is measured.")
@click.option("--threads", default=2, show_default=True, help="Threads of every engine.")
@click.option("--json", "as_json", is_flag=True, help="Print all values as JSON instead of a table.")
def main(rounds: int, threads: int, as_json: bool) -> None:
    """Measure the 270M as int4 and int8 on this machine."""
    with ExitStack() as stack:
        tasks = Tasks(models.bundle("int4"))
        engines: list[Engine] = []
        for recipe in models.RECIPES:
            engines.append(Ours(recipe, threads, tasks))
            stack.callback(engines[-1].close)
        results = measure(engines, rounds, threads)
    click.echo(json.dumps(asdict(results)) if as_json else table(results))


if __name__ == "__main__":
    main()
