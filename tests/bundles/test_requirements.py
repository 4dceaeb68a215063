"""The memory that a bundle needs; a bundle is refused on a board that has less."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edge.board import Board
from edge.bundles.bundle import Manifest, read_manifest
from edge.bundles.requirements import SYSTEM_BYTES, Requirements, fit_together, require_memory, requirements
from edge.errors import BundleError
from tests.support import bundles
from tests.support.checkpoint_files import real_model

MB = 1_000_000
NEEDED = Requirements(program=100 * MB, kv_cache=30 * MB, weights=270 * MB, context=2048)


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., Board]:
    """A board with the given bytes of memory and other files of /proc and /sys."""

    def make(total: int | None, files: dict[str, str] | None = None) -> Board:
        memory = {} if total is None else {"proc/meminfo": f"MemTotal: {total // 1024} kB\n"}
        for name, text in (memory | (files or {})).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return Board(tmp_path)

    return make


def refusal(needed: Requirements, board: Board) -> str:
    with pytest.raises(BundleError) as caught:
        require_memory("pumps", needed, board)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bundle_is_accepted_exactly_if_it_fits(board: Callable[..., Board]) -> None:
    enough = (NEEDED.total + SYSTEM_BYTES + 1023) // 1024 * 1024
    require_memory("pumps", NEEDED, board(enough))
    assert "the board has 400 MB" in refusal(NEEDED, board(enough - 1024))


def test_weights_that_do_not_fit_are_reported_with_all_numbers(board: Callable[..., Board]) -> None:
    assert refusal(NEEDED, board(470 * MB)) == (
        "pumps: needs 400 MB (100 for the program, 30 for 2,048 tokens of context, 270 of weights for each"
        " token), the board has 390 MB: weights would be read from storage again for every token;"
        " use a smaller model,"
        " recipe or context, or --force"
    )


def test_anonymous_memory_that_does_not_fit_is_reported_as_fatal(board: Callable[..., Board]) -> None:
    assert "the board has 120 MB: it would be killed; use a smaller" in refusal(NEEDED, board(200 * MB))


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/system.slice/edge-daemon.service\n",
            "sys/fs/cgroup/system.slice/edge-daemon.service/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/edge-daemon.service/memory.high": f"{300 * MB}\n",
        },
        {
            "proc/self/cgroup": "0::/system.slice/edge-daemon.service\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{300 * MB}\n",
        },
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/\n9:memory:/small\n0::/\n",
            "sys/fs/cgroup/memory/small/memory.limit_in_bytes": f"{300 * MB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    ],
    ids=["high", "of a parent", "version 1"],
)
def test_the_limit_of_a_control_group_counts(files: dict[str, str], board: Callable[..., Board]) -> None:
    assert "its control group has 300 MB: weights would be read" in refusal(NEEDED, board(4000 * MB, files))


def test_without_figures_from_linux_every_bundle_fits(board: Callable[..., Board]) -> None:
    empty = board(None)
    assert empty.memory("MemTotal") is None
    require_memory("pumps", replace(NEEDED, weights=1 << 60), empty)
    assert not fit_together(NEEDED, NEEDED, empty)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_manifest(bundles.small_bundle("gemma4-one-kv-head", "int8"))


def test_the_kv_cache_counts_layers_that_own_kv_up_to_their_window(manifest: Manifest) -> None:
    arch = manifest.architecture
    owners = [arch.layers[i] for i in arch.owners]
    sliding = sum(layer.attention == "sliding" for layer in owners)
    full = len(owners) - sliding
    wide = replace(manifest, context=4096)
    expected = 4 * 2 * (sliding * arch.sliding_window * 32 + full * 3000 * 64)
    assert requirements(wide, 3000).kv_cache == expected
    assert requirements(wide, 99_999).context == requirements(wide).context == 4096


def test_the_weights_counted_are_those_that_a_step_reads(manifest: Manifest) -> None:
    needed = requirements(manifest)
    assert needed.weights == manifest.quantization["bytes_per_token"]
    assert needed.total == needed.program + needed.kv_cache + needed.weights


def test_the_limit_is_the_memory_of_this_machine(manifest: Manifest) -> None:
    small = replace(requirements(manifest), program=1, kv_cache=1)
    require_memory("small", small, Board())
    assert "use a smaller model" in refusal(replace(small, weights=1 << 60), Board())


@pytest.mark.slow
def test_the_estimate_for_the_real_model_is_close_to_its_use() -> None:
    """Anonymous memory of all processes after an answer with a grammar, with 2,000 tokens of context."""
    bundle = bundles.bundle_directory(real_model(), "int8", 2048)
    code = f"""
from pathlib import Path
from edge.generation.generator import Generator
from edge.protocol.messages import Request
generator = Generator.open(Path({str(bundle)!r}), Path({str(bundles.cache_directory())!r}), 2, 2048)
form = {{"type": "json_object"}}
request = Request("1", prompt="Pump 2 is hot. " * 300, max_tokens=20, response_format=form)
for part in generator.generate(request, lambda: None):
    pass
worker = generator.grammars.pid
(child,) = open(f"/proc/{{worker}}/task/{{worker}}/children").read().split()
for process in ("self", worker, child):
    print(next(line.split()[1] for line in open(f"/proc/{{process}}/smaps_rollup") if "Pss_Anon" in line))
generator.close()
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    measured, estimate = sum(map(int, said.split())) * 1024, requirements(read_manifest(bundle)).anonymous
    assert 0.75 * estimate < measured < 1.1 * estimate
