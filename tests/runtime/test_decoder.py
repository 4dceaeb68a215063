"""The decoder against transformers' logits: prefill, step and verify in any mix, rings wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.errors import BundleError, RequestError
from edge.runtime.decoder import Decoder
from tests.support import bundles
from tests.support.checkpoint_files import FIXTURES

FLOAT_TOLERANCE = 2e-4
"""Float32 weights through LiteRT against transformers' float32 logits, which span about -5 to 5."""

INT8_TOLERANCE = 0.12
"""Root mean square error of int8 weights and activations, as a share of the logits' standard deviation.

Random weights have no redundancy: 0.03 for Gemma 3, 0.09 for Gemma 4, whose logits pass more products.
"""


@cache
def decoder(name: str, recipe: str = "float32") -> Decoder:
    return bundles.open_decoder(bundles.small_bundle(name, recipe))


@cache
def reference(name: str) -> tuple[list[int], NDArray[np.float32], list[int]]:
    with np.load(FIXTURES / name / "reference.npz") as file:
        return file["ids"].tolist(), file["logits"], file["greedy"].tolist()


def never() -> None:
    return None


def softcapped(d: Decoder, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    cap = d.arch.logit_softcap
    return logits if cap is None else (cap * np.tanh(logits / cap)).astype(np.float32)


def logits_after(d: Decoder, ids: list[int], start: int) -> Iterator[NDArray[np.float32]]:
    for token in ids[start:]:
        d.advance([token], never)
        yield softcapped(d, d.logits())


@pytest.mark.parametrize("name", bundles.SMALL)
class TestLogitsAgreeWithTransformers:
    def test_at_every_position_in_verify(self, name: str) -> None:
        ids, expected, _ = reference(name)
        got = np.concatenate([block.copy() for block in decoder(name).logits_of(ids)])
        np.testing.assert_allclose(got, expected, atol=FLOAT_TOLERANCE)

    def test_at_every_position_in_steps(self, name: str) -> None:
        ids, expected, _ = reference(name)
        d = decoder(name)
        d.rewind(())
        for i, logits in enumerate(logits_after(d, ids, 0)):
            np.testing.assert_allclose(logits, expected[i], atol=FLOAT_TOLERANCE)

    def test_after_a_prefill_of_any_length(self, name: str) -> None:
        ids, expected, _ = reference(name)
        d = decoder(name)
        for length in (1, 7, 8, 9, 15, 16, 17, 31, 40, 79):
            d.rewind(())
            d.prefill(ids[:length], never)
            logits = next(logits_after(d, ids, length))
            np.testing.assert_allclose(logits, expected[length], atol=FLOAT_TOLERANCE)

    @settings(max_examples=15)
    @given(data=st.data())
    def test_in_any_mix_of_chunks(self, name: str, data: st.DataObject) -> None:
        ids, expected, _ = reference(name)
        d = decoder(name)
        d.rewind(())
        while (done := len(d.tokens)) < len(ids):
            how = data.draw(st.sampled_from(["prefill", "step", "verify"]))
            count = data.draw(st.integers(1, min(len(ids) - done, 8 if how == "verify" else 40)))
            part = ids[done : done + count]
            if how == "prefill":
                d.prefill(part, never)
            elif how == "step":
                for i, logits in enumerate(logits_after(d, part, 0)):
                    np.testing.assert_allclose(logits, expected[done + i], atol=FLOAT_TOLERANCE)
            else:
                logits = softcapped(d, d.verify(part))
                np.testing.assert_allclose(logits, expected[done : done + count], atol=FLOAT_TOLERANCE)
                d.commit(data.draw(st.integers(0, count)))

    def test_greedy_decoding_gives_the_same_tokens(self, name: str) -> None:
        ids, _, greedy = reference(name)
        d = decoder(name)
        d.rewind(())
        d.prefill(ids[:-1], never)
        d.advance(ids[-1:], never)
        got = []
        for _ in greedy:
            got.append(int(d.logits().argmax()))
            d.advance(got[-1:], never)
        assert got == greedy

    def test_int8_stays_close(self, name: str) -> None:
        ids, expected, _ = reference(name)
        got = np.concatenate([block.copy() for block in decoder(name, "int8").logits_of(ids)])
        error = np.sqrt(np.mean(np.square(got - expected))) / expected.std()
        assert error < INT8_TOLERANCE


def test_a_rejected_verify_does_not_change_later_logits() -> None:
    name = bundles.SMALL[0]
    ids, expected, _ = reference(name)
    d = decoder(name)
    d.rewind(())
    d.prefill(ids[:30], never)
    d.verify([3] * 8)
    d.commit(0)
    np.testing.assert_allclose(next(logits_after(d, ids, 30)), expected[30], atol=FLOAT_TOLERANCE)


def test_committing_more_than_was_verified_is_refused() -> None:
    d = decoder(bundles.SMALL[0])
    d.rewind(())
    d.verify([2, 5])
    with pytest.raises(ValueError, match="3 tokens to commit, 2 were verified"):
        d.commit(3)


def test_rewinding_within_the_window_keeps_the_common_prefix() -> None:
    name = bundles.SMALL[0]
    ids, expected, _ = reference(name)
    d = decoder(name)
    d.rewind(())
    window = d.arch.sliding_window
    d.prefill([*ids[: window - 4], 9, 9], never)
    assert d.rewind(ids[: window - 1]) == window - 4
    assert list(d.tokens) == ids[: window - 4]
    np.testing.assert_allclose(
        next(logits_after(d, ids, window - 4)), expected[window - 4], atol=FLOAT_TOLERANCE
    )


def test_rewinding_past_a_wrapped_ring_starts_over() -> None:
    name = bundles.SMALL[0]
    ids, _, _ = reference(name)
    d = decoder(name)
    d.rewind(())
    d.prefill(ids, never)
    assert d.rewind(ids[:-1]) == 0
    assert not d.tokens


def test_the_context_is_a_limit() -> None:
    ids, _, _ = reference(bundles.SMALL[0])
    d = bundles.open_decoder(bundles.small_bundle(bundles.SMALL[0]), context=32)
    with pytest.raises(RequestError, match="33 tokens do not fit into the context of 32") as caught:
        d.prefill(ids[:33], never)
    assert caught.value.code == "too_long"
    d.prefill(ids[:32], never)
    with pytest.raises(RequestError, match="33 tokens do not fit"):
        d.advance([5], never)


def test_prefill_stops_between_chunks_when_interrupted() -> None:
    ids, _, _ = reference(bundles.SMALL[0])
    d = decoder(bundles.SMALL[0])
    d.rewind(())
    answers = iter([None, "cancelled"])
    assert d.prefill(ids[:16], lambda: next(answers)) == "cancelled"
    assert len(d.tokens) == 8


def test_full_attention_caches_grow_with_the_conversation() -> None:
    """The context exceeds the first allocation; tokens stored before the growth are still attended to."""
    name = "gemma3-one-kv-head"
    ids, _, _ = reference(name)
    long = (ids * 10)[:600]
    directory = bundles.small_bundle(name, context=700)
    grown, whole = bundles.open_decoder(directory), bundles.open_decoder(directory)
    grown.prefill(long[:500], never)
    grown.prefill(long[500:], never)
    for token in long:
        whole.advance([token], never)
    grown.advance([7], never)
    whole.advance([7], never)
    np.testing.assert_allclose(grown.logits(), whole.logits(), atol=FLOAT_TOLERANCE)


def test_a_directory_that_is_not_a_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"{tmp_path}/manifest.json: can't be read: No such file"):
        bundles.open_decoder(tmp_path)
