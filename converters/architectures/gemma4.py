"""Gemma 4 (E2B, E4B): its config.json or GGUF metadata to an `Architecture`.

The larger ones share K and V projections, have experts, or lack per-layer embeddings; they are refused.
"""

from __future__ import annotations

from converters.architectures.fields import Fields
from converters.architectures.gemma3 import (
    MAX_LAYERS,
    config_layer_types,
    gguf_attentions,
    periodic,
    require_heads,
    round_float32,
)
from edge.bundles.architecture import Architecture, Attention, Layer, Rope

FAMILY = "gemma4"
STOP_IDS = (1, 106, 50)  # <eos>, <turn|>, <|tool_response> (it ends a tool call)
CHAT_MARKER = "<|turn>"
HUGGINGFACE_NORM_ADDED = 0.0

_PERIOD = 6
_BASE_SLIDING, _BASE_FULL, _ROTATED_SHARE = 1e4, 1e6, 0.25


def from_config(config: Fields) -> Architecture:
    """The architecture that a config.json (its text part) describes; raises CheckpointError."""
    _refuse_bigger(config, ("attention_k_eq_v", "enable_moe_block"), "hidden_size_per_layer_input")
    config.expect("attention_bias", False)
    config.expect("use_bidirectional_attention", False, "vision")
    config.expect("hidden_activation", "gelu_pytorch_tanh")
    config.expect("tie_word_embeddings", True, False)
    config.expect("use_double_wide_mlp", True, False)
    query_heads, kv_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
    config.expect("num_global_key_value_heads", kv_heads)
    count = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    attentions = _config_attentions(config, count)
    shared = config.integer("num_kv_shared_layers", 0, minimum=0, maximum=count - 1)
    widths = config.integers("intermediate_size", count)
    if config.get("use_double_wide_mlp"):
        widths = [width * 2 if index >= count - shared else width for index, width in enumerate(widths)]
    sliding_dim = config.integer("head_dim", 256)
    head_dims = {"sliding": sliding_dim, "full": _full_head_dim(config, attentions, sliding_dim)}
    require_heads(config, query_heads, kv_heads, *head_dims.values())
    rope_sliding, rope_full = _config_rope(config)
    return Architecture(
        family=FAMILY,
        vocabulary=config.integer("vocab_size"),
        hidden=config.integer("hidden_size"),
        query_heads=query_heads,
        kv_heads=kv_heads,
        sliding_window=config.integer("sliding_window"),
        rope_sliding=rope_sliding,
        rope_full=rope_full,
        attention_scale=1.0,
        rms_epsilon=config.number("rms_norm_eps", 1e-6),
        max_positions=config.integer("max_position_embeddings"),
        layers=_layers(config, attentions, head_dims, widths, shared),
        value_norm=True,
        layer_scalar=True,
        per_layer_width=config.integer("hidden_size_per_layer_input"),
        logit_softcap=config.optional_number("final_logit_softcapping"),
        tied_head=config.get("tie_word_embeddings") is not False,
    )


def from_metadata(metadata: Fields, vocabulary: int, tied_head: bool, rotated_share: float) -> Architecture:
    """The architecture that GGUF metadata (keys behind "gemma4.") describe; raises CheckpointError.

    `rotated_share` comes from the file's `rope_freqs.weight`.
    """
    _refuse_bigger(metadata, ("expert_count",), "embedding_length_per_layer_input")
    metadata.expect("rope.scaling.type", "none")
    count = metadata.integer("block_count", maximum=MAX_LAYERS)
    kv_heads = metadata.integers("attention.head_count_kv", count)
    if len(set(kv_heads)) != 1:
        raise metadata.wrong("attention.head_count_kv", "differs between layers, which is not supported")
    head_dims = _metadata_head_dims(metadata)
    query_heads = metadata.integer("attention.head_count")
    require_heads(metadata, query_heads, kv_heads[0], *head_dims.values())
    shared = metadata.integer("attention.shared_kv_layers", 0, minimum=0, maximum=count - 1)
    widths = metadata.integers("feed_forward_length", count)
    return Architecture(
        family=FAMILY,
        vocabulary=vocabulary,
        hidden=metadata.integer("embedding_length"),
        query_heads=query_heads,
        kv_heads=kv_heads[0],
        sliding_window=metadata.integer("attention.sliding_window"),
        rope_sliding=Rope(round_float32(metadata.number("rope.freq_base_swa", _BASE_SLIDING))),
        rope_full=Rope(round_float32(metadata.number("rope.freq_base", _BASE_FULL)), rotated_share),
        attention_scale=1.0,
        rms_epsilon=round_float32(metadata.number("attention.layer_norm_rms_epsilon", 1e-6)),
        max_positions=metadata.integer("context_length"),
        layers=_layers(metadata, gguf_attentions(metadata, count), head_dims, widths, shared),
        value_norm=True,
        layer_scalar=True,
        per_layer_width=metadata.integer("embedding_length_per_layer_input"),
        logit_softcap=metadata.optional_number("final_logit_softcapping"),
        tied_head=tied_head,
    )


def _refuse_bigger(fields: Fields, features: tuple[str, ...], per_layer: str) -> None:
    """Refuse a model with one of `features`, or without per-layer embeddings: 12B, 26B and 31B."""
    which = "belongs to the larger Gemma 4 models (12B, 26B, 31B); only E2B and E4B are supported"
    for key in features:
        if fields.get(key):
            raise fields.wrong(key, f"= {fields.get(key)!r:.60} {which}")
    if fields.get(per_layer) in (None, 0):
        raise fields.wrong(per_layer, f"= {fields.get(per_layer)} {which}")


def _metadata_head_dims(metadata: Fields) -> dict[str, int]:
    """Head widths by attention type; keys, values and RoPE must agree on them."""
    head_dims = {}
    for kind, suffix in (("sliding", "_swa"), ("full", "")):
        head_dims[kind] = metadata.integer(f"attention.key_length{suffix}")
        metadata.expect(f"attention.value_length{suffix}", head_dims[kind])
        metadata.expect(f"rope.dimension_count{suffix}", head_dims[kind])
    return head_dims


def _layers(
    fields: Fields, attentions: list[Attention], head_dims: dict[str, int], widths: list[int], shared: int
) -> tuple[Layer, ...]:
    """The layers; the last `shared` read K and V of the last layer before them of their own type."""
    first_shared = len(attentions) - shared
    owners: dict[Attention, int] = {kind: index for index, kind in enumerate(attentions[:first_shared])}
    layers = []
    for index, (kind, width) in enumerate(zip(attentions, widths, strict=True)):
        owner = index if index < first_shared else owners.get(kind)
        if owner is None:
            raise fields.wrong(
                "layers", f"sharing K and V: no {kind} layer before layer {first_shared} owns any"
            )
        layers.append(Layer(kind, head_dims[kind], width, owner))
    return tuple(layers)


def _config_attentions(config: Fields, count: int) -> list[Attention]:
    """The layer types; the last layer always has full attention, as in transformers."""
    listed = config.get("layer_types") is not None
    attentions = config_layer_types(config, count) if listed else periodic(count, _PERIOD)
    return [*attentions[:-1], "full"]


def _full_head_dim(config: Fields, attentions: list[Attention], sliding_dim: int) -> int:
    """Head width of the full layers: `global_head_dim`, or what `per_layer_config` gives for each of them."""
    overrides = config.section("per_layer_config")
    if config.get("per_layer_config") is None:
        return config.integer("global_head_dim", 512)
    dims: dict[Attention, set[int]] = {"sliding": set(), "full": set()}
    by_index = {int(key): overrides.section(key) for key in overrides.names() if key.isdigit()}
    for index, kind in enumerate(attentions):
        layer = by_index.get(index)
        dims[kind].add(layer.integer("head_dim", sliding_dim) if layer else sliding_dim)
        for key in layer.names() if layer else ():
            if key != "head_dim":
                raise config.wrong(
                    "per_layer_config", f"sets {key} for layer {index}, which is not supported"
                )
    if dims["sliding"] - {sliding_dim} or len(dims["full"]) != 1:
        raise config.wrong(
            "per_layer_config", "gives layers of one type different head_dim, which is not supported"
        )
    return dims["full"].pop()


def _config_rope(config: Fields) -> tuple[Rope, Rope]:
    """Rotary parameters of sliding and of full layers."""
    if config.get("rope_parameters") is None:
        return Rope(_BASE_SLIDING), Rope(_BASE_FULL, _ROTATED_SHARE)
    parameters = config.section("rope_parameters")
    full, sliding = parameters.section("full_attention"), parameters.section("sliding_attention")
    sliding.expect("rope_type", "default")
    sliding.expect("partial_rotary_factor", 1.0)
    full.expect("rope_type", "proportional", "default")
    full.expect("factor", 1.0)
    share = full.number("partial_rotary_factor", 1.0)
    if share > 1 or (share < 1 and full.get("rope_type") != "proportional"):
        raise full.wrong("partial_rotary_factor", f"= {share} is not supported")
    return Rope(sliding.number("rope_theta", _BASE_SLIDING)), Rope(
        full.number("rope_theta", _BASE_FULL), share
    )
