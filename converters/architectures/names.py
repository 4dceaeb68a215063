"""Our tensor names and those of Hugging Face and GGUF files, the same for Gemma 3 and Gemma 4."""

from __future__ import annotations

# ours: (Hugging Face's behind "model." or "model.language_model.", GGUF's)
_TOP = {
    "embedding": ("embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
    "per_layer_embedding": ("embed_tokens_per_layer.weight", "per_layer_token_embd.weight"),
    "per_layer_model_projection": ("per_layer_model_projection.weight", "per_layer_model_proj.weight"),
    "per_layer_projection_norm": ("per_layer_projection_norm.weight", "per_layer_proj_norm.weight"),
}
# ours behind "layers.N.": (Hugging Face's behind "layers.N.", GGUF's behind "blk.N.")
_LAYER = {
    "attention_norm": ("input_layernorm.weight", "attn_norm.weight"),
    "query": ("self_attn.q_proj.weight", "attn_q.weight"),
    "query_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "key": ("self_attn.k_proj.weight", "attn_k.weight"),
    "key_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "value": ("self_attn.v_proj.weight", "attn_v.weight"),
    "output": ("self_attn.o_proj.weight", "attn_output.weight"),
    "post_attention_norm": ("post_attention_layernorm.weight", "post_attention_norm.weight"),
    "feed_forward_norm": ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    "gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down": ("mlp.down_proj.weight", "ffn_down.weight"),
    "post_feed_forward_norm": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
    "per_layer_gate": ("per_layer_input_gate.weight", "inp_gate.weight"),
    "per_layer_projection": ("per_layer_projection.weight", "proj.weight"),
    "post_per_layer_norm": ("post_per_layer_input_norm.weight", "post_norm.weight"),
    "layer_scalar": ("layer_scalar", "layer_output_scale.weight"),
}


def huggingface_name(name: str) -> str:
    """Hugging Face's name of our tensor `name`, without the prefix that depends on the type of repository."""
    if name in _TOP:
        return _TOP[name][0]
    _, index, rest = name.split(".", 2)
    return f"layers.{index}.{_LAYER[rest][0]}"


def gguf_name(name: str) -> str:
    """GGUF's name of our tensor `name`."""
    if name in _TOP:
        return _TOP[name][1]
    _, index, rest = name.split(".", 2)
    return f"blk.{index}.{_LAYER[rest][1]}"
