"""Memory that was freed goes back to the kernel; the C library keeps it otherwise, for as long as the process lives."""

from __future__ import annotations


def give_back() -> None:
    """Of all threads' arenas. Takes some milliseconds; nothing where the C library has no such call (glibc does)."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
