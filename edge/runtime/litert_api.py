"""LiteRT's C API: the functions that this project calls, with their prototypes, and nothing above them.

Why not the Python wrappers of `ai-edge-litert`: they pack every weight into anonymous memory. Names are those
of LiteRT's headers (`litert/c/*.h` of https://github.com/google-ai-edge/LiteRT, version 2.3). A call releases
the GIL.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from edge.errors import RuntimeFailure

_LIBRARIES = {"linux": "libLiteRt.so", "darwin": "libLiteRt.dylib", "win32": "libLiteRt.dll"}

CPU = 1  # kLiteRtHwAcceleratorCpu, litert_common.h
_TAG_ACCELERATORS = 24  # kLiteRtEnvOptionTagAutoRegisterAccelerators, litert_environment_options.h
_TAG_LOG_SEVERITY = 25  # kLiteRtEnvOptionTagMinLoggerSeverity, litert_environment_options.h
_SEVERITY_ERROR = 3  # kLiteRtLogSeverityError, litert_logging.h
FLOAT32, INT32, INT8 = 1, 2, 9  # kLiteRtElementTypeFloat32 and so on, litert_model_types.h
HOST_MEMORY_ALIGNMENT = 64  # LITERT_HOST_MEMORY_BUFFER_ALIGNMENT, litert_tensor_buffer_types.h
_ANY_INT = 2  # kLiteRtAnyTypeInt, litert_any.h
_OK = 0  # kLiteRtStatusOk, litert_common.h
_MAX_RANK = 8  # LITERT_TENSOR_MAX_RANK, litert_layout.h


class _Any(ctypes.Structure):
    """`LiteRtAny` with an integer in it (litert_any.h)."""

    _fields_ = (("type", c_int), ("value", ctypes.c_int64))


class EnvironmentOption(ctypes.Structure):
    """`LiteRtEnvOption` (litert_environment_options.h)."""

    _fields_ = (("tag", c_int), ("value", _Any))


class Layout(ctypes.Structure):
    """`LiteRtLayout` (litert_layout.h)."""

    _fields_ = (
        ("rank", ctypes.c_uint32, 7),
        ("has_strides", ctypes.c_uint32, 1),
        ("dimensions", ctypes.c_int32 * _MAX_RANK),
        ("strides", ctypes.c_uint32 * _MAX_RANK),
    )


class TensorType(ctypes.Structure):
    """`LiteRtRankedTensorType` (litert_model_types.h)."""

    _fields_ = (("element_type", c_int), ("layout", Layout))


Destructor = ctypes.CFUNCTYPE(None, c_void_p)
keep_payload = Destructor(lambda _payload: None)
"""For data that Python owns."""

_Out = POINTER(c_void_p)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    # litert_environment.h
    "LiteRtCreateEnvironment": (c_int, POINTER(EnvironmentOption), _Out),
    # litert_model.h
    "LiteRtCreateModelFromFile": (c_void_p, c_char_p, _Out),
    "LiteRtGetNumModelSignatures": (c_void_p, POINTER(c_size_t)),
    "LiteRtGetModelSignature": (c_void_p, c_size_t, _Out),
    "LiteRtGetSignatureKey": (c_void_p, POINTER(c_char_p)),
    "LiteRtGetNumSignatureInputs": (c_void_p, POINTER(c_size_t)),
    "LiteRtGetNumSignatureOutputs": (c_void_p, POINTER(c_size_t)),
    "LiteRtGetSignatureInputName": (c_void_p, c_size_t, POINTER(c_char_p)),
    "LiteRtGetSignatureOutputName": (c_void_p, c_size_t, POINTER(c_char_p)),
    "LiteRtGetSignatureInputTensorByIndex": (c_void_p, c_size_t, _Out),
    "LiteRtGetSignatureOutputTensorByIndex": (c_void_p, c_size_t, _Out),
    "LiteRtGetRankedTensorType": (c_void_p, POINTER(TensorType)),
    # litert_options.h, litert_opaque_options.h
    "LiteRtCreateOptions": (_Out,),
    "LiteRtSetOptionsHardwareAccelerators": (c_void_p, c_int),
    "LiteRtCreateOpaqueOptions": (c_char_p, c_void_p, Destructor, _Out),
    "LiteRtAddOpaqueOptions": (c_void_p, c_void_p),
    # litert_compiled_model.h
    "LiteRtCreateCompiledModel": (c_void_p, c_void_p, c_void_p, _Out),
    "LiteRtRunCompiledModel": (c_void_p, c_size_t, c_size_t, _Out, c_size_t, _Out),
    # litert_tensor_buffer.h; a deallocator of NULL leaves the memory to its owner
    "LiteRtCreateTensorBufferFromHostMemory": (POINTER(TensorType), c_void_p, c_size_t, c_void_p, _Out),
}
_DESTROYERS = ("CompiledModel", "Model", "Environment", "TensorBuffer")


class Library:
    """The loaded library. A status that is not OK becomes RuntimeFailure."""

    def __init__(self) -> None:
        path = _library_path()
        try:
            self._dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise RuntimeFailure(f"{path}: can't be loaded: {error}") from None
        for name, arguments in _PROTOTYPES.items():
            function = getattr(self._dll, name)
            function.argtypes, function.restype = arguments, c_int
        for kind in _DESTROYERS:
            function = getattr(self._dll, f"LiteRtDestroy{kind}")
            function.argtypes, function.restype = (c_void_p,), None

    def call(self, name: str, *arguments: Any) -> None:
        """Call function `name`."""
        status = getattr(self._dll, name)(*arguments)
        if status != _OK:
            raise RuntimeFailure(f"LiteRT's {name} failed with status {status}")

    def text(self, name: str, *arguments: Any) -> str:
        """Call `name` and return the string that it stores through its last argument."""
        result = c_char_p()
        self.call(name, *arguments, ctypes.byref(result))
        return (result.value or b"").decode()

    def count(self, name: str, *arguments: Any) -> int:
        """Call `name` and return the number that it stores through its last argument."""
        result = c_size_t()
        self.call(name, *arguments, ctypes.byref(result))
        return result.value

    def handle_of(self, name: str, *arguments: Any) -> c_void_p:
        """Call `name` and return the handle that it stores through its last argument."""
        result = c_void_p()
        self.call(name, *arguments, ctypes.byref(result))
        return result

    def destroy(self, kind: str, handle: c_void_p) -> None:
        """Destroy a handle of type `kind`: CompiledModel, Model, Environment or TensorBuffer."""
        getattr(self._dll, f"LiteRtDestroy{kind}")(handle)

    def create_environment(self) -> c_void_p:
        """Create an environment with the CPU alone, which logs errors only; no GPU library is loaded."""
        options = (EnvironmentOption * 2)(
            EnvironmentOption(_TAG_ACCELERATORS, _Any(_ANY_INT, CPU)),
            EnvironmentOption(_TAG_LOG_SEVERITY, _Any(_ANY_INT, _SEVERITY_ERROR)),
        )
        return self.handle_of("LiteRtCreateEnvironment", len(options), options)


def version() -> str:
    """LiteRT's version, from the name of the folder that pip leaves; importlib.metadata is slow."""
    packages = _library_path().parent.parent
    return next((path.name for path in packages.glob("ai_edge_litert-*.dist-info")), "unknown")


def _library_path() -> Path:
    spec = importlib.util.find_spec("ai_edge_litert")
    name = _LIBRARIES.get(sys.platform)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeFailure(
            f"ai-edge-litert is not installed for {platform.machine()}; "
            "it has wheels for 64-bit systems only (aarch64 and x86-64 Linux, macOS arm64, Windows)"
        )
    path = Path(spec.submodule_search_locations[0], name or "")
    if name is None or not path.is_file():
        raise RuntimeFailure(f"ai-edge-litert has no library for {sys.platform} {platform.machine()}")
    return path
