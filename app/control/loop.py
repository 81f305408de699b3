"""The loop: look, blame, plan, act, verify. One `tick` a second over all models of this server; slow steps run as one investigation at a time.

Deciding is pure and elsewhere (suspicion, diagnosis, planner, concurrent); this keeps each model's incident, writes what was decided to the
journal, and hands work to those who do it: the data plane, the commands, the job keeper. docs/loop.md tells it as a story.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic, time
from typing import Any, Final, Protocol

from app.catalog.model_config import ModelConfig
from app.control.bench import Bench
from app.control.commands import Commands
from app.control.diagnosis import (
    DECAYED_CPU,
    DECAYED_WALL,
    Cause,
    Diagnosis,
    Findings,
    FreshRunner,
    Replay,
    diagnose,
    needs_probe,
    needs_replay,
)
from app.control.objectives import burn
from app.control.patient import Condition, Incident, Looks, Patient
from app.control.planner import Action, Plan, plan, wait_after
from app.control.replay import replay
from app.control.rollout import compared
from app.control.rungs import cheaper_versions
from app.control.situation import situation_of
from app.control.standing import LATELY_S, standing
from app.control.steps import parse_tries
from app.control.suspicion import (
    LEAP_CALLS,
    LEAST_CALLS,
    Kind,
    Normal,
    Seen,
    Suspicion,
    leap_of_latency,
    learned,
    other_shapes,
    suspicions,
    with_news,
)
from app.domain import JSON, Event, JobState, Mode, ModelState, ModelView, Split, State, Verdict
from app.errors import HoneError
from app.settings import Settings
from app.store.base import Journal, StoreUnavailable
from app.telemetry.hostfacts import HostFacts, HostSensor
from app.telemetry.metrics import Metrics
from app.telemetry.window import Block, Window
from optimizers.stats import least_samples

log = logging.getLogger("hone.control")
TICK_S: Final = 1.0
HOST_S: Final = 2.0
PROBE_S: Final = 2.0
ORPHAN_S: Final = 60.0
"""A version on trial for whom no job is open loses its share after this long."""
SETTLE_BLOCKS: Final = 2
"""Blocks in a row without suspicion after which an incident is over."""
NEWEST_BLOCKS: Final = 4
"""What fell in so many blocks is held against what was before."""
SURE: Final = least_samples(0.99)
"""Answers held to golden's before a promoted version is confirmed: so many show 99 %."""
YOUNG_S: Final = 3600.0
"""A version this young is suspected first of what begins."""


class Probed(Protocol):
    """Ratios live / fresh as (estimate, low, high)."""

    @property
    def cpu(self) -> tuple[float, float, float]: ...
    @property
    def wall(self) -> tuple[float, float, float]: ...


class Plane(Protocol):
    """The data plane, as far as the loop sees and moves it (app.serving.vitals)."""

    def models(self) -> list[ModelView]: ...
    def model(self, name: str) -> ModelView | None: ...
    def config(self, name: str) -> ModelConfig: ...
    def drift(self, name: str) -> float | None: ...
    def own_cpu(self) -> Callable[[], float]: ...
    async def renew(self, name: str) -> str: ...
    async def against_fresh(self, name: str, seconds: float, limits: tuple[float, float]) -> Probed | None: ...
    async def compare_some(self) -> Any: ...


class Loop:
    """One per server. Only the holder of the control lease decides; every server senses."""

    def __init__(
        self, plane: Plane, window: Window, journal: Journal, commands: Commands, bench: Bench, metrics: Metrics, settings: Settings, host_class: str,
        cores: int, leads: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._plane, self._window, self._journal, self._commands, self._bench = plane, window, journal, commands, bench
        self._metrics, self._settings, self._host_class, self._cores = metrics, settings, host_class, cores
        self._leads = leads
        self._sensor = HostSensor()
        self._host = HostFacts()
        self._host_at = 0.0
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
            self._comparing = asyncio.create_task(self._plane.compare_some(), name="compare-answers")
            self._comparing.add_done_callback(_report)
        self._state = await asyncio.to_thread(self._journal.state)
        if any(job.state is JobState.BUILDING for job in self._state.jobs.values()):
            self._window.mark()
        views = self._plane.models()
        self._window.forget({(view.name, version) for view in views for version in view.loaded})
        for view in views:
            want = self._state.models.get(view.name)
            patient = self._patients.setdefault(view.name, Patient())
            self._notice_events(view, patient)
            condition = self._condition(view, patient, want)
            latest = self._window.closed(view.name, view.active, 1)
            if not latest or latest[0].ended > patient.shown_until or view.name not in self._said:
                patient.shown_until = latest[0].ended if latest else 0.0
                self._said[view.name] = standing(
                    self._window, self._metrics, view, self._plane.config(view.name), patient.normal, self._plane.drift(view.name)
                )
            self._said[view.name] |= {"condition": condition.value} | _told(patient.incident)
            if want is not None and self._leads():
                await self._look(view, patient, want, views)
        names = {view.name for view in views}
        self._patients = {name: patient for name, patient in self._patients.items() if name in names}
        self._said = {name: said for name, said in self._said.items() if name in names}

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
        own_cpu = self._plane.own_cpu()
        self._host = await asyncio.to_thread(lambda: self._sensor.read(own_cpu(), lag))
        self._host_at = now
        cores = (self._host.cores, self._host.quota)
        if self._cores_seen is not None and cores != self._cores_seen:
            for patient in self._patients.values():
                patient.event, patient.event_at, patient.due = "cores", now, True
        self._cores_seen = cores
        for name in ("busy", "others", "steal", "throttled"):
            value = getattr(self._host, f"{name}_ratio")
            if value is not None:
                self._metrics.gauge("hone_host_ratio", name, value=value)
        for name in ("cpu", "memory", "io"):
            value = getattr(self._host, f"{name}_pressure")
            if value is not None:
                self._metrics.gauge("hone_host_pressure_ratio", name, value=value)

    def _notice_events(self, view: ModelView, patient: Patient) -> None:
        identity = (view.active, view.generation)
        if identity == patient.identity:
            return
        before, patient.identity = patient.identity, identity
        patient.event = "start" if not before[0] else "swap" if before[0] != view.active else "settings"
        patient.event_at, patient.normal, patient.seen_until = monotonic(), Normal(), 0.0
        patient.judged_until, patient.found, patient.requests, patient.looks, patient.leapt_at = -1.0, [], 0, Looks(), 0.0
        patient.due = patient.event == "swap" and patient.incident is None
        if patient.incident is not None and not patient.incident.acted_at:
            patient.incident.acted_at = monotonic()  # somebody else acted

    def _condition(self, view: ModelView, patient: Patient, want: ModelState | None) -> Condition:
        """What the loop is about with a model; as a gauge, too."""
        condition = patient.condition
        if want is not None and want.split is not None:
            condition = Condition.WATCHING if want.split.stage == "watch" else Condition.TRIAL
        for one in Condition:
            self._metrics.gauge("hone_model_state", view.name, one.value, value=float(one is condition))
        return condition

    # ---- deciding
    async def _look(self, view: ModelView, patient: Patient, want: ModelState, views: list[ModelView]) -> None:
        config = self._plane.config(view.name)
        if want.split is not None and want.split.stage == "watch":
            await self._watch(view, patient, want, config)
            return
        patient.watch_since = 0.0
        on_trial = want.split is not None
        if want.split is not None and await self._ended_orphan(view, want.split):
            return
        await self._set_ladder(view, patient, want, config)
        blocks = self._window.closed(view.name, view.active, SETTLE_BLOCKS)
        blocks = [block for block in blocks if block.began >= view.active_since]
        found = self._suspicions(view, blocks, patient, config)
        fresh = bool(blocks) and blocks[-1].ended > patient.seen_until
        if blocks:
            patient.seen_until = max(patient.seen_until, blocks[-1].ended)
        if on_trial:
            found = [one for one in found if faulty([one])]  # the incumbent's faults do not wait for a canary's end
        if not found:
            if fresh and not view.rung and not on_trial:
                patient.normal = with_news(learned(patient.normal, blocks[-1], view.memory_bytes), blocks[-1])
                _notice_shapes(patient, blocks[-1])
            told = fresh and not blocks[-1].disturbed and blocks[-1].requests >= LEAST_CALLS
            await self._calm(view, patient, told)
            return
        patient.calm = 0
        if patient.incident is not None:
            patient.incident.suspected_at = monotonic()
        if view.rung and all(one.kind in (Kind.LATENCY, Kind.REFUSALS, Kind.COST) for one in found):
            return  # stepped down for load: no blame until it is back
        incident = patient.incident
        news = incident is not None and _news(found, incident)
        if incident is not None and not news and incident.acted_at and self._acting(view, incident):
            return
        if not news and not patient.looks.due(frozenset(one.kind for one in found), monotonic()):
            return
        if self._busy is None or self._busy.done():
            self._busy = asyncio.create_task(self._investigate(view, patient, want, found, views), name=f"investigate-{view.name}")
            self._busy.add_done_callback(_report)

    async def _ended_orphan(self, view: ModelView, split: Split) -> bool:
        """A version on trial for whom no job is open any more (its holder died, or was refused at the last step) loses its share."""
        jobs = self._state.jobs.values()
        open_job = any(job.model == view.name and job.state is not JobState.FINISHED and job.candidates for job in jobs)
        if open_job or time() - split.since < ORPHAN_S:
            return False
        data = {"version": "", "share": 0.0, "stage": "canary", "summary": "the job whose candidate was on trial is over"}
        await asyncio.to_thread(self._journal.append, Event("traffic.split", view.name, "", data=data))
        return True

    async def _set_ladder(self, view: ModelView, patient: Patient, want: ModelState, config: ModelConfig) -> None:
        """Which versions the data plane may step down to: proven here, clearly cheaper than the desired one, and free to serve alone."""
        by_person = (want.mode or config.mode) is not Mode.AUTO
        if self._state.frozen or not config.ladder or by_person or patient.ladder_for == (want.last_event, want.desired):
            return  # outside auto mode the envelope is a person's to set
        rungs = await asyncio.to_thread(cheaper_versions, self._bench.cards, want, config, self._host_class)
        patient.ladder_for = (want.last_event, want.desired)
        if rungs != want.rungs:
            data = {
                "rungs": list(rungs),
                "summary": f"under load, {' then '.join(rungs)} may answer" if rungs else "no version to step down to",
            }
            await asyncio.to_thread(self._journal.append, Event("ladder.set", view.name, view.active, data=data))

    def _suspicions(self, view: ModelView, blocks: list[Block], patient: Patient, config: ModelConfig) -> list[Suspicion]:
        """What looks wrong now. Faults count from the open block on; a due event asks for a look once there is traffic to look at.

        So do leaps of the cost and of the latency. The rest is judged when a block closes, and stands until the next one does.
        """
        now = self._window.now()
        judged = blocks[-1].ended if blocks else 0.0
        if judged != patient.judged_until or view.recent_deaths != patient.judged_deaths:
            patient.judged_until, patient.judged_deaths = judged, view.recent_deaths
            lately = self._window.since(view.name, view.active, max(view.active_since, now - LATELY_S), sketches=False)
            patient.requests = lately.requests
            promise = config.objective.promise
            burning = burn(promise.share, lambda seconds: self._window.good_and_bad(view.name, seconds)) if promise is not None else None
            seen = Seen(blocks, lately, view.memory_bytes, view.recent_deaths, view.recent_kills)
            patient.found = suspicions(seen, patient.normal, config, promise, burning) if blocks or view.recent_deaths else []
        found = list(patient.found)
        opened = self._window.since(view.name, view.active, max(view.active_since, now - self._window.block_s))
        urgent = suspicions(Seen([opened], Block(now, now), view.memory_bytes, 0), patient.normal, config, None, None)
        urgent = [one for one in urgent if one.kind in (Kind.ERRORS, Kind.NON_FINITE, Kind.COST)]
        urgent += self._leap(opened, blocks, patient, config)
        kinds = {one.kind for one in found}
        found += [one for one in urgent if one.kind not in kinds]
        if patient.due and max(patient.requests, opened.requests) >= LEAST_CALLS:
            found.append(Suspicion(Kind.EVENT, f"a {patient.event}: is it what it was proven to be?", {"event": patient.event}))
        return found

    def _leap(self, opened: Block, blocks: list[Block], patient: Patient, config: ModelConfig) -> list[Suspicion]:
        """A leap of latency that two readings of the host in a row leave unexplained, seen in the newest block that has answers enough."""
        latest = [block for block in blocks[-1:] if block.ended > self._window.now() - self._window.block_s]
        block = opened if opened.requests >= LEAP_CALLS or not latest else latest[0]
        leap = leap_of_latency(block, patient.normal, config.objective.promise, self._host)
        stands = patient.leap_stands(leap is not None, monotonic(), self._host_at)
        return [leap] if leap is not None and stands else []

    def _acting(self, view: ModelView, incident: Incident) -> bool:
        """A remedy is under way, or so fresh that the blocks since do not show it yet."""
        open_job = any(
            job.model == view.name and job.state is not JobState.FINISHED and job.actor == "hone" for job in self._state.jobs.values()
        )
        return open_job or monotonic() - incident.acted_at < (SETTLE_BLOCKS + 1) * self._window.block_s

    async def _calm(self, view: ModelView, patient: Patient, told: bool) -> None:
        """Nothing is suspected; after some blocks in a row with enough answers in them an incident is over. Without answers none is well again."""
        incident = patient.incident
        if incident is None or incident.looking:
            return
        patient.calm += told
        if incident.acted_at and self._acting(view, incident):
            return
        if patient.calm < SETTLE_BLOCKS:
            if monotonic() - incident.suspected_at > LATELY_S:
                patient.incident = None  # nobody asks any more: neither wrong nor well again
            return
        patient.incident = None
        cause = incident.diagnosis.cause if incident.diagnosis is not None else None
        if cause is not None:
            patient.failures.pop(cause, None)
        if incident.diagnosis is None or all(one.kind is Kind.EVENT for one in incident.suspicions):
            return
        took = monotonic() - incident.began
        how = "after the repair" if incident.acted_at else "by itself"
        p95 = self._window.since(view.name, view.active, self._window.now() - 2 * self._window.block_s).total.quantile(0.95)
        now = f", p95 {p95 * 1e3:.3g} ms" if p95 else ""
        data = {"cause": cause.value if cause else "", "took_s": round(took, 1), "summary": f"well again {how} in {took:.0f} s{now}"}
        await self._say("recovery.verified", view, data)
        self._metrics.time("hone_recovery_duration_seconds", view.name, cause.value if cause else "", seconds=took)

    # ---- one investigation
    async def _investigate(
        self, view: ModelView, patient: Patient, want: ModelState, found: list[Suspicion], views: list[ModelView]
    ) -> None:  # fmt: skip
        incident = patient.incident
        news = incident is None or _news(found, incident)
        if incident is None:
            incident = patient.incident = Incident(monotonic(), found, suspected_at=monotonic())
        elif incident.unproven and incident.diagnosis is not None:
            incident.unproven = False
            cause = incident.diagnosis.cause
            patient.failures[cause] = patient.failures.get(cause, 0) + 1
        incident.suspicions, patient.due, patient.experiments_s = found, False, 0.0
        only_event = all(one.kind is Kind.EVENT for one in found)
        for one in found:
            self._metrics.count("hone_suspicions", view.name, one.kind.value)
        if news and not only_event:
            text = "; ".join(one.text for one in found)
            data = {"kinds": [one.kind.value for one in found], "summary": text, "numbers": [one.numbers for one in found]}
            await self._say("suspicion.raised", view, data)
        incident.looking = True
        try:
            diagnosis = await self._blame(view, patient, want, found, views)
        finally:
            incident.looking = False
        if only_event and diagnosis.cause in (Cause.UNKNOWN, Cause.HOST, Cause.LOAD):
            patient.incident = None  # as it should be
            return
        changed = incident.diagnosis is None or incident.diagnosis.cause is not diagnosis.cause
        incident.diagnosis = diagnosis
        self._metrics.count("hone_diagnoses", view.name, diagnosis.cause.value)
        waited = monotonic() - patient.remedied_at.get(diagnosis.cause, 0.0)
        wait_s = max(0.0, wait_after(patient.failures.get(diagnosis.cause, 0)) - waited)
        situation = situation_of(
            self._state, want, view, self._plane.config(view.name), diagnosis.cause, self._host_class, incident.tried, wait_s
        )
        own = monotonic() - patient.remedied_at.get(Cause.SETTINGS, -YOUNG_S) < YOUNG_S  # what the loop changed itself is not undone
        situation = replace(situation, faults=faulty(found), settings_before=situation.settings_before and not own)
        decided = plan(diagnosis, situation, self._plane.config(view.name))
        if changed or decided.action is not Action.NOTHING:
            told: JSON = {
                "cause": diagnosis.cause.value, "confidence": diagnosis.confidence, "summary": f"blamed on {diagnosis.cause.value}: {diagnosis.text}",
                "rules_out": list(diagnosis.rules_out), "beside": list(diagnosis.beside), "evidence": diagnosis.evidence,
            }  # fmt: skip
            await self._say("diagnosis.made", view, told)
            advice = f" (you could: {'; '.join(decided.advice)})" if decided.advice else ""
            told = {
                "action": decided.action.value,
                "summary": f"plan: {decided.text}{advice}",
                "version": decided.version,
                "waits": decided.waits,
            }
            await self._say("plan.made", view, told)
        if decided.action in (Action.NOTHING, Action.STEP_DOWN) or decided.waits:
            patient.looks.in_vain(frozenset(one.kind for one in found), monotonic(), patient.experiments_s, self._cores)
            return
        incident.tried.add(decided.action)
        patient.looks = Looks()
        await self._act(view, want, decided, diagnosis, faulty(incident.suspicions))
        incident.acted_at = patient.remedied_at[diagnosis.cause] = monotonic()
        incident.unproven = True

    async def _blame(
        self, view: ModelView, patient: Patient, want: ModelState, found: list[Suspicion], views: list[ModelView]
    ) -> Diagnosis:  # fmt: skip
        """Experiments where only they can tell, then the rules."""
        stretch = 1 if any(one.numbers.get("leapt") for one in found) else SETTLE_BLOCKS + 1  # what was before the leap would hide it
        block = self._window.since(view.name, view.active, max(view.active_since, self._window.now() - stretch * self._window.block_s))
        others = sum(1 for name, one in self._patients.items() if name != view.name and one.incident is not None)
        event = patient.event if monotonic() - patient.event_at < LATELY_S else ""
        fell = patient.incident.began if patient.incident is not None else monotonic()
        whole, newest = (
            self._window.since(view.name, view.active, began, sketches=False)
            for began in (view.active_since, max(view.active_since, fell - NEWEST_BLOCKS * self._window.block_s))
        )
        before = (whole.agreed - newest.agreed, whole.compared - newest.compared)

        def findings(again: Replay | None = None, fresh: FreshRunner | None = None) -> Findings:
            return Findings(
                found, block, patient.normal, self._host, self._cores, view.settings.instances, view.settings.intra_op_threads, others,
                len(views), monotonic() - view.active_since < YOUNG_S and event == "swap", self._plane.drift(view.name), before, again, fresh, event,
            )  # fmt: skip

        fresh: FreshRunner | None = None
        if needs_probe(findings()):
            began = monotonic()
            probe = await self._plane.against_fresh(view.name, PROBE_S, (DECAYED_CPU, DECAYED_WALL))
            patient.experiments_s += monotonic() - began
            self._metrics.count("hone_background_seconds", "probe", by=monotonic() - began)
            fresh = FreshRunner(probe.cpu, probe.wall) if probe is not None else None
            diagnosis = diagnose(findings(None, fresh))
            if diagnosis.cause is Cause.PROCESS:
                return diagnosis
        if not needs_replay(findings(None, fresh)):
            return diagnose(findings(None, fresh))
        with self._window.background("replay"):
            began = monotonic()
            again = await replay(self._bench, want, view.active, view.settings, self._settings.job_memory_bytes)
            patient.experiments_s += monotonic() - began
            self._metrics.count("hone_background_seconds", "replay", by=monotonic() - began)
        return diagnose(findings(again, fresh))

    async def _act(self, view: ModelView, want: ModelState, decided: Plan, diagnosis: Diagnosis, fault: bool) -> None:
        reason = f"{diagnosis.cause.value}: {diagnosis.text}"
        match decided.action:
            case Action.RESTART:
                await self._plane.renew(view.name)
                await self._say("runner.restarted", view, {"summary": f"a fresh runner took over: {diagnosis.text}"})
            case Action.ROLL_BACK:
                await asyncio.to_thread(self._commands.rollback, view.name, "hone", reason, fault)
                self._metrics.count("hone_rollbacks", view.name, diagnosis.cause.value)
            case Action.UNDO_SETTINGS:
                before = dict(want.previous_settings)[view.active]
                await asyncio.to_thread(self._commands.change_settings, view.name, before, "hone", reason, view.settings)
            case Action.SWITCH:
                await asyncio.to_thread(
                    self._commands.promote, view.name, decided.version, "hone", reason, decided.version.isdigit(), fault=fault
                )  # fmt: skip
                if decided.tries:
                    await self._build(view.name, decided, reason, recent=True)
            case Action.TUNE | Action.OPTIMIZE | Action.RECALIBRATE:
                await self._build(view.name, decided, reason, recent=decided.action is Action.RECALIBRATE)

    async def _build(self, name: str, decided: Plan, reason: str, recent: bool) -> None:
        recipes: list[list[str | JSON]] = [list(recipe) for recipe in decided.tries]
        tries = await asyncio.to_thread(parse_tries, recipes, self._plane.config(name).allow, name, recent=recent)
        await asyncio.to_thread(self._commands.optimize, name, tries, reason, "auto", "hone")

    # ---- after a promotion
    async def _watch(self, view: ModelView, patient: Patient, want: ModelState, config: ModelConfig) -> None:
        """The previous version still takes a share: both are compared, at the same time, until one thing is clear."""
        split = want.split
        if split is None or view.active != want.desired:
            return
        patient.watch_since = patient.watch_since or self._window.cut(view.name)
        judgement = compared(
            self._window, view.name, split.version, view.active, (patient.watch_since, patient.watch_since), view, config, SURE
        )
        age = time() - split.since
        if judgement.verdict is Verdict.FAILED:
            self._metrics.count("hone_verdicts", "watch", "failed")
            self._metrics.count("hone_rollbacks", view.name, "watch")
            await asyncio.to_thread(self._commands.rollback, view.name, "hone", f"watch: {judgement.text}", True)
        elif judgement.verdict is Verdict.PASSED or age > config.rollout.watch_s:
            passed = judgement.verdict is Verdict.PASSED
            self._metrics.count("hone_verdicts", "watch", "passed" if passed else "inconclusive")
            text = judgement.text if passed else f"nothing against it in {age:.0f} s ({judgement.text})"
            await self._say("version.confirmed", view, {"summary": f"beside {split.version}: {text}"})
            data = {"version": "", "share": 0.0, "stage": "watch", "summary": "the watch is over"}
            await asyncio.to_thread(self._journal.append, Event("traffic.split", view.name, "", data=data))

    async def _say(self, kind: str, view: ModelView, data: JSON) -> None:
        await asyncio.to_thread(self._journal.append, Event(kind, view.name, view.active, data=data))


def _notice_shapes(patient: Patient, block: Block) -> None:
    """Rows of other sizes than before are an event, and the new normal."""
    changed = other_shapes(patient.normal, block)
    if changed is not None:
        patient.normal, patient.event, patient.event_at, patient.due = changed, "change of the inputs' shapes", monotonic(), True


def _told(incident: Incident | None) -> JSON:
    """What is wrong now and whom it was blamed on; nothing while all is well."""
    diagnosis = incident.diagnosis if incident is not None else None
    return {
        "suspicions": [one.text for one in incident.suspicions] if incident is not None else [],
        "cause": diagnosis.cause.value if diagnosis is not None else "", "why": diagnosis.text if diagnosis is not None else "",
    }  # fmt: skip


def faulty(found: Sequence[Suspicion]) -> bool:
    """Wrong or missing answers, not slow ones: leaving such a version needs neither budget nor agreement, and it is not gone back to."""
    return any(one.kind in (Kind.ERRORS, Kind.DEATHS, Kind.NON_FINITE, Kind.FIDELITY) for one in found)


def _news(found: Sequence[Suspicion], incident: Incident) -> bool:
    """Whether something is wrong now that was not when it was last looked into: what is known of the incident does not explain it."""
    return bool({one.kind for one in found} - {one.kind for one in incident.suspicions} - {Kind.EVENT})


def _report(task: asyncio.Task[Any]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    if isinstance(error, StoreUnavailable | HoneError):
        log.warning("an investigation could not be brought to its end, and is begun again: %s", error)
    else:
        log.error("an investigation failed", exc_info=error)
