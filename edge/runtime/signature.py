"""A compiled model's signatures, bound to numpy arrays.

An array is bound to a signature's input or output once, and read or written in place by each run; nothing is
copied. `run` releases the GIL.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.runtime.litert_api import FLOAT32, HOST_MEMORY_ALIGNMENT, INT8, INT32, Library, TensorType

_ELEMENT_TYPES: dict[int, type[np.generic]] = {FLOAT32: np.float32, INT32: np.int32, INT8: np.int8}
_ELEMENT_CODES = {np.dtype(dtype).name: code for code, dtype in _ELEMENT_TYPES.items()}
_LARGE = 1 << 17


def aligned_array(shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> NDArray[Any]:
    """A zeroed array whose memory LiteRT can bind (64-byte aligned).

    A large one has pages of its own, which are returned to the system as soon as it is freed.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size >= _LARGE and sys.platform != "win32":
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(pages, dtype).reshape(shape)
    raw = np.zeros(size + HOST_MEMORY_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % HOST_MEMORY_ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def signatures(lib: Library, model: ctypes.c_void_p, compiled: ctypes.c_void_p) -> dict[str, Signature]:
    """The entry points of a compiled model, by their keys."""
    found = {}
    for index in range(lib.count("LiteRtGetNumModelSignatures", model)):
        handle = lib.handle_of("LiteRtGetModelSignature", model, index)
        signature = Signature(lib, compiled, index, handle)
        found[signature.key] = signature
    return found


class Signature:
    """One entry point of a compiled model; its tensors are bound to arrays by name."""

    def __init__(self, lib: Library, compiled: ctypes.c_void_p, index: int, handle: ctypes.c_void_p) -> None:
        self._lib, self._compiled, self._index = lib, compiled, index
        self.key = lib.text("LiteRtGetSignatureKey", handle)
        self._inputs, self._input_types = self._tensors(handle, "Input")
        self._outputs, self._output_types = self._tensors(handle, "Output")
        self._bound: dict[str, tuple[ctypes.c_void_p, NDArray[Any]]] = {}
        self._arguments: tuple[Any, Any] | None = None

    def _tensors(self, handle: ctypes.c_void_p, kind: str) -> tuple[list[str], dict[str, TensorType]]:
        names, types = [], {}
        for i in range(self._lib.count(f"LiteRtGetNumSignature{kind}s", handle)):
            name = self._lib.text(f"LiteRtGetSignature{kind}Name", handle, i)
            tensor = self._lib.handle_of(f"LiteRtGetSignature{kind}TensorByIndex", handle, i)
            names.append(name)
            types[name] = TensorType()
            self._lib.call("LiteRtGetRankedTensorType", tensor, ctypes.byref(types[name]))
        return names, types

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(self._inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(self._outputs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an input or output as the file declares it (-1: set by the bound array)."""
        layout = (self._input_types | self._output_types)[name].layout
        return tuple(layout.dimensions[: layout.rank])

    def bind(self, name: str, array: NDArray[Any]) -> None:
        """Use `array`, C-contiguous and from `aligned_array`, as tensor `name` in every later run.

        The array must keep its shape; to grow one, bind another. It stays referenced while it is bound.
        """
        if array.ctypes.data % HOST_MEMORY_ALIGNMENT or not array.flags.c_contiguous:
            raise ValueError(f"{self.key}: the array for {name} is not 64-byte aligned and contiguous")
        kind = TensorType(_ELEMENT_CODES[array.dtype.name])
        kind.layout.rank = array.ndim
        kind.layout.dimensions[: array.ndim] = array.shape
        buffer = self._lib.handle_of(
            "LiteRtCreateTensorBufferFromHostMemory",
            ctypes.byref(kind),
            array.ctypes.data,
            array.nbytes,
            None,
        )
        old = self._bound.get(name)
        self._bound[name] = (buffer, array)
        self._arguments = None
        if old is not None:
            self._lib.destroy("TensorBuffer", old[0])

    def bind_new(self, name: str) -> NDArray[Any]:
        """Bind a new zeroed array of the declared shape and return it."""
        dtype = _ELEMENT_TYPES[(self._input_types | self._output_types)[name].element_type]
        array = aligned_array(self.shape(name), dtype)
        self.bind(name, array)
        return array

    def unbind(self) -> None:
        """Release all arrays."""
        for buffer, _ in self._bound.values():
            self._lib.destroy("TensorBuffer", buffer)
        self._bound.clear()
        self._arguments = None

    def run(self) -> None:
        """Run on the bound arrays. Raises RuntimeFailure if LiteRT fails, KeyError if one is not bound."""
        if self._arguments is None:
            self._arguments = self._handles(self._inputs), self._handles(self._outputs)
        inputs, outputs = self._arguments
        self._lib.call(
            "LiteRtRunCompiledModel", self._compiled, self._index, len(inputs), inputs, len(outputs), outputs
        )

    def _handles(self, names: list[str]) -> Any:
        return (ctypes.c_void_p * len(names))(*(self._bound[name][0] for name in names))
