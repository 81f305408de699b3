"""How long this thread keeps a core at a time, where the kernel can be told (EEVDF's own slices: Linux 6.12 and later, sched_setattr(2)).

A thread that runs is left alone until its slice is over (1.4 ms on two cores, 2.8 on eight), whatever its priority; so what wakes up waits for background work that long,
at each of its steps. Short slices of the background end that. A thread with shorter slices than the one that runs may also take its place at once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import Final

SHORT_NS: Final = 100_000
"""The shortest that the kernel takes."""
_SYSCALL: Final = {"x86_64": 314, "aarch64": 274}
_ATTR: Final = struct.Struct("=IIQiIQQQ")
"""size, policy, flags, nice, priority, runtime (the slice), deadline, period: sched_attr's first version."""


def ask_for_slices(nanoseconds: int) -> bool:
    """For the calling thread, and those that it starts from now on; 0: the kernel's own choice again. False where nothing could be said.

    Policy and nice value stay as they are. Kernels before 6.12 take the call and change nothing.
    """
    number = _SYSCALL.get(platform.machine())
    if number is None:
        return False
    policy, nice = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    if policy not in (os.SCHED_OTHER, os.SCHED_BATCH):
        return False
    attributes = _ATTR.pack(_ATTR.size, policy, 0, nice, 0, nanoseconds, 0, 0)
    try:
        return bool(ctypes.CDLL(None, use_errno=True).syscall(number, 0, attributes, 0) == 0)
    except (OSError, AttributeError):
        return False
