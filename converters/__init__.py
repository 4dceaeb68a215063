"""The laptop side: turns a checkpoint into a bundle. Nothing in `edge` imports it."""
