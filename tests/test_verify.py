"""Comparing a bundle with its checkpoint: the measures themselves, then real bundles of the fixtures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import real_vocabulary

from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from converters.reference_decoder import Floats
from converters.verify import Report, built_in_text, compare, cut, verify_bundle
from edge.errors import BundleError, EdgeError

FIXTURES = Path(__file__).parent / "fixtures"
VOCABULARY = 50
Logits = Callable[[Sequence[int]], Iterator[Floats]]


def made_up(ids: Sequence[int], seed: int) -> Floats:
    """Logits that depend on the ids and the seed only."""
    return np.random.default_rng([seed, *ids]).normal(0, 3, (len(ids), VOCABULARY)).astype(np.float32)


def in_blocks(size: int, logits: Callable[[Sequence[int]], Floats]) -> Logits:
    def candidate(ids: Sequence[int]) -> Iterator[Floats]:
        whole = logits(ids)
        for start in range(0, len(whole), size):
            yield whole[start : start + size]

    return candidate


CHUNKS = cut([3 + n % 40 for n in range(100)], bos_id=2, length=32)


def measured(candidate: Logits) -> Report:
    return compare(CHUNKS, [made_up(ids, 0) for ids in CHUNKS], candidate)


def test_chunks_hold_the_whole_text_and_each_starts_with_bos() -> None:
    assert [len(chunk) for chunk in CHUNKS] == [32, 32, 32, 8]
    assert all(chunk[0] == 2 for chunk in CHUNKS)
    assert [token for chunk in CHUNKS for token in chunk[1:]] == [3 + n % 40 for n in range(100)]


@pytest.mark.parametrize("count", [0, 16])
def test_a_text_too_short_for_a_perplexity_is_refused(count: int) -> None:
    with pytest.raises(EdgeError, match=rf"^the text has {count} tokens, 17 are needed; give a longer one$"):
        cut([5] * count, bos_id=2, length=32)
    assert cut([5] * 17, bos_id=2, length=32) == [[2] + [5] * 17]


def test_equal_logits_differ_in_nothing() -> None:
    report = measured(in_blocks(8, lambda ids: made_up(ids, 0)))
    assert (report.maximum_error, report.rms_error, report.kl_divergence) == (0, 0, 0)
    assert report.top1_agreement == 1
    assert report.bundle_perplexity == report.checkpoint_perplexity
    assert report.tokens == 104


@pytest.mark.parametrize("block", [1, 8, 32])
def test_measures_are_those_of_their_definitions_whatever_the_blocks(block: int) -> None:
    report = measured(in_blocks(block, lambda ids: made_up(ids, 0) + 0.5 * made_up(ids, 1)))
    p, q, losses = [], [], []
    for ids in CHUNKS:
        reference = made_up(ids, 0).astype(np.float64)
        found = reference + 0.5 * made_up(ids, 1)
        p.append(np.exp(reference) / np.exp(reference).sum(-1, keepdims=True))
        q.append(np.exp(found) / np.exp(found).sum(-1, keepdims=True))
        for position in range(16, len(ids) - 1):
            losses.append((p[-1][position, ids[position + 1]], q[-1][position, ids[position + 1]]))
    every_p, every_q = np.concatenate(p), np.concatenate(q)
    errors = np.concatenate([0.5 * made_up(ids, 1) for ids in CHUNKS])
    assert report.maximum_error == pytest.approx(np.abs(errors).max(), rel=1e-5)
    assert report.rms_error == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-5)
    assert report.top1_agreement == (every_p.argmax(-1) == every_q.argmax(-1)).mean()
    assert report.kl_divergence == pytest.approx(
        (every_p * np.log(every_p / every_q)).sum(-1).mean(), rel=1e-5
    )
    expected = np.exp(-np.log(np.array(losses)).mean(axis=0))
    assert (report.checkpoint_perplexity, report.bundle_perplexity) == pytest.approx(
        tuple(expected), rel=1e-5
    )
    assert report.scored_tokens == len(losses) == 45


def test_an_error_in_the_first_half_of_a_chunk_is_an_error_but_not_in_the_perplexity() -> None:
    def wrong_at_first(ids: Sequence[int]) -> Floats:
        logits = made_up(ids, 0)
        logits[:16] = logits[:16, ::-1]
        return logits

    report = measured(in_blocks(8, wrong_at_first))
    assert report.maximum_error > 1
    assert report.kl_divergence > 1
    assert report.bundle_perplexity == report.checkpoint_perplexity


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    def broken(ids: Sequence[int]) -> Floats:
        logits = made_up(ids, 0)
        logits[5, 7] = value
        return logits

    with pytest.raises(EdgeError, match="not finite at position 0 or soon after"):
        measured(in_blocks(8, broken))


def test_a_candidate_that_leaves_positions_out_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="32 ids gave 31 rows"):
        measured(in_blocks(31, lambda ids: made_up(ids, 0)[:31]))


def test_progress_counts_up_to_all_tokens() -> None:
    seen: list[tuple[int, int]] = []
    compare(
        CHUNKS,
        [made_up(ids, 0) for ids in CHUNKS],
        in_blocks(8, lambda ids: made_up(ids, 0)),
        lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (104, 104)


def test_a_report_reads_back_from_json_and_shows_both_perplexities() -> None:
    report = measured(in_blocks(8, lambda ids: made_up(ids, 1)))
    assert Report(**json.loads(report.to_json())) == report
    assert f"checkpoint {report.checkpoint_perplexity:.3f}, bundle {report.bundle_perplexity:.3f}" in str(
        report
    )


def test_the_built_in_text_has_at_least_4000_tokens_of_a_real_gemma() -> None:
    assert len(real_vocabulary.tokenizer("gemma3").encode(built_in_text())) >= 4000


@pytest.fixture(scope="module")
def short_text() -> str:
    return built_in_text()[:3000]


@pytest.mark.parametrize(
    "name", ["gemma3-one-kv-head", "gemma3-two-kv-heads", "gemma4-one-kv-head", "gemma4-two-kv-heads"]
)
def test_an_unquantised_bundle_computes_what_its_checkpoint_says(
    name: str, short_text: str, tmp_path: Path
) -> None:
    convert(open_checkpoint(FIXTURES / name), tmp_path / "bundle", "float32", context=512)
    report = verify_bundle(tmp_path / "bundle", FIXTURES / name, short_text, tmp_path / "cache", threads=1)
    assert report.maximum_error < 1e-3
    assert report.top1_agreement == 1
    assert report.bundle_perplexity == pytest.approx(report.checkpoint_perplexity, rel=1e-4)


def test_a_coarser_bundle_measures_worse_and_a_short_context_cuts_shorter_chunks(
    short_text: str, tmp_path: Path
) -> None:
    checkpoint = FIXTURES / "gemma3-one-kv-head"
    reports = {}
    for recipe, context in (("int8", 512), ("int4", 64)):
        convert(open_checkpoint(checkpoint), tmp_path / recipe, recipe, context)
        reports[recipe] = verify_bundle(
            tmp_path / recipe, checkpoint, short_text, tmp_path / "cache", threads=1
        )
    fine, coarse = reports["int8"], reports["int4"]
    assert 0.9 < fine.top1_agreement < 1
    assert coarse.top1_agreement < fine.top1_agreement
    assert coarse.rms_error > 2 * fine.rms_error > 0
    assert coarse.kl_divergence > fine.kl_divergence > 0
    assert coarse.tokens > fine.tokens


def test_a_bundle_of_another_model_is_refused_in_one_line(short_text: str, tmp_path: Path) -> None:
    bundle, other = tmp_path / "bundle", FIXTURES / "gemma3-two-kv-heads"
    convert(open_checkpoint(FIXTURES / "gemma3-one-kv-head"), bundle, "int8", context=512)
    message = rf"^{re.escape(str(bundle))}: its dimensions are not those of {re.escape(str(other))}; name .*$"
    with pytest.raises(BundleError, match=message):
        verify_bundle(bundle, other, short_text, tmp_path / "cache", threads=1)
