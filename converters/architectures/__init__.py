"""One module per model family: its configuration, and what its checkpoints call each tensor."""
