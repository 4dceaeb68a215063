"""The targets of `make fuzz` pass for seeds, damaged seeds and noise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.targets import TARGETS

names = st.sampled_from(sorted(TARGETS))


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_targets_pass_for_seeds_and_prefixes(name: str) -> None:
    for seed in TARGETS[name].seeds:
        for length in range(0, len(seed) + 1, max(1, len(seed) // 100)):
            TARGETS[name].run(seed[:length])
        TARGETS[name].run(seed)


@given(names, st.data())
def test_fuzz_targets_pass_for_damaged_seeds(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(TARGETS[name].seeds))
    start = data.draw(st.integers(0, len(seed)))
    end = data.draw(st.integers(start, min(len(seed), start + 40)))
    TARGETS[name].run(seed[:start] + data.draw(st.binary(max_size=8)) + seed[end:])


@given(names, st.binary(max_size=200))
def test_fuzz_targets_pass_for_noise(name: str, noise: bytes) -> None:
    TARGETS[name].run(noise)
