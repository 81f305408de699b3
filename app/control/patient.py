"""What the loop remembers of one model between ticks: what is normal, the incident that is open, when to look again. Pure; it decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from app.control.diagnosis import Cause, Diagnosis
from app.control.planner import Action
from app.control.suspicion import Kind, Normal, Suspicion

AGAIN_S: Final = 60.0
AGAIN_MOST_S: Final = 3600.0
"""A cause without a remedy (load, host, unknown) is looked into again after this long, then after twice, … at most after the other."""
BACKGROUND: Final = 0.1
"""Share of the cores' time that experiments may take."""


class Condition(StrEnum):
    STEADY = "steady"
    SUSPICIOUS = "suspicious"
    REPAIRING = "repairing"
    TRIAL = "trial"
    WATCHING = "watching"
    COOLING = "cooling"


@dataclass
class Looks:
    """Looks that found nothing to mend, also in incidents that ended by themselves: the next one for the same suspicion waits, ever longer."""

    kinds: frozenset[Kind] = frozenset()
    count: int = 0
    not_before: float = 0.0

    def due(self, kinds: frozenset[Kind], now: float) -> bool:
        return now >= self.not_before or not kinds <= self.kinds

    def in_vain(self, kinds: frozenset[Kind], now: float, experiments_s: float, cores: int) -> None:
        again = kinds <= self.kinds and now < self.not_before + AGAIN_MOST_S
        self.count = self.count + 1 if again else 1
        wait_s = min(AGAIN_MOST_S, AGAIN_S * 2.0 ** (self.count - 1))
        self.kinds, self.not_before = kinds, now + max(wait_s, experiments_s / (BACKGROUND * cores))


@dataclass
class Incident:
    """From the first suspicion until all is well again."""

    began: float
    suspicions: Sequence[Suspicion]
    diagnosis: Diagnosis | None = None
    tried: set[Action] = field(default_factory=set)
    acted_at: float = 0.0
    unproven: bool = False
    """A remedy was applied, and whether it helped is not known yet."""
    looking: bool = False
    suspected_at: float = 0.0


@dataclass
class Patient:
    """What the loop remembers of one model between ticks."""

    identity: tuple[str, int] = ("", 0)
    normal: Normal = field(default_factory=Normal)
    seen_until: float = 0.0
    calm: int = 0
    incident: Incident | None = None
    looks: Looks = field(default_factory=Looks)
    experiments_s: float = 0.0
    """What the experiments of the present look took."""
    failures: dict[Cause, int] = field(default_factory=dict)
    event: str = ""
    event_at: float = 0.0
    leapt_at: float = 0.0
    """Since when a leap of latency stands; 0 where none does."""
    due: bool = False
    """An event asks for a look."""
    watch_since: float = 0.0
    shown_until: float = 0.0
    judged_until: float = -1.0
    judged_deaths: int = 0
    found: list[Suspicion] = field(default_factory=list)
    """What the closed blocks made suspicious when the newest of them closed."""
    requests: int = 0
    """Answers of the stretch that was looked at then."""
    remedied_at: dict[Cause, float] = field(default_factory=dict)
    ladder_for: tuple[int, str] = (0, "")

    def leap_stands(self, leapt: bool, now: float, read_at: float) -> bool:
        """Whether a leap was there before the host was read last (at `read_at`): an older reading may know nothing of what explains it."""
        self.leapt_at = (self.leapt_at or now) if leapt else 0.0
        return leapt and read_at > self.leapt_at

    @property
    def condition(self) -> Condition:
        if self.incident is None:
            return Condition.STEADY
        if self.incident.acted_at:
            return Condition.REPAIRING
        return Condition.COOLING if self.incident.diagnosis is not None else Condition.SUSPICIOUS
