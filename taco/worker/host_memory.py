"""Giving memory that was freed back to the operating system.

The C library keeps freed blocks for later. After a large step that may be hundreds of megabytes, which other programs
of the machine could use.
"""

from __future__ import annotations

import ctypes
import functools

IDLE_BYTES = 64 << 20  # kept without being returned: returning it costs, and the next step takes it again


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is one with `malloc_trim` and `mallinfo2` (glibc 2.33 or newer)."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _MallocInfo
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (AttributeError, OSError, TypeError):
        return None
    return library


def return_free_memory() -> None:
    """Returns freed memory to the system, if there is much of it; does nothing without glibc."""
    library = _glibc()
    if library is not None and library.mallinfo2().fordblks > IDLE_BYTES:
        library.malloc_trim(0)
