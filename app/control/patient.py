"""What the loop remembers of one model between ticks: what is normal, the incident that is open, when to look again. Pure; it decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from app.catalog.model_config import Promise
from app.control.diagnosis import SLOW, Cause, Diagnosis
from app.control.findings import HOST_CLASS
from app.control.normal import LEAST_CALLS, Normal
from app.control.planner import Remedy
from app.control.suspicion import Kind, Suspicion
from app.domain import JSON, ModelView
from app.telemetry.block import Block

SETTLE_BLOCKS: Final = 2
"""Blocks in a row without suspicion after which an incident is over."""
AGAIN_S: Final = 60.0
AGAIN_MOST_S: Final = 3600.0
"""A cause without a remedy (load, host, unknown) is looked into again after this long, then after twice, … at most after the other."""
EVENT_S: Final = 300.0
"""So long an event may explain what is seen."""
OWN: Final = frozenset({Cause.VERSION, Cause.INPUT, Cause.SETTINGS, Cause.PROCESS})
"""Causes that lie in one model: they say nothing of the host."""
FIRST_S: Final = 10.0
"""After so long a runner holds what its version needs; what comes on top is growth."""
SHAPES: Final = "change of the inputs' shapes"
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
        wait_s = min(AGAIN_MOST_S, AGAIN_S * 2.0 ** min(self.count - 1, 10))  # it may stand for weeks
        self.kinds = kinds | self.kinds if now < self.not_before else kinds
        self.not_before = now + max(wait_s, experiments_s / (BACKGROUND * cores))


@dataclass
class Incident:
    """From the first suspicion until all is well again."""

    began: float
    suspicions: Sequence[Suspicion]
    diagnosis: Diagnosis | None = None
    tried: set[Remedy] = field(default_factory=set)
    acted_at: float = 0.0
    acted_on: Cause | None = None
    """What the latest remedy was for: a busy host that is blamed after it mended nothing."""
    unproven: bool = False
    """A remedy was applied, and whether it helped is not known yet."""
    awaited: tuple[str, bool] = ("", False)
    """The version that a remedy leads to, and whether one that is being built may come as well: any other is somebody else's."""
    looking: bool = False
    seen_at: dict[Kind, float] = field(default_factory=dict)
    """When each kind was out of the ordinary last: an incident may stand for much longer than what began it."""

    def is_news(self, found: Sequence[Suspicion]) -> bool:
        """Whether something is wrong now that was not when it was last looked into: what is known of the incident does not explain it."""
        return bool({one.kind for one in found} - {one.kind for one in self.suspicions} - {Kind.EVENT})

    def explains(self, found: Sequence[Suspicion]) -> bool:
        """Whether all of it is the slowness that was blamed, by experiment, before anybody had felt it."""
        return self.diagnosis is not None and self.diagnosis.explains_slowness and all(one.kind in {*SLOW, Kind.EVENT} for one in found)

    def well_in(self, block: Block, promises: Sequence[Promise]) -> bool:
        """Whether a block in which nothing is suspected tells that all is well. Slowness is over when promises are kept, not when they are no longer
        clearly broken."""
        kept = Kind.LATENCY not in self.seen_at or all(block.total.share_above(one.threshold_s) <= 1 - one.share for one in promises)
        return kept and not block.disturbed and block.requests >= LEAST_CALLS

    @property
    def suspected_at(self) -> float:
        return max(self.seen_at.values(), default=self.began)


@dataclass
class Watched:
    """A watch as this process saw it: (previous, new) version, the window's clock when it began and was looked at last, and for how long."""

    pair: tuple[str, str] = ("", "")
    since: float = 0.0
    looked_at: float = 0.0
    seconds: float = 0.0


@dataclass
class Patient:
    """What the loop remembers of one model between ticks."""

    identity: tuple[str, int] = ("", 0)
    golden: tuple[str, str] = ("", "")
    """What was deployed, by name and hash, when it was looked at last."""
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
    again_at: float = 0.0
    """When it asks once more, since the host was too busy to tell; 0 where it does not."""
    shapes_after: float = 0.0
    """Until then shapes that change again are no event: traffic that goes to and fro would have one experiment after the other."""
    watched: Watched = field(default_factory=Watched)
    orphan: tuple[str, float] = ("", 0.0)
    """A version on trial without an open job, and when it was first seen so (the window's clock)."""
    shown_until: float = 0.0
    judged_until: float = -1.0
    judged_deaths: int = 0
    found: list[Suspicion] = field(default_factory=list)
    """What the closed blocks made suspicious when the newest of them closed."""
    requests: int = 0
    """Answers of the stretch that was looked at then."""
    non_finite: tuple[int, int] = (0, 0)
    """(answers with NaN or infinity, answers) of the version that answers, over the stretch that was looked at last."""
    non_finite_before: tuple[int, int] = (0, 0)
    """The same of the one before it: what golden always answered is no fault of the next."""
    remedied_at: dict[Cause, float] = field(default_factory=dict)
    ladder_for: tuple[int, str] = (0, "")
    suspected_at: dict[Kind, float] = field(default_factory=dict)
    """When each kind was out of the ordinary last, also while another model is looked into and this one has no incident yet."""
    first_memory: int = 0
    """Bytes that the runner held soon after it began to answer, whatever the traffic; 0 where that is not known."""
    switched_at: list[float] = field(default_factory=list)
    """When the loop took another version here by itself, time.monotonic()."""

    def switched(self, since: float) -> int:
        self.switched_at = [at for at in self.switched_at if at >= since]
        return len(self.switched_at)

    def see(self, found: Sequence[Suspicion], now: float) -> None:
        seen = {one.kind: now for one in found}
        self.suspected_at |= seen
        if self.incident is not None:
            self.incident.seen_at |= seen

    def weigh(self, view: ModelView, now: float) -> None:
        """Note what its runner holds once it has answered for a while."""
        if not self.first_memory and now - view.active_since > FIRST_S:
            self.first_memory = view.memory_bytes

    def suspected_of(self, kinds: Set[Kind], since: float) -> bool:
        """Whether any of `kinds` was out of the ordinary here at or after `since`, and is not known to be this one model's own doing."""
        one = self.incident
        if one is not None and one.diagnosis is not None and one.diagnosis.cause in OWN:
            return False
        return any(self.suspected_at.get(kind, since - 1) >= since for kind in kinds)

    def leap_stands(self, leapt: bool, now: float, read_at: float) -> bool:
        """Whether a leap was there before the host was read last (at `read_at`): an older reading may know nothing of what explains it."""
        self.leapt_at = (self.leapt_at or now) if leapt else 0.0
        return leapt and read_at > self.leapt_at

    def looked_at_event(self, inconclusive: bool, cores: int, now: float) -> None:
        """An event was looked into."""
        later = now + max(AGAIN_S, self.experiments_s / (BACKGROUND * cores))
        self.again_at = later if inconclusive and later < self.event_at + EVENT_S else 0.0
        if self.event == SHAPES:
            self.shapes_after = later

    def serves(self, active: str, generation: int, now: float, moved: bool) -> bool:
        """Note what answers from now on; whether that is an event. `moved`: the server was started on another class of hosts a moment ago."""
        before, self.identity = self.identity, (active, generation)
        if before == self.identity:
            return False
        self.event, self.event_at = "swap" if before[0] != active else "settings", now
        if not before[0]:
            self.event = HOST_CLASS if moved else "start"
        self.another_answers()
        self.due = self.event in ("swap", HOST_CLASS) and self.incident is None
        return True

    def another_answers(self) -> None:
        """Another version, or other settings, from now on: what was seen of the one before stays as far as it is compared with."""
        self.non_finite_before = self.non_finite if self.non_finite[1] >= LEAST_CALLS else (0, 0)
        self.normal = Normal(shapes=self.normal.shapes)  # what comes is the callers' doing, whichever version answers
        self.seen_until, self.judged_until, self.found, self.requests = 0.0, -1.0, [], 0
        self.looks, self.leapt_at, self.again_at, self.non_finite = Looks(), 0.0, 0.0, (0, 0)
        self.first_memory = 0

    def condition(self, acting: Callable[[Incident], bool]) -> Condition:
        """`acting`: whether a remedy is under way. One that was looked into again, and left with nothing to do, repairs nothing any more."""
        if self.incident is None:
            return Condition.STEADY
        if self.incident.acted_at and (self.incident.unproven or acting(self.incident)):
            return Condition.REPAIRING
        return Condition.COOLING if self.incident.diagnosis is not None else Condition.SUSPICIOUS


def told(incident: Incident | None) -> JSON:
    """What is wrong now and whom it was blamed on; nothing while all is well."""
    diagnosis = incident.diagnosis if incident is not None else None
    return {
        "suspicions": [one.text for one in incident.suspicions] if incident is not None else [],
        "cause": diagnosis.cause.value if diagnosis is not None else "", "why": diagnosis.text if diagnosis is not None else "",
    }  # fmt: skip
