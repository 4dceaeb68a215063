"""The LiteRT binding: arrays in place; a weight cache that survives damage and concurrent processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundles.bundle import DECODER, read_manifest
from edge.runtime import weight_cache
from edge.runtime.compiled_model import CompiledModel
from edge.runtime.signature import aligned_array
from edge.runtime.weight_cache import weight_cache_name
from tests.support import bundles

NAME = "gemma3-two-kv-heads"


def compile_model(cache: Path) -> CompiledModel:
    directory = bundles.small_bundle(NAME, "int8")
    return CompiledModel(
        directory / DECODER, read_manifest(directory).files[DECODER].sha256, cache, threads=1
    )


def head_of(model: CompiledModel) -> NDArray[Any]:
    head = model.signatures["head"]
    hidden, logits = head.bind_new("hidden"), head.bind_new("logits")
    hidden[:] = np.linspace(-1, 1, hidden.size).reshape(hidden.shape)
    head.run()
    return logits


def test_arrays_are_read_and_written_in_place(tmp_path: Path) -> None:
    model = compile_model(tmp_path)
    head = model.signatures["head"]
    hidden, logits = head.bind_new("hidden"), head.bind_new("logits")
    head.run()
    assert not logits.any()
    hidden[:] = 1
    head.run()
    first = logits.copy()
    assert first.any()
    hidden *= 2
    head.run()
    np.testing.assert_allclose(logits, 2 * first, rtol=1e-5)


def test_signatures_and_shapes_match_the_file(tmp_path: Path) -> None:
    model = compile_model(tmp_path)
    assert {"decode", "verify", "prefill_64", "head", "head_verify"} == set(model.signatures)
    decode = model.signatures["decode"]
    assert "hidden" in decode.outputs
    assert decode.shape("embeddings")[:2] == (1, 1)


def test_an_unaligned_array_is_refused(tmp_path: Path) -> None:
    head = compile_model(tmp_path).signatures["head"]
    shape = head.shape("hidden")
    array = aligned_array((int(np.prod(shape)) + 1,))[1:].reshape(shape)
    with pytest.raises(ValueError, match="hidden is not 64-byte aligned"):
        head.bind("hidden", array)


def test_packed_weights_are_cached_and_reused(tmp_path: Path) -> None:
    expected = head_of(compile_model(tmp_path))
    (cache,) = tmp_path.glob("*.xnnpack")
    before = cache.stat()
    np.testing.assert_array_equal(head_of(compile_model(tmp_path)), expected)
    assert cache.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "unmarked"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: str) -> None:
    expected = head_of(compile_model(tmp_path))
    (cache,) = tmp_path.glob("*.xnnpack")
    content = cache.read_bytes()
    if damage == "unmarked":
        cache.with_suffix(".stamp").unlink()
    cache.write_bytes(
        {"truncated": content[:1000], "garbage": b"x" * len(content), "empty": b"", "unmarked": content}[
            damage
        ]
    )
    np.testing.assert_array_equal(head_of(compile_model(tmp_path)), expected)
    assert cache.read_bytes() == content


def test_the_cache_is_named_after_version_cpu_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {weight_cache_name("a"), weight_cache_name("b")}
    monkeypatch.setattr("edge.runtime.litert_api.version", lambda: "another")
    names.add(weight_cache_name("a"))
    monkeypatch.setattr("edge.runtime.weight_cache._cpu_identity", lambda: "another")
    names.add(weight_cache_name("a"))
    assert len(names) == 4


def test_two_processes_can_build_the_cache_at_once(tmp_path: Path) -> None:
    run = f"""
import sys
from pathlib import Path
from edge.runtime.compiled_model import CompiledModel
CompiledModel(Path(sys.argv[1]), "digest", Path({str(tmp_path)!r}), 1)
"""
    path = str(bundles.small_bundle(NAME, "int8") / DECODER)
    command = [sys.executable, "-c", run, path]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".stamp", ".xnnpack"]


def test_leftovers_of_interrupted_packing_are_removed_at_the_next_start(tmp_path: Path) -> None:
    packing = """
import os, sys
from pathlib import Path
from edge.runtime.compiled_model import CompiledModel
os.replace = lambda *_: os._exit(9)
CompiledModel(Path(sys.argv[1]), "digest", Path(sys.argv[2]), 1)
"""
    path = str(bundles.small_bundle(NAME, "int8") / DECODER)
    assert subprocess.run([sys.executable, "-c", packing, path, str(tmp_path)], check=False).returncode == 9
    (left,) = tmp_path.glob("*/building")
    with weight_cache._locked(left.parent):  # a file that is still being packed stays
        compile_model(tmp_path)
        assert left.stat().st_size > 100_000
    next(tmp_path.glob("*.stamp")).unlink()
    compile_model(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".stamp", ".xnnpack"]


def test_without_a_writable_cache_packed_weights_stay_in_memory_and_give_equal_results(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    in_memory = compile_model(tmp_path / "file" / "cache")
    assert (
        f"{tmp_path}/file/cache: can't store packed weights: Not a directory; they stay in memory"
        in caplog.text
    )
    np.testing.assert_array_equal(head_of(in_memory), head_of(compile_model(tmp_path / "cache")))
