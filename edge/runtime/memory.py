"""Return freed anonymous memory to the system, where it becomes page cache."""

from __future__ import annotations

import ctypes


def return_free_memory() -> None:
    """Give the heap's free pages back (malloc_trim, where there is glibc); takes a millisecond or two."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
