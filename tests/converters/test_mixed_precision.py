"""Mixed precision: most bytes for the most sensitive matrices, within the budget and recorded."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from converters.calibration.mixed_precision import FormatOption, choose_formats, formats_of, sensitivities
from converters.calibration.text import CalibrationText
from converters.checkpoints.opening import open_checkpoint
from converters.cli import main
from converters.convert import convert
from converters.quantization import Format
from converters.weight_layout import weight_layout
from edge.bundles.bundle import read_manifest
from tests.support.checkpoint_files import (
    FIXTURES,
    GEMMA3,
    GEMMA4,
    NAMES,
    bfloat16,
    copy_fixture,
    read_arrays,
    write_safetensors,
)

INT2, INT4, INT8 = Format(2), Format(4, 32), Format(8)
TEXT = CalibrationText("some text", CalibrationText.built_in().content[:9000])

MATRICES = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.integers(1, 1000), st.floats(1e-6, 10)).map(
        lambda found: [
            FormatOption(INT2, found[0], 20 * found[1]),
            FormatOption(INT4, 2 * found[0], found[1]),
            FormatOption(INT8, 4 * found[0], found[1] / 200),
        ]
    ),
    min_size=1,
)


def total(chosen: dict[str, FormatOption]) -> int:
    return sum(one.bytes for one in chosen.values())


def divergence(chosen: dict[str, FormatOption]) -> float:
    return sum(one.divergence for one in chosen.values())


@given(choices=MATRICES, budget=st.integers(0, 30_000))
def test_the_choice_is_within_the_budget_and_no_better_option_fits(
    choices: dict[str, list[FormatOption]], budget: int
) -> None:
    chosen = choose_formats(choices, budget)
    smallest = sum(options[0].bytes for options in choices.values())
    assert total(chosen) <= max(budget, smallest)
    for name, options in choices.items():
        for option in options:
            fits = total(chosen) - chosen[name].bytes + option.bytes <= budget
            assert not (fits and option.divergence < chosen[name].divergence)


def test_the_most_sensitive_matrix_gets_the_most_bytes() -> None:
    robust = [FormatOption(INT2, 100, 0.2), FormatOption(INT4, 200, 0.01), FormatOption(INT8, 400, 0.0001)]
    sensitive = [FormatOption(INT2, 100, 20.0), FormatOption(INT4, 200, 1.0), FormatOption(INT8, 400, 0.005)]
    chosen = choose_formats({"robust": robust, "sensitive": sensitive}, 500)
    assert (chosen["robust"].format, chosen["sensitive"].format) == (INT2, INT8)
    assert divergence(choose_formats({"robust": robust, "sensitive": sensitive}, 600)) < divergence(chosen)


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_and_table_has_a_sensitivity_and_fewer_bits_cost_more(name: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / name)
    layout = weight_layout(checkpoint.architecture)
    found = sensitivities(checkpoint, layout, list(range(2, 120)))
    assert set(found) == set(layout.weights)
    for matrix, divergences in found.items():
        four, two, eight = (divergences[format] for format in formats_of(matrix))
        assert two > four > eight > 0


@pytest.mark.parametrize("name", [GEMMA3, pytest.param(GEMMA4, marks=pytest.mark.slow)])
def test_a_bundle_fits_its_budget_and_the_manifest_records_the_choice(name: str, tmp_path: Path) -> None:
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
    assert set(choice["formats"]) == set(weight_layout(checkpoint.architecture).weights)
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "auto")]).output
    assert "formats chosen to fit" in shown
    layers = len(checkpoint.architecture.layers)
    (qkv,) = re.findall(r"^ +qkv +(int.* in \d.*)$", shown, re.MULTILINE)
    named = [
        range(int(first), int(last or first) + 1)
        for first, last in re.findall(r"\b(\d+)(?:-(\d+))?(?=[,;]|$)", qkv)
    ]
    assert sorted(layer for run in named for layer in run) == list(range(layers))


@pytest.mark.slow
def test_a_budget_larger_than_the_model_needs_no_more_disk_than_the_model(
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
        (
            ["--recipe", "auto", "--budget", "0.1MB"],
            r"--budget 0.1MB: too small for this model; the least is --budget 1MB",
        ),
        (["--recipe", "auto", "--budget", "much"], "'much' is not a size; write it like 200MB or 1.5GB"),
    ],
)
def test_an_impossible_budget_is_a_one_line_error_and_leaves_nothing(
    options: list[str], message: str, tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    result = CliRunner().invoke(main, [str(FIXTURES / GEMMA3), "-o", str(target), *options])
    assert result.exit_code != 0
    assert re.search(f"^Error: .*{message}.*$", result.output.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_untied_embedding_gets_its_own_format(tmp_path: Path) -> None:
    folder = copy_fixture(GEMMA3, tmp_path / "model", lambda config: config.update(tie_word_embeddings=False))
    arrays = read_arrays(folder / "model.safetensors")
    head = bfloat16(np.random.default_rng(0).normal(0, 0.05, (512, 64)).astype(np.float32))
    write_safetensors(folder / "model.safetensors", arrays | {"lm_head.weight": head})
    checkpoint = open_checkpoint(folder)
    budget = convert(checkpoint, tmp_path / "int8", "int8", 512).bytes * 9 // 10
    convert(checkpoint, tmp_path / "auto", "auto", 512, calibration=TEXT, budget=budget)
    formats = read_manifest(tmp_path / "auto").quantization["choice"]["formats"]
    assert {"embedding", "head"} <= set(formats)
