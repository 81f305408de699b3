"""Instructions that a thread retired, where the kernel lets them be counted (perf_event_open(2)): the same work has the same number on any machine's day.

Neither neighbours nor where weights lie in memory move the number, which both do with CPU time. It does not say how long they take: values below the
normal range (subnormal) and cache misses cost time and no instructions, so it stands beside CPU time and not in its place.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path
from typing import Final, Self

_SYSCALL: Final = {"x86_64": 298, "aarch64": 241}
HARDWARE, INSTRUCTIONS = 0, 1
"""The kind of counter and which of its kind (linux/perf_event.h)."""
SOFTWARE, TASK_CLOCK = 1, 1
"""Nanoseconds on a core, which the kernel counts on machines without a counter of instructions, too."""
_TIMES: Final = 1 | 2
"""read_format: beside the value, for how long the counter was wanted and for how long it really counted."""
_EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 5, 1 << 6
_CLOSE_ON_EXEC: Final = 8


class Counter:
    """A counter of the thread that makes it, in user space, which needs no privilege up to kernel.perf_event_paranoid 2. Raises OSError where it is not to be had."""

    def __init__(self, kind: int = HARDWARE, which: int = INSTRUCTIONS) -> None:
        number = _SYSCALL.get(platform.machine())
        if number is None:
            raise OSError(f"perf_event_open has no known number on {platform.machine()}")
        attributes = struct.pack("=IIQQQQQIIQ", kind, 64, which, 0, 0, _TIMES, _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR, 0, 0, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(number, ctypes.create_string_buffer(attributes, 64), 0, -1, -1, ctypes.c_ulong(_CLOSE_ON_EXEC))
        if fd < 0:
            raise OSError(ctypes.get_errno(), f"perf_event_open: {os.strerror(ctypes.get_errno())}")
        self._fd = fd

    @classmethod
    def or_none(cls) -> Self | None:
        """Instructions, where this machine counts them and its kernel allows it: most virtual machines do not.

        Under a seccomp filter it is not tried. Docker's refuses the call, and systemd's (SystemCallFilter=@system-service) would end the process.
        """
        try:
            return None if _filtered() else cls()
        except OSError:
            return None

    def read(self) -> int | None:
        """Since it was made; None where others took turns with it on the hardware, since then it is a guess."""
        value, wanted, counted = struct.unpack("=QQQ", os.read(self._fd, 24))
        return value if counted and counted == wanted else None

    def close(self) -> None:
        os.close(self._fd)


def _filtered() -> bool:
    """Whether a filter of system calls holds for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return any(line.split() == ["Seccomp:", "2"] for line in lines)
