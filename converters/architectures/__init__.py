"""One module per model family: its configuration and its tensor names."""
