"""The reference decoder against transformers, and proof that the fixtures show each error of a decoder."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converters import reference_decoder
from converters.architectures.tensor_shapes import tensor_shapes
from converters.checkpoints.base import Checkpoint, LazyTensor
from converters.checkpoints.opening import open_checkpoint
from converters.reference_decoder import Floats, ReferenceDecoder, run_layer
from edge.bundles.architecture import Architecture, Rope

FIXTURES = Path(__file__).parents[1] / "fixtures"
GEMMA3 = ("gemma3-one-kv-head", "gemma3-two-kv-heads")
GEMMA4 = ("gemma4-one-kv-head", "gemma4-two-kv-heads")
TOLERANCE = 3e-4
"""Of logits up to 32, at every position; the largest difference seen is 1.0e-4."""

Fault = Callable[[pytest.MonkeyPatch, Checkpoint], Checkpoint]


def expected(name: str) -> dict[str, NDArray[Any]]:
    with np.load(FIXTURES / name / "reference.npz") as arrays:
        return dict(arrays)


def ids_of(name: str) -> list[int]:
    ids: list[int] = expected(name)["ids"].tolist()
    return ids


def opened(name: str) -> Checkpoint:
    return open_checkpoint(FIXTURES / name)


class Changed(LazyTensor):
    """A tensor with a function applied to its values."""

    def __init__(self, source: LazyTensor, change: Callable[[Floats], Floats]) -> None:
        self.name, self.shape, self.source_type = source.name, source.shape, source.source_type
        self._values = change(source.array())

    def rows(self, start: int, stop: int) -> Floats:
        return self._values[start:stop]


class Plain(LazyTensor):
    """A tensor in memory."""

    def __init__(self, name: str, values: Floats) -> None:
        self.name, self.shape, self.source_type = name, values.shape, "F32"
        self._values = values

    def rows(self, start: int, stop: int) -> Floats:
        return self._values[start:stop]


@pytest.mark.parametrize("name", GEMMA3 + GEMMA4)
def test_logits_and_hidden_states_equal_those_of_transformers_at_every_position(name: str) -> None:
    reference, decoder = expected(name), ReferenceDecoder(opened(name))
    logits, (hidden,) = decoder.logits(ids_of(name)), decoder.hidden_states([ids_of(name)])
    assert logits.dtype == hidden.dtype == np.float32
    np.testing.assert_allclose(logits, reference["logits"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(hidden, reference["hidden"], atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("name", GEMMA3 + GEMMA4)
def test_greedy_continuation_equals_that_of_transformers(name: str) -> None:
    reference, decoder = expected(name), ReferenceDecoder(opened(name))
    ids = [*reference["ids"], *reference["greedy"]]
    following = decoder.logits(ids).argmax(axis=-1)
    assert following[len(reference["ids"]) - 1 : -1].tolist() == reference["greedy"].tolist()


@pytest.mark.parametrize("name", [GEMMA3[0], GEMMA4[0]])
def test_batched_sequences_give_the_same_results_as_single_ones(name: str) -> None:
    ids, decoder = ids_of(name), ReferenceDecoder(opened(name))
    sequences = [ids, ids[:1], ids[7:40]]
    for together, sequence in zip(decoder.hidden_states(sequences), sequences, strict=True):
        np.testing.assert_array_equal(together, decoder.hidden_states([sequence])[0])


@pytest.mark.parametrize("wrong", [-1, 512])
def test_an_id_outside_the_vocabulary_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.511"):
        ReferenceDecoder(opened(GEMMA3[0])).logits([2, wrong])


@pytest.mark.parametrize("name", GEMMA3 + GEMMA4)
def test_every_matrix_of_a_layer_passes_through_linear_and_no_cache_outlives_its_readers(name: str) -> None:
    decoder = ReferenceDecoder(opened(name))
    (stream,) = decoder.begin([ids_of(name)])
    seen: dict[str, tuple[int, ...]] = {}

    def record(matrix: str, x: Floats, weight: Floats) -> Floats:
        seen[f"layers.{index}.{matrix}"] = (weight.shape[0], x.shape[1])
        return x @ weight.T

    for index in range(len(decoder.arch.layers)):
        run_layer(decoder.arch, index, decoder.layer_weights(index), stream, record)
    matrices = {
        n: s for n, s in tensor_shapes(decoder.arch).items() if n.startswith("layers.") and len(s) == 2
    }
    assert seen == matrices
    assert stream.kv == {}


# Faults. Each takes a checkpoint and gives the one that a decoder with that error would in effect have run.


def dimensions(**changes: Any) -> Fault:
    return lambda _patch, checkpoint: replace(
        checkpoint, architecture=replace(checkpoint.architecture, **changes)
    )


def window(change: int) -> Fault:
    def fault(_patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Checkpoint:
        arch = checkpoint.architecture
        return replace(checkpoint, architecture=replace(arch, sliding_window=arch.sliding_window + change))

    return fault


def tensors(end: str, change: Callable[[Floats], Floats]) -> Fault:
    """Change every tensor whose name has this suffix."""

    def fault(_patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Checkpoint:
        changed = {name: Changed(t, change) for name, t in checkpoint.tensors.items() if name.endswith(end)}
        assert changed
        return replace(checkpoint, tensors={**checkpoint.tensors, **changed})

    return fault


def formula(name: str, wrong: Callable[..., Any]) -> Fault:
    def fault(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Checkpoint:
        patch.setattr(reference_decoder, name, wrong)
        return checkpoint

    return fault


def unscaled_embedding(patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Checkpoint:
    patch.setattr(Architecture, "embedding_scale", 1.0)
    return checkpoint


def only_sliding_layers(_patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Checkpoint:
    arch = checkpoint.architecture
    layers = tuple(replace(layer, attention="sliding") for layer in arch.layers)
    return replace(checkpoint, architecture=replace(arch, rope_sliding=arch.rope_full, layers=layers))


def first_owner_read(_patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Checkpoint:
    """Shared layers read the first layer of their type and not the last that owns K and V."""
    arch = checkpoint.architecture
    first = {layer.attention: i for i, layer in reversed(list(enumerate(arch.layers)))}
    layers = tuple(
        layer if arch.owns_kv(i) else replace(layer, kv_owner=first[layer.attention])
        for i, layer in enumerate(arch.layers)
    )
    return replace(checkpoint, architecture=replace(arch, layers=layers))


def dead_kv_used(_patch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Checkpoint:
    """Shared layers compute K and V of their own from the tensors that are still in the file."""
    arch = checkpoint.architecture
    stored = bfloat16_tensors(checkpoint.path / "model.safetensors")
    layers = tuple(replace(layer, kv_owner=i) for i, layer in enumerate(arch.layers))
    names = {"key": "k_proj", "value": "v_proj", "key_norm": "k_norm"}
    dead = {
        f"layers.{i}.{ours}": Plain(
            theirs, stored[f"model.language_model.layers.{i}.self_attn.{theirs}.weight"]
        )
        for i in range(len(layers))
        if not arch.owns_kv(i)
        for ours, theirs in names.items()
    }
    return replace(
        checkpoint, architecture=replace(arch, layers=layers), tensors={**checkpoint.tensors, **dead}
    )


def bfloat16_tensors(path: Path) -> dict[str, Floats]:
    """Every tensor of a safetensors file, dead ones included."""
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__")
    found = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(raw[begin:end], "<u2").astype(np.uint32) << 16
        found[name] = bits.view(np.float32).reshape(entry["shape"])
    return found


def erf_gelu(x: Floats) -> Floats:
    erf = np.vectorize(math.erf, otypes=[np.float32])
    result: Floats = 0.5 * x * (1 + erf(x / math.sqrt(2)))
    return result


def interleaved_rotation(x: Floats, frequencies: NDArray[np.float64]) -> Floats:
    angles = np.arange(x.shape[1])[:, None] * frequencies
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape).astype(np.float32)


def frequencies_of_the_rotated_part(rope: Rope, head_dim: int) -> NDArray[np.float64]:
    """The exponent's denominator is the rotated share of the head and not the whole head."""
    rotated = int(rope.rotated_share * head_dim / 2)
    frequencies = np.zeros(head_dim // 2)
    frequencies[:rotated] = rope.base ** (-np.arange(rotated) / rotated)
    return frequencies


def attend_with_interleaved_groups(query: Floats, key: Floats, *rest: Any) -> Floats:
    """Query head j uses KV head `j % kv_heads`."""
    order = np.arange(len(query)).reshape(-1, len(key)).T.ravel()
    mixed = correct_attend(query[order], key, *rest).reshape(query.shape[1], len(query), -1)
    return mixed[:, np.argsort(order)].reshape(query.shape[1], -1)


correct_attend = reference_decoder.attend


def seen_by_later_tokens(length: int, _window: int | None) -> NDArray[np.bool_]:
    return np.ones((length, length), np.bool_)


def token_major(table: Floats) -> Floats:
    """Rows packed width-major instead of layer-major."""
    return table.reshape(len(table), -1, 32).swapaxes(1, 2).reshape(table.shape)


FAULTS: list[tuple[str, tuple[str, ...], Fault]] = [
    ("window one too wide", GEMMA3 + GEMMA4, window(1)),
    ("window one too narrow", GEMMA3 + GEMMA4, window(-1)),
    ("no causal mask", GEMMA3 + GEMMA4, formula("visible", seen_by_later_tokens)),
    ("full layers slide too", GEMMA3, only_sliding_layers),
    ("erf GELU", GEMMA3 + GEMMA4, formula("gelu", erf_gelu)),
    ("interleaved RoPE", GEMMA3 + GEMMA4, formula("rotate", interleaved_rotation)),
    ("RoPE base of sliding layers", GEMMA3 + GEMMA4, dimensions(rope_sliding=Rope(1e6))),
    ("RoPE base of full layers", GEMMA3, dimensions(rope_full=Rope(1e4))),
    ("norms off by one", GEMMA3 + GEMMA4, tensors("_norm", lambda w: w + 1)),
    ("weight of query norm forgotten", GEMMA3 + GEMMA4, tensors("query_norm", np.ones_like)),
    ("weight of key norm forgotten", GEMMA3 + GEMMA4, tensors("key_norm", np.ones_like)),
    ("embedding not scaled", GEMMA3 + GEMMA4, unscaled_embedding),
    (
        "query heads grouped crosswise",
        (GEMMA3[1], GEMMA4[1]),
        formula("attend", attend_with_interleaved_groups),
    ),
    ("scale from the head's width", (GEMMA3[1],), dimensions(attention_scale=32**-0.5)),
    ("values normed", GEMMA3, dimensions(value_norm=True)),
    ("values not normed", GEMMA4, dimensions(value_norm=False)),
    ("scores divided by sqrt(d)", GEMMA4, dimensions(attention_scale=32**-0.5)),
    ("no layer scalar", GEMMA4, dimensions(layer_scalar=False)),
    ("no softcap", GEMMA4, dimensions(logit_softcap=None)),
    ("p-RoPE turns all pairs", GEMMA4, dimensions(rope_full=Rope(1e6))),
    (
        "p-RoPE denominator is the rotated part",
        GEMMA4,
        formula("rotary_frequencies", frequencies_of_the_rotated_part),
    ),
    ("shared layers read the wrong owner", GEMMA4, first_owner_read),
    ("dead k/v used", (GEMMA4[0],), dead_kv_used),
    ("per-layer rows not scaled", GEMMA4, tensors("per_layer_embedding", lambda w: w / math.sqrt(32))),
    ("per-layer rows packed the other way", GEMMA4, tensors("per_layer_embedding", token_major)),
    ("per-layer inputs without the token's part", GEMMA4, tensors("per_layer_embedding", np.zeros_like)),
    (
        "per-layer inputs without the context's part",
        GEMMA4,
        tensors("per_layer_model_projection", np.zeros_like),
    ),
]


@pytest.mark.parametrize(
    ("name", "fault"), [pytest.param(n, f, id=f"{title}-{n}") for title, names, f in FAULTS for n in names]
)
def test_the_logits_reveal_a_wrong_decoder(name: str, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = expected(name)
    wrong = ReferenceDecoder(fault(monkeypatch, opened(name))).logits(ids_of(name))
    assert np.abs(wrong - reference["logits"]).max() > 10 * TOLERANCE
