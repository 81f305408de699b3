"""Brown-out: when load is about to break the objective, a faster proven version answers instead, until the load would fit again.

The journal holds the envelope (which versions may); stepping inside it is the data plane's own, within seconds and without the store. It
builds nothing, blames nobody, and leaves *desired* and *previous* alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

from app.domain import Event, ModelState
from app.serving.service import InferenceService
from app.serving.slot import Loaded, Slot
from app.telemetry.metrics import Metrics
from app.telemetry.window import Totals, Window

log = logging.getLogger("hone.serving")
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
"""After this long without a step the hold-off is short again."""


@dataclass
class Footing:
    """Where one model stands. `capacities` are requests a second that a version answered while it was full."""

    rung: str = ""
    bad_looks: int = 0
    calm_since: float = 0.0
    stepped_at: float = -SETTLED_S
    hold_s: float = HOLD_S
    capacities: dict[str, float] = field(default_factory=dict)
    marks: deque[tuple[float, str, Totals]] = field(default_factory=lambda: deque(maxlen=round(SPAN_S / LOOK_S) + 1))


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
        while True:
            await asyncio.sleep(LOOK_S)
            for slot in list(self._service.slots.values()):
                try:
                    self.look(slot)
                except Exception:
                    log.exception("model %s: the ladder could not be looked at", slot.name)

    def look(self, slot: Slot) -> None:
        """One look at one model: a step down, a step up, or nothing."""
        want, active = self._want(slot.name), slot.active
        footing = self._footings.setdefault(slot.name, Footing())
        if want is None or active is None:
            return
        now = self._clock()
        rungs = [want.desired, *(version for version in want.rungs if version != want.desired)] if slot.config.ladder else [want.desired]
        current = slot.rung.version if slot.rung is not None else active.version
        if current not in rungs:
            self._step(slot, footing, None, "the envelope changed", now)
            return
        at = rungs.index(current)
        footing.marks.append((now, current, self._window.totals(slot.name, current)))
        (then, _, before), (_, _, after) = next(mark for mark in footing.marks if mark[1] == current), footing.marks[-1]
        seen, span_s = after.minus(before), max(1e-3, now - then)
        if now - footing.stepped_at > SETTLED_S:
            footing.hold_s = HOLD_S
        if self._overloaded(slot, seen):
            footing.bad_looks, footing.calm_since = footing.bad_looks + 1, 0.0
            lower = self._loaded(slot, rungs[at + 1 :])
            if footing.bad_looks >= DOWN_LOOKS and lower is not None:
                footing.capacities[current] = seen.requests / span_s
                why = f"load: {seen.offered / span_s:.3g} requests/s offered, {seen.requests / span_s:.3g} answered, queue {seen.queue_ratio:.0%} of latency"
                self._step(slot, footing, lower, why, now)
            return
        footing.bad_looks = 0
        if at > 0:
            self._perhaps_up(slot, footing, rungs[at - 1], seen.offered / span_s, now)

    def _perhaps_up(self, slot: Slot, footing: Footing, upper: str, offered: float, now: float) -> None:
        """`offered` in requests a second."""
        capacity = footing.capacities.get(upper, 0.0)
        if offered >= UP_SHARE * capacity:
            footing.calm_since = 0.0
            return
        footing.calm_since = footing.calm_since or now
        if now - footing.calm_since < footing.hold_s:
            return
        loaded = self._loaded(slot, [upper])
        if loaded is not None:
            why = f"{offered:.3g} requests/s offered for {footing.hold_s:.0f} s, below {UP_SHARE:.0%} of the {capacity:.3g} that {upper} answered when it was full"
            footing.hold_s = min(MOST_HOLD_S, 2 * footing.hold_s)
            self._step(slot, footing, loaded if loaded is not slot.active else None, why, now)

    def _overloaded(self, slot: Slot, seen: Totals) -> bool:
        """Refusals, or a broken promise whose time goes into the queue."""
        if seen.offered < LEAST:
            return False
        if seen.refused > REFUSED * seen.offered:
            return True
        promise = slot.config.objective.promise
        if promise is None or not seen.requests:
            return False
        return 1 - seen.within / seen.requests > 2 * (1 - promise.share) and seen.queue_ratio > QUEUED

    def _loaded(self, slot: Slot, versions: list[str]) -> Loaded | None:
        """The first of `versions` that can answer at once."""
        for version in versions:
            loaded = slot.versions.get(version)
            if loaded is not None and loaded.engine.alive:
                return loaded
        return None

    def _step(self, slot: Slot, footing: Footing, rung: Loaded | None, why: str, now: float) -> None:
        active = slot.active.version if slot.active is not None else ""
        before = slot.rung.version if slot.rung is not None else active
        after = rung.version if rung is not None else active
        if before == after:
            slot.rung = rung
            return
        slot.rung = rung
        footing.bad_looks, footing.calm_since, footing.stepped_at = 0, 0.0, now
        direction = "up" if rung is None else "down"
        self._metrics.count("hone_ladder_steps", slot.name, direction)
        self._metrics.gauge("hone_ladder_rung", slot.name, value=0.0 if rung is None else 1.0)
        data = {
            "version": after,
            "from": before,
            "summary": f"{after} answers for {before}: {why}" if rung is not None else f"back to {after}: {why}",
        }
        self._record(Event("ladder.stepped", slot.name, after, data=data))
