"""What a candidate gains in speed over the incumbent here, and whether that is worth a swap.

CPU time of one quiet thread decides, because a busy host cannot bend it; wall time in the layouts served is compared where the host is quiet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from optimizers.answers import Fault
from optimizers.layouts import LayoutComparison, low_load, throughput
from optimizers.measure import LOUD, QUIET, Arm, ArmFailed, Comparison, Quietness, compare, interval_json, narrow
from optimizers.session import Feeds, Settings
from optimizers.stats import Interval
from optimizers.torch_module import TorchSource

HARM: Final = 0.05
"""Loss of capacity, or growth of time per call, that is never taken, whatever is gained elsewhere."""
LEAST_S: Final = 1.0
HOPELESS: Final = 0.6
"""Share of time spent waiting for a core above which wall time in layouts is not even tried."""
Outcome = Literal["passed", "failed", "inconclusive"]
_NO_SOURCES: Final[Mapping[str, TorchSource]] = {}


@dataclass(frozen=True)
class Goal:
    """`objective`: latency (time of one row) or throughput (time per row in full batches). `least_gain`: 0.05 is 5 %; None: no slower will do."""

    objective: Literal["latency", "throughput"] = "latency"
    least_gain: float | None = 0.05

    def __post_init__(self) -> None:
        if self.objective not in {"latency", "throughput"}:
            raise ValueError(f"objective {self.objective!r} is unknown; name latency or throughput")

    def weigh(self, ratio: Interval) -> Outcome:
        """A ratio of times per row, below 1 where the candidate is faster: is the gain shown by its interval, or its absence?"""
        needed = 1 - self.least_gain if self.least_gain is not None else 1 + HARM
        if ratio.high <= needed:
            return "passed"
        return "failed" if ratio.low > needed else "inconclusive"

    def decided(self, ratio: Interval) -> bool:
        """Enough rounds: the gain is shown either way and its size is known to ± 4 %, or the interval is narrow anyway."""
        settled = self.weigh(ratio) != "inconclusive" and ratio.high - ratio.low <= 0.08 * ratio.estimate
        return settled or narrow(ratio)


@dataclass
class SpeedReport:
    """`latency` by batch size; `rows_ratio` is the time per row that the goal is about."""

    verdict: Outcome = "inconclusive"
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    latency: dict[str, Comparison] = field(default_factory=dict)
    rows_ratio: Interval = Interval(math.nan, -math.inf, math.inf)
    capacity: LayoutComparison | None = None
    layout: LayoutComparison | None = None

    @property
    def headline(self) -> str:
        ratio = self.rows_ratio
        if not math.isfinite(ratio.low) or not math.isfinite(ratio.high):
            return ""
        return f"CPU time per row {ratio.estimate - 1:+.0%} [{ratio.low - 1:+.0%}, {ratio.high - 1:+.0%}]"

    @property
    def quiet(self) -> Quietness:
        found = [part.quiet for part in (*self.latency.values(), self.capacity, self.layout) if part]
        return Quietness(max((q.waiting_ratio for q in found), default=0.0), max((q.steal_ratio for q in found), default=0.0))

    def to_json(self) -> dict[str, Any]:
        return {
            "latency": {
                "verdict": self.verdict, "rows_ratio": interval_json(self.rows_ratio) if self.headline else None,
                "batches": [part.to_json() for part in self.latency.values()], "layout": self.layout.to_json() if self.layout else None,
            },
            "capacity": self.capacity.to_json() if self.capacity else {},
            "quiet": self.quiet.to_json(),
        }  # fmt: skip


def speed(
    incumbent: str,
    incumbent_settings: Settings,
    candidate: str,
    candidate_settings: Settings,
    inputs: Mapping[int, Feeds],
    goal: Goal,
    *,
    seconds: float,
    tick: Callable[[str, float], None],
    sources: Mapping[str, TorchSource] = _NO_SOURCES,
) -> SpeedReport:
    """Both versions side by side; `sources` by path for PyTorch ones. `inputs` by batch size: 1, and each side's batch limit.

    Raises Fault where one of them breaks down.
    """
    report, began = SpeedReport(), time.monotonic()
    sizes = (incumbent_settings.batch_limit, candidate_settings.batch_limit)
    sizes = sizes if set(sizes) <= set(inputs) else (1, 1)
    settings = (incumbent_settings, candidate_settings)
    try:
        quiet = tuple(one.one_quiet_thread() for one in settings)
        with _arm(incumbent, quiet[0], sources) as first, _arm(candidate, quiet[1], sources) as other:
            common = sorted({1, min(sizes)})
            for batch in common:
                tick(f"timing at batch {batch}", 0.1)
                found = compare(
                    first,
                    other,
                    inputs[batch],
                    batch,
                    seconds=seconds * 0.4 / len(common),
                    decided=goal.decided,
                    tick=lambda: tick("timing", 0.3),
                )
                report.latency[f"batch {batch}"] = found
            report.rows_ratio = _rows_ratio(report, goal, sizes)
        left = seconds - (time.monotonic() - began)
        if left < LEAST_S or report.quiet.waiting_ratio > HOPELESS:
            why = "time was over" if left < LEAST_S else f"threads waited for a core {report.quiet.waiting_ratio:.0%} of the time"
            report.notes.append(f"capacity in the layouts served was not measured: {why}")
            conclude(report, goal)
            return report
        with _arm(incumbent, settings[0], sources) as first, _arm(candidate, settings[1], sources) as other:
            part = min(8.0, left / 3)
            feeds = (inputs[sizes[0]], inputs[sizes[1]])
            report.capacity = throughput(
                first, other, feeds, sizes, seconds=part, decided=_more_or_harm, tick=lambda: tick("capacity", 0.7)
            )
            if max(s.intra_op_threads for s in settings) > 1:
                report.layout = low_load(
                    first,
                    other,
                    inputs[1],
                    spread=True,
                    seconds=part,
                    decided=_less_or_harm,
                    tick=lambda: tick("latency in its layout", 0.9),
                )
    except ArmFailed as failed:
        raise Fault("candidate" if failed.path == Path(candidate) else "incumbent", str(failed)) from None
    conclude(report, goal)
    return report


def _arm(path: str, settings: Settings, sources: Mapping[str, TorchSource]) -> Arm:
    return Arm(path, settings, source=sources.get(path))


def _rows_ratio(report: SpeedReport, goal: Goal, sizes: tuple[int, int]) -> Interval:
    """Time per row as the goal counts it. A side that must be served row by row is charged for it: no batch of its makes a row cheaper."""
    if goal.objective == "latency" or min(sizes) == max(sizes) == 1:
        return report.latency["batch 1"].cpu
    return report.latency[f"batch {min(sizes)}"].cpu


def conclude(report: SpeedReport, goal: Goal) -> None:
    """Fill in the verdict from what was measured: the gain, then harm elsewhere, then whether the host let us measure at all."""
    ratio, quiet = report.rows_ratio, report.quiet
    loud = max((part.quiet.waiting_ratio for part in report.latency.values()), default=0.0)
    report.verdict = goal.weigh(ratio)
    wanted = f"{goal.least_gain:.0%} less" if goal.least_gain is not None else "no more"
    if not all(part.quiet.cpu_counts for part in report.latency.values()):
        report.verdict = "inconclusive"
        report.reasons.append(f"the host was too busy to measure: threads waited for a core {loud:.0%} of the time (bound {LOUD:.0%})")
        return
    if report.verdict == "failed":
        report.reasons.append(f"no gain worth a swap: {report.headline}, wanted {wanted}")
    elif report.verdict == "inconclusive":
        report.reasons.append(f"the gain is not shown: {report.headline or 'too few rounds in the time given'}, wanted {wanted}")
    for harm in (*_slower_batches(report), *_worse_layouts(report)):
        report.verdict = "failed"
        report.reasons.append(harm)
    if not quiet.wall_counts:
        report.notes.append(
            f"wall time and capacity are not shown: threads waited for a core {quiet.waiting_ratio:.0%} of the time (bound {QUIET:.0%})"
        )


def _more_or_harm(capacity: Interval) -> bool:
    """Enough rounds: the candidate takes no less, or clearly too little."""
    return capacity.low > 1 or capacity.high < 1 - HARM


def _less_or_harm(latency: Interval) -> bool:
    return latency.high < 1 or latency.low > 1 + HARM


def _slower_batches(report: SpeedReport) -> list[str]:
    return [
        f"slower at {name}: CPU time {part.cpu.estimate - 1:+.0%} (at least {part.cpu.low - 1:+.0%})"
        for name, part in report.latency.items()
        if part.cpu.low > 1 + HARM and part.cpu is not report.rows_ratio
    ]


def _worse_layouts(report: SpeedReport) -> list[str]:
    """Harm in the layouts served, where the host was quiet enough for wall time to say so."""
    found = []
    capacity, layout = report.capacity, report.layout
    if capacity and capacity.quiet.wall_counts and capacity.ratio.high < 1 - HARM:
        found.append(f"less capacity in its layout: {capacity.other.value:.0f} rows/s, the incumbent's is {capacity.first.value:.0f}")
    if layout and layout.quiet.wall_counts and layout.ratio.low > 1 + HARM:
        found.append(f"slower in its layout: p50 {layout.other.value * 1e3:.2f} ms, the incumbent's is {layout.first.value * 1e3:.2f} ms")
    return found
