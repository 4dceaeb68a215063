"""Sensor scenarios, and the training of a LoRA adapter that answers them; see README.md."""
