"""Recipes: which format each matrix of a decoder gets, and which stored codes a recipe keeps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from converters.checkpoints.base import Checkpoint, ExactCodes
from converters.quantization import Format
from converters.weight_layout import WeightLayout
from edge.errors import EdgeError

_BLOCKWISE = Format(4, 32)
_INT8, _INT4, _INT2 = Format(8), Format(4), Format(2)


@dataclass(frozen=True)
class Plan:
    """The format of each matrix and table of a layout, by its name."""

    layout: WeightLayout
    formats: Mapping[str, Format]

    def of_tensors(self) -> dict[str, Format]:
        """The format of each tensor that is stored as codes."""
        return {
            tensor: self.formats[name]
            for name, stored in self.layout.weights.items()
            for tensor in stored.tensors
        }


def _everywhere(body: Format, head: Format, per_layer: Format) -> Callable[[WeightLayout], dict[str, Format]]:
    special = {"head": head, "embedding": head, "per_layer_embedding": per_layer}

    def formats(layout: WeightLayout) -> dict[str, Format]:
        return {name: special.get(name, body) for name in layout.weights}

    return formats


def _mobile(layout: WeightLayout) -> dict[str, Format]:
    """The bit widths of Google's mobile releases of Gemma 4 E2B and E4B.

    Where the layers that share KV are double-wide (E2B), their MLP is int2 and the per-layer table int4;
    where no layer is (E4B), the MLP is int4 throughout and the table int2.
    """
    arch = layout.architecture
    if not arch.per_layer_width:
        raise EdgeError(f"--recipe mobile: is for Gemma 4, this is {arch.family}; choose int4 or int8")
    narrow = min(layer.feed_forward for layer in arch.layers)
    double_wide = any(layer.feed_forward > narrow for layer in arch.layers)
    by_group = {"qkv": _INT4, "output": _INT4, "per_layer_gate": _INT8, "per_layer_projection": _INT8}
    formats = {"per_layer_embedding": _INT4 if double_wide else _INT2, "embedding": _INT2, "head": _INT2}
    for name in layout.matrices:
        _, *inner = name.split(".")
        if not inner:
            formats.setdefault(name, _INT8)
        elif inner[1] in by_group:
            formats[name] = by_group[inner[1]]
        else:
            wide = arch.layers[int(inner[0])].feed_forward > narrow
            formats[name] = _INT2 if wide else _INT4
    return {name: formats[name] for name in layout.weights}


AUTO = "auto"
"""The recipe whose formats are chosen to fit a budget; until then, all are int8."""


@dataclass(frozen=True)
class _Recipe:
    """The formats of float weights, and the formats of stored codes that are kept as they are."""

    formats: Callable[[WeightLayout], dict[str, Format]]
    keeps: frozenset[Format]


_RECIPES = {
    "int8": _Recipe(_everywhere(_INT8, _INT8, _INT8), frozenset({_INT8})),
    "int4": _Recipe(_everywhere(_BLOCKWISE, _INT8, _INT4), frozenset({_BLOCKWISE})),
    "int4-all": _Recipe(_everywhere(_BLOCKWISE, _BLOCKWISE, _INT4), frozenset({_BLOCKWISE})),
    "mobile": _Recipe(_mobile, frozenset({_INT8, _INT4, _INT2})),
    AUTO: _Recipe(_everywhere(_INT8, _INT8, _INT8), frozenset()),
    "float32": _Recipe(_everywhere(Format(32), Format(32), Format(32)), frozenset()),
}

RECIPES = ("int8", "int4", "int4-all", "mobile")
"""The recipes of `--recipe`, next to "auto"; float32 is for tests of the graph itself."""


def plan_for(recipe: str, layout: WeightLayout) -> Plan:
    """The plan of a recipe for a checkpoint of floats.

    Raises KeyError for an unknown recipe, EdgeError if it does not support the architecture.
    """
    return Plan(layout, _RECIPES[recipe].formats(layout))


@dataclass(frozen=True)
class StoredCodes:
    """The integers that a checkpoint stores for a tensor, and the format that holds them unchanged."""

    codes: ExactCodes
    format: Format


def stored_codes(checkpoint: Checkpoint, layout: WeightLayout) -> dict[str, StoredCodes]:
    """The tensors whose stored integer codes a bundle can keep unchanged."""
    found = {}
    for name, columns in layout.columns.items():
        codes = checkpoint.tensors[name].codes()
        format = None if codes is None else stored_format(codes, columns)
        if codes is not None and format is not None:
            found[name] = StoredCodes(codes, format)
    return found


def stored_format(codes: ExactCodes, columns: int) -> Format | None:
    """The format that holds stored codes unchanged; in a per-channel one, `columns` share a scale."""
    if (codes.bits, codes.group, codes.scale_type) == (_BLOCKWISE.bits, _BLOCKWISE.block, "F16"):
        return _BLOCKWISE
    return Format(codes.bits) if codes.group == columns else None


def choose_recipe(requested: str | None, stored: Collection[Format]) -> str:
    """The requested recipe; None: the one that keeps the stored integers, or int8 if there are none.

    Raises EdgeError if the checkpoint is the quantised mobile release and another recipe is requested: it was
    trained for its codes, and quantising them a second time loses quality.
    """
    mobile = any(not format.block for format in stored)
    if requested is None:
        return "mobile" if mobile else "int4" if stored else "int8"
    if mobile and requested not in ("mobile", "float32"):
        raise EdgeError(
            f"--recipe {requested}: the checkpoint holds quantised integers, which only --recipe mobile"
            " keeps; use it, or convert the bf16 checkpoint"
        )
    return requested


def plan_that_keeps(recipe: str, layout: WeightLayout, stored: Mapping[str, Format]) -> Plan:
    """The plan of a recipe, with the formats of `stored` tensors where the recipe keeps such codes.

    A stack of tensors gets their format if all of them are stored in the same one.
    """
    keeps = _RECIPES[recipe].keeps

    def kept(tensors: tuple[str, ...], planned: Format) -> Format:
        formats = {stored.get(tensor) for tensor in tensors}
        only = formats.pop()
        return only if not formats and only in keeps else planned

    planned = plan_for(recipe, layout).formats
    return Plan(layout, {name: kept(layout.weights[name].tensors, planned[name]) for name in layout.weights})
