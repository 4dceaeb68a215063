"""Speed and memory of this project with the real Gemma 3 270M, compared with its peers if they are given.

    make bench                     our rows alone, about four minutes on two cores
    python -m benchmarks.bench --llama-cpp DIR --litert-lm-int4 FILE ...
    python -m benchmarks.bench --model e2b --llama-cpp DIR      random weights in the shape of a Gemma 4 E2B

Everything is measured in rounds. In each round the engines run the same task one after the other, so other
programs disturb all of them equally. Only ratios within one run are meaningful.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import click

from benchmarks import gate, models
from benchmarks.ours import Ours
from benchmarks.peer_litert_lm import LiteRtLm
from benchmarks.peer_llama_cpp import LlamaCpp
from benchmarks.peer_llama_cpp import find as find_llama_cpp
from benchmarks.processes import OtherPrograms
from benchmarks.results import MACHINE, MEASURES, Measure, Results, table
from benchmarks.speed import read_bandwidth, seconds
from benchmarks.tasks import Tasks

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


class Engine(Protocol):
    """Something that runs the model. `facts` has its `bits`; `measures` gives functions by key."""

    name: str
    facts: Mapping[str, Any]

    def measures(self) -> dict[str, Callable[[int], float]]:
        """By key of `results.MEASURES`: a function from the round to a value."""

    def close(self) -> None:
        """End its processes."""


@dataclass(frozen=True)
class Peers:
    """The locations of the peers: llama.cpp's programs, and LiteRT-LM's model files by recipe."""

    llama_cpp: Path | None
    litert_lm: Mapping[str, Path]
    litert_lm_python: Path

    def missing(self, model: str) -> str:
        """The columns missing from the table, with the option for each; empty if there are none."""
        options = [] if self.llama_cpp else ["llama.cpp (--llama-cpp DIR)"]
        for recipe in models.RECIPES[model]:
            if model == models.REAL and recipe not in self.litert_lm:
                options.append(f"LiteRT-LM {recipe} (--litert-lm-{recipe} FILE)")
        return ", ".join(options)


def measure(engines: Sequence[Engine], rows: Sequence[Measure], rounds: int, threads: int) -> Results:
    """Measure all engines, interleaved."""
    results = Results(facts={engine.name: dict(engine.facts) for engine in engines})
    functions = [(engine, engine.measures()) for engine in engines]
    for turn in range(rounds):
        results.add(MACHINE, "interpreter", seconds(_bare_interpreter))
        for row in rows:
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
    """Compare the last decode with the limit of the read bandwidth measured just before it."""
    read = engine.facts["bytes_per_token"]
    bound = bandwidth / read
    share = 100 * results.of(engine.name, "decode")[-1] / bound
    values = {"bytes_per_token": read, "bandwidth": bandwidth, "bound": bound, "share": share}
    for key, value in values.items():
        results.add(engine.name, key, value)


def _bare_interpreter() -> None:
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)


def _engines(stack: ExitStack, model: str, threads: int, peers: Peers) -> list[Engine]:
    """All available engines, closed with `stack`."""
    engines: list[Engine] = []
    tasks = Tasks(models.bundle("int4", model))

    def add(engine: Engine) -> None:
        engines.append(engine)
        stack.callback(engine.close)

    for recipe in models.RECIPES[model]:
        add(Ours(recipe, model, threads, tasks))
    for recipe in models.RECIPES[model]:
        if peers.llama_cpp is not None:
            add(LlamaCpp(peers.llama_cpp, recipe, model, threads, tasks))
        if recipe in peers.litert_lm:
            add(LiteRtLm(peers.litert_lm_python, peers.litert_lm[recipe], recipe, threads, tasks))
    return engines


@click.command()
@click.option("--model", type=click.Choice(sorted(models.RECIPES)), default=models.REAL, show_default=True)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([row.key for row in MEASURES]),
    metavar="ROW",
    help="Measure this row; can be repeated.  [default: all]",
)
@click.option("--rounds", default=5, show_default=True, help="Number of times everything is measured.")
@click.option("--threads", default=2, show_default=True, help="Threads of every engine.")
@click.option("--llama-cpp", type=FOLDER, help="A folder with llama.cpp's programs.  [default: PATH]")
@click.option("--litert-lm-int4", type=FILE, help="A .litertlm file, int4 in blocks of 32, head int8.")
@click.option("--litert-lm-int8", type=FILE, help="A .litertlm file, int8.")
@click.option("--litert-lm-python", type=FILE, default=sys.executable, help="Has litert-lm-api installed.")
@click.option("--json", "as_json", is_flag=True, help="Print all values as JSON instead of a table.")
@click.option("--save", is_flag=True, help="Save this run as the baseline of --check.")
@click.option("--check", is_flag=True, help="Fail if a ratio is worse than the committed one.")
def main(
    model: str,
    only: Sequence[str],
    rounds: int,
    threads: int,
    llama_cpp: Path | None,
    litert_lm_int4: Path | None,
    litert_lm_int8: Path | None,
    litert_lm_python: Path,
    as_json: bool,
    save: bool,
    check: bool,
) -> None:
    """Measure the 270M as int4 and int8 on this machine, and its peers if they are given.

    Another --model has random weights, int4 only, and only llama.cpp as a peer.
    """
    if model != models.REAL and (litert_lm_int4 or litert_lm_int8 or save or check):
        raise click.UsageError(f"--model {model}: LiteRT-LM, --save and --check are not available")
    files = {"int4": litert_lm_int4, "int8": litert_lm_int8}
    given = {recipe: file for recipe, file in files.items() if file is not None}
    peers = Peers(llama_cpp or find_llama_cpp(), given, litert_lm_python)
    if missing := peers.missing(model):
        click.echo(f"our own columns; not measured: {missing}", err=True)
    others = OtherPrograms()
    with ExitStack() as stack:
        engines = _engines(stack, model, threads, peers)
        rows = [row for row in MEASURES if not only or row.key in only]
        results = measure(engines, rows, rounds, threads)
    results.others = others.share()
    click.echo(json.dumps(asdict(results)) if as_json else table(results))
    if save:
        gate.save(results)
    if check:
        worse = gate.check(results)
        for line in worse:
            click.echo(f"worse: {line}", err=True)
        if worse and results.others > gate.BUSY:
            click.echo("the machine was busy, which affects some ratios; run it again", err=True)
        sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
