"""Name and shape of every tensor of a decoder, for all checkpoint readers and graph builders."""

from __future__ import annotations

from edge.bundles.architecture import Architecture


def tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Our name and the shape, [out, in] for matrices, of every tensor that the decoder uses.

    Norm weights are the factor itself (Gemma 3's safetensors store it minus one).
    """
    hidden, width, count = arch.hidden, arch.per_layer_width, len(arch.layers)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (arch.vocabulary, hidden), "final_norm": (hidden,)}
    if not arch.tied_head:
        shapes["head"] = (arch.vocabulary, hidden)
    if width:
        shapes["per_layer_embedding"] = (arch.vocabulary, count * width)
        shapes["per_layer_model_projection"] = (count * width, hidden)
        shapes["per_layer_projection_norm"] = (width,)
    for index in range(count):
        for name, shape in layer_shapes(arch, index).items():
            shapes[f"layers.{index}.{name}"] = shape
    return shapes


def layer_shapes(arch: Architecture, index: int) -> dict[str, tuple[int, ...]]:
    """Name, without the `layers.N.` prefix, and shape of each tensor of one layer."""
    layer, hidden = arch.layers[index], arch.hidden
    queries, keys = arch.query_heads * layer.head_dim, arch.kv_heads * layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "query": (queries, hidden),
        "query_norm": (layer.head_dim,),
    }
    if arch.owns_kv(index):
        shapes |= {"key": (keys, hidden), "key_norm": (layer.head_dim,), "value": (keys, hidden)}
    shapes |= {
        "output": (hidden, queries),
        "post_attention_norm": (hidden,),
        "feed_forward_norm": (hidden,),
        "gate": (layer.feed_forward, hidden),
        "up": (layer.feed_forward, hidden),
        "down": (hidden, layer.feed_forward),
        "post_feed_forward_norm": (hidden,),
    }
    if arch.per_layer_width:
        shapes |= {
            "per_layer_gate": (arch.per_layer_width, hidden),
            "per_layer_projection": (hidden, arch.per_layer_width),
            "post_per_layer_norm": (hidden,),
        }
    if arch.layer_scalar:
        shapes["layer_scalar"] = (1,)
    return shapes
