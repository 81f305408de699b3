"""Brown-out: when load is about to break the objective, a faster proven version answers instead, until the load would fit again.

The journal holds the envelope (which versions may); stepping inside it is the data plane's own, within seconds and without the store. It
builds nothing, blames nobody, and leaves *desired* and *previous* alone. The versions next to the one that stands answer beside it (`slot.py`): the
one above what it has room for, so that no more get a lesser answer than must; the one below what would wait too long until the next step.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from time import monotonic
from typing import Final, NamedTuple

from app.domain import Event, Mode, ModelState, short
from app.serving.service import InferenceService
from app.serving.slot import Loaded, Neighbours, Slot, asked_alike
from app.telemetry.block import Totals
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window

log = logging.getLogger("hone.serving")
GLANCE_S: Final = 0.15
GLANCES: Final = 3
"""So many glances in a row at a queue that is too long are a step down: a hiccup is over by then, a burst is not."""
FULL: Final = 0.5
"""A queue is too long from this share of the promise on: calls, and what runs already, take their part of it too. What comes then is answered below."""
ABOUT: Final = 0.8
"""Of that: since nothing is added to a queue that is too long, it is seen a little shorter as well."""
SPARE: Final = 0.1
"""The version above goes on answering while what waits takes no more than this share of the promise: it waits for cores that are free anyway."""
PRESSED_S: Final = 1.0
"""So long after a queue was too long it answers only where nobody waits: a full server has nothing to spare."""
LOOK_S: Final = 1.0
SPAN_S: Final = 3.0
"""What a look sees: short enough to act within seconds, long enough for a few hundred requests."""
DOWN_LOOKS: Final = 2
REFUSED: Final = 0.02
QUEUED: Final = 0.5
LEAST: Final = 10
UP_SHARE: Final = 0.7
"""Up only when what is offered is less than this share of what the upper version did when it was full."""
HOLD_S: Final = 20.0
MOST_HOLD_S: Final = 900.0
SETTLED_S: Final = 600.0
"""After this long on the desired version, without a step, the hold-off is short again."""
PROVED_S: Final = 60.0
"""A step up that is taken back within this time, without more load than it was taken for, shows that the upper version can do less."""
MORE: Final = 1.3
BESIDE_S: Final = 30.0
"""So much of what the version above answers beside tells what it could do: it may have been full only since others had the cores."""
REFUTED_S: Final = 3600.0
"""A step up that was taken back knows better for so long: calls take longer where there are more of them."""
MOST_BESIDE: Final = 0.8
"""A version above that answers so much of all that comes beside, while next to nothing waits, can do the rest as well, whatever it did before."""


class Full(NamedTuple):
    """When the queue was first seen too long, how many waited, and what the version and all of the envelope had done by then."""

    at: float
    queued: int
    own: Totals
    all: Totals


class Mark(NamedTuple):
    """A look: which version stood then, what it had done by itself, and what all of the envelope had."""

    at: float
    version: str
    own: Totals
    all: Totals


@dataclass
class Footing:
    """Where one model stands. `capacities` are requests a second that a version answered while it was full, or could by what its calls take since.

    `refuted` is when a step up to a version was taken back for load.
    """

    rung: str = ""
    """The version that was last told to stand in for the active one. It may be stopped without a word to the ladder."""
    bad_looks: int = 0
    long_glances: int = 0
    full_since: Full | None = None
    calm_since: float = 0.0
    stepped_at: float = -SETTLED_S
    up_at: float = -PROVED_S
    up_offered: float = 0.0
    """Requests a second that were offered when it last stepped up, at `up_at`."""
    hold_s: float = HOLD_S
    pressed_at: float = -PRESSED_S
    capacities: dict[str, float] = field(default_factory=dict)
    refuted: dict[str, float] = field(default_factory=dict)
    marks: deque[Mark] = field(default_factory=lambda: deque(maxlen=round(SPAN_S / LOOK_S) + 1))


class Ladder:
    """One per server. `want(model)` is what the journal says; steps are told to `record`."""

    def __init__(
        self, service: InferenceService, window: Window, metrics: Metrics, want: Callable[[str], ModelState | None], record: Callable[[Event], None],
        clock: Callable[[], float] = monotonic,
    ) -> None:  # fmt: skip
        self._service, self._window, self._metrics, self._want, self._record = service, window, metrics, want, record
        self._clock = clock
        self._footings: dict[str, Footing] = {}

    async def run(self) -> None:
        looked_at = self._clock()
        while True:
            await asyncio.sleep(GLANCE_S)
            look = self._clock() - looked_at > LOOK_S - GLANCE_S / 2
            looked_at = self._clock() if look else looked_at
            for slot in list(self._service.slots.values()):
                try:
                    self.glance(slot)
                    if look:
                        self.look(slot)
                except Exception:
                    log.exception("model %s: the ladder could not be looked at", slot.name)

    def glance(self, slot: Slot) -> None:
        """A step down before answers are late: what waits takes too much of what is promised, and goes on to."""
        want, promise, footing = self._want(slot.name), slot.config.objective.promise, self._footings.setdefault(slot.name, Footing())
        current = slot.rung or slot.active
        near = slot.neighbours
        for one in (
            (current, near.above, near.below) if near is not None else (current,)
        ):  # one caller's flood is limited before anybody steps down for it
            if one is not None:
                one.engine.promise(promise.threshold_s if promise is not None else math.inf, slot.config.limits.caller_share)
        if promise is None:
            slot.spare_s, slot.most_s = 0.0, math.inf
        if want is None or promise is None or current is None or not slot.config.ladder or not want.rungs:
            return
        now, waits_s, queued = self._clock(), current.engine.backlog_s, current.engine.queued
        slot.most_s = FULL * promise.threshold_s
        if waits_s > slot.most_s:
            footing.pressed_at = now
        slot.spare_s = SPARE * promise.threshold_s if now - footing.pressed_at > PRESSED_S else 0.0
        if waits_s <= ABOUT * slot.most_s:
            footing.long_glances, footing.full_since = 0, None
            return
        rungs = _rungs(slot, want)
        own, totals = self._window.totals(slot.name, current.version), self._totals(slot, rungs)
        footing.long_glances += 1
        full = footing.full_since = footing.full_since or Full(now, queued, own, totals)
        if footing.long_glances < GLANCES or current.version not in rungs:
            return
        span_s, offered = max(1e-3, now - full.at), totals.minus(full.all).offered + queued - full.queued
        lower = self._lower(slot, footing, rungs[rungs.index(current.version) + 1 :], offered / span_s)
        if lower is None:
            return
        answered = own.minus(full.own).requests / span_s  # of long calls none may have ended in so short a time
        footing.capacities[current.version] = self._capacity(slot, footing, rungs, current, max(answered, queued / waits_s), now)
        why = f"load: what waits takes {waits_s * 1e3:.0f} ms, {promise.threshold_s * 1e3:.0f} are promised; {short(answered)} requests/s answered"
        self._step(slot, footing, rungs, lower, why, now, up=False)

    def look(self, slot: Slot) -> None:
        """One look at one model: a step down, a step up, or nothing."""
        want, active = self._want(slot.name), slot.active
        footing = self._footings.setdefault(slot.name, Footing())
        if want is None or active is None:
            footing.rung = ""
            self._metrics.gauge("hone_ladder_rung", slot.name, value=None)
            return
        now = self._clock()
        rungs = _rungs(slot, want)
        if footing.rung == active.version:
            slot.rung, slot.neighbours, footing.rung = None, None, ""  # it was promoted: nobody stands in for it any more
        self._metrics.gauge("hone_ladder_rung", slot.name, value=float(slot.rung is not None))
        if footing.rung and slot.rung is None:
            self._step(slot, footing, rungs, None, f"{footing.rung} is no longer loaded", now, up=True)
        current = slot.rung.version if slot.rung is not None else active.version
        if current not in rungs:
            self._step(slot, footing, rungs, None, "the envelope changed", now, up=True)
            return
        at = rungs.index(current)
        self._stand(slot, rungs, slot.rung)
        footing.marks.append(Mark(now, current, self._window.totals(slot.name, current), self._totals(slot, rungs)))
        first, last = next(mark for mark in footing.marks if mark.version == current), footing.marks[-1]
        own, seen, span_s = last.own.minus(first.own), last.all.minus(first.all), max(1e-3, now - first.at)
        if slot.rung is None and now - footing.stepped_at > SETTLED_S:
            footing.hold_s = HOLD_S
        if self._overloaded(slot, own):  # who waits for the version above since before a step is late anyway
            footing.bad_looks, footing.calm_since = footing.bad_looks + 1, 0.0
            lower = self._lower(slot, footing, rungs[at + 1 :], seen.offered / span_s)
            if footing.bad_looks >= DOWN_LOOKS and lower is not None:
                footing.capacities[current] = self._capacity(slot, footing, rungs, slot.versions.get(current), own.requests / span_s, now)
                why = f"load: {short(seen.offered / span_s)} requests/s offered, {short(own.requests / span_s)} answered, queue {own.queue_ratio:.0%} of latency"
                self._step(slot, footing, rungs, lower, why, now, up=False)
            return
        footing.bad_looks = 0
        if upper := self._upper(slot, rungs[:at]):
            self._perhaps_up(slot, footing, rungs, upper, seen.offered / span_s, now)

    def _upper(self, slot: Slot, above: list[str]) -> str:
        """The next version up that can answer: one that does not load (a promotion, too) must not keep it down; '' at the top."""
        if not above:
            return ""
        loaded = self._loaded(slot, above[::-1]) or slot.active
        return loaded.version if loaded is not None else ""

    def _perhaps_up(self, slot: Slot, footing: Footing, rungs: list[str], upper: str, offered: float, now: float) -> None:
        """`offered` in requests a second. What the upper version can do may be unknown, where it never was full: then only trying tells."""
        capacity = footing.capacities.get(upper)
        could, share = self._beside(slot, rungs, upper, max(footing.stepped_at, now - BESIDE_S))
        if capacity is not None and could > capacity and now - footing.refuted.get(upper, -REFUTED_S) >= REFUTED_S:
            capacity = footing.capacities[upper] = could
        enough = capacity is None or not offered or offered < UP_SHARE * capacity
        if not enough and share < MOST_BESIDE:
            footing.calm_since = 0.0
            return
        footing.calm_since = footing.calm_since or now
        if now - footing.calm_since < footing.hold_s:
            return
        loaded = self._loaded(slot, [upper])
        if loaded is not None:
            known = (
                f"below {UP_SHARE:.0%} of the {short(capacity)} that {upper} can do"
                if capacity is not None
                else f"what {upper} can do is not known"
            )
            why = f"{short(offered)} requests/s offered for {footing.hold_s:.0f} s, {known if enough else f'and {upper} answers {share:.0%} of them'}"
            footing.hold_s = min(MOST_HOLD_S, 2 * footing.hold_s)
            footing.up_at, footing.up_offered = now, offered
            footing.marks.append(Mark(now, upper, self._window.totals(slot.name, upper), footing.marks[-1].all))
            self._step(slot, footing, rungs, loaded if loaded is not slot.active else None, why, now, up=True)

    def _capacity(self, slot: Slot, footing: Footing, rungs: list[str], full: Loaded | None, answered: float, now: float) -> float:
        """Requests a second that `full` can do: what it answered; no more than what it was just tried with, where that proved too much."""
        recent = [mark for mark in footing.marks if full is not None and mark.version == full.version and mark.at >= footing.up_at]
        if full is None or not recent or now - footing.up_at > PROVED_S:
            return answered
        came = self._totals(slot, rungs).minus(recent[0].all).offered + full.engine.queued
        if came / max(LOOK_S, now - recent[0].at) >= MORE * footing.up_offered:
            return answered
        footing.refuted[full.version] = now
        return min(answered, footing.up_offered)

    def _beside(self, slot: Slot, rungs: list[str], version: str, began: float) -> tuple[float, float]:
        """Of a version that answers beside another: requests a second that it could do, by what its calls take, and its share of all that came.
        Zeros where too few tell."""
        seen = {one: self._window.since(slot.name, one, began, sketches=False) for one in {*rungs, version}}
        loaded, own = slot.versions.get(version), seen[version]
        if loaded is None or own.requests < LEAST:
            return 0.0, 0.0
        settings = loaded.engine.settings
        took_s = max(own.compute_s, own.cpu_s / settings.intra_op_threads)  # a lone call had threads of the other instances as well
        could = settings.instances * own.requests / took_s if took_s else 0.0
        return could, own.requests / max(1, sum(one.offered for one in seen.values()))

    def _overloaded(self, slot: Slot, seen: Totals) -> bool:
        """Refusals, or deadlines or a promise that are broken in the queue."""
        if seen.offered < LEAST:
            return False
        waited = seen.queue_ratio > QUEUED or not seen.requests  # else one caller's deadlines are too short for any version
        if seen.refused + (seen.expired if waited else 0) > REFUSED * seen.offered:
            return True
        promise = slot.config.objective.promise
        if promise is None or not seen.requests:
            return False
        return 1 - seen.within / seen.requests > promise.most_missed and seen.queue_ratio > QUEUED

    def _loaded(self, slot: Slot, versions: list[str], alike: Loaded | None = None) -> Loaded | None:
        """The first of `versions` that can answer at once what was asked of `alike`."""
        for version in versions:
            loaded = slot.versions.get(version)
            if loaded is not None and loaded.engine.alive and (alike is None or asked_alike(loaded, alike)):
                return loaded
        return None

    def _lower(self, slot: Slot, footing: Footing, rungs: list[str], offered: float) -> Loaded | None:
        """The first of the lower `rungs` that is not known to be too small for `offered` requests a second, else the lowest that can answer. None
        where the owner wants Hone to look only."""
        want = self._want(slot.name)
        if want is not None and (want.mode or slot.config.mode) is Mode.OBSERVE:
            return None
        loaded = [one for version in rungs if (one := self._loaded(slot, [version])) is not None]
        return next((one for one in loaded if footing.capacities.get(one.version, math.inf) >= offered), loaded[-1] if loaded else None)

    def _totals(self, slot: Slot, rungs: list[str]) -> Totals:
        """What all of the envelope did so far: while a lower version stands in, the one above it answers as well."""
        return reduce(Totals.plus, (self._window.totals(slot.name, version) for version in rungs), Totals())

    def _stand(self, slot: Slot, rungs: list[str], rung: Loaded | None) -> None:
        """`rung` stands for the model (None: the active version), and its neighbours of the envelope answer beside it."""
        slot.rung, current = rung, rung or slot.active
        if current is None or current.version not in rungs or len(rungs) < 2:
            slot.neighbours = None
            return
        at = rungs.index(current.version)
        above, below = (self._loaded(slot, some, current) for some in (rungs[:at][::-1], rungs[at + 1 :]))
        slot.neighbours = Neighbours(current, above, below)

    def _step(self, slot: Slot, footing: Footing, rungs: list[str], rung: Loaded | None, why: str, now: float, up: bool) -> None:
        active = slot.active.version if slot.active is not None else ""
        before = footing.rung or active
        after = rung.version if rung is not None else active
        footing.rung = after if rung is not None else ""
        self._stand(slot, rungs, rung)
        if before == after:
            return
        footing.bad_looks, footing.long_glances, footing.full_since = 0, 0, None
        footing.calm_since, footing.stepped_at = 0.0, now
        self._metrics.count("hone_ladder_steps", slot.name, "up" if up else "down")
        self._metrics.gauge("hone_ladder_rung", slot.name, value=0.0 if rung is None else 1.0)
        data = {
            "version": after,
            "from": before,
            "summary": f"back to {after}: {why}" if up else f"{after} answers for {before}: {why}",
        }
        self._record(Event("ladder.stepped", slot.name, after, data=data))


def _rungs(slot: Slot, want: ModelState) -> list[str]:
    """The versions that may answer, the desired one first."""
    return [want.desired, *(version for version in want.rungs if version != want.desired)] if slot.config.ladder else [want.desired]
