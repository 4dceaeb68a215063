"""The layers of `edge/` and `converters/`: order, no circles, no private parts of a library.

A room is a package or module directly below `edge/` or `converters/`; docs/architecture.md describes each.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGES = ("edge", "converters")

# Each room may import from itself and from rooms that come before it.
ORDER = {
    "edge": """
        errors endpoints files defaults logs protocol board bundles text runtime generation
        routes config requests transports service doctor client cli __main__
    """,
    "converters": """
        progress progress_display output_directory source_digests merged_adapter manifest_text tflite
        quantization architectures checkpoints encoding weight_layout decoder_graph recipes
        reference_decoder calibration lora bundle_writer convert fidelity evaluate golden picture cli __main__
    """,
}
SHARED = {"errors", "endpoints", "files", "protocol", "bundles", "text"}
"""Rooms of `edge/` that every room of `converters/` may use."""
ALSO = {
    "calibration": {"runtime"},  # rounds activations as the runtime does
    "evaluate": {"runtime"},
    "golden": {"runtime", "generation"},
    "cli": {"cli"},
    "__main__": {"cli"},
}
"""Further rooms of `edge/` that a room of `converters/` may use."""

PUBLIC = {"_replace", "_asdict", "_fields", "_make"}
"""Names with an underscore that are public all the same: those of named tuples."""


def modules() -> dict[str, ast.Module]:
    """Every module of the project's packages by its dotted name."""
    parsed = {}
    for path in (path for package in PACKAGES for path in (PROJECT / package).rglob("*.py")):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        parsed[name] = ast.parse(path.read_text())
    return parsed


MODULES = modules()


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node`, except the imports that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from statements(child)


def imports(module: ast.Module) -> set[str]:
    """Dotted names that a module imports, also within functions."""
    names = set()
    for node in statements(module):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def graph(parsed: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """The modules that each module imports, among those given."""
    edges = {}
    for name, module in parsed.items():
        targets = {target if target in parsed else target.rpartition(".")[0] for target in imports(module)}
        edges[name] = targets & set(parsed)
    return edges


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty if there is no circle."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def room(name: str) -> str:
    """The room of a module: "bundles" for "edge.bundles.store"."""
    return name.split(".")[1]


def private(name: str) -> bool:
    """Return whether a name is private (leading underscore); dunder names and ctypes' `_fields_` are not."""
    return name.startswith("_") and not name.endswith("_") and name not in PUBLIC


def private_parts(module: ast.Module, own: set[str]) -> set[str]:
    """Private names of other people's code that a module uses.

    An attribute counts as theirs unless the module itself defines the name; on `self`, `own` names, which
    modules of this project define, are fine too.
    """
    here = definitions(module)
    used = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node) != "os._exit":
            inherited = own if ast.unparse(node.value) in ("self", "cls") else set()
            if node.attr not in here | inherited:
                used.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(private(part) for part in parts if part != "__future__"):
                used.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            used |= {a.name for a in node.names if any(private(part) for part in a.name.split("."))}
    return used


def definitions(module: ast.Module) -> set[str]:
    """Names that a module defines, and attributes that it sets on `self` or `cls`."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in (
            f"self.{node.attr}",
            f"cls.{node.attr}",
        ):
            names |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return names


def overridden(cls: type) -> set[str]:
    """Private members of other people's base classes that a class replaces."""
    theirs = {
        name
        for base in cls.__mro__[1:]
        if base.__module__.split(".")[0] not in (*PACKAGES, *sys.stdlib_module_names)
        for name in vars(base)
    }
    return {name for name in vars(cls) if private(name) and name in theirs}


@pytest.mark.parametrize("package", PACKAGES)
def test_each_room_imports_only_from_itself_and_from_earlier_rooms(package: str) -> None:
    order = ORDER[package].split()
    names = [name for name in MODULES if name.startswith(f"{package}.")]
    assert {room(name) for name in names} == set(order), "ORDER must list every room"
    backward = {
        (f"{package}.{room(name)}", f"{package}.{room(target)}")
        for name in names
        for target in imports(MODULES[name])
        if target.startswith(f"{package}.") and order.index(room(target)) > order.index(room(name))
    }
    assert backward == set()


def test_the_device_side_imports_only_packages_installed_on_the_device() -> None:
    for name, module in MODULES.items():
        if name.startswith("edge"):
            roots = {target.split(".")[0] for target in imports(module)}
            assert not roots & {"converters", "tests", "benchmarks", "adapters", "fuzz"}, name


def test_the_converter_uses_only_some_rooms_of_the_device_side() -> None:
    for name, module in MODULES.items():
        if name.startswith("converters."):
            used = {room(target) for target in imports(module) if target.startswith("edge.")}
            assert used <= SHARED | ALSO.get(room(name), set()), name


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(graph(MODULES)) == []


def test_no_private_part_of_a_library_is_used() -> None:
    own = set().union(*(definitions(module) for module in MODULES.values()))
    used = {name: private_parts(module, own) for name, module in MODULES.items()}
    assert {name: parts for name, parts in used.items() if parts} == {}


def test_no_private_method_of_a_library_is_overridden() -> None:
    for name in MODULES:
        if name.endswith(".__main__"):
            continue
        for _, cls in inspect.getmembers(importlib.import_module(name), inspect.isclass):
            if cls.__module__ == name:
                assert overridden(cls) == set(), f"{name}.{cls.__name__}"


def parse(text: str) -> ast.Module:
    return ast.parse(textwrap.dedent(text))


def test_a_circle_with_an_import_inside_a_function_is_found() -> None:
    a = parse("from edge import b")
    b = parse("from edge.c import thing")
    c = parse("""
        def late():
            import edge.a
    """)
    assert sorted(set(circle(graph({"edge.a": a, "edge.b": b, "edge.c": c})))) == [
        "edge.a",
        "edge.b",
        "edge.c",
    ]
    typed = parse("""
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            import edge.a
    """)
    assert circle(graph({"edge.a": a, "edge.b": b, "edge.c": typed})) == []


@pytest.mark.parametrize(
    "use",
    [
        "client._sock.close()",
        "import paho.mqtt.client as mqtt\nmqtt._encode_len(3)",
        "from paho.mqtt.client import _MosquittoMessage",
        "import numpy._core",
        "class Ours(Client):\n    def send(self): self._packet_queue(1)",
    ],
)
def test_a_private_part_of_a_library_is_found(use: str) -> None:
    assert len(private_parts(parse(use), {"_ours"})) == 1


def test_use_of_our_own_private_parts_is_allowed() -> None:
    ours = parse("""
        import ctypes, os
        class Ours(Base):
            _fields_ = [("count", ctypes.c_int)]
            def __init__(self): self._count = self._ours
            def same(self, other): return other._count == self._count
        os._exit(1)
    """)
    assert private_parts(ours, {"_ours"}) == set()


def test_an_overridden_private_method_is_found() -> None:
    theirs = type("Theirs", (), {"_create": None, "__module__": "library"})
    ours = type("Ours", (theirs,), {"_create": None, "_new": None, "__module__": "edge.example"})
    assert overridden(ours) == {"_create"}
