"""The self-test: a bundle passes if it reproduces its recording; a failure is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from converters.cli import main
from converters.golden import record_golden
from edge.bundles.bundle import SIGNATURE, Golden, read_manifest
from edge.errors import BundleError, EdgeError
from edge.generation.generator import Generator
from edge.generation.self_test import TOLERANCE, self_test
from tests.support import bundles

TEXT = "The hut stands on a shoulder of the hill, where the wind does not reach it with its full strength."


@pytest.fixture(scope="module", params=["gemma3-two-kv-heads", "gemma4-two-kv-heads"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a recording."""
    small = bundles.small_bundle(request.param, "int8")
    directory = bundles.copy_of(small, tmp_path_factory.mktemp("golden") / "bundle")
    record_golden(directory, TEXT, bundles.cache_directory())
    return directory


@pytest.fixture
def generator(bundle: Path) -> Iterator[Generator]:
    opened = Generator.open(bundle, bundles.cache_directory(), 1, None)
    yield opened
    opened.close()


def with_golden(generator: Generator, change: Callable[[Golden], Golden]) -> Generator:
    """Replace the recording in the manifest."""
    golden = generator.bundle.manifest.golden
    assert golden is not None
    manifest = replace(generator.bundle.manifest, golden=change(golden))
    generator.bundle = replace(generator.bundle, manifest=manifest)
    return generator


def test_a_bundle_passes_its_self_test_and_its_answers_do_not_change(generator: Generator) -> None:
    assert generator.bundle.manifest.golden is not None
    self_test(generator)
    assert generator.decoder.tokens != []
    self_test(generator)


def test_a_loss_within_the_tolerance_passes_and_one_beyond_it_does_not(generator: Generator) -> None:
    near, far = TOLERANCE - 0.02, TOLERANCE + 0.02
    self_test(with_golden(generator, lambda golden: replace(golden, loss=golden.loss + near)))
    with pytest.raises(BundleError, match=r"the self-test failed: the loss over its text is [\d.]+, but"):
        self_test(with_golden(generator, lambda golden: replace(golden, loss=golden.loss - near - far)))


def test_a_tokenizer_that_splits_the_text_differently_is_detected(generator: Generator) -> None:
    with pytest.raises(BundleError, match="the self-test's text has other token ids"):
        self_test(with_golden(generator, lambda golden: replace(golden, text="Another text, " + golden.text)))


def test_changed_weights_are_detected(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    real = generator.decoder.verify
    monkeypatch.setattr(generator.decoder, "verify", lambda tokens: 2 * real(tokens))
    with pytest.raises(BundleError, match="the self-test failed"):
        self_test(generator)
    monkeypatch.setattr(generator.decoder, "verify", lambda tokens: real(tokens) * np.nan)
    with pytest.raises(BundleError, match="the loss over its text is nan"):
        self_test(generator)


def test_a_bundle_without_a_recording_passes_if_it_answers(generator: Generator) -> None:
    manifest = replace(generator.bundle.manifest, golden=None)
    generator.bundle = replace(generator.bundle, manifest=manifest)
    self_test(generator)


def test_recording_changes_the_manifest_and_drops_the_signature(bundle: Path, tmp_path: Path) -> None:
    copy = bundles.copy_of(bundle, tmp_path / "copy")
    (copy / SIGNATURE).write_bytes(b"of the old manifest")
    text = tmp_path / "field.txt"
    text.write_text(
        "12.1 bar at 3 l/s, the limit is 8 bar; the inlet valve of pump 3 was opened by hand at noon."
    )
    result = CliRunner().invoke(main, ["golden", str(copy), "--text", str(text)])
    assert result.exit_code == 0, result.output
    golden = read_manifest(copy).golden
    assert golden is not None
    assert golden.text == text.read_text()
    assert result.output == f"{copy}: recorded a loss of {golden.loss:.2f} over {len(golden.ids)} tokens\n"
    assert not (copy / SIGNATURE).exists()
    assert read_manifest(copy).files == read_manifest(bundle).files


def test_a_text_that_is_too_short_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = bundles.copy_of(bundle, tmp_path / "copy")
    with pytest.raises(EdgeError, match="16 are needed"):
        record_golden(copy, "Pump", bundles.cache_directory())
