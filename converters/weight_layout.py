"""Which tensors of a checkpoint a bundle stores together, and in which order.

Matrices that read the same input are stacked into one matrix of the graph (`qkv`, `gate_up`), their rows in
that order. Tables whose rows are gathered one at a time are stored outside the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from converters.architectures.tensor_shapes import tensor_shapes
from edge.bundles.architecture import Architecture


@dataclass(frozen=True)
class StoredMatrix:
    """Tensors whose rows follow each other, and the shape of the whole: [rows, columns].

    The columns of a row share a scale in a per-channel format.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, int]

    @property
    def values(self) -> int:
        """The number of values."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class WeightLayout:
    """All tensors of a model that are quantised, by name, in the order of writing.

    `matrices` are those of the graph. `tables` are "per_layer_embedding" (Gemma 4), where each layer's part
    of a row counts as a row of its own, and "embedding", unless the output head is the same matrix.
    """

    architecture: Architecture
    matrices: Mapping[str, StoredMatrix]
    tables: Mapping[str, StoredMatrix]

    @cached_property
    def weights(self) -> Mapping[str, StoredMatrix]:
        """Matrices and tables."""
        return {**self.matrices, **self.tables}

    @cached_property
    def columns(self) -> Mapping[str, int]:
        """For each tensor, the number of columns that share a scale in a per-channel format."""
        return {tensor: stored.shape[1] for stored in self.weights.values() for tensor in stored.tensors}

    @cached_property
    def values(self) -> int:
        """The total number of values."""
        return sum(stored.values for stored in self.weights.values())


def weight_layout(arch: Architecture) -> WeightLayout:
    """Lay out the weights of a model."""
    shapes = tensor_shapes(arch)
    matrices = {}
    for name, tensors in _stacks(arch):
        rows = sum(shapes[tensor][0] for tensor in tensors)
        matrices[name] = StoredMatrix(tensors, (rows, shapes[tensors[0]][1]))
    tables = {}
    if arch.per_layer_width:
        shape = (arch.vocabulary * len(arch.layers), arch.per_layer_width)
        tables["per_layer_embedding"] = StoredMatrix(("per_layer_embedding",), shape)
    if not arch.tied_head:
        tables["embedding"] = StoredMatrix(("embedding",), (arch.vocabulary, arch.hidden))
    return WeightLayout(arch, matrices, tables)


def _stacks(arch: Architecture) -> Iterable[tuple[str, tuple[str, ...]]]:
    """The graph's matrices and the tensors that are stacked in each."""
    for i in range(len(arch.layers)):
        at = f"layers.{i}."
        kv = ("key", "value") if arch.owns_kv(i) else ()
        yield f"{at}qkv", tuple(at + name for name in ("query", *kv))
        yield f"{at}output", (f"{at}output",)
        yield f"{at}gate_up", (f"{at}gate", f"{at}up")
        yield f"{at}down", (f"{at}down",)
        if arch.per_layer_width:
            yield f"{at}per_layer_gate", (f"{at}per_layer_gate",)
            yield f"{at}per_layer_projection", (f"{at}per_layer_projection",)
    if arch.per_layer_width:
        yield "per_layer_model_projection", ("per_layer_model_projection",)
    yield "head", ("embedding" if arch.tied_head else "head",)
