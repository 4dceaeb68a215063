"""Spending bytes: never more than there are, where they mend most, and as the manifest tells."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.calibration.mixed_precision import Choice, damages, formats_of, spend
from converters.calibration.text import CalibrationText
from converters.checkpoints.opening import open_checkpoint
from converters.cli import main
from converters.convert import convert
from converters.decoder_graph import stacked_matrices
from converters.quantization import Format
from edge.bundles.bundle import read_manifest
from tests.support.checkpoint_files import FIXTURES, GEMMA3, GEMMA4, NAMES

INT2, INT4, INT8 = Format(2), Format(4, 32), Format(8)
TEXT = CalibrationText("some text", CalibrationText.built_in().content[:9000])

MATRICES = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.integers(1, 1000), st.floats(1e-6, 10)).map(
        lambda found: [
            Choice(INT2, found[0], 20 * found[1]),
            Choice(INT4, 2 * found[0], found[1]),
            Choice(INT8, 4 * found[0], found[1] / 200),
        ]
    ),
    min_size=1,
)


def total(chosen: dict[str, Choice]) -> int:
    return sum(one.bytes for one in chosen.values())


def damage(chosen: dict[str, Choice]) -> float:
    return sum(one.damage for one in chosen.values())


@given(choices=MATRICES, budget=st.integers(0, 30_000))
@settings(deadline=None)
def test_no_more_is_spent_than_there_is_and_no_step_that_fits_is_left(
    choices: dict[str, list[Choice]], budget: int
) -> None:
    chosen = spend(choices, budget)
    smallest = sum(options[0].bytes for options in choices.values())
    assert total(chosen) <= max(budget, smallest)
    for name, options in choices.items():
        for option in options:
            fits = total(chosen) - chosen[name].bytes + option.bytes <= budget
            assert not (fits and option.damage < chosen[name].damage)


def test_bytes_go_to_the_matrix_that_is_hurt_most() -> None:
    calm = [Choice(INT2, 100, 0.2), Choice(INT4, 200, 0.01), Choice(INT8, 400, 0.0001)]
    sore = [Choice(INT2, 100, 20.0), Choice(INT4, 200, 1.0), Choice(INT8, 400, 0.005)]
    chosen = spend({"calm": calm, "sore": sore}, 500)
    assert (chosen["calm"].format, chosen["sore"].format) == (INT2, INT8)
    assert damage(spend({"calm": calm, "sore": sore}, 600)) < damage(chosen)


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_and_table_has_a_damage_in_each_format_and_fewer_bits_hurt_more(name: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / name)
    found = damages(checkpoint, list(range(2, 120)))
    expected = set(stacked_matrices(checkpoint.architecture))
    if checkpoint.architecture.per_layer_width:
        expected.add("per_layer_embedding")
    if not checkpoint.architecture.tied_head:
        expected.add("embedding")
    assert set(found) == expected
    for matrix, hurt in found.items():
        four, two, eight = (hurt[format] for format in formats_of(matrix))
        assert two > four > eight > 0


@pytest.mark.parametrize("name", [GEMMA3, GEMMA4])
def test_a_bundle_fits_its_budget_and_the_manifest_says_what_was_chosen(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FIXTURES / name)
    large = convert(checkpoint, tmp_path / "int8", "int8", 512)
    small = convert(checkpoint, tmp_path / "int4", "int4-all", 512)
    budget = (large.bytes + small.bytes) // 2
    found = convert(checkpoint, tmp_path / "auto", "auto", 512, calibration=TEXT, budget=budget)
    assert 0.85 * budget < found.bytes <= budget
    manifest = read_manifest(tmp_path / "auto")
    choice = manifest.quantization["choice"]
    assert choice["budget"] == budget
    assert len(set(choice["formats"].values())) > 1
    assert set(stacked_matrices(checkpoint.architecture)) <= set(choice["formats"])
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "auto")]).output
    assert "chosen for at most" in shown
    layers = len(checkpoint.architecture.layers)
    (qkv,) = re.findall(r"^ +qkv +(int.* in \d.*)$", shown, re.MULTILINE)
    named = [
        range(int(first), int(last or first) + 1)
        for first, last in re.findall(r"\b(\d+)(?:-(\d+))?(?=[,;]|$)", qkv)
    ]
    assert sorted(layer for run in named for layer in run) == list(range(layers))


def test_a_budget_larger_than_the_model_asks_for_no_more_disk_than_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**7, 0, 10**7))
    found = convert(
        open_checkpoint(FIXTURES / GEMMA3), tmp_path / "auto", "auto", 512, calibration=TEXT, budget=10**9
    )
    assert found.bytes < 10**6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--recipe", "auto"],
            "--recipe auto and --budget need each other: give both, or another recipe alone",
        ),
        (
            ["--recipe", "int8", "--budget", "1GB"],
            "--recipe auto and --budget need each other: give both, or",
        ),
        (["--recipe", "auto", "--budget", "0.1MB"], r"--budget 0.1MB: no .* so small; --budget 1MB would do"),
        (["--recipe", "auto", "--budget", "much"], "'much' is not a size; write it like 200MB or 1.5GB"),
    ],
)
def test_a_budget_that_can_not_be_met_is_one_line_and_leaves_nothing(
    options: list[str], message: str, tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    result = CliRunner().invoke(main, [str(FIXTURES / GEMMA3), "-o", str(target), *options])
    assert result.exit_code != 0
    assert re.search(f"^Error: .*{message}.*$", result.output.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []
