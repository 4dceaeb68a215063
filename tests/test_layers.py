"""The rooms of `edge/` stand in an order, and each knows only those above it (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

EDGE = Path(__file__).parents[1] / "edge"

ORDER = (
    *(
        "errors",
        "endpoints",
        "files",
        "defaults",
        "logs",
        "protocol",
        "board",
        "bundles",
        "text",
        "runtime",
        "generation",
    ),
    *("routes", "config", "requests", "transports", "service", "doctor", "client", "cli", "__main__"),
)


def imported(module: Path) -> Iterator[str]:
    """Names of the modules that `module` imports, also within functions."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(path: Path) -> str:
    """The room that a module of `edge/` is, or is in."""
    return path.relative_to(EDGE).parts[0].removesuffix(".py")


def test_each_room_imports_only_from_itself_and_those_above_it() -> None:
    modules = [path for path in EDGE.rglob("*.py") if path != EDGE / "__init__.py"]
    assert {room(path) for path in modules} == set(ORDER)
    for path in modules:
        known = ORDER[: ORDER.index(room(path)) + 1]
        for name in imported(path):
            if name.startswith("edge."):
                assert name.split(".")[1] in known, f"{path} imports {name}"


def test_the_device_side_imports_nothing_of_the_converter_or_the_tests() -> None:
    for path in EDGE.rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in ("converters", "tests", "benchmarks", "adapters"), path
