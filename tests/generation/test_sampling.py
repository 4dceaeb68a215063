"""Sampling: the order of the steps, the distribution drawn, and every edge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.errors import RuntimeFailure
from edge.generation.sampling import Sampler, Sampling

Logits = NDArray[np.float32]


def noise(count: int, seed: int = 0) -> Logits:
    return (np.random.default_rng(seed).normal(size=count) * 3).astype(np.float32)


def plain_distribution(logits: Logits, sampling: Sampling, softcap: float | None = None) -> dict[int, float]:
    """The definition, with a full sort: softcap, temperature, top-k, renormalise, top-p, renormalise."""
    order = sorted(np.flatnonzero(np.isfinite(logits)), key=lambda i: (-logits[i], i))[: sampling.top_k]
    values = [float(logits[i]) for i in order]
    if softcap is not None:
        values = [softcap * np.tanh(value / softcap) for value in values]
    weights = [np.exp((value - values[0]) / sampling.temperature) for value in values]
    kept: dict[int, float] = {}
    total, reached = sum(weights), 0.0
    for token, weight in zip(order, weights, strict=True):
        if reached < sampling.top_p:
            kept[int(token)] = float(weight / total)
            reached += weight / total
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@given(
    count=st.integers(1, 3000),
    seed=st.integers(0, 2**32),
    top_k=st.integers(1, 100) | st.just(5000),
    top_p=st.floats(0.01, 0.999),
    temperature=st.floats(0.1, 2),
    softcap=st.none() | st.floats(5, 50),
    steps=st.sampled_from([None, 2, 0.5]),
)
def test_the_distribution_matches_the_definition(
    count: int,
    seed: int,
    top_k: int,
    top_p: float,
    temperature: float,
    softcap: float | None,
    steps: float | None,
) -> None:
    logits = noise(count, seed)
    if steps:  # many ties, and some tokens not allowed
        logits = (np.round(logits * steps) / steps).astype(np.float32)
        logits[1::3] = -np.inf
    sampling = Sampling(temperature, top_k, top_p)
    tokens, probabilities = Sampler(sampling, softcap).distribution(logits)
    expected = plain_distribution(logits, sampling, softcap)
    assert list(tokens) == list(expected)
    np.testing.assert_allclose(probabilities, list(expected.values()), rtol=1e-9)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=7), softcap=30.0)
    logits = noise(5000, 3)
    tokens, probabilities = sampler.distribution(logits)
    drawn = [sampler.sample(logits) for _ in range(20000)]
    assert set(drawn) <= set(tokens)
    counts = [drawn.count(int(token)) for token in tokens]
    expected = probabilities * len(drawn)
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(tokens) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)  # mean and standard deviation of chi-square


def test_softcap_flattens_the_distribution_at_temperature_one() -> None:
    logits = np.array([60, 30], np.float32)
    _, capped = Sampler(Sampling(1.0, 2, 1.0), softcap=30.0).distribution(logits)
    assert capped[0] / capped[1] == pytest.approx(np.exp(30 * (np.tanh(2) - np.tanh(1))))


def test_equal_seeds_give_equal_sequences_and_different_seeds_different_ones() -> None:
    def sequence(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.0, 64, 0.95, seed))
        return [sampler.sample(noise(1000, step)) for step in range(40)]

    assert sequence(5) == sequence(5)
    assert sequence(5) != sequence(6)
    assert sequence(None) != sequence(None)


def test_sampling_with_drafts_draws_exactly_the_same_tokens() -> None:
    steps = [noise(300, step) for step in range(30)]
    alone = Sampler(Sampling(1.0, 64, 0.95, 9))
    plain = [alone.sample(logits) for logits in steps]
    drafts = [token if step % 3 else 299 for step, token in enumerate(plain)]
    checking = Sampler(Sampling(1.0, 64, 0.95, 9))
    verified: list[int] = []
    while len(verified) < len(steps):
        for logits, draft in list(zip(steps, drafts, strict=True))[len(verified) :][:4]:
            verified.append(checking.sample(logits))
            if verified[-1] != draft:
                break
    assert verified == plain


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0, 1), Sampling(1.0, 64, 1e-6), Sampling(1e-300, 64, 1)]
)
def test_greedy_and_its_limiting_cases_choose_the_best_token(sampling: Sampling) -> None:
    logits = noise(2000)
    assert {Sampler(sampling).sample(logits) for _ in range(5)} == {int(logits.argmax())}
    tokens, probabilities = Sampler(sampling).distribution(logits)
    assert tokens[0] == logits.argmax()
    assert probabilities[0] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equal_logits_are_ordered_by_token_id(temperature: float) -> None:
    logits = np.zeros(4096, np.float32)
    logits[[7, 3000, 4000]] = 5
    sampler = Sampler(Sampling(temperature, top_k=2, top_p=1.0))
    tokens, probabilities = sampler.distribution(logits)
    assert list(tokens) == ([7] if temperature == 0 else [7, 3000])
    assert list(probabilities) == ([1] if temperature == 0 else [0.5, 0.5])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_a_few_tokens_give_the_same_choice_as_masked_full_logits(temperature: float) -> None:
    logits = noise(3000)
    ids = np.array([3, 77, 78, 1500, 2999], np.int32)
    masked = np.full_like(logits, -np.inf)
    masked[ids] = logits[ids]
    few, whole = Sampler(Sampling(temperature, seed=1)), Sampler(Sampling(temperature, seed=1))
    assert [few.sample(logits[ids], ids) for _ in range(50)] == [whole.sample(masked) for _ in range(50)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[1.0, np.nan, 2.0], [-np.inf, -np.inf], [1.0, np.inf]])
def test_non_finite_logits_raise_a_typed_error(temperature: float, bad: list[float]) -> None:
    sampler = Sampler(Sampling(temperature))
    with pytest.raises(RuntimeFailure, match="the largest logit is"):
        sampler.sample(np.array(bad, np.float32))
