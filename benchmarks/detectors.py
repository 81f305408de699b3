"""Rules that raise a suspicion from one call after another: Hone's own, simple ones that people use, control charts, and river's detectors.

Each learns from a quiet baseline and is started afresh after each suspicion. They judge nothing further.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from app.catalog.model_config import ModelConfig
from app.control.loop import TICK_S
from app.control.normal import Normal, learned
from app.control.suspicion import COST_LIMIT, LEAP_LIMIT, Kind, Seen, suspicions
from app.domain import Observation
from app.telemetry.block import Block
from app.telemetry.window import BLOCK_S as HONE_BLOCK_S
from app.telemetry.window import Track, Window
from benchmarks.traces import Floats, Phase
from optimizers.stats import trimmed_mean

BLOCK_S: Final = 10.0
CHART_BLOCK_S: Final = 1.0
"""Control charts need the spread of blocks, so theirs are short."""


class Detector(Protocol):
    def see(self, at_s: float, value_s: float) -> bool:
        """Take one call's time in; True is a suspicion."""


@dataclass(frozen=True)
class Rule:
    """A named way to make a detector from a baseline, and the signal that it is fed: wall or cpu."""

    name: str
    signal: str
    make: Callable[[Floats, Floats], Detector]

    def suspicions(self, baseline: Phase, phase: Phase) -> list[float]:
        """Seconds into the phase of each suspicion."""
        known, values = self._signal(baseline), self._signal(phase)
        found = []
        detector = self.make(baseline.at_s, known)
        for at, value in zip(phase.at_s, values, strict=True):
            if detector.see(float(at), float(value)):
                found.append(float(at))
                detector = self.make(baseline.at_s, known)
        return found

    def _signal(self, phase: Phase) -> Floats:
        return phase.wall_s if self.signal == "wall" else phase.cpu_s


@dataclass
class Blocks:
    """Trimmed means of blocks of `seconds`, on a grid from second 0 on."""

    seconds: float
    _number: int = -1
    _values: list[float] = field(default_factory=list)

    def add(self, at_s: float, value: float) -> float | None:
        """The mean of the block that this value ends by not belonging to it."""
        number = int(at_s // self.seconds)
        ended = trimmed_mean(self._values) if self._values and number != self._number else None
        if number != self._number:
            self._number, self._values = number, []
        self._values.append(value)
        return ended

    def whole(self, at_s: Floats, values: Floats) -> list[float]:
        return [mean for at, value in zip(at_s, values, strict=True) if (mean := self.add(float(at), float(value))) is not None]


@dataclass
class Hone:
    """The server's own window and suspicion of cost, on a clock that the trace tells."""

    normal: Normal = field(default_factory=Normal)
    now: float = 0.0
    looked: float = 0.0

    def __post_init__(self) -> None:
        self._window = Window(clock=lambda: self.now)

    def see(self, at_s: float, value_s: float) -> bool:
        self.now = at_s
        self._window.observe(Observation("m", "1", 200, value_s, 0.0, 0.0, value_s, 0.0, 1, 1, value_s, 0.0))
        self._window.called("m", "1", 1, 4096, value_s, value_s, 0.0)
        if at_s < self.looked + TICK_S:
            return False
        self.looked = at_s
        track = self._track
        for blocks in (list(track.blocks)[-2:], [track.open]):
            found = suspicions(Seen(blocks, Block(at_s, at_s), 0, 0), self.normal, ModelConfig(), None)
            if any(one.kind is Kind.COST for one in found):
                return True
        return False

    @property
    def _track(self) -> Track:
        return self._window.tracks["m", "1"]

    @classmethod
    def after(cls, at_s: Floats, values: Floats) -> Hone:
        """One that has learned what is normal from the baseline."""
        learner = cls()
        for at, value in zip(at_s, values, strict=True):
            learner.see(float(at), float(value))
        normal = Normal()
        for block in learner._track.blocks:
            normal = learned(normal, block, 0)
        return cls(normal)


@dataclass
class InARow:
    """So many blocks in a row above `limit` times the baseline."""

    normal: float
    count: int
    limit: float
    blocks: Blocks = field(default_factory=lambda: Blocks(BLOCK_S))
    run: int = 0

    def see(self, at_s: float, value_s: float) -> bool:
        mean = self.blocks.add(at_s, value_s)
        if mean is not None:
            self.run = self.run + 1 if mean > self.limit * self.normal else 0
        return self.run >= self.count


@dataclass
class Cusum:
    """Page's one-sided chart on the logarithm of block means, in standard deviations of the baseline's."""

    mean: float
    spread: float
    slack: float = 1.0
    limit: float = 8.0
    blocks: Blocks = field(default_factory=lambda: Blocks(CHART_BLOCK_S))
    total: float = 0.0

    def see(self, at_s: float, value_s: float) -> bool:
        mean = self.blocks.add(at_s, value_s)
        if mean is not None:
            self.total = max(0.0, self.total + (math.log(mean) - self.mean) / self.spread - self.slack)
        return self.total > self.limit


@dataclass
class River:
    """One of river's detectors on times relative to the baseline's median; what falls is no suspicion."""

    detector: Any
    normal: float
    rising: Callable[[Any, float], bool]

    def see(self, at_s: float, value_s: float) -> bool:
        before = getattr(self.detector, "estimation", 0.0)
        self.detector.update(value_s / self.normal)
        return bool(self.detector.drift_detected) and self.rising(self.detector, before)


def plain_rules() -> list[Rule]:
    """All that need no library."""
    hone = Rule(
        f"Hone's suspicion: 2 blocks of {HONE_BLOCK_S:.0f} s > {COST_LIMIT - 1:+.0%}, or one, even open, > {LEAP_LIMIT - 1:+.0%}",
        "cpu",
        Hone.after,
    )
    rules = [
        Rule(f"{count} blocks of {BLOCK_S:.0f} s > {limit - 1:+.0%}", signal, _in_a_row(count, limit))
        for signal, count, limit in (("cpu", 2, 1.15), ("cpu", 2, 1.06), ("wall", 3, 1.2))
    ]
    return [hone, *rules] + [Rule("CUSUM k=1 h=8", signal, _cusum) for signal in ("cpu", "wall")]


def river_rules() -> list[Rule]:
    """River's ADWIN and Page–Hinkley with their defaults; none where river is not installed."""
    try:
        drift = importlib.import_module("river.drift")
    except ImportError:
        return []

    def adwin(at_s: Floats, values: Floats) -> Detector:
        return _warm(River(drift.ADWIN(), float(np.median(values)), lambda detector, before: detector.estimation > before), values)

    def page_hinkley(at_s: Floats, values: Floats) -> Detector:
        return _warm(River(drift.PageHinkley(mode="up"), float(np.median(values)), lambda detector, before: True), values)

    return [Rule(name, signal, make) for name, make in (("ADWIN", adwin), ("Page–Hinkley", page_hinkley)) for signal in ("cpu", "wall")]


def _warm(detector: River, values: Floats) -> River:
    for value in values:
        detector.see(0.0, float(value))
    return detector


def _in_a_row(count: int, limit: float) -> Callable[[Floats, Floats], Detector]:
    return lambda at_s, values: InARow(trimmed_mean(values), count, limit)


def _cusum(at_s: Floats, values: Floats) -> Detector:
    logs = np.log(Blocks(CHART_BLOCK_S).whole(at_s, values))
    return Cusum(float(logs.mean()), max(1e-3, float(logs.std(ddof=1))))
