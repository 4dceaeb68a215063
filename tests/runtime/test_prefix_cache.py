"""Snapshots: the same logits after a restore, damage is a miss, and writes are bounded."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from edge.bundles.architecture import Architecture, Layer, Rope
from edge.runtime.kv_cache import KVCache
from edge.runtime.prefix_cache import SHORTEST, PrefixCache
from tests.support import bundles
from tests.support.checkpoint_files import FIXTURES

ARCH = Architecture(
    family="gemma3",
    vocabulary=512,
    hidden=64,
    query_heads=4,
    kv_heads=2,
    sliding_window=48,
    rope_sliding=Rope(1e4),
    rope_full=Rope(1e6),
    attention_scale=1.0,
    rms_epsilon=1e-6,
    max_positions=512,
    layers=(Layer("sliding", 16, 64, 0), Layer("full", 16, 64, 1), Layer("sliding", 16, 64, 0)),
)


def filled(length: int, seed: int = 0) -> KVCache:
    """A cache of `length` random tokens, stored in chunks, so that rings wrap."""
    cache, rng = KVCache(ARCH, 512), np.random.default_rng(seed)
    while cache.length < length:
        count = min(20, length - cache.length)
        cache.reserve(cache.length + count)
        new = {i: rng.normal(size=(1, 2, 20, 16)).astype(np.float32) for i in ARCH.owners}
        cache.append(new, {i: -array for i, array in new.items()}, count)
    return cache


def rows(cache: KVCache) -> list[bytes]:
    return [part.tobytes() for pair in cache.snapshot() for part in pair]


def restore(prefixes: PrefixCache, ids: list[int], longer_than: int = 0) -> tuple[int, KVCache]:
    cache = KVCache(ARCH, 512)

    def reserve(length: int) -> None:
        cache.reserve(length)

    return prefixes.restore(ids, cache, longer_than, reserve), cache


@pytest.mark.parametrize("length", [SHORTEST, 47, 48, 49, 130, 300])
def test_a_snapshot_is_restored_also_in_a_new_process(tmp_path: Path, length: int) -> None:
    ids = list(range(length))
    assert PrefixCache(tmp_path, "bundle").store(ids, filled(length))
    found, cache = restore(PrefixCache(tmp_path, "bundle"), [*ids, 7, 8])
    assert found == cache.length == length
    assert rows(cache) == rows(filled(length))


def test_the_longest_stored_prefix_is_used(tmp_path: Path) -> None:
    prefixes = PrefixCache(tmp_path, "bundle")
    for length in (40, 80):
        prefixes.store(list(range(length)), filled(length))
    assert restore(prefixes, list(range(100)))[0] == 80
    assert restore(prefixes, list(range(79)))[0] == 40
    assert restore(prefixes, list(range(100)), longer_than=80)[0] == 0
    assert restore(prefixes, [5, *range(100)])[0] == 0


def test_snapshots_of_another_bundle_are_not_used(tmp_path: Path) -> None:
    PrefixCache(tmp_path, "one").store(list(range(40)), filled(40))
    assert restore(PrefixCache(tmp_path, "other"), list(range(60)))[0] == 0


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty", "longer"])
def test_a_damaged_snapshot_is_a_miss_and_is_removed(tmp_path: Path, damage: str) -> None:
    PrefixCache(tmp_path, "bundle").store(list(range(40)), filled(40))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    flipped, short = bytes(content), bytes(content[:-4])
    changed = {"flipped bit": flipped, "cut short": short, "empty": b"", "longer": flipped + b"1234"}
    path.write_bytes(changed[damage])
    prefixes = PrefixCache(tmp_path, "bundle")
    found, cache = restore(prefixes, list(range(60)))
    assert (found, cache.length) == (0, 0)
    assert prefixes.store(list(range(40)), filled(40))


def test_short_prefixes_are_not_stored(tmp_path: Path) -> None:
    assert not PrefixCache(tmp_path, "bundle").store(list(range(SHORTEST - 1)), filled(SHORTEST - 1))
    assert not list(tmp_path.iterdir())


def test_the_least_used_snapshot_is_evicted_when_the_directory_is_full(tmp_path: Path) -> None:
    size = 4 + sum(len(part) for part in rows(filled(40)))
    prefixes = PrefixCache(tmp_path, "bundle", capacity=2 * size)
    sets = [[start, *range(39)] for start in (101, 102, 103)]
    for age, ids in zip((300, 200), sets[:2], strict=True):
        prefixes.store(ids, filled(40))
        newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (time.time() - age, time.time() - age))
    assert restore(prefixes, sets[0])[0] == 40
    assert prefixes.store(sets[2], filled(40))
    assert [restore(prefixes, ids)[0] for ids in sets] == [40, 0, 40]


def test_snapshots_unused_for_long_are_removed_at_the_start(tmp_path: Path) -> None:
    PrefixCache(tmp_path, "bundle").store(list(range(40)), filled(40))
    (path,) = tmp_path.iterdir()
    old = time.time() - 31 * 24 * 3600
    os.utime(path, (old, old))
    PrefixCache(tmp_path, "bundle")
    assert not list(tmp_path.iterdir())


def test_snapshots_that_cannot_be_removed_do_not_prevent_a_start(tmp_path: Path) -> None:
    """As on a disk that became read-only after an error, where snapshots expire but stay."""
    for length in (40, 50):
        stuck = tmp_path / f"{length}-{'0' * 32}.kv"
        (stuck / "inside").mkdir(parents=True)
        os.utime(stuck, (0, 0))
    (tmp_path / "left.part").mkdir()
    prefixes = PrefixCache(tmp_path, "digest", capacity=1000)
    assert restore(prefixes, list(range(60)))[0] == 0
    assert not prefixes.store(list(range(40)), filled(40))


def test_snapshots_half_written_at_a_power_cut_are_removed_at_the_start(tmp_path: Path) -> None:
    PrefixCache(tmp_path, "bundle").store(list(range(40)), filled(40))
    (whole,) = tmp_path.iterdir()
    whole.with_suffix(".part").write_bytes(b"half")
    assert restore(PrefixCache(tmp_path, "bundle"), list(range(40)))[0] == 40
    assert list(tmp_path.iterdir()) == [whole]


def test_bytes_written_per_day_are_bounded_across_restarts(tmp_path: Path) -> None:
    size = 4 + sum(len(part) for part in rows(filled(40)))
    prefixes = PrefixCache(tmp_path, "bundle", daily=2 * size)
    assert prefixes.store([1, *range(39)], filled(40))
    assert prefixes.written == size
    again = PrefixCache(tmp_path, "bundle", daily=2 * size)
    assert again.store([2, *range(39)], filled(40))
    assert not again.store([3, *range(39)], filled(40))
    assert again.written == size


def test_in_a_read_only_directory_nothing_is_stored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    prefixes = PrefixCache(tmp_path / "file" / "cache", "bundle")
    assert not prefixes.store(list(range(40)), filled(40))
    assert restore(prefixes, list(range(60)))[0] == 0


def test_a_decoder_continues_from_a_snapshot_bit_for_bit() -> None:
    directory = bundles.small_bundle("gemma4-two-kv-heads", "int8")
    with np.load(FIXTURES / "gemma4-two-kv-heads" / "reference.npz") as file:
        ids = file["ids"].tolist()
    first, second = bundles.open_decoder(directory), bundles.open_decoder(directory)
    first.prefill(ids[:60], lambda: None)
    first.remember()
    assert second.recall(ids[:-1]) == 60
    for decoder in (first, second):
        decoder.advance(ids[60:], lambda: None)
    np.testing.assert_array_equal(first.logits(), second.logits())
