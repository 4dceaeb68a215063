"""Calibration: codes with the least output error, smoothing factors, and complete bundles."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.calibration import calibrate as calibration
from converters.calibration.calibrate import calibrate
from converters.calibration.gptq import Objective, quantize_for
from converters.calibration.smoothing import smooth
from converters.calibration.text import CalibrationText
from converters.checkpoints.base import LazyTensor
from converters.checkpoints.opening import open_checkpoint
from converters.cli import main
from converters.convert import convert
from converters.evaluate import built_in_text, evaluate_bundles
from converters.quantization import HIGHEST, LOWEST, Floats, Format, quantize
from converters.recipes import plan_for
from converters.reference_decoder import ReferenceDecoder
from converters.weight_layout import weight_layout
from edge.bundles.bundle import DECODER, file_digest, read_manifest
from edge.errors import EdgeError
from edge.text.tokenizer import Tokenizer
from tests.support.checkpoint_files import FIXTURES, GEMMA3, GEMMA4, NAMES, write_packed_release

FORMATS = (Format(8), Format(4), Format(2), Format(4, 32))
TEXT = CalibrationText("built-in text", CalibrationText.built_in().content[:9000])
"""Enough for a few sequences of a fixture's small vocabulary."""


def correlated(seed: int, rows: int, columns: int) -> Floats:
    """Inputs that mostly lie in a few directions, some of which are long."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(columns // 4, columns)) * random.lognormal(0, 1, (columns // 4, 1))
    x = random.normal(size=(rows, columns // 4)) @ directions + 0.1 * random.normal(size=(rows, columns))
    return np.ascontiguousarray(x, np.float32)


def objective_of(x: Floats, damping: float = 0.01) -> Objective:
    return Objective.of(x.T @ x, damping)


@given(
    seed=st.integers(0, 999),
    format=st.sampled_from(FORMATS),
    rows=st.integers(32, 64),
    blocks=st.integers(1, 3),
)
@settings(max_examples=30)
def test_calibrated_codes_lose_no_more_than_nearest_codes(
    seed: int, format: Format, rows: int, blocks: int
) -> None:
    """A single row can lose more, because codes are chosen column by column and not all at once."""
    columns = 32 * blocks
    weights = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    objective = objective_of(correlated(seed, 400, columns))
    found = quantize_for(objective, weights, format)
    assert found.codes.min() >= LOWEST[format.bits]
    assert found.codes.max() <= HIGHEST[format.bits]
    assert (found.scales > 0).all()
    assert found.scales.shape == format.scale_shape(rows, columns)
    assert objective.error(weights, found) <= objective.error(weights, quantize(weights, format)) * 1.001


def test_with_correlated_inputs_codes_compensate_for_each_other() -> None:
    weights = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    objective = objective_of(correlated(1, 1000, 128))
    for format in FORMATS:
        nearest = objective.error(weights, quantize(weights, format))
        assert objective.error(weights, quantize_for(objective, weights, format)) < 0.5 * nearest


def test_columns_without_calibration_inputs_still_get_codes() -> None:
    weights = np.random.default_rng(4).normal(size=(3, 32)).astype(np.float32)
    objective = Objective.of(np.zeros((32, 32), np.float32))
    assert objective.error(weights, quantize_for(objective, weights, Format(8))) < 1e-4
    with pytest.raises(ValueError, match="not finite"):
        Objective.of(np.full((4, 4), np.nan, np.float32))


@pytest.mark.slow
def test_a_very_long_text_is_sampled_evenly_up_to_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    encode = Tokenizer.encode

    def counted(tokenizer: Tokenizer, text: str) -> list[int]:
        asked.append(len(text))
        return encode(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    checkpoint = open_checkpoint(FIXTURES / GEMMA3)
    long = CalibrationText("log", "".join(f"{number:07d}\n" for number in range(1_000_000)))
    sequences = long.sequences(checkpoint)
    assert asked == [1 << 20]
    assert [len(sequence) for sequence in sequences] == [512] * 16
    texts = [Tokenizer(checkpoint.tokenizer_model).decode(sequence) for sequence in sequences]
    seen = [int(text.split("\n")[1]) for text in texts]
    assert seen == sorted(seen)
    assert len({number // 62_500 for number in seen}) >= 12  # of the 16 parts; the first have more tokens


@pytest.mark.parametrize("name", NAMES)
def test_smoothing_does_not_change_what_is_computed(name: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / name)
    sequences = [list(range(2, 2 + 200)), list(range(150, 150 + 200))]
    smoothed = smooth(checkpoint, sequences, formats_of(name, "int8"))
    assert smoothed.changed > 0
    ids = list(range(300, 340))
    np.testing.assert_allclose(
        ReferenceDecoder(smoothed.checkpoint).logits(ids), ReferenceDecoder(checkpoint).logits(ids), atol=1e-3
    )


def test_tensors_that_keep_their_stored_codes_are_not_smoothed() -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA3)
    formats = formats_of(GEMMA3, "int8")
    del formats["layers.0.value"], formats["layers.0.up"]
    smoothed = smooth(checkpoint, [list(range(2, 300))], formats)
    changed = {
        name for name, tensor in smoothed.checkpoint.tensors.items() if tensor is not checkpoint.tensors[name]
    }
    assert not any(name.startswith("layers.0.") for name in changed)
    assert {"layers.1.value", "layers.1.output", "layers.1.up", "layers.1.feed_forward_norm"} <= changed


def formats_of(name: str, recipe: str) -> dict[str, Format]:
    """The formats of all tensors that are stored as codes."""
    return plan_for(recipe, weight_layout(open_checkpoint(FIXTURES / name).architecture)).of_tensors()


class Plain(LazyTensor):
    """A tensor in memory."""

    def __init__(self, base: LazyTensor, values: Floats) -> None:
        self.name, self.shape, self.source_type = base.name, base.shape, base.source_type
        self._values = values

    def rows(self, start: int, stop: int) -> Floats:
        return self._values[start:stop]


def of_few_directions(tensor: LazyTensor) -> LazyTensor:
    """A matrix whose rows lie near a few directions, as those of trained models do."""
    left, sizes, right = np.linalg.svd(tensor.array(), full_matrices=False)
    sizes[4:] *= 0.02
    return Plain(tensor, np.ascontiguousarray((left * sizes) @ right, np.float32))


@pytest.mark.slow
def test_calibrated_int2_has_less_than_half_the_output_error_of_nearest_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA4)
    tensors = {
        name: of_few_directions(tensor) if name.endswith((".gate", ".up")) or name == "embedding" else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    checkpoint = replace(checkpoint, tensors=tensors)
    formats = formats_of(GEMMA4, "mobile")
    narrow = [name for name, format in formats.items() if format == Format(2) and name.startswith("layers.")]
    assert narrow
    found = calibrate(checkpoint, formats, TEXT).errors
    monkeypatch.setattr(calibration, "quantize_for", lambda _objective, rows, format: quantize(rows, format))
    nearest = calibrate(checkpoint, formats, TEXT).errors
    assert sum(found[name] for name in narrow) < 0.5 * sum(nearest[name] for name in narrow)
    assert all(found[name] < 0.7 * nearest[name] for name in narrow)


@pytest.mark.parametrize(
    ("name", "recipe", "share"),
    [
        pytest.param(GEMMA3, "int4", 0.8, marks=pytest.mark.slow),
        pytest.param(GEMMA3, "int8", 0.9, marks=pytest.mark.slow),
        (GEMMA4, "int4", 0.8),
    ],
)
def test_a_calibrated_bundle_has_equal_size_and_is_closer_to_the_checkpoint(
    name: str, recipe: str, share: float, tmp_path: Path
) -> None:
    bundles = []
    for text in (None, TEXT):
        bundles.append(tmp_path / f"{recipe}-{text is not None}")
        convert(open_checkpoint(FIXTURES / name), bundles[-1], recipe, 512, calibration=text)
    plain, better = evaluate_bundles(
        bundles, FIXTURES / name, built_in_text()[:2000], tmp_path / "cache", threads=1
    )
    assert better.bytes == plain.bytes
    assert better.fidelity.kl_divergence < share * plain.fidelity.kl_divergence


def test_the_same_checkpoint_and_text_give_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FIXTURES / GEMMA4)
    digests = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        convert(checkpoint, folder, "int4", 512, calibration=TEXT)
        digests.add(file_digest(folder / DECODER))
    assert len(digests) == 1


def test_the_manifest_and_inspect_name_the_calibration_text(tmp_path: Path) -> None:
    source, target = str(FIXTURES / GEMMA3), str(tmp_path / "bundle")
    text = tmp_path / "notes.txt"
    text.write_text(TEXT.content)
    result = CliRunner().invoke(
        main, [source, "-o", target, "--recipe", "int4", "--calibrate", str(text), "--json"]
    )
    assert result.exit_code == 0, result.output
    notes = read_manifest(tmp_path / "bundle").quantization["calibration"]
    assert notes["text"] == str(text)
    assert notes["sha256"] == file_digest(text)
    assert notes["tokens"] >= 4 * 512
    assert 0 < notes["output_errors"]["down"] < 0.5
    assert any("output error" in line for line in json.loads(result.stdout)["errors"])
    shown = CliRunner().invoke(main, ["inspect", target]).output
    assert f"calibrated on {text}, {notes['tokens']:,} tokens" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            "notes.txt: has 0 tokens, calibration needs at least 2044; give a longer text",
        ),
        (
            b"The pump is loud. " * 20,
            r"notes.txt: has \d+ tokens, calibration needs at least 2044;",
        ),
        (b"caf\xe9", "notes.txt: byte 3 is not UTF-8; save the text as UTF-8"),
        (None, "notes.txt: can't be read: No such file or directory"),
    ],
)
def test_an_unusable_text_is_a_one_line_error_and_leaves_nothing(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    text, target = tmp_path / "notes.txt", tmp_path / "bundle"
    if content is not None:
        text.write_bytes(content)
    result = CliRunner().invoke(main, [str(FIXTURES / GEMMA3), "-o", str(target), "--calibrate", str(text)])
    (line,) = result.output.splitlines()
    assert re.fullmatch(f"Error: .*{message}.*", line)
    assert list(tmp_path.iterdir()) == ([] if content is None else [text])


def test_calibrating_the_mobile_release_is_refused(tmp_path: Path) -> None:
    write_packed_release(tmp_path / "packed")
    with pytest.raises(
        EdgeError, match="packed: all its stored integers are kept, so nothing is left to calibrate"
    ):
        convert(open_checkpoint(tmp_path / "packed"), tmp_path / "bundle", "mobile", 128, calibration=TEXT)
