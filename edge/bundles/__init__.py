"""The bundle: its format, and what a board does with bundles: install, trust, list, run, weigh, go back."""
