"""Tune: which threads, instances, spinning and batch limit serve a version best on this host. It gives settings, not a file; answers stay the same.

Every layout is measured against the settings in use, in turns, so that what the machine does to one it does to the other. A layout is taken
only for a gain that its interval shows; among those that are as good, the one that burns the fewest cores. The task `tune`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from optimizers.answers import feeds_of
from optimizers.base import Budget, Rejected
from optimizers.cores import busy_s
from optimizers.host import cpu_budget, host_class
from optimizers.layouts import low_load, throughput
from optimizers.measure import QUIET, Arm, ArmFailed, interval_json
from optimizers.samples import Samples
from optimizers.session import Feeds, Settings
from optimizers.stats import Interval
from optimizers.tune_config import TuneConfig

SPINS_US: Final = (0, 200, 1000)
LEAST_GAIN: Final = 0.05
"""What a layout must gain, by its interval, before the settings in use are left."""
AS_GOOD: Final = 0.05
"""Layouts within this of the best are as good as it: the cheapest of them is taken (a core burnt by spinning is one that others miss)."""
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
LONGEST_CALL_S: Final = 0.25
"""A batch that takes longer than this makes a newcomer wait too long; larger ones are not tried."""
BATCHES_S: Final = 3.0
LOUD_ROWS: Final = 2
"""After so many layouts that could not be compared, with none before them that could, the rest is not tried: the host is not idle."""
BUSY: Final = 0.2
BUSY_LOOK_S: Final = 1.0
"""Share of the cores that was in use before anything began, from which layouts are compared elsewhere where they can be."""
LEAST_S: Final = 0.5
LONGEST_COMPARISON_S: Final = 3.0
LAYOUT: Final = ("intra_op_threads", "instances", "spin_duration_us")
_METHOD: Final = "tune"


@dataclass(frozen=True)
class Row:
    """One layout against the settings in use. `speedup` is above 1 where it is faster: of calls at low load, or of rows at saturation."""

    settings: Settings
    speedup: Interval
    value: float
    p95_s: float | None
    cores_burnt: float
    waiting_ratio: float

    def to_json(self, unit: str) -> dict[str, Any]:
        return {
            **{key: getattr(self.settings, key) for key in (*LAYOUT, "batch_limit")}, "speedup": interval_json(self.speedup), unit: self.value,
            "p95_s": self.p95_s, "cores_burnt": round(self.cores_burnt, 3), "waiting_ratio": round(self.waiting_ratio, 4),
        }  # fmt: skip


@dataclass(frozen=True)
class BatchRow:
    """CPU cost of one batch size, on one quiet thread."""

    batch: int
    cpu_s_per_row: float
    call_s: float


@dataclass
class Tuned:
    """What was found. `changed` is False where the settings in use stay; `verdict`: tuned | kept | inconclusive."""

    settings: Settings
    objective: str
    verdict: str = "kept"
    reason: str = ""
    gain: Interval | None = None
    layouts: list[Settings] = field(default_factory=list)
    """What was to be tried; `table` has what was."""
    table: list[Row] = field(default_factory=list)
    batches: list[BatchRow] = field(default_factory=list)
    saturated: Row | None = None
    cores: int = 1
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        return "p50_s" if self.objective == "latency" else "rows_per_s"

    def to_json(self) -> dict[str, Any]:
        waiting = max((row.waiting_ratio for row in self.table), default=0.0)
        return {
            "verdict": self.verdict, "changed": self.verdict == "tuned", "settings": self.settings.to_json(), "objective": self.objective,
            "reason": self.reason, "summary": f"{self.verdict}: {self.reason}", "gain": interval_json(self.gain) if self.gain else None, "host_class": host_class().key, "cores": self.cores,
            "layouts": [{key: getattr(layout, key) for key in LAYOUT} for layout in self.layouts],
            "table": [row.to_json(self.unit) for row in self.table], "batches": [asdict(row) for row in self.batches],
            "saturated": self.saturated.to_json("rows_per_s") if self.saturated else None, "notes": self.notes,
            "quiet": {"waiting_ratio": waiting, "label": "quiet" if waiting <= 0.05 else "busy" if waiting <= QUIET else "loud"}, "seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class TuneRequest:
    """`samples`: an .npz of real inputs. `batchable`: requests may share a call. `settings`: those in use; the `fixed` among them stay.

    `elsewhere`: beside the traffic they can be compared as well, so that nothing is tried here on a busy host.
    """

    path: str
    samples: str
    stacked: bool = True
    batchable: bool = True
    settings: Settings = Settings()
    fixed: tuple[str, ...] = ()
    elsewhere: bool = False
    config: TuneConfig = TuneConfig()
    largest_batch: int = 64

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises Rejected."""
        try:
            known = {**data, "settings": Settings.from_json(data.get("settings")), "config": TuneConfig(**(data.get("config") or {}))}
            known["fixed"] = tuple(data.get("fixed") or ())
            if wrong := sorted(set(known["fixed"]) - {*LAYOUT, "batch_limit"}):
                raise Rejected(f"tune: {wrong[0]!r} cannot be fixed; there are {', '.join((*LAYOUT, 'batch_limit'))}")
            return cls(**known)
        except (TypeError, ValueError) as error:
            raise Rejected(f"tune: {error}") from None


def run(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """The task: a TuneRequest as JSON in, what was Tuned as JSON out."""
    return tune(TuneRequest.from_json(request), budget).to_json()


def tune(request: TuneRequest, budget: Budget) -> Tuned:
    """Measure, and choose. Raises Rejected where the version does not run."""
    began = time.monotonic()
    try:
        samples = Samples.load(Path(request.samples), stacked=request.stacked)
        found = _tune(request, samples, budget, began + min(request.config.max_seconds, max(1.0, budget.left_s - 2)))
    except (OSError, ValueError) as error:
        raise Rejected(f"tune: samples: {error}") from None
    except ArmFailed as failed:
        raise Rejected(f"tune: {failed}") from None
    found.seconds = time.monotonic() - began
    budget.tick(_METHOD, found.verdict, 1.0)
    return found


def layouts(cores: int, used: Settings, objective: str, fixed: Sequence[str] = ()) -> list[Settings]:
    """What is worth trying on `cores`: threads in powers of two and all of them, spinning where threads can, instances in what is left.

    What is `fixed` stays as it is.

    A single caller meets one instance only, so for latency their number stays (see `_fill`).
    """
    found = []
    for threads in (
        (used.intra_op_threads,) if "intra_op_threads" in fixed else sorted({t for t in (1, 2, 4, 8, 16, 32, cores) if t <= cores})
    ):
        fit = max(1, cores // threads)
        stay = "instances" in fixed
        instances = used.instances if stay else min(used.instances, fit) if objective == "latency" else fit
        spins = (used.spin_duration_us,) if "spin_duration_us" in fixed else SPINS_US if threads > 1 else (0,)
        found += [replace(used, intra_op_threads=threads, instances=instances, spin_duration_us=spin) for spin in spins]
    return [layout for layout in found if layout != used]


def choose(used: Settings, rows: list[Row]) -> tuple[Settings, Row | None]:
    """The cheapest of the best where its gain is shown, else the settings in use. Pure."""
    shown = [row for row in rows if row.speedup.low >= 1 + LEAST_GAIN]
    if not shown:
        return used, None
    best = max(row.speedup.estimate for row in shown)
    as_good = [row for row in shown if row.speedup.estimate >= best * (1 - AS_GOOD)]
    taken = min(as_good, key=lambda row: (round(row.cores_burnt, 1), -row.speedup.estimate))
    return taken.settings, taken


def choose_batch(used: int, rows: list[BatchRow]) -> int:
    """The batch limit in use where its rows cost about as little as any; else the smallest of which that is true. Pure."""
    least = min(row.cpu_s_per_row for row in rows)
    as_good = [row.batch for row in rows if row.cpu_s_per_row <= least * (1 + AS_GOOD)]
    return used if used in as_good else min(as_good)


def _tune(request: TuneRequest, samples: Samples, budget: Budget, until: float) -> Tuned:
    config = request.config
    found = Tuned(request.settings, config.goal, cores=config.cores or cpu_budget().cores)
    used = request.settings
    batched = request.batchable and samples.stacked and "batch_limit" not in request.fixed
    if batched and config.goal == "throughput":  # layouts are then compared at it
        used = _with_batch(used, found, request, samples, budget, until)
    bench = _Bench(request, samples, used, budget)
    tried = found.layouts = layouts(found.cores, used, config.goal, request.fixed)
    if request.elsewhere and (busy := _busy(BUSY_LOOK_S)) > BUSY:
        found.verdict, found.reason = "inconclusive", f"the host is busy: {busy:.0%} of its cores were in use before anything began"
        return found
    steps = len(tried) + (config.goal == "latency") + (batched and config.goal == "latency")
    with Arm(request.path, used) as first:
        for at, layout in enumerate(tried):
            seconds = (until - time.monotonic()) / (steps - at)
            if seconds < LEAST_S:
                found.notes.append(f"time was over before all layouts were tried: {len(tried) - at} were not")
                break
            budget.tick(_METHOD, describe(layout), 0.2 + 0.7 * at / steps)
            found.table.append(bench.row(first, layout, config.goal, seconds))
            if len(found.table) == LOUD_ROWS and _loud(found.table) == LOUD_ROWS:
                break
    if batched and config.goal == "latency" and not _loud(found.table):
        used = _with_batch(used, found, request, samples, budget, until)
        bench = _Bench(request, samples, used, budget)
    _conclude(found, used, request.settings)
    if config.goal == "latency" and found.verdict != "inconclusive":
        _fill(found, bench, until)
    return found


@dataclass
class _Bench:
    """What every comparison shares: the version, inputs for one call and for a full batch, and the settings to compare with."""

    request: TuneRequest
    samples: Samples
    used: Settings
    budget: Budget

    def __post_init__(self) -> None:
        self.rows = self.used.batch_limit if self.request.batchable and self.samples.stacked else 1
        self.full: Feeds = feeds_of(self.samples, np.arange(self.rows) % len(self.samples))
        self.one: Feeds = feeds_of(self.samples, [0])

    def row(self, first: Arm, layout: Settings, objective: str, seconds: float) -> Row:
        """`layout` beside the arm `first`, for at most some seconds."""
        tick: Callable[[], None] = lambda: self.budget.tick(_METHOD, describe(layout), 0.5)
        with Arm(self.request.path, layout) as other:
            part = min(LONGEST_COMPARISON_S, seconds * 0.8)
            if objective == "latency":
                compared = low_load(first, other, self.one, seconds=part, tick=tick)
            else:
                compared = throughput(first, other, (self.full, self.full), (self.rows, self.rows), seconds=part, tick=tick)
        ratio, side = compared.ratio, compared.other
        if objective == "latency":
            ratio = Interval(1 / ratio.estimate, 1 / ratio.high, 1 / ratio.low if ratio.low > 0 else math.inf)
        return Row(layout, ratio, side.value, side.p95_s, side.cores_burnt, compared.quiet.waiting_ratio)


def describe(layout: Settings) -> str:
    spinning = f", spinning {layout.spin_duration_us} µs" if layout.spin_duration_us else ""
    return f"{layout.instances} instance{'s' if layout.instances > 1 else ''} of {layout.intra_op_threads} thread{'s' if layout.intra_op_threads > 1 else ''}{spinning}"


def _fill(found: Tuned, bench: _Bench, until: float) -> None:
    """Instances in the cores that are left cost a single caller nothing; they are taken where they serve many callers faster."""
    chosen = found.settings
    instances = max(1, found.cores // chosen.intra_op_threads)
    seconds = until - time.monotonic()
    if instances <= chosen.instances or seconds < LEAST_S or "instances" in bench.request.fixed:
        return
    filled = replace(chosen, instances=instances)
    with Arm(bench.request.path, chosen) as first:
        row = bench.row(first, filled, "throughput", seconds)
    found.saturated = row
    if row.waiting_ratio <= QUIET and row.speedup.low >= 1 + LEAST_GAIN:
        found.settings, found.verdict = filled, "tuned"
        more = (
            f"{instances} instances serve many callers {row.speedup.estimate:.2f} × as fast [{row.speedup.low:.2f}, {row.speedup.high:.2f}]"
        )
        found.reason = f"{found.reason}; {more}" if found.gain else more


def _batches(request: TuneRequest, samples: Samples, budget: Budget, until: float) -> list[BatchRow]:
    """CPU time per row of each batch size, in turns on one quiet thread; stops where calls get long or rows get dearer."""
    sizes = sorted({size for size in (*BATCHES, request.settings.batch_limit) if size <= request.largest_batch})
    ends = time.monotonic() + min(BATCHES_S, 0.2 * (until - time.monotonic()))
    with Arm(request.path, request.settings.one_quiet_thread()) as arm:
        keys: dict[int, int] = {}
        for size in sizes:
            key = arm.keep(feeds_of(samples, np.arange(size) % len(samples)))
            call_s = min(arm.time(key, 2, 1).cpu_s)
            if keys and (call_s > LONGEST_CALL_S or time.monotonic() > ends):
                break
            keys[size] = key
        taken: dict[int, list[float]] = {size: [] for size in keys}
        rounds = 0
        while rounds < 3 or (time.monotonic() < ends and rounds < 12):
            for size, key in keys.items() if rounds % 2 else reversed(list(keys.items())):
                budget.tick(_METHOD, f"batch {size}", 0.05)
                taken[size].append(
                    float(np.median(arm.time(key, max(2, min(50, math.ceil(0.01 / max(1e-6, min(taken[size], default=0.01))))), 1).cpu_s))
                )
            rounds += 1
    return [BatchRow(size, float(np.median(values)) / size, float(np.median(values))) for size, values in taken.items()]


def _with_batch(used: Settings, found: Tuned, request: TuneRequest, samples: Samples, budget: Budget, until: float) -> Settings:
    found.batches = _batches(request, samples, budget, until)
    return replace(used, batch_limit=choose_batch(used.batch_limit, found.batches))


def _busy(look_s: float) -> float:
    """Share of this process's cores that was in use over a look; 0 where the kernel does not say."""
    before = busy_s()
    time.sleep(look_s)
    after = busy_s()
    return 0.0 if before is None or after is None else (after - before) / look_s / len(os.sched_getaffinity(0))


def _loud(table: Sequence[Row]) -> int:
    """How many layouts the host was too busy to compare."""
    return sum(row.waiting_ratio > QUIET for row in table)


def _conclude(found: Tuned, used: Settings, before: Settings) -> None:
    """`used` is `before` with the batch limit that was found; layouts were compared with it."""
    loud = _loud(found.table)
    settings, taken = choose(used, [row for row in found.table if row.waiting_ratio <= QUIET])
    settings = replace(settings, batch_limit=used.batch_limit)
    found.settings, found.gain = settings, taken.speedup if taken else None
    if loud:
        found.notes.append(
            f"{loud} of {len(found.table)} layouts tried ({len(found.layouts)} in all) were not compared: threads waited for a core too long "
            f"(bound {QUIET:.0%})"
        )
    if taken:
        found.verdict = "tuned"
        found.reason = f"{taken.speedup.estimate:.2f} × as fast [{taken.speedup.low:.2f}, {taken.speedup.high:.2f}] by {found.objective}, {taken.cores_burnt:.1f} cores"
    elif loud:
        found.verdict, found.settings = "inconclusive", before
        found.reason = f"the host was too busy to compare all layouts: threads waited for a core up to {max(r.waiting_ratio for r in found.table):.0%} of the time"
    elif settings.batch_limit != before.batch_limit:
        found.verdict = "tuned"
        found.reason = (
            f"batch limit {settings.batch_limit} (was {before.batch_limit}): the smallest at which a row costs as little CPU time as it can"
        )
    else:
        found.reason = "no layout gains what its interval shows to be worth a change"
