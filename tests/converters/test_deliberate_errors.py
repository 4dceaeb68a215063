"""Decoders with deliberate errors: each typical mistake with Gemma shows in the logits.

This shows that the tests of `test_decoder` can fail: a model with one error is converted and run like any
other, and its logits exceed the tolerance for the correct model by a factor of at least ten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edge.runtime.decoder
from converters.architectures.names import huggingface_name
from converters.architectures.tensor_shapes import tensor_shapes
from converters.checkpoints.base import Checkpoint, LazyTensor
from converters.checkpoints.opening import open_checkpoint
from converters.convert import convert
from converters.tflite.graph import Graph, Tensor
from converters.tflite.schema import schema
from edge.bundles.architecture import Architecture, Attention, Layer
from tests.runtime.test_decoder import FLOAT_TOLERANCE, reference
from tests.support import bundles
from tests.support.checkpoint_files import FIXTURES, GEMMA3, GEMMA4, read_arrays

pytestmark = pytest.mark.slow

Floats = NDArray[np.float32]
Change = Callable[[Checkpoint], Checkpoint]


def furthest_logit(checkpoint: Checkpoint, name: str, scratch: Path) -> float:
    """The largest error over all positions of a float32 bundle of `checkpoint`; `pytest -s` shows it."""
    convert(checkpoint, scratch / "bundle", "float32", 128)
    decoder = bundles.open_decoder(scratch / "bundle")
    ids, expected, _ = reference(name)
    got = np.concatenate([block.copy() for block in decoder.logits_of(ids)])
    furthest = float(np.abs(got - expected).max())
    print(f"largest error of a logit: {furthest:.3g}")
    return furthest


@cache
def right(name: str) -> Checkpoint:
    return open_checkpoint(FIXTURES / name)


def with_architecture(**changes: Any) -> Change:
    """Replace the values of fields of the architecture."""
    return lambda one: replace(one, architecture=replace(one.architecture, **changes))


def with_window(change: int) -> Change:
    return lambda one: with_architecture(sliding_window=one.architecture.sliding_window + change)(one)


def with_layers(change: Callable[[Architecture, int], Layer]) -> Change:
    def changed(one: Checkpoint) -> Checkpoint:
        arch = one.architecture
        return with_architecture(layers=tuple(change(arch, i) for i in range(len(arch.layers))))(one)

    return changed


class Changed(LazyTensor):
    """A tensor with a function applied to its values."""

    def __init__(self, base: LazyTensor, change: Callable[[Floats], Floats]) -> None:
        self._values = change(base.array())
        self.name, self.shape, self.source_type = base.name, self._values.shape, base.source_type

    def rows(self, start: int, stop: int) -> Floats:
        return self._values[start:stop]


def with_tensors(ending: str, change: Callable[[Floats], Floats]) -> Change:
    """Replace the values of every tensor with that name, in all layers."""

    def changed(one: Checkpoint) -> Checkpoint:
        tensors = {
            name: Changed(tensor, change) if name.endswith(ending) else tensor
            for name, tensor in one.tensors.items()
        }
        assert any(isinstance(tensor, Changed) for tensor in tensors.values())
        return replace(one, tensors=tensors)

    return changed


def given(values: Floats, _instead_of: Floats) -> Floats:
    return values


def gate_and_up_swapped(one: Checkpoint) -> Checkpoint:
    names = {"gate": "up", "up": "gate"}
    swapped = {
        name: one.tensors[name.rsplit(".", 1)[0] + "." + names[last]]
        for name in one.tensors
        if (last := name.rsplit(".", 1)[-1]) in names
    }
    return replace(one, tensors={**one.tensors, **swapped})


def last_owner_of_any_type(arch: Architecture, index: int) -> Layer:
    """A reader that takes the owner before the right one of its type."""
    layer = arch.layers[index]
    same = [i for i in arch.owners if arch.layers[i].attention == layer.attention]
    return layer if arch.owns_kv(index) else replace(layer, kv_owner=same[-2])


def pairs_next_to_each_other(one: Checkpoint) -> Checkpoint:
    """Rotary pairs (2k, 2k + 1): the same as rows of Q and K in another order, since q.k does not see it."""
    arch = one.architecture

    def reordered(base: LazyTensor, head_dim: int) -> LazyTensor:
        return Changed(base, lambda values: reorder(values, head_dim))

    def reorder(values: Floats, head_dim: int) -> Floats:
        heads = values.reshape(-1, head_dim, *values.shape[1:])
        return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(values.shape)

    tensors = dict(one.tensors)
    for i, layer in enumerate(arch.layers):
        for name in ("query", "query_norm", "key", "key_norm"):
            if (at := f"layers.{i}.{name}") in tensors:
                tensors[at] = reordered(tensors[at], layer.head_dim)
    return replace(one, tensors=tensors)


BOTH, FOUR = (GEMMA3, GEMMA4), (GEMMA4,)
IN_THE_CHECKPOINT: dict[str, tuple[tuple[str, ...], Change]] = {
    "window one too wide": (BOTH, with_window(1)),
    "window one too narrow": (BOTH, with_window(-1)),
    "queries scaled by 1 / sqrt(head_dim)": (
        FOUR,
        lambda one: with_architecture(attention_scale=1 / math.sqrt(one.architecture.layers[0].head_dim))(
            one
        ),
    ),
    "queries not scaled": ((GEMMA3,), with_architecture(attention_scale=1.0)),
    "rotary bases exchanged": (
        BOTH,
        lambda one: with_architecture(
            rope_sliding=one.architecture.rope_full, rope_full=one.architecture.rope_sliding
        )(one),
    ),
    "rotary pairs next to each other": (BOTH, pairs_next_to_each_other),
    "all pairs of full layers turn": (
        FOUR,
        lambda one: with_architecture(rope_full=replace(one.architecture.rope_full, rotated_share=1.0))(one),
    ),
    "norm weights off by one": (BOTH, with_tensors("attention_norm", lambda values: values + 1)),
    "no query norm": (BOTH, with_tensors("query_norm", np.ones_like)),
    "no value norm": (FOUR, with_architecture(value_norm=False)),
    "no layer scalar": (FOUR, with_architecture(layer_scalar=False)),
    "no softcap": (FOUR, with_architecture(logit_softcap=None)),
    "readers take another owner's K and V": (FOUR, with_layers(last_owner_of_any_type)),
    "gate and up exchanged": (BOTH, gate_and_up_swapped),
    "per-layer rows not scaled": (
        FOUR,
        with_tensors("per_layer_embedding", lambda values: values / np.float32(math.sqrt(32))),
    ),
    "no per-layer projection norm": (FOUR, with_tensors("per_layer_projection_norm", np.ones_like)),
}


@pytest.mark.parametrize("name", BOTH)
def test_the_correct_model_is_within_the_tolerance(name: str, tmp_path: Path) -> None:
    assert furthest_logit(right(name), name, tmp_path) < FLOAT_TOLERANCE


@pytest.mark.parametrize(
    ("error", "name"), [(error, name) for error, (names, _) in IN_THE_CHECKPOINT.items() for name in names]
)
def test_a_wrong_model_is_detected(error: str, name: str, tmp_path: Path) -> None:
    wrong = IN_THE_CHECKPOINT[error][1](right(name))
    assert furthest_logit(wrong, name, tmp_path) > 10 * FLOAT_TOLERANCE


def test_using_unused_keys_and_values_is_detected(tmp_path: Path) -> None:
    stored = read_arrays(FIXTURES / GEMMA4 / "model.safetensors")
    wrong = with_layers(lambda arch, index: replace(arch.layers[index], kv_owner=index))(right(GEMMA4))
    tensors = dict(wrong.tensors)
    for name in set(tensor_shapes(wrong.architecture)) - set(tensors):
        bits = stored["model.language_model." + huggingface_name(name)].astype(np.uint32) << 16
        owned = tensors[f"layers.0.{name.rsplit('.', 1)[-1]}"]
        tensors[name] = Changed(owned, partial(given, bits.view(np.float32)))
    assert len(tensors) > len(wrong.tensors)
    assert furthest_logit(replace(wrong, tensors=tensors), GEMMA4, tmp_path) > 10 * FLOAT_TOLERANCE


@pytest.mark.parametrize("name", BOTH)
def test_erf_in_gelu_is_detected(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gelu(self: Graph, x: Tensor) -> Tensor:
        return self._op("GELU", [x], x.shape, "GeluOptions", schema.GeluOptionsT())

    monkeypatch.setattr(Graph, "gelu", gelu)
    assert furthest_logit(right(name), name, tmp_path) > 10 * FLOAT_TOLERANCE


@pytest.mark.parametrize("name", BOTH)
def test_an_unscaled_embedding_is_detected(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Architecture, "embedding_scale", property(lambda _self: 1.0))
    assert furthest_logit(right(name), name, tmp_path) > 10 * FLOAT_TOLERANCE


def test_a_rope_denominator_of_the_rotated_pairs_only_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frequencies(arch: Architecture, attention: Attention) -> NDArray[np.float64]:
        rope, half = arch.rope(attention), arch.head_dim(attention) // 2
        turned = int(rope.rotated_share * half)
        return np.concatenate([rope.base ** (-np.arange(turned) / turned), np.zeros(half - turned)])

    monkeypatch.setattr(edge.runtime.decoder, "_frequencies", frequencies)
    assert furthest_logit(right(GEMMA4), GEMMA4, tmp_path) > 10 * FLOAT_TOLERANCE
