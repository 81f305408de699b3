"""Counts and histograms of what was served, cheap enough for every request (about 2 µs); app.telemetry.prometheus shows them.

Labels are bound once per model and version; nothing here knows Prometheus or HTTP. All durations are seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Final

from app.domain import Observation

LADDER: Final = (
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""One ladder of bucket edges for every duration, so that quantiles of all panels compare."""
BATCH_LADDER: Final = (1, 2, 4, 8, 16, 32, 64, 128)
PHASES: Final = ("decode", "queue", "compute", "encode")
RETIRE_AFTER_S: Final = 900.0
RETIRE_AFTER_SCRAPES: Final = 3
KEPT_RETIRED: Final = 1000


class Histogram:
    """Counts per bucket (the last is +Inf) and the sum."""

    __slots__ = ("counts", "edges", "total")

    def __init__(self, edges: tuple[float, ...] = LADDER) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value


@dataclass(slots=True)
class VersionRow:
    """All that is counted for one version of one model."""

    model: str
    version: str
    codes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    duration: Histogram = field(default_factory=Histogram)
    phases: tuple[Histogram, Histogram, Histogram, Histogram] = field(
        default_factory=lambda: (Histogram(), Histogram(), Histogram(), Histogram())
    )
    batch: Histogram = field(default_factory=lambda: Histogram(BATCH_LADDER))
    by_size: dict[int, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))
    """Rows per call -> [calls, seconds], for the statistics extension."""
    rows: int = 0
    executions: int = 0
    failures: int = 0
    failed_s: float = 0.0
    last_ms: int = 0
    touched: float = 0.0
    scrapes_since: int = 0


@dataclass(slots=True)
class ObjectiveRow:
    """Requests within a model's own latency threshold, exact."""

    threshold_s: float
    within: int = 0
    total: int = 0


class Metrics:
    """Everything this process counted. Only the process that did a thing counts it."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], VersionRow] = {}
        self.objectives: dict[str, ObjectiveRow] = {}
        self.counters: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
        self.histograms: dict[str, dict[tuple[str, ...], Histogram]] = defaultdict(lambda: defaultdict(Histogram))
        self.gauges: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
        self.before_scrape: list[Callable[[], None]] = []
        self.from_zero: tuple[tuple[str, tuple[str, ...]], ...] = ()
        """Counters by model and version, with their other labels, that every version has from 0 on: born at 1 one would hide its first event."""
        self._retired: OrderedDict[tuple[str, str], VersionRow] = OrderedDict()

    def observe(self, seen: Observation) -> None:
        """Count one finished request."""
        row = self.rows.get((seen.model, seen.version)) or self._row(seen.model, seen.version)
        row.codes[seen.code] += 1
        row.touched = monotonic()
        row.scrapes_since = 0
        if seen.code != 200:
            row.failures += 1
            row.failed_s += seen.total_s
            return
        row.duration.observe(seen.total_s)
        decode, queue, compute, encode = row.phases
        decode.observe(seen.decode_s)
        queue.observe(seen.queue_s)
        compute.observe(seen.compute_s)
        encode.observe(seen.encode_s)
        row.rows += seen.rows
        row.last_ms = int(time() * 1000)
        objective = self.objectives.get(seen.model)
        if objective is not None:
            objective.total += 1
            objective.within += seen.total_s <= objective.threshold_s

    def batch(self, model: str, version: str, rows: int, compute_s: float) -> None:
        """Count one call of a model with `rows` rows."""
        row = self.rows.get((model, version)) or self._row(model, version)
        row.executions += 1
        row.batch.observe(rows)
        size = row.by_size[rows]
        size[0] += 1
        size[1] += compute_s

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        self.counters[name][labels] += by

    def time(self, name: str, *labels: str, seconds: float) -> None:
        self.histograms[name][labels].observe(seconds)

    def gauge(self, name: str, *labels: str, value: float | None) -> None:
        """What is not known any more (None) is not shown: a gauge that stays as it was looks like news."""
        if value is None:
            self.gauges[name].pop(labels, None)
        else:
            self.gauges[name][labels] = value

    def replace_gauge(self, name: str, values: Iterable[tuple[tuple[str, ...], float]]) -> None:
        """Set a whole gauge family; label sets that are not given disappear."""
        self.gauges[name] = dict(values)

    def objective(self, model: str, threshold_s: float | None) -> None:
        """Set a model's latency threshold; a changed one starts a new count, None ends it."""
        known = self.objectives.get(model)
        if threshold_s is None:
            self.objectives.pop(model, None)
        elif known is None or known.threshold_s != threshold_s:
            self.objectives[model] = ObjectiveRow(threshold_s)

    def begin(self, loaded: Iterable[tuple[str, str]]) -> None:
        """See that every loaded version is counted, though nobody asked it yet."""
        for key in loaded:
            if key not in self.rows:
                self._row(*key)

    def retire(self, loaded: set[tuple[str, str]]) -> None:
        """Called at each scrape: rows of versions long gone and scraped often enough leave the export, but not the memory.

        Loaded versions are shown from 0 on: a counter that begins at 5 hides these five from Prometheus's increase().
        """
        now = monotonic()
        self.begin(loaded)
        for key, row in list(self.rows.items()):
            if key in loaded:
                continue
            row.scrapes_since += 1
            if row.scrapes_since > RETIRE_AFTER_SCRAPES and now - row.touched > RETIRE_AFTER_S:
                self._retired[key] = self.rows.pop(key)
                for name, rest in self.from_zero:
                    if not self.counters[name][(*key, *rest)]:
                        del self.counters[name][(*key, *rest)]
        while len(self._retired) > KEPT_RETIRED:
            self._retired.popitem(last=False)

    def _row(self, model: str, version: str) -> VersionRow:
        key = (model, version)
        row = self._retired.pop(key) if key in self._retired else VersionRow(model, version)
        row.codes[200] += 0
        for name, rest in self.from_zero if version else ():
            self.count(name, model, version, *rest, by=0.0)
        row.scrapes_since = 0
        self.rows[key] = row
        return row
