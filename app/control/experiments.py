"""Whose fault it is: the experiments that only a look can order (a fresh runner beside the live one, a paired replay), then the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic, time
from typing import Final, Protocol

from app.control.bench import Bench
from app.control.diagnosis import Cause, Diagnosis, diagnose, needs_probe, needs_replay
from app.control.findings import DECAYED_CPU, DECAYED_WALL, Findings, FreshRunner, Replay
from app.control.patient import BACKGROUND, EVENT_S, SETTLE_BLOCKS, Patient
from app.control.replay import replay
from app.control.suspicion import Kind, Suspicion
from app.domain import ModelState, ModelView
from app.telemetry.hostfacts import HostFacts
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window
from optimizers.samples import Samples

PROBE_S: Final = 2.0
MOST_SAVED_S: Final = 60.0
"""Of a core, as much as two or three looks take one after the other; then they come as often as the host's budget for them allows."""
NEWEST_BLOCKS: Final = 4
"""What fell in so many blocks is held against what was before."""


class Probed(Protocol):
    """Ratios live / fresh as (estimate, low, high)."""

    @property
    def cpu(self) -> tuple[float, float, float]: ...
    @property
    def wall(self) -> tuple[float, float, float]: ...


class Plane(Protocol):
    """What is asked of the data plane."""

    def drift(self, name: str) -> float | None: ...
    async def against_fresh(self, name: str, seconds: float, limits: tuple[float, float]) -> Probed | None: ...
    async def newest(self, name: str) -> Sequence[Samples]: ...


class Experiments:
    """One per server."""

    def __init__(self, plane: Plane, window: Window, bench: Bench, metrics: Metrics, memory_bytes: int, cores: int) -> None:
        self._plane, self._window, self._bench, self._metrics = plane, window, bench, metrics
        self._memory_bytes, self._cores = memory_bytes, cores
        self._left_s, self._left_at = MOST_SAVED_S, monotonic()
        """Seconds of a core that experiments may take at once, for all models together."""

    def affordable(self) -> bool:
        """Whether the host's budget for experiments has anything left; it fills with the share of the cores that is theirs."""
        now = monotonic()
        self._left_s = min(MOST_SAVED_S, self._left_s + (now - self._left_at) * BACKGROUND * self._cores)
        self._left_at = now
        return self._left_s > 0

    def _spend(self, kind: str, seconds: float, patient: Patient) -> None:
        patient.experiments_s += seconds
        self._left_s -= seconds
        self._metrics.count("hone_background_seconds", kind, by=seconds)

    async def blame(
        self, view: ModelView, patient: Patient, want: ModelState, found: Sequence[Suspicion], others: Mapping[str, Patient], models: int,
        host: Callable[[], HostFacts],
    ) -> Diagnosis:  # fmt: skip
        """Experiments where only they can tell, then the rules. `others` are all patients, `host` its newest reading; what was spent is noted in `patient`."""
        stretch = 1 if any(one.numbers.get("leapt") for one in found) else SETTLE_BLOCKS + 1  # what was before the leap would hide it
        since = self._window.now() - stretch * self._window.block_s
        if stretch > 1:  # of little traffic what is suspicious is older
            told = self._window.gathered(view.name, view.active, SETTLE_BLOCKS, view.active_since)
            since = min([since, *(one.began for one in told)])
        block = self._window.since(view.name, view.active, max(view.active_since, since))
        kinds = {one.kind for one in found} - {Kind.EVENT}
        event = patient.event if monotonic() - patient.event_at < EVENT_S else ""
        fell = patient.incident.began if patient.incident is not None else monotonic()
        well_until = min(since, fell - NEWEST_BLOCKS * self._window.block_s)
        whole, newest = (
            self._window.since(view.name, view.active, began, sketches=False)
            for began in (view.active_since, max(view.active_since, well_until))
        )
        before = (whole.agreed - newest.agreed, whole.compared - newest.compared)

        def findings(again: Replay | None = None, fresh: FreshRunner | None = None) -> Findings:
            recent = monotonic() - SETTLE_BLOCKS * self._window.block_s
            beside = sum(1 for name, one in others.items() if name != view.name and one.suspected_of(kinds, recent))
            return Findings(
                found, block, patient.normal, host(), self._cores, view.settings.instances, view.settings.intra_op_threads, beside,
                models, event == "swap", self._plane.drift(view.name), before, again, fresh, view.killers,
                view.recent_deaths - view.recent_kills, view.recent_kills, patient.first_memory, event,
            )  # fmt: skip

        fresh: FreshRunner | None = None
        if needs_probe(findings()):
            began = monotonic()
            probe = await self._plane.against_fresh(view.name, PROBE_S, (DECAYED_CPU, DECAYED_WALL))
            self._spend("probe", monotonic() - began, patient)
            fresh = FreshRunner(probe.cpu, probe.wall) if probe is not None else None
            diagnosis = diagnose(findings(None, fresh))
            if diagnosis.cause is Cause.PROCESS:
                return diagnosis
        if not needs_replay(findings(None, fresh)):
            return diagnose(findings(None, fresh))
        with self._window.background("replay"):
            began = monotonic()
            inputs = await self._plane.newest(view.name)
            all_was_well = time() - (began - well_until)
            taken = host().others_ratio or 0.0
            again = await replay(self._bench, want, view.active, view.settings, self._memory_bytes, inputs, all_was_well, taken)
            self._spend("replay", monotonic() - began, patient)
        return diagnose(findings(again, fresh))
