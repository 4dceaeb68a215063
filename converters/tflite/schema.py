"""The TFLite schema's generated classes, from `ai-edge-litert` but without its inference library.

Importing that package loads the library; the schema is one plain Python file in it, loaded on its own here,
so that a conversion runs where LiteRT can't.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from edge.errors import EdgeError

_MODULE = "schema_py_generated"


def _load() -> Any:
    package = importlib.util.find_spec("ai_edge_litert")
    if package is None or not package.submodule_search_locations:
        raise EdgeError("ai-edge-litert is not installed; its TFLite schema is needed to write a bundle")
    path = Path(package.submodule_search_locations[0], f"{_MODULE}.py")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise EdgeError(f"{path}: can't be loaded; install ai-edge-litert again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


schema = _load()
"""The module: `ModelT`, `TensorT` and so on."""
