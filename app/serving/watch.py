"""When is a runner hung? Judged by its own progress, never by a client's patience (design 12, facts/noise.md).

Hung is no CPU progress while neither waiting for a core nor throttled, being stopped, or CPU time far beyond the worst of its kind. Wall
time alone says nothing: noise makes a call 10 to 27 times its median. The judging part is pure; `look` reads /proc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from app.serving import procfs


@dataclass(frozen=True, slots=True)
class Patience:
    """Bounds in seconds. A batch is looked at only after `glance_s`."""

    glance_s: float = 0.4
    stopped_s: float = 1.0
    stalled_s: float = 1.0
    stalled_first_s: float = 10.0
    stalled_times: float = 3.0
    disk_s: float = 60.0
    cpu_floor_s: float = 10.0
    cpu_first_s: float = 600.0
    cpu_times: float = 30.0


@dataclass(frozen=True, slots=True)
class Usual:
    """What batches of this kind took at worst so far; nothing where none was seen."""

    seen: bool = False
    worst_wall_s: float = 0.0
    worst_cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sight:
    """One look at a running batch: since when it showed no progress, what state it is in, what CPU time it has used."""

    cpu_s: float
    used_s: float
    progress_at: float
    state: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """Why a runner must go, and whether its work is to blame (a runner that somebody stopped is not)."""

    reason: str
    own_fault: bool


RUNNABLE: Final = "R"
STOPPED: Final = "Tt"
DISK: Final = "D"


def seen(before: Sight | None, cpu_s: float, state: str, sharers: int, now: float) -> Sight:
    """The next sight of a batch, one of `sharers` that use the CPU time read.

    Running, or runnable without a core, is no standstill; a throttled thread shows as runnable too.
    """
    if before is None:
        return Sight(cpu_s, 0.0, now, state)
    used_s = cpu_s - before.cpu_s
    turned = (state in STOPPED) != (before.state in STOPPED)
    moved = used_s > 0 or state == RUNNABLE or turned
    return Sight(cpu_s, before.used_s + used_s / max(1, sharers), now if moved else before.progress_at, state)


def judge(sight: Sight, usual: Usual, patience: Patience, now: float) -> Judgement | None:
    """None while the batch may go on."""
    still_s = now - sight.progress_at
    if sight.state in STOPPED:
        if still_s >= patience.stopped_s:
            return Judgement(f"the runner was stopped from outside (state {sight.state}) for {still_s:.1f} s", own_fault=False)
        return None
    allowed_s = patience.disk_s if sight.state == DISK else patience.stalled_first_s
    if usual.seen and sight.state != DISK:
        allowed_s = max(patience.stalled_s, patience.stalled_times * usual.worst_wall_s)
    if still_s >= allowed_s:
        return Judgement(f"the runner hung: no CPU progress for {still_s:.1f} s while no one kept it from a core", own_fault=True)
    most_s = max(patience.cpu_floor_s, patience.cpu_times * usual.worst_cpu_s) if usual.seen else patience.cpu_first_s
    if sight.used_s > most_s:
        return Judgement(
            f"the runner hung: {sight.used_s:.0f} CPU seconds on a batch whose kind took {usual.worst_cpu_s:.3f} at worst", own_fault=True
        )
    return None


def look(pid: int, tid: int, threads: int, busy: int, before: Sight | None, now: float) -> Sight | None:
    """Read one batch's progress: of its own thread where it computes alone, else its share of the process. None where it is gone."""
    own = tid and threads <= 1
    facts = procfs.facts(pid, tid if own else 0)
    if facts is None:
        return None
    if own:
        return seen(before, facts.cpu_s, facts.state, 1, now)
    state = facts.state
    if state not in STOPPED and RUNNABLE in procfs.states(pid):
        state = RUNNABLE
    return seen(before, facts.cpu_s, state, busy, now)
