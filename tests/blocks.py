"""Blocks of what a version did, what is normal for it, a quiet host, and findings of these."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from app.control.findings import Findings
from app.control.normal import Normal, learned
from app.control.planner import Situation
from app.control.suspicion import Kind, Suspicion
from app.telemetry.block import Block, Cost
from app.telemetry.hostfacts import HostFacts

QUIET = HostFacts(busy_ratio=0.4, others_ratio=0.02, steal_ratio=0.0, throttled_ratio=0.0, memory_pressure=0.0)
BUCKET = (0, 13, 2)


def block(cpu_s: float = 0.001, requests: int = 200, total_s: float = 0.004, stretch: float = 1.0, **more: Any) -> Block:
    """Ten seconds of `requests` answers that took `total_s` and cost `cpu_s` a row, in calls of `stretch` × their CPU time."""
    found = Block(0.0, 10.0, requests=requests, rows=requests, calls=requests, called_rows=requests, total_s=requests * total_s)
    found.cpu_s, found.within = requests * cpu_s, requests
    cost = found.costs[BUCKET] = Cost(requests, requests, requests * cpu_s)
    for number in range(requests):
        cost.cpu.add(cpu_s * (1 + 0.02 * (number % 3 - 1)))
        found.stretch.add(stretch)
        found.total.add(total_s * (1 + 0.1 * (number % 10) / 10))
    for name, value in more.items():
        setattr(found, name, value)
    return found


def normal(**more: Any) -> Normal:
    found = Normal()
    for _ in range(3):
        found = learned(found, block(), 30 << 20)
    assert found.known
    return replace(found, **more)


def findings(kinds: list[Kind], seen: Block | None = None, **more: Any) -> Findings:
    said = {"threshold_s": 0.003} if Kind.LATENCY in kinds else {}
    numbers: dict[Kind, dict[str, Any]] = {Kind.LATENCY: said, Kind.DEATHS: {"deaths": 3, "from_outside": 0}}
    found = [Suspicion(kind, kind.value, numbers.get(kind, {})) for kind in kinds]
    given = {"host": QUIET, "cores": 2, "instances": 2, "threads": 1, "normal": normal(), **more}
    return Findings(found, seen or block(), **given)


GOLDEN = Situation("1", "1")
