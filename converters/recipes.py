"""Recipes: which format each matrix of a decoder gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters.decoder_graph import stacked_matrices
from converters.quantization import Format
from edge.architecture import Architecture

_BLOCKWISE = Format(4, 32)
_INT8 = Format(8)


@dataclass(frozen=True)
class Plan:
    """A format for every matrix of `stacked_matrices`, and for the rows of the per-layer table."""

    matrices: Mapping[str, Format]
    per_layer: Format


def _everywhere(body: Format, head: Format, per_layer: Format) -> Callable[[Architecture], Plan]:
    def plan(arch: Architecture) -> Plan:
        return Plan({name: head if name == "head" else body for name in stacked_matrices(arch)}, per_layer)

    return plan


_RECIPES: dict[str, Callable[[Architecture], Plan]] = {
    "int8": _everywhere(_INT8, _INT8, _INT8),
    "int4": _everywhere(_BLOCKWISE, _INT8, Format(4)),
    "float32": _everywhere(Format(32), Format(32), Format(32)),
}

RECIPES = ("int8", "int4")
"""What a user may choose; float32 is for tests of the graph itself."""


def plan_for(recipe: str, arch: Architecture) -> Plan:
    """The plan of a recipe. Raises KeyError for an unknown one."""
    return _RECIPES[recipe](arch)
