"""The decoder: LiteRT, the KV cache and its snapshots; token ids in, hidden states or logits out."""
