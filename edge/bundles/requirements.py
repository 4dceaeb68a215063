"""How much memory a bundle needs, and whether the board has it.

Weights are file pages: Linux can drop them and read them again, so a bundle that does not fit still answers,
but reads most of its weights from storage for every token, at a hundredth of the speed. What is anonymous
can't be dropped: beyond the limit the process is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from edge.board import Board
from edge.bundles.architecture import Architecture
from edge.bundles.bundle import Manifest
from edge.errors import BundleError

_MB = 1_000_000
SYSTEM_BYTES = 80 * _MB
"""For Linux itself."""
_INTERPRETER = 87 * _MB
"""Python, numpy, the daemon's modules: 35 MB; the grammar worker with its copy of 262,144 pieces: 52 MB."""
_LAYER = 300_000
"""What LiteRT and XNNPACK keep for the operators of one layer in one signature."""
_CHANNEL = 8
"""What TFLite keeps for each output channel of a matrix in one signature: a scale and a zero point."""
_FLOAT = 4


@dataclass(frozen=True)
class Requirements:
    """Bytes of the program and the KV cache (anonymous), and of the weights that a token reads (file pages).

    `context` is the number of tokens that the KV cache is for.
    """

    program: int
    kv_cache: int
    weights: int
    context: int

    @property
    def anonymous(self) -> int:
        """Bytes that can't be dropped."""
        return self.program + self.kv_cache

    @property
    def total(self) -> int:
        """Bytes for a token at full speed."""
        return self.anonymous + self.weights


def requirements(manifest: Manifest, context: int | None = None) -> Requirements:
    """What a bundle needs with a KV cache of `context` tokens (None: as many as the bundle allows)."""
    arch, tokens = manifest.architecture, min(context or manifest.context, manifest.context)
    step = int(manifest.quantization["bytes_per_token"])
    return Requirements(_program(manifest, tokens), _kv_cache(arch, tokens), step, tokens)


def require_memory(name: str, needed: Requirements, board: Board) -> None:
    """Raise BundleError, with the memory needed and available, if bundle `name` does not fit.

    If Linux does not tell how much there is, everything fits.
    """
    found = _memory_there(board)
    if found is None or needed.total <= found[0]:
        return
    there, where = found
    killed = needed.anonymous > there
    outcome = "it would be killed" if killed else "weights would be read from storage again for every token"
    cache = f"{_mb(needed.kv_cache)} for {needed.context:,} tokens of context"
    raise BundleError(
        f"{name}: needs {_mb(needed.total)} MB ({_mb(needed.program)} for the program, {cache},"
        f" {_mb(needed.weights)} of weights for each token),"
        f" {where} has {_mb(there)} MB: {outcome}; use a smaller model, recipe or context, or --force"
    )


def fit_together(running: Requirements, other: Requirements, board: Board) -> bool:
    """Return whether a second bundle fits next to the running one, in one process and at full speed."""
    found, available = _memory_there(board), board.memory("MemAvailable")
    if found is None or available is None:
        return False
    more = other.total - _INTERPRETER
    return running.total + more <= found[0] and more <= available


def _memory_there(board: Board) -> tuple[int, str] | None:
    """Bytes available to the daemon, and what limits them; None if Linux does not tell."""
    total = board.memory("MemTotal")
    if total is None:
        return None
    board_has = total - SYSTEM_BYTES
    limit = min(_group_limits(board), default=board_has)
    return (limit, "its control group") if limit < board_has else (board_has, "the board")


def _mb(size: int) -> str:
    return f"{size / _MB:,.0f}"


def _kv_cache(arch: Architecture, tokens: int) -> int:
    """K and V of the layers that own them, float32."""
    size = 0
    for index in arch.owners:
        layer = arch.layers[index]
        rows = min(tokens, arch.sliding_window) if layer.attention == "sliding" else tokens
        size += 2 * _FLOAT * arch.kv_heads * rows * layer.head_dim
    return size


def _program(manifest: Manifest, tokens: int) -> int:
    """The interpreter, the compiled graph, what it computes with, and the logits of a verify pass."""
    arch = manifest.architecture
    whole, owning = 2, len(manifest.prefill_widths)  # decode and verify; prefill
    layers = whole * len(arch.layers) + owning * len(arch.owners)
    channels = sum(_channels(arch, i) * (whole + owning * arch.owns_kv(i)) for i in range(len(arch.layers)))
    channels += whole * arch.vocabulary
    widest = max(layer.feed_forward for layer in arch.layers)
    scratch = max(manifest.prefill_widths) * _FLOAT * (6 * widest + 3 * arch.query_heads * tokens)
    logits = (manifest.verify_width + 1) * arch.vocabulary * _FLOAT
    return _INTERPRETER + layers * _LAYER + channels * _CHANNEL + scratch + logits


def _channels(arch: Architecture, index: int) -> int:
    """Output channels of all matrices of a layer."""
    layer = arch.layers[index]
    heads = arch.query_heads + 2 * arch.kv_heads * arch.owns_kv(index)
    per_layer = arch.per_layer_width + arch.hidden if arch.per_layer_width else 0
    return heads * layer.head_dim + 2 * arch.hidden + 2 * layer.feed_forward + per_layer


def _group_limits(board: Board) -> Iterator[int]:
    """Memory limits of the control groups that this process is in, versions 1 and 2."""
    for line in (board.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = "/sys/fs/cgroup", ["memory.max", "memory.high"]
        elif "memory" in controllers.split(","):
            root, names = "/sys/fs/cgroup/memory", ["memory.limit_in_bytes"]
        else:
            continue
        folders = (PurePosixPath(path), *PurePosixPath(path).parents)
        texts = [board.read(f"{root}{folder}/{name}") for folder in folders for name in names]
        yield from (int(text) for text in texts if text is not None and text.isdigit())
