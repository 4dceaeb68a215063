"""Recipes: which format each matrix of a decoder gets, and which stored codes a recipe carries over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from converters.checkpoints.base import ExactCodes
from converters.decoder_graph import stacked_matrices
from converters.quantization import Format
from edge.bundles.architecture import Architecture
from edge.errors import EdgeError

_BLOCKWISE = Format(4, 32)
_INT8, _INT4, _INT2 = Format(8), Format(4), Format(2)


@dataclass(frozen=True)
class Plan:
    """Formats of every matrix of `stacked_matrices` and of the tables whose rows are gathered.

    `per_layer` is the per-layer table's; without blocks, each layer's slice of a row has a scale of its own.
    `embedding` is the embedding's where the head is a matrix of its own (else its rows lie in the head).
    """

    matrices: Mapping[str, Format]
    per_layer: Format
    embedding: Format

    def of_tensors(self, arch: Architecture) -> dict[str, Format]:
        """The format of each tensor that is written as codes."""
        formats = {
            part: self.matrices[name] for name, parts in stacked_matrices(arch).items() for part in parts
        }
        if arch.per_layer_width:
            formats["per_layer_embedding"] = self.per_layer
        return formats if arch.tied_head else formats | {"embedding": self.embedding}


def _everywhere(body: Format, head: Format, per_layer: Format) -> Callable[[Architecture], Plan]:
    def plan(arch: Architecture) -> Plan:
        matrices = {name: head if name == "head" else body for name in stacked_matrices(arch)}
        return Plan(matrices, per_layer, head)

    return plan


def _mobile(arch: Architecture) -> Plan:
    """The bit widths of Google's mobile releases of Gemma 4 E2B and E4B.

    Where the layers that share KV are double-wide (E2B), their MLP is int2 and the per-layer table int4;
    where no layer is (E4B), the MLP is int4 throughout and the table int2.
    """
    if not arch.per_layer_width:
        raise EdgeError(f"--recipe mobile: is for Gemma 4, this is {arch.family}; choose int4 or int8")
    narrow = min(layer.feed_forward for layer in arch.layers)
    widths = {"qkv": _INT4, "output": _INT4, "per_layer_gate": _INT8, "per_layer_projection": _INT8}
    matrices = {}
    for name in stacked_matrices(arch):
        _, *inner = name.split(".")
        if not inner:
            matrices[name] = _INT2 if name == "head" else _INT8
        elif inner[1] in widths:
            matrices[name] = widths[inner[1]]
        else:
            wide = arch.layers[int(inner[0])].feed_forward > narrow
            matrices[name] = _INT2 if wide else _INT4
    double_wide = any(layer.feed_forward > narrow for layer in arch.layers)
    return Plan(matrices, _INT4 if double_wide else _INT2, _INT2)


AUTO = "auto"
"""The recipe whose formats a budget decides; without one, as large as it gets."""


@dataclass(frozen=True)
class _Recipe:
    plan: Callable[[Architecture], Plan]
    carries: frozenset[Format]


_RECIPES = {
    "int8": _Recipe(_everywhere(_INT8, _INT8, _INT8), frozenset({_INT8})),
    "int4": _Recipe(_everywhere(_BLOCKWISE, _INT8, _INT4), frozenset({_BLOCKWISE})),
    "int4-all": _Recipe(_everywhere(_BLOCKWISE, _BLOCKWISE, _INT4), frozenset({_BLOCKWISE})),
    "mobile": _Recipe(_mobile, frozenset({_INT8, _INT4, _INT2})),
    AUTO: _Recipe(_everywhere(_INT8, _INT8, _INT8), frozenset()),
    "float32": _Recipe(_everywhere(Format(32), Format(32), Format(32)), frozenset()),
}

RECIPES = ("int8", "int4", "int4-all", "mobile")
"""What a user may choose, beside "auto"; float32 is for tests of the graph itself."""


def plan_for(recipe: str, arch: Architecture) -> Plan:
    """The plan of a recipe for weights that are floats.

    Raises KeyError for an unknown recipe, EdgeError if it has none for the architecture.
    """
    return _RECIPES[recipe].plan(arch)


def stored_format(codes: ExactCodes, width: int) -> Format | None:
    """The format that holds stored codes as they are; without blocks, `width` columns share a scale."""
    if (codes.bits, codes.group, codes.scale_type) == (_BLOCKWISE.bits, _BLOCKWISE.block, "F16"):
        return _BLOCKWISE
    return Format(codes.bits) if codes.group == width else None


def choose_recipe(asked: str | None, stored: Collection[Format]) -> str:
    """The recipe asked for, or else the one that keeps what is stored as integers, or else int8.

    Raises EdgeError if the checkpoint is the packed mobile release and another recipe is asked for: it was
    trained for its codes, and quantising them a second time only loses.
    """
    packed = any(not format.block for format in stored)
    if asked is None:
        return "mobile" if packed else "int4" if stored else "int8"
    if packed and asked not in ("mobile", "float32"):
        raise EdgeError(
            f"--recipe {asked}: the checkpoint holds packed integers, which only --recipe mobile keeps;"
            " use it, or convert the bf16 checkpoint"
        )
    return asked


def plan_that_keeps(recipe: str, arch: Architecture, stored: Mapping[str, Format]) -> Plan:
    """The plan of a recipe, changed to the formats of `stored` tensors where the recipe carries such codes.

    A matrix that stacks tensors is changed if all of them are stored alike.
    """
    plan, carries = plan_for(recipe, arch), _RECIPES[recipe].carries

    def kept(parts: tuple[str, ...], planned: Format) -> Format:
        formats = {stored.get(part) for part in parts}
        only = formats.pop()
        return only if not formats and only in carries else planned

    stacked = stacked_matrices(arch)
    return Plan(
        {name: kept(stacked[name], format) for name, format in plan.matrices.items()},
        kept(("per_layer_embedding",), plan.per_layer),
        kept(("embedding",), plan.embedding),
    )
