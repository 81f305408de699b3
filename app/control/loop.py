"""The loop: look, blame, plan, act, verify. One `tick` a second over all models of this server; slow steps run as one investigation at a time.

Deciding is pure and elsewhere (suspicion, diagnosis, planner, concurrent); this keeps each model's incident, writes what was decided to the
journal, and hands work to those who do it: the data plane, the commands, the job keeper. docs/loop.md tells it as a story.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any, Final, Protocol

from app.control import experiments, remedies
from app.control.bench import Bench
from app.control.beside import Beside
from app.control.builders import builders_here, under_way, workers
from app.control.commands import Commands
from app.control.diagnosis import Cause
from app.control.expected import expected, harm_of, rank_of
from app.control.experiments import Experiments
from app.control.findings import CORES
from app.control.glance import glance, notice_shapes
from app.control.normal import learned, with_news
from app.control.patient import EVENT_S, SETTLE_BLOCKS, Condition, Incident, Looks, Patient, Watched, told
from app.control.planner import Action, in_brackets, plan, wait_after
from app.control.remedies import Remedies
from app.control.situation import DAY_S, situation_of
from app.control.standing import LATELY_S, begin_at_zero, prune, standing
from app.control.suspicion import Kind, Suspicion, faulty
from app.domain import JSON, Event, ModelState, ModelView, State, short
from app.errors import HoneError
from app.settings import Settings
from app.store.base import Journal, StoreUnavailable
from app.telemetry.hostfacts import HostFacts, HostSensor
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window

log = logging.getLogger("hone.control")
TICK_S: Final = 1.0
HOST_S: Final = 2.0
OWN_S: Final = 3600.0
"""Settings that the loop changed itself are not undone by it for so long."""
AGAIN_FAULT_S: Final = 5.0
"""Until a remedy for wrong or missing answers that could not be begun is tried again."""
FOLLOWS: Final = 5
"""Ticks without the lease after which it is another's: after an absence of the store it may be a moment until it is renewed."""


class Plane(experiments.Plane, remedies.Plane, Protocol):
    """The data plane, as far as the loop sees and moves it (app.serving.vitals)."""

    def models(self) -> list[ModelView]: ...
    def model(self, name: str) -> ModelView | None: ...
    def own_cpu(self, workers: Collection[int]) -> Callable[[], float]: ...
    async def compare_some(self) -> Any: ...


class Loop:
    """One per server. Only the holder of the control lease decides; every server senses."""

    def __init__(
        self, plane: Plane, window: Window, journal: Journal, commands: Commands, bench: Bench, metrics: Metrics, settings: Settings, host_class: str,
        cores: int, leads: Callable[[], bool], moved_from: str = "",
    ) -> None:  # fmt: skip
        """`moved_from`: the class of hosts that was served on before this start, where it was another."""
        self._plane, self._window, self._journal = plane, window, journal
        self._metrics, self._host_class, self._cores = metrics, host_class, cores
        self.leads = leads
        self._follows = 0
        """Ticks in a row, with the store in reach, in which another server decided."""
        self._experiments = Experiments(plane, window, bench, metrics, settings.job_memory_bytes, cores)
        self._remedies = Remedies(plane, commands, journal, metrics)
        self._beside = Beside(window, journal, commands, bench, metrics, host_class)
        self._sensor = HostSensor()
        self._host = HostFacts()
        self._builders: dict[str, int] = {}
        self._workers: frozenset[str] = frozenset()
        self._host_at = 0.0
        self._moved_until = monotonic() + EVENT_S if moved_from else 0.0
        self._patients: dict[str, Patient] = {}
        self._busy: asyncio.Task[None] | None = None
        self._comparing: asyncio.Task[Any] | None = None
        self._state = State()
        self._cores_seen: tuple[tuple[int, ...], float | None] | None = None
        self._said: dict[str, JSON] = {}

    async def run(self) -> None:
        try:
            while True:
                began = monotonic()
                try:
                    await self.tick()
                except StoreUnavailable:
                    pass  # serving goes on, deciding pauses
                except HoneError as error:
                    log.warning("%s", error)
                except Exception:
                    log.exception("a tick of the loop failed")
                await asyncio.sleep(max(0.05, TICK_S - (monotonic() - began)))
        finally:
            running = [task for task in (self._busy, self._comparing) if task is not None]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def tick(self) -> None:
        """One bounded step."""
        await self._sense_host()
        if self._comparing is None or self._comparing.done():  # golden may take its time: nobody waits for it here
            self._comparing = asyncio.create_task(self._compare(), name="compare-answers")
            self._comparing.add_done_callback(_report)
        self._state = await asyncio.to_thread(self._journal.state)
        self._workers = await asyncio.to_thread(workers, self._journal, self._state)
        self._builders = builders_here(self._state, self._workers)
        if self._builders:
            self._window.mark()
        self._follows = 0 if self.leads() else self._follows + 1
        views = self._plane.models()
        self._window.forget({(view.name, version) for view in views for version in view.loaded})
        for view in views:
            await asyncio.sleep(0)  # of many models each takes some milliseconds: requests are answered between two
            want = self._state.models.get(view.name)
            if view.name not in self._patients:
                begin_at_zero(self._metrics, view.name)
            patient = self._patients.setdefault(view.name, Patient())
            self._notice_events(view, patient, want)
            if self._follows >= FOLLOWS:
                patient.incident = None  # another decides, and sees for itself: what was begun here nobody would ever end
            condition = self._condition(view, patient, want)
            latest = self._window.closed(view.name, view.active, 1)
            if not latest or latest[0].ended > patient.shown_until or view.name not in self._said:
                patient.shown_until = latest[0].ended if latest else 0.0
                self._said[view.name] = standing(
                    self._window, self._metrics, view, self._plane.config(view.name), patient.normal, self._plane.drift(view.name)
                )
            self._said[view.name] |= {"condition": condition.value} | told(patient.incident)
            if want is not None and self.leads():
                await self._look(view, patient, want, views)
        prune(self._metrics, {view.name: view.active for view in self._plane.models()})
        names = {view.name for view in views}
        self._patients = {name: patient for name, patient in self._patients.items() if name in names}
        self._said = {name: said for name, said in self._said.items() if name in names}

    async def _compare(self) -> None:
        began = monotonic()
        if await self._plane.compare_some():
            self._metrics.count("hone_background_seconds", "compare", by=monotonic() - began)

    def told(self, name: str) -> JSON:
        """What the loop thinks of a model now, for status and explain."""
        return self._said.get(name) or {"condition": Condition.STEADY.value}

    @property
    def host(self) -> HostFacts:
        return self._host

    # ---- sensing
    async def _sense_host(self) -> None:
        now = monotonic()
        if now - self._host_at < HOST_S:
            return
        lag = self._metrics.gauges["hone_event_loop_lag_seconds"].get((), 0.0)
        own_cpu = self._plane.own_cpu({pid for pid in self._builders.values() if pid})
        self._host = await asyncio.to_thread(lambda: self._sensor.read(own_cpu(), lag))
        self._host_at = now
        cores = (self._host.cores, self._host.quota)
        if self._cores_seen is not None and cores != self._cores_seen:
            for patient in self._patients.values():
                patient.event, patient.event_at, patient.due = CORES, now, True
        self._cores_seen = cores
        for name in ("busy", "others", "steal", "throttled"):
            value = getattr(self._host, f"{name}_ratio")
            if value is not None:
                self._metrics.gauge("hone_host_ratio", name, value=value)
        for name in ("cpu", "memory", "io"):
            value = getattr(self._host, f"{name}_pressure")
            if value is not None:
                self._metrics.gauge("hone_host_pressure_ratio", name, value=value)

    def _notice_events(self, view: ModelView, patient: Patient, want: ModelState | None) -> None:
        if want is not None and patient.golden != (want.golden, want.golden_sha256):
            if patient.golden[0]:
                patient.incident = None  # of a model that is not the same any more: what was tried for it says nothing of this one
            patient.golden = (want.golden, want.golden_sha256)
        now, incident = monotonic(), patient.incident
        if not patient.serves(view.active, view.generation, now, now < self._moved_until):
            return
        self._window.afresh(view.name)
        if incident is None:
            return
        version, builds = incident.awaited
        if patient.event == "swap" and view.active != version and not (builds and not view.active.isdigit()):
            incident.tried.clear()  # somebody else swapped: what was tried was tried for another version
        if not incident.acted_at:
            incident.acted_at = now  # somebody else acted

    def _condition(self, view: ModelView, patient: Patient, want: ModelState | None) -> Condition:
        """What the loop is about with a model; as a gauge, too."""
        condition = patient.condition(lambda incident: self._acting(view, incident))
        if want is not None and want.split is not None:
            condition = Condition.WATCHING if want.split.stage == "watch" else Condition.TRIAL
        for one in Condition:
            self._metrics.gauge("hone_model_state", view.name, one.value, value=float(one is condition))
        return condition

    # ---- deciding
    async def _look(self, view: ModelView, patient: Patient, want: ModelState, views: list[ModelView]) -> None:
        config = self._plane.config(view.name)
        on_watch = want.split is not None and want.split.stage == "watch"
        if on_watch and want.split is not None:
            await self._beside.watch(view, patient, want, want.split, config, self._state.frozen)
            if not self._state.frozen:
                return  # a frozen watch confirms nothing, for as long as the freeze lasts: it is looked at meanwhile
        if want.desired != view.active and want.desired not in dict(view.failed):
            return  # another is about to serve: what is left behind is not judged, and going back would leave the one that comes
        patient.watched = patient.watched if on_watch else Watched()
        on_trial = want.split is not None
        if want.split is not None and not on_watch and await self._beside.ended_orphan(view, patient, want.split, self._state):
            return
        if not on_trial:  # rungs take memory, and other versions beside a trial are no part of what it compares
            await self._beside.set_ladder(view, patient, want, config, self._state)
        blocks = self._window.gathered(view.name, view.active, SETTLE_BLOCKS, view.active_since)
        found = glance(self._window, view, blocks, patient, config, self._host, self._host_at)
        fresh = bool(blocks) and blocks[-1].ended > patient.seen_until
        if blocks:
            patient.seen_until = max(patient.seen_until, blocks[-1].ended)
        if on_trial:
            found = [one for one in found if faulty([one])]  # the incumbent's faults do not wait for a canary's end
        patient.see(found, monotonic())
        patient.weigh(view, self._window.now())
        incident = patient.incident
        if not found:
            if fresh and not view.rung and not on_trial:
                patient.normal = with_news(learned(patient.normal, blocks[-1], view.memory_bytes), blocks[-1])
                notice_shapes(patient, blocks[-1])  # an open block of little traffic has too few rows to tell
            well = fresh and incident is not None and incident.well_in(blocks[-1], config.objective.promises)
            await self._calm(view, patient, well)
            return
        patient.calm = 0
        if view.rung and all(one.kind in (Kind.LATENCY, Kind.REFUSALS, Kind.COST) for one in found):
            return  # stepped down for load: no blame until it is back
        news = incident is not None and incident.is_news(found)
        if incident is not None and incident.acted_at and self._acting(view, incident) and (not news or incident.explains(found)):
            if news:  # it is felt by now: to look again would only hold up what is under way
                await self._raise(view, found)
                incident.suspicions = found
            return
        if not patient.looks.due(frozenset(one.kind for one in found), monotonic()):
            return
        if not faulty(found) and not self._experiments.affordable():
            return  # of many models at once each would have its replay: wrong and missing answers alone need none
        if self._busy is None or self._busy.done():
            self._busy = asyncio.create_task(self._investigate(view, patient, want, found, views), name=f"investigate-{view.name}")
            self._busy.add_done_callback(_report)

    def _acting(self, view: ModelView, incident: Incident) -> bool:
        """A remedy is under way, or so fresh that the blocks since do not show it yet."""
        open_job = any(job.actor == "hone" for job in under_way(self._state, view.name, self._workers))
        return open_job or monotonic() - incident.acted_at < (SETTLE_BLOCKS + 1) * self._window.block_s

    async def _calm(self, view: ModelView, patient: Patient, well: bool) -> None:
        """Nothing is suspected; after some blocks that tell that all is well an incident is over. Without answers none is well again."""
        incident = patient.incident
        if incident is None or incident.looking:
            return
        patient.calm += well
        if incident.acted_at and self._acting(view, incident):
            return
        if patient.calm < SETTLE_BLOCKS:
            if monotonic() - incident.suspected_at > LATELY_S:
                patient.incident = None  # nobody asks any more: neither wrong nor well again
            return
        patient.incident = None
        cause = incident.acted_on or (incident.diagnosis.cause if incident.diagnosis is not None else None)
        if cause is not None:
            patient.failures.pop(cause, None)
        if incident.diagnosis is None or (all(one.kind is Kind.EVENT for one in incident.suspicions) and not incident.tried):
            return
        took = monotonic() - incident.began
        how = "after the repair" if incident.acted_on is not None else "after another change" if incident.acted_at else "by itself"
        p95 = self._window.since(view.name, view.active, self._window.now() - 2 * self._window.block_s).total.quantile(0.95)
        now = f", p95 {short(p95 * 1e3)} ms" if p95 else ""
        data = {"cause": cause.value if cause else "", "took_s": round(took, 1), "summary": f"well again {how} in {took:.0f} s{now}"}
        await self._say("recovery.verified", view, data)
        self._metrics.time("hone_recovery_duration_seconds", view.name, cause.value if cause else "", seconds=took)

    # ---- one investigation
    async def _investigate(
        self, view: ModelView, patient: Patient, want: ModelState, found: list[Suspicion], views: list[ModelView]
    ) -> None:  # fmt: skip
        incident = patient.incident
        news = incident is None or incident.is_news(found)
        if incident is None:
            incident = patient.incident = Incident(monotonic(), found, seen_at={one.kind: monotonic() for one in found})
        elif incident.unproven and incident.diagnosis is not None:
            incident.unproven = False
            cause = incident.diagnosis.cause
            patient.failures[cause] = patient.failures.get(cause, 0) + 1
        incident.suspicions, patient.due, patient.experiments_s = found, False, 0.0
        only_event = all(one.kind is Kind.EVENT for one in found)
        await self._raise(view, found, told=news and not only_event)
        incident.looking = True
        try:
            diagnosis = await self._experiments.blame(view, patient, want, found, self._patients, len(views), lambda: self._host)
        finally:
            incident.looking = False
        if any(one.kind is Kind.EVENT for one in found):
            patient.looked_at_event(diagnosis.inconclusive, self._cores, monotonic())
        if only_event and diagnosis.cause in (Cause.UNKNOWN, Cause.HOST, Cause.LOAD):
            patient.incident = None  # as it should be
            return
        state = await asyncio.to_thread(self._journal.state)
        now = state.models.get(view.name)
        if patient.incident is not incident or not self.leads():
            return  # another golden came meanwhile, or another server decides now
        if now is None or now.desired != want.desired or (now.split is not None and want.split is None and not faulty(found)):
            patient.incident = None  # while it was looked into, somebody asked for another version, or put one on trial
            return
        want = now  # its mode, settings and what was left may be others by now, and so may a freeze
        changed = (news and not only_event) or incident.diagnosis is None or incident.diagnosis.cause is not diagnosis.cause
        incident.diagnosis = diagnosis
        self._metrics.count("hone_diagnoses", view.name, diagnosis.cause.value)
        waited = monotonic() - patient.remedied_at.get(diagnosis.cause, 0.0)
        wait_s = max(0.0, wait_after(patient.failures.get(diagnosis.cause, 0)) - waited)
        situation = situation_of(
            state, want, view, self._plane.config(view.name), diagnosis.cause, self._host_class, incident.tried, wait_s,
            patient.switched(monotonic() - DAY_S), self._workers,
        )  # fmt: skip
        own = monotonic() - patient.remedied_at.get(Cause.SETTINGS, -OWN_S) < OWN_S
        situation = replace(situation, faults=faulty(found), settings_before=situation.settings_before and not own)
        decided = plan(diagnosis, situation, self._plane.config(view.name))
        outlook = expected(decided.tries, state.jobs.values(), view.name, self._host_class) if decided.tries else None
        if changed or decided.action is not Action.NOTHING:
            told: JSON = {
                "cause": diagnosis.cause.value, "confidence": diagnosis.confidence, "summary": f"blamed on {diagnosis.cause.value}: {diagnosis.text}",
                "rules_out": list(diagnosis.rules_out), "beside": list(diagnosis.beside), "evidence": diagnosis.evidence,
            }  # fmt: skip
            await self._say("diagnosis.made", view, told)
            hoped = f"; {outlook.text}" if outlook is not None else ""
            told = {
                "action": decided.action.value, "summary": f"plan: {decided.text}{hoped}{in_brackets(decided, diagnosis)}", "version": decided.version,
                "waits": decided.waits, "expected": outlook.to_json() if outlook is not None else None,
            }  # fmt: skip
            await self._say("plan.made", view, told)
        if decided.action in (Action.NOTHING, Action.STEP_DOWN) or decided.waits:
            patient.looks.in_vain(frozenset(one.kind for one in found), monotonic(), patient.experiments_s, self._cores)
            return
        incident.awaited = (decided.version, bool(decided.tries))
        try:
            harm = harm_of(found, float(self.told(view.name).get("requests_per_s") or 0.0))
            await self._remedies.apply(
                view, want, decided, diagnosis, faulty(found), rank_of(harm, outlook) if outlook is not None else 0.0
            )
        except Exception:  # it was not tried: the same comes again, soon where answers are wrong or missing
            kinds = frozenset(one.kind for one in found)
            if faulty(found):
                patient.looks = Looks(kinds, 0, monotonic() + AGAIN_FAULT_S)
            else:
                patient.looks.in_vain(kinds, monotonic(), patient.experiments_s, self._cores)
            raise
        incident.tried.add(decided.remedy)
        patient.looks = Looks()
        if decided.action is Action.RESTART:
            self._window.afresh(view.name)  # what else is in effect by now is a swap, or other settings
        if decided.action is Action.SWITCH:
            patient.switched_at.append(monotonic())
        incident.acted_at = patient.remedied_at[diagnosis.cause] = monotonic()
        incident.acted_on = diagnosis.cause
        incident.unproven = True

    async def _raise(self, view: ModelView, found: Sequence[Suspicion], told: bool = True) -> None:
        for one in found:
            self._metrics.count("hone_suspicions", view.name, one.kind.value)
        if told:
            text = "; ".join(one.text for one in found)
            data = {"kinds": [one.kind.value for one in found], "summary": text, "numbers": [one.numbers for one in found]}
            await self._say("suspicion.raised", view, data)

    async def _say(self, kind: str, view: ModelView, data: JSON) -> None:
        await asyncio.to_thread(self._journal.append, Event(kind, view.name, view.active, data=data))


def _report(task: asyncio.Task[Any]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    if isinstance(error, StoreUnavailable | HoneError):
        log.warning("an investigation could not be brought to its end, and is begun again: %s", error)
    else:
        log.error("an investigation failed", exc_info=error)
