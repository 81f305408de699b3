"""Two versions, or two settings of one, in the layouts in which they would be served: throughput at saturation, latency at low load.

With several threads there is no clean CPU time, so this is wall time, interleaved, and counts only where the host was quiet enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from optimizers.cores import busy_s, stolen_s
from optimizers.host import cpu_budget
from optimizers.measure import LEAST_ROUNDS, LOOK_CONFIDENCE, QUIET, Arm, Quietness, interval_json, quietness
from optimizers.session import Feeds
from optimizers.stats import Interval, hodges_lehmann

SLICE_S: Final = 0.1
LOOKS: Final = (8, 16)
"""Rounds after which it may be decided, beside the end: each look at LOOK_CONFIDENCE, so that all three together are at least 95 %."""
LOUD_ROUNDS: Final = 3
"""So many rounds and half the time in which threads always waited for others too long: the rest would be no better."""
PACED_CALLS: Final = 6
"""Calls in one turn at low load; the first two of them wake caches and threads and are not counted."""
_UNCOUNTED: Final = 2


@dataclass(frozen=True)
class LayoutSide:
    """One side of a layout comparison. `value` is rows per second at saturation, or the median seconds per call at low load."""

    value: float
    p95_s: float | None
    cores_burnt: float

    def to_json(self, unit: str) -> dict[str, Any]:
        shown = {unit: self.value, "cores_burnt": round(self.cores_burnt, 3)}
        return shown if self.p95_s is None else {**shown, "p95_s": self.p95_s}


@dataclass(frozen=True)
class LayoutComparison:
    """The other layout relative to the first: ratio of rows per second (above 1 is better), or of seconds per call (below 1 is better)."""

    unit: str
    ratio: Interval
    rounds: int
    rounds_left_out: int
    first: LayoutSide
    other: LayoutSide
    quiet: Quietness

    def to_json(self) -> dict[str, Any]:
        return {
            "ratio": interval_json(self.ratio), "rounds": self.rounds, "rounds_left_out": self.rounds_left_out, "incumbent": self.first.to_json(self.unit),
            "candidate": self.other.to_json(self.unit), "quiet": self.quiet.to_json(),
        }  # fmt: skip


@dataclass(frozen=True)
class _Turn:
    """One arm's turn: the number compared, call times where there are any, and the kernel's account."""

    value: float
    wall_s: tuple[float, ...]
    elapsed_s: float
    ran_s: float
    waited_s: float


def throughput(
    first: Arm,
    other: Arm,
    feeds: tuple[Feeds, Feeds],
    rows: tuple[int, int],
    *,
    seconds: float = 8.0,
    decided: Callable[[Interval], bool] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> LayoutComparison:
    """Rows per second with all instances calling back to back, each arm at its own batch size. It ends early where it is `decided`."""
    keys = (first.keep(feeds[0]), other.keep(feeds[1]))
    for arm in (first, other):
        arm.pin(cpu_budget().affinity)

    def turn(which: int) -> _Turn:
        load = (first, other)[which].saturate(keys[which], SLICE_S)
        return _Turn(load.calls_per_s * rows[which], (), load.elapsed_s, load.ran_s, load.waited_s)

    return _interleave("rows_per_s", turn, seconds, decided, tick)


def low_load(
    first: Arm,
    other: Arm,
    feeds: Feeds,
    *,
    spread: bool = False,
    seconds: float = 8.0,
    pause_s: float | None = None,
    decided: Callable[[Interval], bool] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> LayoutComparison:
    """Wall time of single calls with pauses between them, in which threads go to sleep or spin. It ends early where it is `decided`.

    With `spread` each thread of a call has a core of its own. Else the kernel may wake a helper on its caller's core while another one idles: they
    wait for each other, which says nothing of the host, and one arm may be luckier than the other.
    """
    keys = (first.keep(feeds), other.keep(feeds))
    for arm in (first, other):
        (arm.spread if spread else arm.pin)(cpu_budget().affinity)
    pause = pause_for(first.time(keys[0], 3, 2).wall_s) if pause_s is None else pause_s

    def turn(which: int) -> _Turn:
        piece = (first, other)[which].time(keys[which], PACED_CALLS, 1, pause)
        wall = piece.wall_s[_UNCOUNTED:]
        return _Turn(float(np.median(wall)), wall, piece.elapsed_s, piece.ran_s, piece.waited_s)

    return _interleave("p50_s", turn, seconds, decided, tick)


def pause_for(wall_s: Sequence[float]) -> float:
    """Low load means idle for about as long as busy, and long enough that threads fall asleep."""
    return min(0.010, max(0.002, float(np.median(wall_s))))


def _interleave(
    unit: str, turn: Callable[[int], _Turn], seconds: float, decided: Callable[[Interval], bool] | None, tick: Callable[[], None]
) -> LayoutComparison:  # fmt: skip
    """ABBA until `seconds` are over, at least the rounds that an interval needs (or twice the time); less where it is decided or too loud.

    Rounds in which threads waited for a core too long are left out where enough others remain: chosen by the waiting, never by the result.
    """
    rounds: list[_Round] = []
    began, stolen, busy, own = time.monotonic(), stolen_s(), busy_s(), time.process_time()
    confidence = LOOK_CONFIDENCE if decided is not None else 0.95

    def seen() -> LayoutComparison:
        calm = [one for one in rounds if one.waiting_ratio <= QUIET]
        used = calm if len(calm) >= LEAST_ROUNDS else rounds
        turns = [t for one in used for t in (*one.first, *one.other)]
        ran = sum(t.ran_s for one in rounds for t in (*one.first, *one.other)) + time.process_time() - own
        waited = for_others(sum(t.waited_s for t in turns), ran, busy, busy_s())
        quiet = quietness(sum(t.ran_s for t in turns), waited, stolen_s() - stolen, time.monotonic() - began)
        first, other = _side([t for one in used for t in one.first]), _side([t for one in used for t in one.other])
        ratio = hodges_lehmann([one.log_ratio for one in used], confidence).exp()
        return LayoutComparison(unit, ratio, len(used), len(rounds) - len(used), first, other, quiet)

    while not rounds or (spent := time.monotonic() - began) < seconds or (len(rounds) < LEAST_ROUNDS and spent < 2 * seconds):
        sides: tuple[list[_Turn], list[_Turn]] = ([], [])
        for which in (1, 0, 0, 1) if len(rounds) % 2 else (0, 1, 1, 0):
            sides[which].append(turn(which))
        rounds.append(_Round(*sides))
        tick()
        tried = len(rounds) >= LOUD_ROUNDS and time.monotonic() - began > seconds / 2
        if tried and not any(one.waiting_ratio <= QUIET for one in rounds) and not seen().quiet.wall_counts:
            break
        if decided is not None and len(rounds) in LOOKS and (so_far := seen()).quiet.wall_counts and decided(so_far.ratio):
            break
    return seen()


def for_others(waited_s: float, ran_s: float, busy_before: float | None, busy_after: float | None) -> float:
    """How much of the waiting others can be the reason of, who had what is left of the cores' busy seconds: the rest is own threads on one core.

    The kernel often wakes a helper on its caller's core while another idles. That is how the layout runs here, and says nothing of the host.
    """
    if busy_before is None or busy_after is None:
        return waited_s
    return min(waited_s, max(0.0, busy_after - busy_before - ran_s))


@dataclass(frozen=True)
class _Round:
    """Two turns of each arm."""

    first: list[_Turn]
    other: list[_Turn]

    @property
    def log_ratio(self) -> float:
        means = [float(np.mean(np.log([t.value for t in side]))) for side in (self.first, self.other)]
        return means[1] - means[0]

    @property
    def waiting_ratio(self) -> float:
        both = [*self.first, *self.other]
        return quietness(sum(t.ran_s for t in both), sum(t.waited_s for t in both), 0.0, 0.0).waiting_ratio


def _side(turns: list[_Turn]) -> LayoutSide:
    wall = [value for turn in turns for value in turn.wall_s]
    burnt = sum(t.ran_s for t in turns) / sum(t.elapsed_s for t in turns)
    return LayoutSide(float(np.median([t.value for t in turns])), float(np.quantile(wall, 0.95)) if wall else None, burnt)
