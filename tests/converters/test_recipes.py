"""Recipes: the bit width of each matrix, and which stored codes a recipe keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.checkpoints.base import CodeRows, ExactCodes
from converters.checkpoints.opening import open_checkpoint
from converters.quantization import Format
from converters.recipes import RECIPES, choose_recipe, plan_for, plan_that_keeps, stored_format
from converters.weight_layout import WeightLayout, weight_layout
from edge.bundles.architecture import Architecture, Layer
from edge.errors import EdgeError
from tests.support.checkpoint_files import FIXTURES, GEMMA3, GEMMA4

INT8, INT4, INT2, BLOCKWISE = Format(8), Format(4), Format(2), Format(4, 32)


def e2b() -> Architecture:
    """The published dimensions of Gemma 4 E2B: 35 layers, 15 of them with KV, the others double-wide."""
    kinds = [("full" if i % 5 == 4 else "sliding") for i in range(35)]
    owner = {"sliding": 13, "full": 14}
    layers = tuple(
        Layer(
            "full" if kind == "full" else "sliding",
            512 if kind == "full" else 256,
            6144 if i < 15 else 12288,
            i if i < 15 else owner[kind],
        )
        for i, kind in enumerate(kinds)
    )
    arch = open_checkpoint(FIXTURES / GEMMA4).architecture
    assert arch.kv_heads == 1
    return replace(arch, vocabulary=262144, hidden=1536, query_heads=8, per_layer_width=256, layers=layers)


def layout() -> WeightLayout:
    return weight_layout(e2b())


class Codes(ExactCodes):
    """Stored codes; only their format matters."""

    def __init__(self, bits: int, group: int, scale_type: str) -> None:
        self.bits, self.group = bits, group
        self.scale_type = "F16" if scale_type == "F16" else "F32"

    def rows(self, start: int, stop: int) -> CodeRows:
        raise AssertionError("a plan needs no values")


def test_the_mobile_recipe_has_the_published_bit_widths_of_e2b() -> None:
    formats = plan_for("mobile", layout()).formats
    for i in range(35):
        at = f"layers.{i}."
        assert formats[f"{at}qkv"] == formats[f"{at}output"] == INT4
        assert formats[f"{at}gate_up"] == formats[f"{at}down"] == (INT4 if i < 15 else INT2)
        assert formats[f"{at}per_layer_gate"] == formats[f"{at}per_layer_projection"] == INT8
    assert formats["per_layer_model_projection"] == INT8
    assert formats["head"] == INT2
    assert formats["per_layer_embedding"] == INT4


def test_without_double_wide_layers_the_mobile_recipe_matches_e4b() -> None:
    arch = e2b()
    even = replace(arch, layers=tuple(replace(layer, feed_forward=10240) for layer in arch.layers))
    formats = plan_for("mobile", weight_layout(even)).formats
    assert {formats[f"layers.{i}.down"] for i in range(35)} == {INT4}
    assert formats["per_layer_embedding"] == INT2


def test_a_decode_step_of_mobile_e2b_reads_the_published_number_of_bytes() -> None:
    plan = plan_for("mobile", layout())
    matrices = plan.layout.matrices.items()
    total = sum(plan.formats[name].code_bytes(*matrix.shape) for name, matrix in matrices)
    assert round(total / 1e6) == 777


def test_the_mobile_recipe_is_refused_for_gemma_3() -> None:
    with pytest.raises(EdgeError, match="--recipe mobile: is for Gemma 4, this is gemma3; choose int4 or"):
        plan_for("mobile", weight_layout(open_checkpoint(FIXTURES / GEMMA3).architecture))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tied_head", [True, False])
def test_every_matrix_and_table_has_a_format(recipe: str, tied_head: bool) -> None:
    weights = weight_layout(replace(e2b(), tied_head=tied_head))
    formats = plan_for(recipe, weights).formats
    assert list(formats) == [*weights.matrices, *weights.tables]
    assert ("embedding" in formats) is not tied_head
    assert formats.get("embedding", formats["head"]) == formats["head"]


@pytest.mark.parametrize(
    ("codes", "width", "format"),
    [
        (Codes(4, 32, "F16"), 1536, BLOCKWISE),
        (Codes(4, 32, "F32"), 1536, None),
        (Codes(4, 1536, "F32"), 1536, INT4),
        (Codes(2, 1536, "F32"), 1536, INT2),
        (Codes(8, 256, "F32"), 256, INT8),
        (Codes(8, 32, "F16"), 1536, None),
    ],
)
def test_stored_codes_have_a_format_if_a_bundle_can_hold_them(
    codes: Codes, width: int, format: Format | None
) -> None:
    assert stored_format(codes, width) == format


@pytest.mark.parametrize(
    ("stored", "recipe"),
    [(set(), "int8"), ({BLOCKWISE}, "int4"), ({INT2, INT4, INT8}, "mobile"), ({INT4, BLOCKWISE}, "mobile")],
)
def test_the_default_recipe_keeps_the_stored_integers(stored: set[Format], recipe: str) -> None:
    assert choose_recipe(None, stored) == recipe


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_the_mobile_release_is_not_quantised_a_second_time(recipe: str) -> None:
    with pytest.raises(EdgeError, match=f"--recipe {recipe}: the checkpoint holds quantised integers"):
        choose_recipe(recipe, {INT4, INT2})


@given(recipe=st.sampled_from(RECIPES))
def test_a_requested_recipe_is_used_for_every_other_checkpoint(recipe: str) -> None:
    assert choose_recipe(recipe, set()) == recipe
    assert choose_recipe(recipe, {BLOCKWISE}) == recipe


def test_int4_keeps_the_grid_of_q4_0_in_the_head_and_the_tables_too() -> None:
    stored = dict.fromkeys(("embedding", "per_layer_embedding", "layers.0.output"), BLOCKWISE)
    formats = plan_that_keeps("int4", layout(), stored).formats
    assert formats["head"] == formats["per_layer_embedding"] == BLOCKWISE
    assert plan_that_keeps("int8", layout(), stored) == plan_for("int8", layout())


def test_a_stacked_matrix_changes_only_if_all_its_tensors_are_stored_alike() -> None:
    some = plan_that_keeps("mobile", layout(), {"layers.0.query": INT2, "layers.0.key": INT2})
    assert some.formats["layers.0.qkv"] == INT4
    both = {"layers.0.gate": INT2, "layers.0.up": INT2}
    assert plan_that_keeps("mobile", layout(), both).formats["layers.0.gate_up"] == INT2
