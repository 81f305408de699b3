"""What the kernel says of the cores that this process may use: how busy they are, what was stolen of them, which idles most."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path


def stolen_s() -> float:
    """Seconds, over all cores, that the hypervisor gave to somebody else."""
    fields = _proc_stat().get("cpu", [])
    return fields[7] / os.sysconf("SC_CLK_TCK") if len(fields) > 7 else 0.0


def busy_s() -> float | None:
    """Seconds that this process's cores were in use since the start of the machine, by whomever; None where the kernel does not say."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = [sum(fields[:3]) + sum(fields[5:7]) for name, fields in _proc_stat().items() if name in cores]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def quietest_core(look_s: float = 0.05) -> int:
    """The core of the affinity mask that idles most, by a short look."""
    allowed = sorted(os.sched_getaffinity(0))
    before = _proc_stat()
    time.sleep(look_s)
    after = _proc_stat()
    return max(allowed, key=lambda core: _idle(after.get(f"cpu{core}")) - _idle(before.get(f"cpu{core}")))


def _idle(fields: list[int] | None) -> int:
    return fields[3] + fields[4] if fields and len(fields) > 4 else 0


def _proc_stat() -> dict[str, list[int]]:
    with contextlib.suppress(OSError):
        lines = (line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu"))
        return {name: [int(value) for value in values] for name, *values in lines}
    return {}
