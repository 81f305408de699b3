"""What the host does to us, read each few seconds: pressure, stolen and throttled time, memory, faults. Every fact may be absent.

Reads /proc and cgroup files (v1 and v2); blocks for well under a millisecond. It judges nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple

from optimizers.host import cgroup_folders, cpu_quota

_TICK: Final = os.sysconf("SC_CLK_TCK")
LEAST_NS: Final = 20_000_000
"""Of running and waiting, before a ratio of the two says anything."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Ratios of the time since the reading before; None where the host does not say. `busy_ratio` is the share of the cores that this process may
    use that worked (a machine may have many more), `others_ratio` the part of it that is not ours; `server_waiting_ratio` the share of its active time in which this process's main thread was
    ready and had no core. Pressures are shares of the last ten seconds (PSI, some)."""

    busy_ratio: float | None = None
    others_ratio: float | None = None
    steal_ratio: float | None = None
    throttled_ratio: float | None = None
    cpu_pressure: float | None = None
    memory_pressure: float | None = None
    io_pressure: float | None = None
    major_faults_per_s: float | None = None
    load_average: float | None = None
    server_waiting_ratio: float | None = None
    loop_lag_s: float = 0.0
    cores: tuple[int, ...] = ()
    """The cores that this process may use now."""
    quota: float | None = None
    """Cores' worth of time that our cgroup, and those above it, may take; None without a limit."""

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items() if value is not None}


class _Reading(NamedTuple):
    at_s: float
    ticks: dict[str, list[int]]
    """Of each core that this process may use, by kind (proc(5): stat)."""
    throttled_us: dict[Path, int]
    """Microseconds in which a quota held each of our cgroups back, since it exists; all its cores together."""
    major_faults: int | None
    own_cpu_s: float


class HostSensor:
    """Call `read` every few seconds with the CPU seconds that Hone's own processes have used."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root, self._proc = root, root / "proc"
        self._before: _Reading | None = None
        self._ran: tuple[int, int] | None = None

    def read(self, own_cpu_s: float = 0.0, loop_lag_s: float = 0.0) -> HostFacts:
        groups = list(cgroup_folders(self._root, "cpu"))
        now = _Reading(monotonic(), self._cpu_ticks(), _throttled_us(groups), self._major_faults(), own_cpu_s)
        before, self._before = self._before, now
        ratios: dict[str, float | None] = {}
        if before is not None:
            ratios = _between(before, now)
        return HostFacts(
            cpu_pressure=self._pressure("cpu"),
            memory_pressure=self._pressure("memory"),
            io_pressure=self._pressure("io"),
            load_average=self._load(),
            server_waiting_ratio=self._server_waiting(),
            loop_lag_s=loop_lag_s,
            cores=tuple(sorted(os.sched_getaffinity(0))),
            quota=min((quota for group in groups if (quota := cpu_quota(group)) is not None), default=None),
            **ratios,
        )

    def _cpu_ticks(self) -> dict[str, list[int]]:
        """Of all cores together where none is told by itself."""
        lines = [line.split() for line in _text(self._proc / "stat").splitlines() if line.startswith("cpu")]
        ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        found = {name: [int(value) for value in values[:8]] for name, *values in lines}
        return {name: ticks for name, ticks in found.items() if name in ours} or {name: found[name] for name in ("cpu",) if name in found}

    def _major_faults(self) -> int | None:
        for line in _text(self._proc / "vmstat").splitlines():
            if line.startswith("pgmajfault "):
                return int(line.split()[1])
        return None

    def _pressure(self, what: str) -> float | None:
        text = _text(self._proc / "pressure" / what)
        if not text.startswith("some"):
            return None
        return float(text.split("avg10=", 1)[1].split()[0]) / 100

    def _server_waiting(self) -> float | None:
        """Since the reading before (proc(5): schedstat); None where it hardly ran."""
        text = _text(self._proc / "self" / "schedstat")
        if not text:
            return None
        ran, waited = (int(value) for value in text.split()[:2])
        before, self._ran = self._ran, (ran, waited)
        if before is None or ran + waited - sum(before) < LEAST_NS:
            return None
        return (waited - before[1]) / (ran + waited - sum(before))

    def _load(self) -> float | None:
        text = _text(self._proc / "loadavg")
        return float(text.split()[0]) if text else None


def _between(before: _Reading, now: _Reading) -> dict[str, float | None]:
    elapsed = max(1e-3, now.at_s - before.at_s)
    ratios: dict[str, float | None] = {}
    if cores := before.ticks.keys() & now.ticks.keys():
        each = [[max(0, b - a) for a, b in zip(before.ticks[core], now.ticks[core], strict=False)] for core in cores]
        spent = [sum(kind) for kind in zip(*each, strict=True)]
        total = max(1, sum(spent))
        idle = sum(spent[3:5])
        steal = spent[7] if len(spent) > 7 else 0
        ratios["busy_ratio"] = (total - idle) / total
        ratios["steal_ratio"] = steal / total
        own = max(0.0, now.own_cpu_s - before.own_cpu_s) * _TICK / total
        ratios["others_ratio"] = max(0.0, (total - idle) / total - own)
    if held := [later - before.throttled_us[group] for group, later in now.throttled_us.items() if group in before.throttled_us]:
        ratios["throttled_ratio"] = min(1.0, max(0, *held) / 1e6 / elapsed)  # by whichever of them holds back most
    if before.major_faults is not None and now.major_faults is not None:
        ratios["major_faults_per_s"] = max(0, now.major_faults - before.major_faults) / elapsed
    return ratios


def _throttled_us(groups: Sequence[Path]) -> dict[Path, int]:
    """Of those that say it (the root of a hierarchy does not)."""
    found: dict[Path, int] = {}
    for group in groups:
        for line in _text(group / "cpu.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == "throttled_usec":
                found[group] = int(value)
            elif name == "throttled_time":  # v1, nanoseconds
                found[group] = int(value) // 1000
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
