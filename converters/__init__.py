"""The converter, run on a laptop: turns a checkpoint into a bundle. `edge` imports nothing from it."""
