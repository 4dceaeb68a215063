"""Scenarios for the field adapter: answers follow from the text alone and are scored correctly."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapters.field_270m
from adapters.field_270m.examples import Encoder
from adapters.field_270m.scenarios import KINDS, Scenario, scenarios
from adapters.field_270m.score import held_out, score
from adapters.field_270m.sensors import HELD_OUT, TRAINING, World
from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from converters.lora import merge_adapter
from edge.generation.generator import Generator
from edge.text.tokenizer import Tokenizer
from tests.support import bundles
from tests.support.checkpoint_files import FIXTURES, GEMMA3, real_model

SHIPPED = Path(adapters.field_270m.__file__).parent / "trained"

WORLDS = {"training": TRAINING, "held out": HELD_OUT}
worlds = st.sampled_from(sorted(WORLDS)).map(WORLDS.__getitem__)

LIMIT = r"larm (?P<side>above|below) (?P<limit>-?[\d.]+)"
AGE = r"newest \d+ s old(?P<overdue>, overdue)?"
SENTENCES = (
    rf"(?P<place>.+), .+ in (?P<unit>\S+), a{LIMIT}: (?P<values>.+), {AGE}\.",
    rf"(?P<place>.+) \(.+, (?P<unit>\S+); a{LIMIT}\): (?P<values>.+), {AGE}\.",
)
SITES = rf".+ in \S+, a{LIMIT}: (?P<values>.+)\."
NOTES = r" \((same|jump|[+-][\d.]+(e-\d+)?)?(, )?(beyond)?\)"


def some(world: World, seed: int, count: int) -> list[Scenario]:
    return list(itertools.islice(scenarios(world, seed), count))


@dataclass
class Reading:
    """One reading of a report, as in the text; no value if there is no number."""

    text: str
    unit: str

    @property
    def value(self) -> float | None:
        return float(self.text) if re.match(r"-?\d", self.text) else None


@dataclass
class Understood:
    """The content of a prompt."""

    unit: str
    side: str
    limit: float
    readings: dict[str, Reading]
    overdue: bool = False


def understood(prompt: str) -> Understood:
    """Parse a prompt, and check its notes against its numbers."""
    body, end, _ = re.sub(NOTES, "", prompt).rpartition("\nJSON:")
    assert end
    return from_json(json.loads(body)) if body.startswith("{") else from_text(body)


def from_json(data: dict[str, Any]) -> Understood:
    side = "above" if "alarm_above" in data else "below"
    values = data.get("sites") or dict(enumerate(data["values"]))
    readings = {str(name): reading(value, data["unit"]) for name, value in values.items()}
    return Understood(data["unit"], side, data[f"alarm_{side}"], readings, "overdue" in data.get("age", ""))


def from_text(body: str) -> Understood:
    found = next((match for pattern in SENTENCES if (match := re.fullmatch(pattern, body))), None)
    if found is None:
        sites = re.fullmatch(SITES, body)
        assert sites
        pairs = (item.rsplit(" ", 1) for item in sites["values"].split(", "))
        readings = {name: Reading(value, "") for name, value in pairs}
        return Understood("", sites["side"], float(sites["limit"]), readings)
    items = enumerate(found["values"].split(", "))
    readings = {str(index): reading(item, found["unit"]) for index, item in items}
    return Understood(
        found["unit"], found["side"], float(found["limit"]), readings, found["overdue"] is not None
    )


def reading(text: str, unit: str) -> Reading:
    value, _, named = text.partition(" ")
    return Reading(value, named or unit)


def status(report: Understood, value: float) -> str:
    return "alarm" if (value > report.limit) == (report.side == "above") else "ok"


def judged(report: Understood, asked: Collection[str]) -> dict[str, str]:
    """The correct answer by the rules, from the text alone."""
    if "fault" not in asked:
        found = {site: status(report, item.value or 0.0) for site, item in report.readings.items()}
        if "site" not in asked:
            return found
        beyond = [site for site, what in found.items() if what != "ok"]
        assert len(beyond) < 2
        return {"site": beyond[0] if beyond else "none"}
    items = list(report.readings.values())
    values = [item.value for item in items if item.value is not None]
    if items[-1].value is None or report.overdue:
        fault = "missing"
    elif len({item.text for item in items}) == 1:
        fault = "stuck"
    elif items[-1].unit != report.unit or not 0.2 < values[-1] / values[0] < 5:
        fault = "unit"
    else:
        ups = {b > a for a, b in itertools.pairwise(values)}
        trend = (
            "steady"
            if len(set(values)) < len(values) or len(ups) == 2
            else "rising"
            if True in ups
            else "falling"
        )
        return {"fault": "none", "trend": trend, "status": status(report, values[-1])}
    return {"fault": fault, "trend": "unknown", "status": "unknown"}


@given(worlds, st.integers(0, 2**32))
def test_the_answer_follows_from_the_text_alone(world: World, seed: int) -> None:
    for scenario in some(world, seed, 14):
        assert json.loads(scenario.answer) == judged(
            understood(scenario.prompt), scenario.schema["required"]
        ), scenario.prompt


def test_scenarios_are_reproducible_by_seed_and_cover_all_types() -> None:
    again, other = some(HELD_OUT, 5, 60), some(HELD_OUT, 6, 60)
    assert some(HELD_OUT, 5, 60) == again
    assert not {s.prompt for s in again} & {s.prompt for s in other}
    assert [s.kind for s in again[: len(KINDS)]] == list(KINDS)
    statuses = {json.loads(s.answer)["status"] for s in again if s.kind == "threshold"}
    assert statuses == {"ok", "alarm"}


def test_held_out_scenarios_are_not_in_the_training_set() -> None:
    assert not {k.quantity for k in TRAINING.kinds} & {k.quantity for k in HELD_OUT.kinds}
    assert not {k.unit for k in TRAINING.kinds} & {k.unit for k in HELD_OUT.kinds}
    for name in ("places", "sites", "marks"):
        assert not {*getattr(TRAINING, name)} & {*getattr(HELD_OUT, name)}, name


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_the_grammar_of_the_schema_allows_the_answer_and_a_choice_for_each_member(world: World) -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA3)
    tokenizer = Tokenizer(checkpoint.tokenizer_model)
    encoder = Encoder(tokenizer, checkpoint.chat.bos_id, checkpoint.chat.stop_ids)
    for scenario in some(world, 1, 30):
        example = encoder.example(scenario)
        assert tokenizer.decode(example.ids) == scenario.prompt + scenario.answer
        assert len(example.choices) >= len(json.loads(scenario.answer))
        for position, allowed, right in example.choices:
            assert example.ids[position] == allowed[right]


def test_a_score_counts_each_type_and_every_answer_is_allowed_by_the_schema() -> None:
    directory = bundles.small_bundle(GEMMA3, context=512)
    with closing(Generator.open(directory, bundles.cache_directory(), 1, 512)) as generator:
        result = score(generator, held_out(2 * len(KINDS)))
    assert result.asked == dict.fromkeys(KINDS, 2)
    assert result.right.total() + len(result.mistakes) == 2 * len(KINDS)
    for scenario, answer in result.mistakes:
        said = json.loads(answer)
        assert answer != scenario.answer
        assert list(said) == scenario.schema["required"]
        assert all(said[key] in rule["enum"] for key, rule in scenario.schema["properties"].items())


def test_the_shipped_adapter_is_small_and_includes_its_licence() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 8_000_000
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in (SHIPPED / "NOTICE").read_text()
    assert json.loads((SHIPPED / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "google/gemma-3-270m"
    )


@pytest.mark.slow
def test_with_the_shipped_adapter_held_out_reports_are_answered_correctly_in_int8(tmp_path: Path) -> None:
    convert(merge_adapter(open_checkpoint(real_model()), SHIPPED), tmp_path / "bundle", "int8", 512)
    with closing(Generator.open(tmp_path / "bundle", tmp_path / "cache", 2, 512)) as generator:
        result = score(generator, held_out(140))
    assert result.share >= 0.94, result.mistakes
