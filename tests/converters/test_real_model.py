"""The real Gemma 3 270M: its bundles compared with a float32 decoder of the checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

from converters.checkpoints.opening import open_checkpoint
from converters.evaluate import built_in_text, evaluate_bundles
from converters.fidelity import Fidelity
from converters.reference_decoder import ReferenceDecoder
from edge.bundles.bundle import TOKENIZER, read_manifest
from edge.text.tokenizer import Tokenizer
from tests.support import bundles
from tests.support.checkpoint_files import real_model

pytestmark = pytest.mark.slow

TOKENS = 700
"""More than the window of 512, so that the rings wrap."""


def evaluated(recipe: str, calibrated: bool = False) -> Fidelity:
    directory = bundles.bundle_directory(real_model(), recipe, 2048, calibrated)
    (report,) = evaluate_bundles(
        [directory], real_model(), built_in_text(), bundles.cache_directory(), threads=2
    )
    return report.fidelity


def test_float32_weights_give_the_logits_of_the_checkpoint_in_every_signature() -> None:
    directory = bundles.bundle_directory(real_model(), "float32", 2048)
    manifest = read_manifest(directory)
    text = Tokenizer((directory / TOKENIZER).read_bytes()).encode(built_in_text())
    ids = [manifest.bos_id, *text][:TOKENS]
    expected = ReferenceDecoder(open_checkpoint(real_model())).logits(ids)
    decoder = bundles.open_decoder(directory)
    start = 0
    for block in decoder.logits_of(ids):
        np.testing.assert_allclose(block, expected[start : start + len(block)], atol=1e-3)
        start += len(block)
    decoder.rewind(())
    decoder.prefill(ids[:550], lambda: None)
    for i in range(550, 570):
        decoder.advance([ids[i]], lambda: None)
        np.testing.assert_allclose(decoder.logits(), expected[i], atol=1e-3)


def test_int8_stays_within_two_percent_of_the_perplexity_and_agrees_on_the_top_token() -> None:
    report = evaluated("int8")
    assert report.tokens >= 4000
    assert report.bundle_perplexity < 1.02 * report.checkpoint_perplexity
    assert report.top1_agreement >= 0.89


@pytest.mark.parametrize(
    ("recipe", "rise", "agreement"), [("int8", 0.01, 0.92), ("int4", 0.08, 0.8), ("int4-all", 0.14, 0.75)]
)
def test_a_calibrated_bundle_stays_near_the_checkpoint_on_a_held_out_text(
    recipe: str, rise: float, agreement: float
) -> None:
    report = evaluated(recipe, calibrated=True)
    assert report.perplexity_rise < rise
    assert report.top1_agreement >= agreement
