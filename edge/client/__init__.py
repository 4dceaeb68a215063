"""The other end: ways to a model or a daemon, and what `edge-ask` shows."""
