"""Packed weights on disk: any damage to them or to their stamp is found, at the start or while idle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.runtime import weight_cache
from edge.runtime.weight_cache import BLOCK_BYTES, CHECK_EVERY_S, PackedWeights, open_packed, publishing

BLOCKS = 40


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random bytes that was published as packed weights are."""
    path = tmp_path_factory.mktemp("cache") / "key.xnnpack"
    with publishing(path) as building:
        building.write_bytes(os.urandom(BLOCKS * BLOCK_BYTES + 17))
    return path


def flip(path: Path, at: int) -> None:
    """Change one bit of a file and keep its times."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def whole_check(weights: PackedWeights) -> bool:
    """Return whether all blocks pass; continues after a damaged block, as the next poll would."""
    return False not in {weights.check() for _ in range(BLOCKS)}


def test_intact_weights_pass_the_check_of_every_block(packed: Path) -> None:
    weights = PackedWeights(packed)
    assert whole_check(weights)


@settings(max_examples=25)
@given(at=st.integers(0, BLOCKS * BLOCK_BYTES + 16))
def test_a_flipped_bit_is_detected_at_the_start_or_while_idle(packed: Path, at: int) -> None:
    flip(packed, at)
    try:
        weights = open_packed(packed)
        assert weights is None or not whole_check(weights)
    finally:
        flip(packed, at)


@pytest.mark.parametrize("at", [0, BLOCKS * BLOCK_BYTES - 1, BLOCKS * BLOCK_BYTES + 16])
def test_the_part_that_litert_parses_is_checked_at_the_start(packed: Path, at: int) -> None:
    flip(packed, at)
    try:
        assert open_packed(packed) is None
    finally:
        flip(packed, at)


def test_a_bit_that_flips_after_the_start_is_detected_by_the_daily_check(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    weights = PackedWeights(packed)
    assert whole_check(weights)
    flip(packed, 3 * BLOCK_BYTES)
    try:
        assert whole_check(weights)  # not due yet
        now += CHECK_EVERY_S + 1
        assert not whole_check(weights)
    finally:
        flip(packed, 3 * BLOCK_BYTES)


@settings(max_examples=60)
@given(data=st.data())
def test_weights_with_a_changed_stamp_are_not_intact(packed: Path, data: st.DataObject) -> None:
    stamp = packed.with_suffix(".stamp")
    content = stamp.read_bytes()
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.integers(0, len(content)))]
    stamp.write_bytes(changed)
    try:
        assert (open_packed(packed) is not None) == (bytes(changed) == content)
    finally:
        stamp.write_bytes(content)


def test_weights_whose_stamp_is_a_fifo_or_endless_are_not_intact(packed: Path, tmp_path: Path) -> None:
    stamp = packed.with_suffix(".stamp")
    kept = tmp_path / "stamp"
    os.replace(stamp, kept)
    try:
        os.mkfifo(stamp)
        assert open_packed(packed) is None
        stamp.unlink()
        stamp.symlink_to("/dev/zero")
        assert open_packed(packed) is None
        stamp.unlink()
    finally:
        os.replace(kept, stamp)
    assert open_packed(packed) is not None


def test_damaged_weights_are_removed_unless_another_process_has_replaced_them(tmp_path: Path) -> None:
    path = tmp_path / "key.xnnpack"
    with publishing(path) as building:
        building.write_bytes(b"old")
    old = PackedWeights(path)
    with publishing(path) as building:
        building.write_bytes(b"new")
    old.remove()
    new = PackedWeights(path)
    new.remove()
    assert not list(tmp_path.iterdir())


def test_packed_weights_are_readable_by_their_owner_only(packed: Path) -> None:
    assert packed.stat().st_mode & 0o777 == 0o600
    assert packed.with_suffix(".stamp").stat().st_mode & 0o777 == 0o600


def test_a_start_reads_few_blocks_of_a_file_of_any_size() -> None:
    assert set(weight_cache._sampled(3)) == {0, 1, 2}
    sampled = set(weight_cache._sampled(2500))
    assert {0, 2498, 2499} <= sampled
    assert len(sampled) <= 8
