"""What one version did in a stretch of time: counts, sums of seconds and sketches. It merges; who records it is `app.telemetry.window`."""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from app.telemetry.likeness import Likeness
from app.telemetry.sketch import LogSketch

Bucket: TypeAlias = tuple[int, int, int]
"""(rows of the call, bytes of a row, rest before it): calls that cost alike. Rows and bytes as powers of two."""
Size: TypeAlias = tuple[int, int]
"""The same without the rest."""
RESTS_S: Final = (0.002, 0.015)
"""After a longer rest the next call finds its code and weights in slower caches. On two cores with AMX: 1.1 to 1.6 × the CPU time after 5 ms, 1.3 to 2 ×
after 25, and no more after a second (benchmarks.share shows what that does to a comparison)."""


def bucket_of(rows: int, row_bytes: int, rested_s: float = math.inf) -> Bucket:
    return (rows - 1).bit_length() if rows > 1 else 0, row_bytes.bit_length(), bisect(RESTS_S, rested_s)


@dataclass(slots=True)
class Cost:
    """Calls of one bucket. `cpu` sketches CPU seconds per row."""

    calls: int = 0
    rows: int = 0
    cpu_s: float = 0.0
    cpu: LogSketch = field(default_factory=LogSketch)

    def merge(self, other: Cost) -> None:
        self.calls += other.calls
        self.rows += other.rows
        self.cpu_s += other.cpu_s
        self.cpu.merge(other.cpu)


@dataclass(slots=True)
class Block:
    """All that one version did between `began` and `ended`. Sums of seconds; `disturbed` where Hone itself used the cores meanwhile."""

    began: float
    ended: float
    requests: int = 0
    failures: int = 0
    refused: int = 0
    expired: int = 0
    """Requests whose own deadline passed, or would: they say that too much came for it, not that the version erred."""
    failed_calls: int = 0
    """Requests that the model itself failed on. A caller who sends what it cannot take has them as well, so they are no failures by themselves."""
    within: int = 0
    rows: int = 0
    calls: int = 0
    called_rows: int = 0
    compute_s: float = 0.0
    cpu_s: float = 0.0
    wait_s: float = 0.0
    queue_s: float = 0.0
    edge_s: float = 0.0
    total_s: float = 0.0
    non_finite: int = 0
    poisoned: int = 0
    """Answers with NaN or infinity to requests that held some: the callers' doing, where the other ones are the version's."""
    deaths: int = 0
    compared: int = 0
    agreed: float = 0.0
    """Of those compared with golden, each counting by the share of its rows that agree."""
    labelled: int = 0
    right: int = 0
    disturbed: bool = False
    total: LogSketch = field(default_factory=LogSketch)
    queue: LogSketch = field(default_factory=LogSketch)
    compute: LogSketch = field(default_factory=LogSketch)
    edge: LogSketch = field(default_factory=LogSketch)
    """Of each answered request: waiting, in the model's call, being read and written; `total` is all of it. Merged by `with_phases` alone."""
    stretch: LogSketch = field(default_factory=LogSketch)
    """Wall time over CPU time of each call: what a call waits, in terms of what it works."""
    costs: dict[Bucket, Cost] = field(default_factory=dict)
    likeness: Likeness = field(default_factory=Likeness)

    @property
    def seconds(self) -> float:
        return max(1e-9, self.ended - self.began)

    @property
    def offered(self) -> int:
        return self.requests + self.failures + self.refused + self.expired

    def with_phases(self, other: Block) -> None:
        self.queue.merge(other.queue)
        self.compute.merge(other.compute)
        self.edge.merge(other.edge)

    @property
    def waiting_ratio(self) -> float:
        """Share of the runner's time in which its threads were ready to run and had no core."""
        busy = self.cpu_s + self.wait_s
        return self.wait_s / busy if busy > 0 else 0.0

    @property
    def queue_ratio(self) -> float:
        return self.queue_s / self.total_s if self.total_s > 0 else 0.0

    @property
    def edge_ratio(self) -> float:
        """Share of the requests' time that went into reading and writing them."""
        return self.edge_s / self.total_s if self.total_s > 0 else 0.0

    def costs_by_size(self) -> dict[Size, Cost]:
        """Whatever the rest before the calls: a version that gets slower rests less, and must not be a kind of its own for that."""
        found: dict[Size, Cost] = {}
        for (rows, size, _), cost in self.costs.items():
            found.setdefault((rows, size), Cost()).merge(cost)
        return found

    def merge(self, other: Block, sketches: bool = True) -> None:
        """Add `other`; its counts alone where the sketches are not asked for, which take nearly all of the time."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.began, self.ended = min(self.began, other.began), max(self.ended, other.ended)
        self.disturbed = self.disturbed or other.disturbed
        self.likeness.merge(other.likeness)
        if not sketches:
            return
        self.total.merge(other.total)
        self.stretch.merge(other.stretch)
        for bucket, cost in other.costs.items():
            self.costs.setdefault(bucket, Cost()).merge(cost)


_SUMS: Final = (
    "requests", "failures", "refused", "expired", "failed_calls", "within", "rows", "calls", "called_rows", "compute_s", "cpu_s", "wait_s", "queue_s",
    "edge_s", "total_s", "non_finite", "poisoned", "deaths", "compared", "agreed", "labelled", "right",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of one version since its track began: two of them, seconds apart, say what happened between, whatever the blocks."""

    requests: int = 0
    refused: int = 0
    failures: int = 0
    within: int = 0
    queue_s: float = 0.0
    total_s: float = 0.0
    expired: int = 0

    def plus(self, other: Block | Totals) -> Totals:
        return Totals(
            self.requests + other.requests, self.refused + other.refused, self.failures + other.failures, self.within + other.within,
            self.queue_s + other.queue_s, self.total_s + other.total_s, self.expired + other.expired,
        )  # fmt: skip

    def minus(self, earlier: Totals) -> Totals:
        return Totals(
            self.requests - earlier.requests, self.refused - earlier.refused, self.failures - earlier.failures, self.within - earlier.within,
            self.queue_s - earlier.queue_s, self.total_s - earlier.total_s, self.expired - earlier.expired,
        )  # fmt: skip

    @property
    def offered(self) -> int:
        return self.requests + self.refused + self.failures + self.expired

    @property
    def queue_ratio(self) -> float:
        return self.queue_s / self.total_s if self.total_s > 0 else 0.0
