"""A clock for leases that no change of the wall clock can move: time since boot, and which boot that was."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def since_boot_ns() -> int:
    """Nanoseconds since boot, sleep included; the same in every process of this host."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Names this boot of this host: what was stamped in another one is over. '' where the kernel does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
