"""Comparing a bundle with its checkpoint: the measures themselves, then real bundles of the fixtures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters import evaluate
from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from converters.evaluate import Report, built_in_text, evaluate_bundles
from converters.fidelity import Fidelity, compare, cut
from converters.picture import CHARACTER, HEIGHT, LABEL_SIZE, WIDTH, picture
from converters.reference_decoder import Floats, Linear, ReferenceDecoder, Stream
from edge.bundles.bundle import read_manifest
from edge.errors import BundleError, EdgeError
from tests.support import real_vocabulary

FIXTURES = Path(__file__).parents[1] / "fixtures"
VOCABULARY = 50
Logits = Callable[[Sequence[int]], Iterator[Floats]]


def made_up(ids: Sequence[int], seed: int) -> Floats:
    """Logits that depend only on the ids and the seed."""
    return np.random.default_rng([seed, *ids]).normal(0, 3, (len(ids), VOCABULARY)).astype(np.float32)


def in_blocks(size: int, logits: Callable[[Sequence[int]], Floats]) -> Logits:
    def candidate(ids: Sequence[int]) -> Iterator[Floats]:
        whole = logits(ids)
        for start in range(0, len(whole), size):
            yield whole[start : start + size]

    return candidate


CHUNKS = cut([3 + n % 40 for n in range(100)], bos_id=2, length=32)


def measured(candidate: Logits) -> Fidelity:
    return compare(CHUNKS, [made_up(ids, 0) for ids in CHUNKS], [candidate])[0]


def test_chunks_cover_the_whole_text_and_each_starts_with_bos() -> None:
    assert [len(chunk) for chunk in CHUNKS] == [32, 32, 32, 8]
    assert all(chunk[0] == 2 for chunk in CHUNKS)
    assert [token for chunk in CHUNKS for token in chunk[1:]] == [3 + n % 40 for n in range(100)]


@pytest.mark.parametrize("count", [0, 16])
def test_a_text_too_short_for_a_perplexity_is_refused(count: int) -> None:
    with pytest.raises(
        EdgeError, match=rf"^the text has {count} tokens, at least 17 are needed; give a longer one$"
    ):
        cut([5] * count, bos_id=2, length=32)
    assert cut([5] * 17, bos_id=2, length=32) == [[2] + [5] * 17]


def test_equal_logits_have_zero_divergence() -> None:
    report = measured(in_blocks(8, lambda ids: made_up(ids, 0)))
    assert (report.maximum_error, report.rms_error, report.kl_divergence) == (0, 0, 0)
    assert report.top1_agreement == 1
    assert report.bundle_perplexity == report.checkpoint_perplexity
    assert report.tokens == 104


@pytest.mark.parametrize("block", [1, 8, 32])
def test_measures_match_their_definitions_for_any_block_size(block: int) -> None:
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


def test_the_first_half_of_a_chunk_counts_for_the_error_but_not_for_perplexity() -> None:
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

    with pytest.raises(EdgeError, match="not finite at or soon after position 0"):
        measured(in_blocks(8, broken))


def test_a_candidate_that_omits_positions_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match="32 ids gave 31 rows"):
        measured(in_blocks(31, lambda ids: made_up(ids, 0)[:31]))


def test_progress_counts_up_to_all_tokens() -> None:
    seen: list[tuple[int, int]] = []
    compare(
        CHUNKS,
        [made_up(ids, 0) for ids in CHUNKS],
        [in_blocks(8, lambda ids: made_up(ids, 0)), in_blocks(8, lambda ids: made_up(ids, 1))],
        lambda progress: seen.append((progress.done, progress.total)),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (208, 208)


def test_several_candidates_are_measured_independently() -> None:
    candidates = [in_blocks(8, lambda ids: made_up(ids, 1)), in_blocks(3, lambda ids: made_up(ids, 2))]
    together = compare(CHUNKS, [made_up(ids, 0) for ids in CHUNKS], candidates)
    assert together == [measured(candidate) for candidate in candidates]
    assert together[0] != together[1]


REPORT = Report(
    "pump <1>",
    "int4",
    3_000_000,
    measured(in_blocks(8, lambda ids: made_up(ids, 1))),
    {0: 0.01, 2: 0.05},
    12.5,
)


def test_a_report_is_a_line_of_json_and_shows_both_perplexities() -> None:
    fields = json.loads(REPORT.to_json())
    assert fields["layer_errors"] == {"0": 0.01, "2": 0.05}
    assert Fidelity(**{name: fields[name] for name in asdict(REPORT.fidelity)}) == REPORT.fidelity
    found = REPORT.fidelity
    assert f"checkpoint {found.checkpoint_perplexity:.3f}, bundle {found.bundle_perplexity:.3f}" in str(
        REPORT
    )


class Page(HTMLParser):
    """The text of a page, its marks, and the external resources that it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [name for name, _ in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_the_picture_has_a_point_and_a_row_for_each_bundle_and_loads_nothing() -> None:
    page = Page(picture([REPORT, replace(REPORT, name="other", bytes=1_000_000)], "model & co"))
    assert page.tags.count("circle") == 2
    assert page.tags.count("tr") == 3
    assert page.tags.count("rect") == 4
    assert page.links == []
    assert {"pump <1>", "other", "3.0", "1.0", "12.5"} <= set(page.words)


@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=60), st.integers(10_000, 10**10), st.floats(-0.9, 50)),
        min_size=1,
        max_size=5,
    )
)
def test_every_point_and_label_is_inside_the_picture(bundles: list[tuple[str, int, float]]) -> None:
    fidelity = REPORT.fidelity
    reports = [
        replace(
            REPORT,
            name=name,
            bytes=size,
            fidelity=replace(fidelity, bundle_perplexity=fidelity.checkpoint_perplexity * (1 + rise)),
        )
        for name, size, rise in bundles
    ]
    chart = picture(reports, "model")
    points = re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', chart)
    assert len(points) == len(bundles)
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in points)
    labels = re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)" text-anchor="(\w+)">([^<]*)<', chart)
    for x, y, anchor, text in labels:
        width = CHARACTER * len(unescape(text))
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        assert left >= 0, text
        assert left + width <= WIDTH, text
        assert LABEL_SIZE <= float(y) <= HEIGHT, text


def test_labels_of_neighbouring_points_do_not_overlap() -> None:
    chart = picture([replace(REPORT, name=name) for name in ("one", "two", "three")], "model")
    labels = re.findall(r'y="([-\d.]+)" text-anchor="\w+">[^<]*\(', chart)
    low, middle, high = sorted(map(float, labels))
    assert middle - low > LABEL_SIZE - 1
    assert high - middle > LABEL_SIZE - 1


def test_the_built_in_text_has_at_least_4000_tokens_of_a_real_gemma() -> None:
    assert len(real_vocabulary.tokenizer("gemma3").encode(built_in_text())) >= 4000


@pytest.fixture(scope="module")
def short_text() -> str:
    return built_in_text()[:3000]


@pytest.mark.parametrize(
    "name", ["gemma3-one-kv-head", "gemma3-two-kv-heads", "gemma4-one-kv-head", "gemma4-two-kv-heads"]
)
def test_an_unquantised_bundle_agrees_with_its_checkpoint(name: str, short_text: str, tmp_path: Path) -> None:
    convert(open_checkpoint(FIXTURES / name), tmp_path / "bundle", "float32", context=512)
    (report,) = evaluate_bundles(
        [tmp_path / "bundle"], FIXTURES / name, short_text, tmp_path / "cache", threads=1
    )
    found, arch = report.fidelity, read_manifest(tmp_path / "bundle").architecture
    assert found.maximum_error < 1e-3
    assert found.top1_agreement == 1
    assert found.bundle_perplexity == pytest.approx(found.checkpoint_perplexity, rel=1e-4)
    assert tuple(report.layer_errors) == arch.owners
    assert max(report.layer_errors.values()) < 1e-4
    assert report.tokens_per_second > 1


def test_a_coarser_bundle_measures_worse_and_the_shortest_context_cuts_the_chunks(
    short_text: str, tmp_path: Path
) -> None:
    checkpoint = FIXTURES / "gemma3-one-kv-head"
    for recipe, context in (("int8", 512), ("int4", 64)):
        convert(open_checkpoint(checkpoint), tmp_path / recipe, recipe, context)
    bundles = [tmp_path / "int8", tmp_path / "int4"]
    fine, coarse = evaluate_bundles(bundles, checkpoint, short_text, tmp_path / "cache", threads=1)
    assert (fine.recipe, coarse.recipe) == ("int8", "int4")
    assert fine.bytes > coarse.bytes
    assert all(coarse.layer_errors[i] > 2 * error > 0 for i, error in fine.layer_errors.items())
    (alone,) = evaluate_bundles(bundles[:1], checkpoint, short_text, tmp_path / "cache", threads=1)
    assert alone.fidelity.tokens < fine.fidelity.tokens == coarse.fidelity.tokens
    assert 0.9 < fine.fidelity.top1_agreement < 1
    assert coarse.fidelity.top1_agreement < fine.fidelity.top1_agreement
    assert coarse.fidelity.rms_error > 2 * fine.fidelity.rms_error > 0
    assert coarse.fidelity.kl_divergence > fine.fidelity.kl_divergence > 0


def test_a_long_text_is_run_a_few_chunks_at_a_time_with_the_same_result(
    short_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All chunks at once would take 36 KB of K and V a token with the 270M: 9 GB for a text of 1 MB."""
    checkpoint, bundle = FIXTURES / "gemma4-one-kv-head", tmp_path / "bundle"
    convert(open_checkpoint(checkpoint), bundle, "int8", context=64)
    sizes: list[int] = []
    begin = ReferenceDecoder.begin

    def counted(decoder: ReferenceDecoder, sequences: Sequence[Sequence[int]], *rest: Linear) -> list[Stream]:
        sizes.append(len(sequences))
        return begin(decoder, sequences, *rest)

    monkeypatch.setattr(ReferenceDecoder, "begin", counted)
    reports = []
    for together in (8192, 128):
        monkeypatch.setattr(evaluate, "_TOGETHER", together)
        (report,) = evaluate_bundles([bundle], checkpoint, short_text, tmp_path / "cache", threads=1)
        reports.append((report.fidelity, report.layer_errors))
    assert reports[0] == reports[1]
    whole, *parts = sizes
    assert sum(parts) == whole > 2
    assert max(parts) == 2


def test_a_bundle_of_another_model_is_refused_in_one_line(short_text: str, tmp_path: Path) -> None:
    bundle, other = tmp_path / "bundle", FIXTURES / "gemma3-two-kv-heads"
    convert(open_checkpoint(FIXTURES / "gemma3-one-kv-head"), bundle, "int8", context=512)
    message = rf"^{re.escape(str(bundle))}: its dimensions are not those of {re.escape(str(other))}; name .*$"
    with pytest.raises(BundleError, match=message):
        evaluate_bundles([bundle], other, short_text, tmp_path / "cache", threads=1)
