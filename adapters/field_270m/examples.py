"""Scenarios as token ids and choices, for a training script that is independent of this product.

    python -m adapters.field_270m.examples CHECKPOINT OUT.jsonl --count 6000 --seed 1

Each line is an object: `kind`, `ids` (prompt and right answer as the product would run them) and `choices`,
one for each answer token that the grammar leaves open: [position in `ids`, allowed ids, index of the right
one].
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from adapters.field_270m.scenarios import MAX_TOKENS, Scenario, scenarios
from adapters.field_270m.sensors import TRAINING
from converters.checkpoints.opening import open_checkpoint
from edge.generation.answer_format import AnswerFormat
from edge.generation.grammar import Grammar, GrammarCompiler
from edge.text.prompt import render
from edge.text.tokenizer import Tokenizer

MIX = (
    *("trend", "unit", "missing", "sites", "threshold", "survey", "missing"),
    *("stuck", "threshold", "trend", "unit", "survey", "missing", "sites"),
)
"""Kinds in training: more of those that take longer to learn."""


@dataclass(frozen=True)
class Example:
    """A scenario in tokens. Each of `choices` is (position, allowed ids, index of the right one)."""

    ids: list[int]
    choices: list[tuple[int, list[int], int]]


class Encoder:
    """Turns scenarios into examples for a base model with this tokenizer."""

    def __init__(self, tokenizer: Tokenizer, bos_id: int, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._bos_id = tokenizer, bos_id
        self._grammars = GrammarCompiler(tokenizer, stop_ids)

    def example(self, scenario: Scenario) -> Example:
        """The scenario with its right answer."""
        request = scenario.request("example")
        ids = render(request, "plain", self._tokenizer, self._bos_id)
        answer_format = AnswerFormat.of(request)
        assert answer_format is not None
        grammar = self._grammars.compile(answer_format)
        choices = []
        for token, allowed in self._path(grammar, scenario.answer):
            if allowed:
                choices.append((len(ids), allowed, allowed.index(token)))
            ids.append(token)
        return Example(ids, choices)

    def _path(self, grammar: Grammar, answer: str) -> Iterator[tuple[int, list[int]]]:
        """Tokens of `answer` as the grammar forces or allows them, each with what else was allowed."""
        constraint, rest = grammar.constrain(MAX_TOKENS), answer.encode()
        while not constraint.complete:
            forced = constraint.forced()
            constraint.accept(forced)
            for token in forced:
                rest = rest[len(self._tokenizer.piece_bytes(token)) :]
                yield token, []
            if forced:
                continue
            allowed = constraint.allowed()
            assert allowed is not None  # answers are made of enums
            fitting = [token for token in allowed if rest.startswith(self._tokenizer.piece_bytes(token))]
            token = max(fitting, key=lambda token: len(self._tokenizer.piece_bytes(token)))
            constraint.accept([token])
            rest = rest[len(self._tokenizer.piece_bytes(token)) :]
            yield token, allowed


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(1), default=12000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
def main(checkpoint: Path, output: Path, count: int, seed: int) -> None:
    """Write the examples."""
    opened = open_checkpoint(checkpoint)
    encoder = Encoder(Tokenizer(opened.tokenizer_model), opened.chat.bos_id, opened.chat.stop_ids)
    with output.open("w") as file:
        for scenario in itertools.islice(scenarios(TRAINING, seed, MIX), count):
            example = encoder.example(scenario)
            file.write(
                json.dumps({"kind": scenario.kind, "ids": example.ids, "choices": example.choices}) + "\n"
            )


if __name__ == "__main__":
    main()
