"""Gemma 3 (270M, 1B): its config.json or GGUF metadata to an `Architecture`.

Larger Gemma 3 models scale their RoPE, and are refused for that.
"""

from __future__ import annotations

from converters.architectures.fields import Fields
from edge.bundles.architecture import Architecture, Attention, Layer, Rope

FAMILY = "gemma3"
STOP_IDS = (1, 106)  # <eos>, <end_of_turn>
CHAT_MARKER = "<start_of_turn>"
HUGGINGFACE_NORM_ADDED = 1.0  # safetensors store w where the norm multiplies by 1 + w; GGUF stores 1 + w

_PERIOD = 6
_BASE_SLIDING, _BASE_FULL = 1e4, 1e6
MAX_LAYERS = 512


def from_config(config: Fields) -> Architecture:
    """The architecture that a config.json (its text part) describes; CheckpointError if not supported."""
    config.expect("hidden_activation", "gelu_pytorch_tanh")
    config.expect("attention_bias", False)
    config.expect("attn_logit_softcapping")
    config.expect("use_bidirectional_attention", False)
    config.expect("rope_scaling")
    rope = config.section("rope_parameters")
    full, sliding = rope.section("full_attention"), rope.section("sliding_attention")
    full.expect("rope_type", "default")
    sliding.expect("rope_type", "default")
    count = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    scalar = config.number("query_pre_attn_scalar", 256.0)
    config.expect("tie_word_embeddings", True, False)
    return _architecture(
        config,
        _config_attentions(config, count),
        vocabulary=config.integer("vocab_size"),
        hidden=config.integer("hidden_size"),
        query_heads=config.integer("num_attention_heads"),
        kv_heads=config.integer("num_key_value_heads"),
        head_dim=config.integer("head_dim", 256),
        feed_forward=config.integer("intermediate_size"),
        sliding_window=config.integer("sliding_window"),
        base_sliding=sliding.number("rope_theta", config.number("rope_local_base_freq", _BASE_SLIDING)),
        base_full=full.number("rope_theta", config.number("rope_theta", _BASE_FULL)),
        attention_scale=scalar**-0.5,
        rms_epsilon=config.number("rms_norm_eps", 1e-6),
        max_positions=config.integer("max_position_embeddings"),
        logit_softcap=config.optional_number("final_logit_softcapping"),
        tied_head=config.get("tie_word_embeddings") is not False,
    )


def from_metadata(metadata: Fields, vocabulary: int, tied_head: bool) -> Architecture:
    """The architecture that GGUF metadata (keys behind "gemma3.") describe; raises CheckpointError."""
    metadata.expect("rope.scaling.type", "none")
    metadata.expect("attn_logit_softcapping")
    count = metadata.integer("block_count", maximum=MAX_LAYERS)
    head_dim = metadata.integer("attention.key_length", 256)
    metadata.expect("attention.value_length", head_dim)
    return _architecture(
        metadata,
        gguf_attentions(metadata, count),
        vocabulary=vocabulary,
        hidden=metadata.integer("embedding_length"),
        query_heads=metadata.integer("attention.head_count"),
        kv_heads=metadata.integer("attention.head_count_kv"),
        head_dim=head_dim,
        feed_forward=metadata.integer("feed_forward_length"),
        sliding_window=metadata.integer("attention.sliding_window"),
        base_sliding=round_float32(metadata.number("rope.freq_base_swa", _BASE_SLIDING)),
        base_full=round_float32(metadata.number("rope.freq_base", _BASE_FULL)),
        attention_scale=head_dim**-0.5,
        rms_epsilon=round_float32(metadata.number("attention.layer_norm_rms_epsilon", 1e-6)),
        max_positions=metadata.integer("context_length"),
        logit_softcap=metadata.optional_number("final_logit_softcapping"),
        tied_head=tied_head,
    )


def _architecture(
    fields: Fields,
    attentions: list[Attention],
    *,
    vocabulary: int,
    hidden: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    feed_forward: int,
    sliding_window: int,
    base_sliding: float,
    base_full: float,
    attention_scale: float,
    rms_epsilon: float,
    max_positions: int,
    logit_softcap: float | None,
    tied_head: bool,
) -> Architecture:
    require_heads(fields, query_heads, kv_heads, head_dim)
    return Architecture(
        family=FAMILY,
        vocabulary=vocabulary,
        hidden=hidden,
        query_heads=query_heads,
        kv_heads=kv_heads,
        sliding_window=sliding_window,
        rope_sliding=Rope(base_sliding),
        rope_full=Rope(base_full),
        attention_scale=attention_scale,
        rms_epsilon=rms_epsilon,
        max_positions=max_positions,
        layers=tuple(Layer(kind, head_dim, feed_forward, index) for index, kind in enumerate(attentions)),
        logit_softcap=logit_softcap,
        tied_head=tied_head,
    )


def _config_attentions(config: Fields, count: int) -> list[Attention]:
    if config.get("layer_types") is not None:
        return config_layer_types(config, count)
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        if config.get(key) is not None:
            return periodic(count, config.integer(key))
    return periodic(count, _PERIOD)


def periodic(count: int, period: int) -> list[Attention]:
    """`count` layers; the last of each `period` has full attention."""
    return ["full" if (index + 1) % period == 0 else "sliding" for index in range(count)]


def config_layer_types(config: Fields, count: int) -> list[Attention]:
    """The attention types that a config lists, one for each of `count` layers."""
    types = config.get("layer_types")
    names: dict[str, Attention] = {"sliding_attention": "sliding", "full_attention": "full"}
    if not isinstance(types, list) or len(types) != count:
        raise config.wrong("layer_types", f"must list {count} layers")
    for kind in types:
        if kind not in names:
            raise config.wrong("layer_types", f"has {kind!r:.60}, which is not supported")
    return [names[kind] for kind in types]


def gguf_attentions(metadata: Fields, count: int) -> list[Attention]:
    """The attention types of `count` layers: an array (true = sliding), a period, or the default period."""
    key = "attention.sliding_window_pattern"
    pattern = metadata.get(key)
    if pattern is None or isinstance(pattern, int):
        return periodic(count, metadata.integer(key, _PERIOD))
    if len(pattern) != count:
        raise metadata.wrong(key, f"has {len(pattern)} entries for {count} layers")
    return ["sliding" if flag else "full" for flag in pattern]


def require_heads(fields: Fields, query_heads: int, kv_heads: int, *head_dims: int) -> None:
    """Refuse head counts that don't divide, and odd head widths (RoPE turns pairs)."""
    if query_heads % kv_heads or any(head_dim % 2 for head_dim in head_dims):
        raise fields.wrong(
            "attention heads",
            f"do not fit: {query_heads} query heads, {kv_heads} KV heads, width {head_dims}",
        )


def round_float32(value: float) -> float:
    """The shortest decimal that reads as the same float32: GGUF's 9.99999997e-07 is 1e-6."""
    return float(f"{value:.7g}")
