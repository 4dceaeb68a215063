"""Ask held-out scenarios through the product's own converter and generator; count what is exactly right.

    python -m adapters.field_270m.score CHECKPOINT --recipe float32
    python -m adapters.field_270m.score CHECKPOINT --recipe int8 --recipe int4 --calibrate --lora FOLDER

Each answer is made under its schema's grammar, so all are valid; right is only the one that the scenario's
rules give. Sensor kinds, places, sites and seed take no part in the training.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import click

from adapters.field_270m.scenarios import KINDS, Scenario, scenarios
from adapters.field_270m.sensors import HELD_OUT
from converters.calibration.text import CalibrationText
from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from converters.lora import merge_adapter
from edge import defaults
from edge.generation.answer import Completion
from edge.generation.generator import Generator

SEED = 2_000_000
CONTEXT = 512


@dataclass
class Score:
    """How many scenarios were asked and exactly right, by kind, and the wrong answers."""

    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    mistakes: list[tuple[Scenario, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of all scenarios, how many were exactly right."""
        return self.right.total() / self.asked.total()

    def by_kind(self) -> Mapping[str, float]:
        """The share of each kind."""
        return {kind: self.right[kind] / self.asked[kind] for kind in KINDS if self.asked[kind]}


def held_out(count: int, seed: int = SEED) -> Iterable[Scenario]:
    """The first `count` held-out scenarios, all kinds alike often."""
    return itertools.islice(scenarios(HELD_OUT, seed), count)


def score(generator: Generator, asked: Iterable[Scenario]) -> Score:
    """Ask them one after the other."""
    result = Score()
    for index, scenario in enumerate(asked):
        answer = _answer(generator, scenario, str(index))
        result.asked[scenario.kind] += 1
        result.right[scenario.kind] += answer == scenario.answer
        if answer != scenario.answer:
            result.mistakes.append((scenario, answer))
    return result


def _answer(generator: Generator, scenario: Scenario, identity: str) -> str:
    for part in generator.generate(scenario.request(identity), lambda: None):
        if isinstance(part, Completion):
            return part.text
    raise AssertionError("an answer ends with a Completion")


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--recipe", "recipes", multiple=True, default=("int8",), help="float32, or one of edge-convert's."
)
@click.option("--lora", type=click.Path(exists=True, path_type=Path), help="An adapter to merge first.")
@click.option("--calibrate", is_flag=True, help="Quantise as `edge-convert --calibrate` does.")
@click.option("--count", type=click.IntRange(1), default=700, show_default=True)
@click.option("--mistakes", is_flag=True, help="Show the wrong answers.")
def main(
    checkpoint: Path, recipes: tuple[str, ...], lora: Path | None, calibrate: bool, count: int, mistakes: bool
) -> None:
    """Convert by each recipe, ask, and print one line for each."""
    opened = open_checkpoint(checkpoint)
    opened = opened if lora is None else merge_adapter(opened, lora)
    text = CalibrationText.built_in() if calibrate else None
    for recipe in recipes:
        with tempfile.TemporaryDirectory(prefix="edge-gemma-score-") as scratch:
            bundle = Path(scratch, "bundle")
            convert(opened, bundle, recipe, CONTEXT, calibration=text)
            cache = Path(scratch, "cache")
            with closing(Generator.open(bundle, cache, defaults.threads(), CONTEXT)) as generator:
                result = score(generator, held_out(count))
        click.echo(f"{recipe}: {result.right.total()} of {count} exactly right, {result.share:.1%}")
        click.echo("  " + "  ".join(f"{kind} {share:.1%}" for kind, share in result.by_kind().items()))
        for scenario, answer in result.mistakes if mistakes else ():
            click.echo(f"\n{scenario.prompt}\n  said  {answer}\n  right {scenario.answer}")


if __name__ == "__main__":
    main()
