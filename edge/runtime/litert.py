"""LiteRT through its C API: a model compiled for the CPU, whose signatures are `edge.runtime.signature`'s.

Why not the Python wrappers of `ai-edge-litert`: they pack every weight into anonymous memory. Here the
XNNPACK weight cache keeps packed weights as pages of a file. Compiling releases the GIL and needs no numpy,
so a program can import the rest of itself meanwhile.

The model file must have been verified: LiteRT does not check it, and a damaged one crashes the process.
A cache that belongs to another LiteRT, CPU or model is never opened (it has another name), and one that
does not load is removed and rebuilt. Two processes may build at once: each builds under a name of its own,
and the rename that publishes it is atomic.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.errors import RuntimeFailure
from edge.files import identity, write_atomically

if TYPE_CHECKING:
    from edge.runtime.signature import Signature

log = logging.getLogger(__name__)

_LIBRARIES = {"linux": "libLiteRt.so", "darwin": "libLiteRt.dylib", "win32": "libLiteRt.dll"}
_CPU = 1
_OPTION_ACCELERATORS, _OPTION_LOG_SEVERITY, _ANY_INT, _ERRORS_ONLY = 24, 25, 2, 3


class _Any(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("value", ctypes.c_int64))


class _EnvironmentOption(ctypes.Structure):
    _fields_ = (("tag", ctypes.c_int), ("value", _Any))


_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_keep_payload = _Destructor(lambda _payload: None)


@contextlib.contextmanager
def _native_messages() -> Iterator[Callable[[], str]]:
    """Keep what the library writes to standard error; yields a function that gives its first error line.

    TFLite logs there below LiteRT's own log level, with no way to turn it off. What is neither an error nor
    an INFO line is passed on.
    """
    with tempfile.TemporaryFile() as kept:
        saved = os.dup(2)
        os.dup2(kept.fileno(), 2)

        def lines() -> list[str]:
            kept.seek(0)
            return kept.read().decode(errors="replace").splitlines()

        try:
            yield lambda: next(
                (line for line in lines() if line.startswith("ERROR: ")), "ERROR: no reason given"
            )
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            for line in lines():
                if not line.startswith(("INFO: ", "ERROR: ")):
                    sys.stderr.write(f"{line}\n")


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


def _cpu_identity() -> str:
    """What decides which kernels XNNPACK picks, and so how it packs: the machine and its CPU features."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "CPU implementer", "CPU part", "model name")
    lines = {line for line in text.splitlines() if line.startswith(wanted)}
    return platform.machine() + "".join(sorted(lines))


def _version() -> str:
    """LiteRT's version, by the name of the folder that pip leaves beside it; importlib.metadata is slow."""
    packages = _library_path().parent.parent
    return next((path.name for path in packages.glob("ai_edge_litert-*.dist-info")), "unknown")


def weight_cache_name(model_digest: str) -> str:
    """File name of the packed weights of a model on this CPU with this LiteRT."""
    key = "\n".join((_version(), _cpu_identity(), model_digest))
    return f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.xnnpack"


_IN_MEMORY = ":memory"
"""What XNNPACK takes instead of a path for packed weights in memory, of all signatures together."""
_PACKED_SHARE, _PACKED_BYTES = 1.1, 1 << 20
"""Packed weights take at most so much of the model file's size, and so many bytes beside."""


def forget_packed_weights(directory: Path, kept_models: Sequence[str]) -> None:
    """Remove all packed weights in `directory` but those of some models, and what a crash left of packing."""
    kept = {weight_cache_name(digest) for digest in kept_models}
    for path in directory.glob("*.xnnpack"):
        if path.name not in kept:
            with contextlib.suppress(OSError):
                _stamp(path).unlink(missing_ok=True)
                path.unlink()
    _forget_abandoned(directory)


def _forget_abandoned(directory: Path) -> None:
    """Remove what a crash or a power cut left of packing: it may be as large as the model."""
    for building in directory.glob("*/building"):
        with contextlib.suppress(OSError), _locked(building.parent):
            shutil.rmtree(building.parent)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock, which is gone with its process. Raises OSError if another process has it."""
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


class Library:
    """The loaded library. A status that is not OK becomes RuntimeFailure."""

    def __init__(self) -> None:
        path = _library_path()
        try:
            self._dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise RuntimeFailure(f"{path}: can't be loaded: {error}") from None

    def call(self, name: str, *arguments: Any) -> None:
        """Call function `name`."""
        status = getattr(self._dll, name)(*arguments)
        if status != 0:
            raise RuntimeFailure(f"LiteRT's {name} failed with status {status}")

    def text(self, name: str, *arguments: Any) -> str:
        """What `name` puts behind its last argument, a string."""
        result = ctypes.c_char_p()
        self.call(name, *arguments, ctypes.byref(result))
        return (result.value or b"").decode()

    def count(self, name: str, *arguments: Any) -> int:
        """The same, a number."""
        result = ctypes.c_size_t()
        self.call(name, *arguments, ctypes.byref(result))
        return result.value

    def handle_of(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """The same, a handle."""
        result = ctypes.c_void_p()
        self.call(name, *arguments, ctypes.byref(result))
        return result

    def destroy(self, name: str, handle: ctypes.c_void_p) -> None:
        """Call `name`, which returns nothing."""
        function = getattr(self._dll, name)
        function.restype = None
        function(handle)


class CompiledModel:
    """A verified .tflite file, compiled for the CPU.

    `digest` identifies the file's content; packed weights are kept in `cache_directory` under a name made
    of it, LiteRT's version and the CPU, or in memory where the disk is full or can't be written, which the
    log says. Raises RuntimeFailure if LiteRT refuses.
    """

    def __init__(self, path: Path, digest: str, cache_directory: Path, threads: int) -> None:
        self._lib = Library()
        self._path, self._threads = path, threads
        self._environment = self._create_environment()
        self._model = self._lib.handle_of("LiteRtCreateModelFromFile", self._environment, os.fsencode(path))
        self._compiled = self._compile_with_cache(cache_directory, digest)

    @cached_property
    def signatures(self) -> Mapping[str, Signature]:
        """The entry points by their keys."""
        from edge.runtime.signature import signatures

        return signatures(self._lib, self._model, self._compiled)

    def close(self) -> None:
        """Give all memory and mappings back. The model's signatures may not be used after that."""
        for signature in self.signatures.values():
            signature.unbind()
        self._lib.destroy("LiteRtDestroyCompiledModel", self._compiled)
        self._lib.destroy("LiteRtDestroyModel", self._model)
        self._lib.destroy("LiteRtDestroyEnvironment", self._environment)

    def _create_environment(self) -> ctypes.c_void_p:
        options = (_EnvironmentOption * 2)(
            _EnvironmentOption(_OPTION_ACCELERATORS, _Any(_ANY_INT, _CPU)),
            _EnvironmentOption(_OPTION_LOG_SEVERITY, _Any(_ANY_INT, _ERRORS_ONLY)),
        )
        return self._lib.handle_of("LiteRtCreateEnvironment", len(options), options)

    def _compile_with_cache(self, directory: Path, digest: str) -> ctypes.c_void_p:
        cache = directory / weight_cache_name(digest)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if _is_intact(cache):
                with contextlib.suppress(RuntimeFailure):
                    return self._compile(cache)
            _forget_abandoned(directory)
            self._require_room(directory)
            return self._build_cache(cache)
        except OSError as error:
            log.error(
                "%s: can't keep packed weights there: %s; they are in memory for now: free or mend the disk",
                *(directory, error.strerror),
            )
            return self._compile(Path(_IN_MEMORY))

    def _require_room(self, directory: Path) -> None:
        """Raise OSError if packed weights would fill the disk: XNNPACK ends the process then."""
        free = os.statvfs(directory)
        if free.f_bavail * free.f_frsize < _PACKED_SHARE * self._path.stat().st_size + _PACKED_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _build_cache(self, cache: Path) -> ctypes.c_void_p:
        """Compile, which packs the weights into a file under a scratch name, publish it, and compile from it.

        What packed them keeps much of its memory (170 MB for a 270M), so it is thrown away.
        """
        with contextlib.ExitStack() as stack:
            scratch = tempfile.TemporaryDirectory(prefix=f"{cache.stem}.", dir=cache.parent)
            building = Path(stack.enter_context(scratch), "building")
            with contextlib.suppress(OSError):  # without a lock another process may take it for abandoned
                stack.enter_context(_locked(building.parent))
            packer = self._compile(building)
            self._lib.destroy("LiteRtDestroyCompiledModel", packer)
            if not building.is_file():
                raise RuntimeFailure(
                    f"{cache.parent}: LiteRT could not write the packed weights; is the disk full?"
                )
            _stamp(cache).unlink(missing_ok=True)
            os.replace(building, cache)
            write_atomically(_stamp(cache), identity(cache).encode())
        return self._compile(cache)

    def _compile(self, cache: Path) -> ctypes.c_void_p:
        lib = self._lib
        options = lib.handle_of("LiteRtCreateOptions")
        lib.call("LiteRtSetOptionsHardwareAccelerators", options, _CPU)
        payload = f"num_threads = {self._threads}\nweight_cache_file_path = {json.dumps(str(cache))}\n"
        self._payload = ctypes.create_string_buffer(payload.encode())
        opaque = lib.handle_of("LiteRtCreateOpaqueOptions", b"xnnpack", self._payload, _keep_payload)
        lib.call("LiteRtAddOpaqueOptions", options, opaque)
        with _native_messages() as first_error:
            try:
                return lib.handle_of("LiteRtCreateCompiledModel", self._environment, self._model, options)
            except RuntimeFailure:
                reason = first_error().removeprefix("ERROR: ")
                raise RuntimeFailure(f"{self._path}: LiteRT can't run it: {reason}") from None


def _stamp(cache: Path) -> Path:
    return cache.with_suffix(".stamp")


def _is_intact(cache: Path) -> bool:
    """Whether the file is the very one that was published: LiteRT does not check what it maps."""
    try:
        return _stamp(cache).read_text() == identity(cache)
    except OSError:
        return False
