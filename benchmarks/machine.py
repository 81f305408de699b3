"""What machine a figure comes from, and how quiet it was: cores, CPU, host class, steal and what else ran. Reads /proc; judges nothing."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from app.serving.procfs import descendants
from optimizers.host import cpu_budget, host_class

_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of all cores since boot: busy, idle, and stolen by the hypervisor."""

    busy: float
    idle: float
    steal: float


def cpu_times() -> CpuTimes:
    user, nice, system, idle, iowait, irq, softirq, steal, *_ = (int(v) / _TICKS for v in Path("/proc/stat").read_text().split()[1:11])
    return CpuTimes(user + nice + system + irq + softirq, idle + iowait, steal)


def process_seconds(pid: int, with_ended: bool = False) -> float:
    """CPU seconds of a process and all its threads, and on request of those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11 : 15 if with_ended else 13]) / _TICKS


def cpu_of_tree(pid: int) -> float:
    """CPU seconds of a process and of all below it that live; those that end meanwhile are left out."""
    total = 0.0
    for each in descendants(pid):
        with contextlib.suppress(OSError):
            total += process_seconds(each)
    return total


def status_bytes(pid: int, key: str = "VmRSS") -> int:
    """A size from /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def rollup_bytes(pid: int, *keys: str) -> int:
    """The sum of sizes from /proc/PID/smaps_rollup (Pss, Private_Dirty, …); 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.split(":")[0] in keys)


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def description() -> dict[str, Any]:
    """Machine, software and moment, for the head of a result."""
    import onnxruntime

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "cpu": _cpu_model(),
        "cores": cpu_budget().cores,
        "host_class": host_class().key,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }


class Quiet:
    """How quiet the machine was between two moments: its own processes aside, who used the cores?"""

    def __init__(self) -> None:
        self._cpu = cpu_times()
        self._own = _own_seconds()

    def report(self) -> dict[str, float]:
        """Shares of all cores' time since the start. `others` is what nobody of this run used."""
        now, own = cpu_times(), _own_seconds()
        busy, steal = now.busy - self._cpu.busy, now.steal - self._cpu.steal
        total = busy + steal + now.idle - self._cpu.idle
        if total <= 0:
            return {}
        others = max(0.0, busy - (own - self._own))
        return {"busy": round(busy / total, 3), "others": round(others / total, 3), "steal": round(steal / total, 3)}


def _own_seconds() -> float:
    """CPU seconds of this process, of its children that live, and of those that ended."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    for pid in descendants(os.getpid())[1:]:
        try:
            total += process_seconds(pid, with_ended=True)
        except OSError:
            continue
    return total


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
