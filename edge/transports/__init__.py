"""Bytes to messages and back; a transport knows nothing of prompts or tensors."""
