"""The released configurations give the published architectures: layers, KV owners, weight counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from converters.architectures import gemma3, gemma4
from converters.architectures.fields import Fields
from converters.architectures.names import gguf_name, huggingface_name
from converters.architectures.tensor_shapes import tensor_shapes
from edge.bundles.architecture import Architecture, Rope
from edge.errors import CheckpointError

SLIDING, FULL = "sliding_attention", "full_attention"

GEMMA3 = {
    "vocab_size": 262144,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "_sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32768,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA3_270M = GEMMA3 | {"hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048}
GEMMA3_1B = GEMMA3 | {"hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912}
GEMMA4 = {
    "vocab_size": 262144,
    "num_attention_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "hidden_size_per_layer_input": 256,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 131072,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "rope_parameters": {
        FULL: {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    },
}
GEMMA4_E2B = GEMMA4 | {
    "hidden_size": 1536,
    "num_hidden_layers": 35,
    "intermediate_size": 6144,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
}
GEMMA4_E4B = GEMMA4 | {
    "hidden_size": 2560,
    "num_hidden_layers": 42,
    "intermediate_size": 10240,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 18,
    "use_double_wide_mlp": False,
}


def from_config(config: dict[str, Any]) -> Architecture:
    module: Any = gemma4 if "hidden_size_per_layer_input" in config else gemma3
    architecture: Architecture = module.from_config(Fields("config.json", config))
    return architecture


def weights(architecture: Architecture) -> int:
    return sum(math.prod(shape) for shape in tensor_shapes(architecture).values())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (GEMMA3_270M, 268_098_176),
        (GEMMA3_1B, 999_885_952),
        (GEMMA4_E2B, 4_628_569_379),
        (GEMMA4_E4B, 7_463_013_418),
    ],
)
def test_the_number_of_weights_equals_the_published_one(config: dict[str, Any], count: int) -> None:
    assert weights(from_config(config)) == count


def test_e2b_shares_keys_and_values_of_layers_13_and_14() -> None:
    arch = from_config(GEMMA4_E2B)
    assert [i for i, layer in enumerate(arch.layers) if layer.attention == "full"] == [
        4,
        9,
        14,
        19,
        24,
        29,
        34,
    ]
    assert arch.owners == tuple(range(15))
    assert {layer.kv_owner for layer in arch.layers[15:] if layer.attention == "sliding"} == {13}
    assert {layer.kv_owner for layer in arch.layers[15:] if layer.attention == "full"} == {14}
    assert [layer.feed_forward for layer in arch.layers] == [6144] * 15 + [12288] * 20
    assert (arch.head_dim("sliding"), arch.head_dim("full")) == (256, 512)


def test_e4b_shares_keys_and_values_of_layers_22_and_23() -> None:
    arch = from_config(GEMMA4_E4B)
    assert arch.owners == tuple(range(24))
    assert {layer.kv_owner for layer in arch.layers[24:]} == {22, 23}
    assert all(arch.layers[layer.kv_owner].attention == layer.attention for layer in arch.layers)
    assert {layer.feed_forward for layer in arch.layers} == {10240}


def test_the_differences_between_the_families() -> None:
    old, new = from_config(GEMMA3_1B), from_config(GEMMA4_E2B)
    assert (old.attention_scale, new.attention_scale) == (1 / 16, 1.0)
    assert (old.value_norm, new.value_norm) == (False, True)
    assert (old.layer_scalar, new.layer_scalar) == (False, True)
    assert (old.logit_softcap, new.logit_softcap) == (None, 30.0)
    assert (old.rope_full, new.rope_full) == (Rope(1e6), Rope(1e6, 0.25))
    assert old.rope_sliding == new.rope_sliding == Rope(1e4)
    assert old.layers[-1].attention == "sliding"
    assert new.layers[-1].attention == "full"


def test_e2bs_gguf_metadata_and_its_config_mean_the_same() -> None:
    keys = {
        "context_length": 131072,
        "embedding_length": 1536,
        "block_count": 35,
        "attention.head_count": 8,
        "attention.head_count_kv": np.ones(35, np.int32),
        "feed_forward_length": np.array([6144] * 15 + [12288] * 20, np.int32),
        "attention.key_length": 512,
        "attention.value_length": 512,
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "rope.dimension_count": 512,
        "rope.dimension_count_swa": 256,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "attention.sliding_window": 512,
        "attention.sliding_window_pattern": np.array(([True] * 4 + [False]) * 7),
        "attention.shared_kv_layers": 20,
        "embedding_length_per_layer_input": 256,
        "final_logit_softcapping": 30.0,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    }
    fields = Fields("model.gguf", {f"gemma4.{key}": value for key, value in keys.items()}, "gemma4.")
    read = gemma4.from_metadata(fields, vocabulary=262144, tied_head=True, rotated_share=0.25)
    assert read == from_config(GEMMA4_E2B)


@pytest.mark.parametrize(
    ("config", "edit", "named"),
    [
        # Gemma 3 4B and larger; Gemma 4 12B and 31B; 26B: what they have and these have not.
        (GEMMA3_1B, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling"),
        (GEMMA4_E2B, {"attention_k_eq_v": True, "num_global_key_value_heads": 4}, "attention_k_eq_v"),
        (GEMMA4_E2B, {"enable_moe_block": True, "num_experts": 128}, "enable_moe_block"),
        (GEMMA4_E2B, {"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input"),
        (GEMMA4_E2B, {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        (GEMMA4_E2B, {"rope_parameters": {FULL: {"rope_type": "yarn"}}}, "rope_type = 'yarn'"),
        (GEMMA4_E2B, {"rope_parameters": {FULL: {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor"),
        (GEMMA4_E2B, {"rope_parameters": []}, "rope_parameters must be a mapping"),
        (GEMMA4_E2B, {"num_key_value_heads": True}, "num_key_value_heads must be a whole number"),
        (GEMMA4_E2B, {"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number"),
        (GEMMA4_E2B, {"intermediate_size": [6144] * 34}, "intermediate_size has 34 entries for 35 layers"),
        (GEMMA4_E2B, {"num_attention_heads": 7, "num_key_value_heads": 2}, "7 query heads, 2 KV heads"),
    ],
)
def test_unsupported_model_types_are_refused_by_key(
    config: dict[str, Any], edit: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        from_config(config | edit)
    assert named in str(caught.value)


def test_every_tensor_has_a_unique_name_in_both_formats() -> None:
    shapes = tensor_shapes(from_config(GEMMA4_E2B | {"tie_word_embeddings": False}))
    assert len({huggingface_name(name) for name in shapes}) == len(shapes)
    assert len({gguf_name(name) for name in shapes}) == len(shapes)
    assert huggingface_name("layers.7.query") == "layers.7.self_attn.q_proj.weight"
    assert gguf_name("layers.7.layer_scalar") == "blk.7.layer_output_scale.weight"
