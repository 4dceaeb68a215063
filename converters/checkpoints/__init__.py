"""Checkpoints on disk, read lazily: safetensors folders and GGUF files behind one interface."""
