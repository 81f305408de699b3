"""Latency traces of one model beside neighbours, in phases with and without a planted slowdown: read from a file, or recorded.

In a file: `one_thread`, a row per call with seconds, phase, wall ms, CPU ms, run-queue wait ms (further columns are ignored), and
`one_thread_phases`, the phases' names: neighbours and the slowdown planted in percent, as in cpu2+20.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.neighbours import NONE, neighbours
from optimizers.measure import Arm
from optimizers.session import Feeds, Settings

Floats = NDArray[np.float64]
BESIDE: Final = (NONE, "cpu2", "cpu4", "mem2", "burst2")
UNCHANGED_SHARES: Final = 3
"""Of a neighbour's time in a recording, in units of one planted phase: false suspicions need more hours than delays do."""
PERIOD_S: Final = 0.05


@dataclass(frozen=True)
class Phase:
    """Calls under one condition. `planted` is the slowdown in percent, by its name; times in seconds from the phase's start."""

    beside: str
    planted: int
    at_s: Floats
    wall_s: Floats
    cpu_s: Floats

    @property
    def seconds(self) -> float:
        return float(self.at_s[-1] - self.at_s[0])


@dataclass(frozen=True)
class Trace:
    """The first phase is quiet and unchanged: what every rule learns from."""

    name: str
    phases: tuple[Phase, ...]

    @property
    def baseline(self) -> Phase:
        return self.phases[0]

    def planted_ratio(self, planted: int) -> float:
        """What a planted slowdown really is: CPU time over that of the unchanged model, both quiet."""
        quiet = [[p.cpu_s.mean() for p in self.phases if p.beside == NONE and p.planted == level] for level in (0, planted)]
        return float(np.mean(quiet[1]) / np.mean(quiet[0])) if all(quiet) else float("nan")


def read(path: Path) -> Trace:
    """Raises ValueError for files of another form."""
    with np.load(path, allow_pickle=False) as file:
        if not {"one_thread", "one_thread_phases"} <= set(file.files):
            raise ValueError(f"{path} has no arrays one_thread and one_thread_phases; it has {', '.join(file.files)}")
        return _trace(path.name, file["one_thread"], [str(name) for name in file["one_thread_phases"]])


def record(files: Mapping[int, Path], feeds: Sequence[Feeds], minutes: float, save: Path, say: Callable[[str], None]) -> Trace:
    """Call the file of each slowdown (in percent; 0 is the model itself) beside all neighbours in turn, and save the trace."""
    plan = phases_of(sorted(files), minutes * 60)
    rows: list[tuple[float, ...]] = []
    arms = {planted: Arm(path, Settings()) for planted, path in files.items()}
    try:
        for number, (beside, planted, seconds) in enumerate(plan):
            say(f"recording {beside}+{planted} for {seconds:.0f} s")
            with neighbours(beside):
                rows += _calls(arms[planted], feeds, seconds, number)
    finally:
        for arm in arms.values():
            arm.close()
    names = [f"{beside}+{planted}" for beside, planted, _ in plan]
    array = np.array(rows, np.float64)
    np.savez_compressed(save, one_thread=array, one_thread_phases=np.array(names))
    return _trace(save.name, array, names)


def phases_of(levels: Sequence[int], seconds: float) -> list[tuple[str, int, float]]:
    """(neighbours, slowdown in percent, seconds): a quiet baseline, then beside each neighbour unchanged for long and each slowdown for less."""
    unit = seconds / (len(BESIDE) * (UNCHANGED_SHARES + len(levels) - 1) + UNCHANGED_SHARES)
    plan = [(NONE, 0, unit * UNCHANGED_SHARES)]
    for beside in BESIDE:
        plan += [(beside, level, unit * (1 if level else UNCHANGED_SHARES)) for level in levels]
    return plan


def _calls(arm: Arm, feeds: Sequence[Feeds], seconds: float, phase: int) -> list[tuple[float, ...]]:
    """One call each PERIOD_S, or as often as it can."""
    keys = [arm.keep(each) for each in feeds]
    rows: list[tuple[float, ...]] = []
    began = time.monotonic()
    while (now := time.monotonic()) - began < seconds:
        piece = arm.time(keys[len(rows) % len(keys)], 1, 0)
        rows.append((now, phase, piece.wall_s[0] * 1e3, piece.cpu_s[0] * 1e3, piece.waited_s * 1e3))
        time.sleep(max(0.0, now + PERIOD_S - time.monotonic()))
    return rows


def _trace(name: str, rows: NDArray[np.floating], names: Sequence[str]) -> Trace:
    phases = []
    for number, label in enumerate(names):
        mine = rows[rows[:, 1] == number].astype(np.float64)
        beside, _, planted = label.partition("+")
        phases.append(Phase(beside, int(planted), mine[:, 0] - mine[0, 0], mine[:, 2] / 1e3, mine[:, 3] / 1e3))
    if (phases[0].beside, phases[0].planted) != (NONE, 0):
        raise ValueError(f"{name} begins with {names[0]}; the first phase must be none+0, quiet and unchanged, to learn from")
    return Trace(name, tuple(phases))
