"""A model compiled for the CPU by LiteRT, with packed weights that are pages of a file.

The model file must have been verified: LiteRT does not check it, and a damaged one crashes the process.
Compiling releases the GIL and needs no numpy, so a program can import the rest of itself meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from edge.errors import RuntimeFailure
from edge.runtime.litert_api import CPU, Library, keep_payload
from edge.runtime.native_messages import native_messages
from edge.runtime.weight_cache import (
    IN_MEMORY,
    PackedWeights,
    forget_abandoned,
    open_packed,
    publishing,
    require_room,
    weight_cache_name,
)

if TYPE_CHECKING:
    from edge.runtime.signature import Signature

log = logging.getLogger(__name__)


class CompiledModel:
    """A verified .tflite file, compiled for the CPU.

    `digest` identifies the file's content. `weights` are the packed weights in `cache_directory`, None if
    they are in memory because the disk is full or can't be written, which is logged. Raises RuntimeFailure
    if LiteRT refuses.
    """

    def __init__(self, path: Path, digest: str, cache_directory: Path, threads: int) -> None:
        self._lib = Library()
        self._path, self._threads = path, threads
        self._environment = self._lib.create_environment()
        self._model = self._lib.handle_of("LiteRtCreateModelFromFile", self._environment, os.fsencode(path))
        self.weights: PackedWeights | None = None
        self._compiled = self._compile_with_cache(cache_directory / weight_cache_name(digest))

    @cached_property
    def signatures(self) -> Mapping[str, Signature]:
        """The entry points by their keys."""
        from edge.runtime.signature import signatures  # numpy, which compiling does not need

        return signatures(self._lib, self._model, self._compiled)

    def close(self) -> None:
        """Give all memory and mappings back. The model's signatures can't be used after that."""
        for signature in self.signatures.values():
            signature.unbind()
        if self.weights is not None:
            self.weights.close()
        self._lib.destroy("CompiledModel", self._compiled)
        self._lib.destroy("Model", self._model)
        self._lib.destroy("Environment", self._environment)

    def _compile_with_cache(self, cache: Path) -> ctypes.c_void_p:
        directory = cache.parent
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._compile_packed(cache) or self._pack_and_compile(cache)
        except OSError as error:
            log.error(
                "%s: can't store packed weights: %s; they stay in memory for now; free or repair the disk",
                *(directory, error.strerror),
            )
            return self._compile(IN_MEMORY)

    def _compile_packed(self, cache: Path) -> ctypes.c_void_p | None:
        """Compile with the packed weights that are there; None if they are not intact."""
        self.weights = open_packed(cache)
        if self.weights is None:
            return None
        with contextlib.suppress(RuntimeFailure):
            return self._compile(str(cache))
        self.weights.close()
        self.weights = None
        return None

    def _pack_and_compile(self, cache: Path) -> ctypes.c_void_p:
        """Compile, which packs the weights into a file, publish that, and compile from it.

        What packed them keeps much of its memory (170 MB for a 270M), so it is thrown away.
        """
        forget_abandoned(cache.parent)
        require_room(cache.parent, self._path)
        with publishing(cache) as scratch:
            self._lib.destroy("CompiledModel", self._compile(str(scratch)))
        compiled = self._compile(str(cache))
        self.weights = open_packed(cache)
        return compiled

    def _compile(self, cache: str) -> ctypes.c_void_p:
        lib = self._lib
        options = lib.handle_of("LiteRtCreateOptions")
        lib.call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
        payload = f"num_threads = {self._threads}\nweight_cache_file_path = {json.dumps(cache)}\n"
        self._payload = ctypes.create_string_buffer(payload.encode())
        opaque = lib.handle_of("LiteRtCreateOpaqueOptions", b"xnnpack", self._payload, keep_payload)
        lib.call("LiteRtAddOpaqueOptions", options, opaque)
        with native_messages() as errors:
            try:
                return lib.handle_of("LiteRtCreateCompiledModel", self._environment, self._model, options)
            except RuntimeFailure:
                reason = errors[0] if errors else "no reason given"
                raise RuntimeFailure(f"{self._path}: LiteRT can't run it: {reason}") from None
