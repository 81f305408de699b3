"""Memory that was freed goes back to the kernel; the C library keeps it otherwise, for as long as the process lives."""

from __future__ import annotations

from typing import Final

_M_ARENA_MAX: Final = -8
"""Of <malloc.h>."""


def give_back() -> None:
    """Of all threads' arenas. Takes some milliseconds; nothing where the C library has no such call (glibc does)."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def few_arenas() -> None:
    """For a process whose threads mostly wait: they share one arena beside the main one, each of which may keep tens of megabytes that were freed.

    To be called before any thread begins (mallopt(3), M_ARENA_MAX).
    """
    import ctypes

    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(_M_ARENA_MAX, 2)
