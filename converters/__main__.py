"""The entry point of `edge-convert` and of `python -m converters`."""

from __future__ import annotations

from edge.cli.entry import run


def main() -> None:
    """Run `edge-convert`."""
    run("converters.cli", "main")


if __name__ == "__main__":
    main()
