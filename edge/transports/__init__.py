"""Bytes to messages and back: MQTT and serial. A transport knows nothing of prompts or tensors."""
