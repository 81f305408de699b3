"""The loop: look, blame, plan, act, verify. One `tick` a second over all models of this server; slow steps run as one investigation at a time.

Deciding is pure and elsewhere (suspicion, diagnosis, planner, concurrent); this keeps each model's incident, writes what was decided to the
journal, and hands work to those who do it: the data plane, the commands, the job keeper. docs/loop.md tells it as a story.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from time import monotonic, time
from typing import Any, Final, Protocol

from app.catalog.model_config import ModelConfig
from app.control.bench import Bench
from app.control.commands import Commands
from app.control.diagnosis import Cause, Diagnosis, Findings, FreshRunner, Replay, diagnose, needs_probe, needs_replay
from app.control.objectives import burn, promise_of
from app.control.planner import Action, Plan, Situation, plan, wait_after
from app.control.replay import replay
from app.control.rollout import compared
from app.control.rungs import cheaper_versions
from app.control.steps import parse_tries
from app.control.suspicion import Kind, Normal, Seen, Suspicion, cost_ratio, learned, suspicions, with_news
from app.domain import JSON, Event, JobState, Mode, ModelState, ModelView, State, Verdict
from app.errors import HoneError
from app.settings import Settings
from app.store.base import Journal, StoreUnavailable
from app.telemetry.hostfacts import HostFacts, HostSensor
from app.telemetry.metrics import Metrics
from app.telemetry.window import Block, Window

log = logging.getLogger("hone.control")
TICK_S: Final = 1.0
HOST_S: Final = 2.0
PROBE_S: Final = 2.0
LATELY_S: Final = 300.0
SETTLE_BLOCKS: Final = 2
"""Blocks in a row without suspicion after which an incident is over."""
YOUNG_S: Final = 3600.0
"""A version this young is suspected first of what begins."""
AGAIN_S: Final = 60.0
"""A cause without a remedy (load, host) is looked into again after this long, then after twice, …"""
DAY_S: Final = 86_400.0


class Condition(StrEnum):
    STEADY = "steady"
    SUSPICIOUS = "suspicious"
    REPAIRING = "repairing"
    TRIAL = "trial"
    WATCHING = "watching"
    COOLING = "cooling"


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
    async def against_fresh(self, name: str, seconds: float) -> Probed | None: ...
    async def compare_some(self) -> Any: ...


@dataclass
class Incident:
    """From the first suspicion until all is well again."""

    began: float
    suspicions: Sequence[Suspicion]
    diagnosis: Diagnosis | None = None
    tried: set[Action] = field(default_factory=set)
    acted_at: float = 0.0
    looks: int = 0
    looking: bool = False
    look_after: float = 0.0


@dataclass
class Patient:
    """What the loop remembers of one model between ticks."""

    identity: tuple[str, int] = ("", 0)
    normal: Normal = field(default_factory=Normal)
    seen_until: float = 0.0
    calm: int = 0
    incident: Incident | None = None
    failures: dict[Cause, int] = field(default_factory=dict)
    event: str = ""
    event_at: float = 0.0
    due: bool = False
    """An event asks for a look."""
    watch_since: float = 0.0
    ticks: int = 0
    ready_ticks: int = 0
    ladder_for: tuple[int, str] = (0, "")

    @property
    def condition(self) -> Condition:
        if self.incident is None:
            return Condition.STEADY
        if self.incident.acted_at:
            return Condition.REPAIRING
        return Condition.COOLING if self.incident.diagnosis is not None else Condition.SUSPICIOUS


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
        self._state = State()
        self._cores_seen: tuple[int, ...] = ()
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
            if self._busy is not None:
                self._busy.cancel()
                await asyncio.gather(self._busy, return_exceptions=True)

    async def tick(self) -> None:
        """One bounded step."""
        await self._sense_host()
        await self._plane.compare_some()
        self._state = await asyncio.to_thread(self._journal.state)
        if any(job.state is JobState.BUILDING for job in self._state.jobs.values()):
            self._window.mark()
        views = self._plane.models()
        self._window.forget({(view.name, version) for view in views for version in view.loaded})
        for view in views:
            want = self._state.models.get(view.name)
            patient = self._patients.setdefault(view.name, Patient())
            self._notice_events(view, patient)
            self._show(view, patient, want)
            if want is not None and self._leads():
                await self._look(view, patient, want, views)
        self._patients = {name: patient for name, patient in self._patients.items() if any(view.name == name for view in views)}

    def told(self, name: str) -> JSON:
        """What the loop thinks of a model now, for status and explain."""
        patient = self._patients.get(name)
        if patient is None:
            return {"condition": Condition.STEADY.value}
        return self._said.get(name, {}) | {"condition": patient.condition.value}

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
        if self._cores_seen and self._host.cores != self._cores_seen:
            for patient in self._patients.values():
                patient.event, patient.event_at, patient.due = "cores", now, True
        self._cores_seen = self._host.cores
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
        patient.due = patient.event == "swap" and patient.incident is None
        if patient.incident is not None and not patient.incident.acted_at:
            patient.incident.acted_at = monotonic()  # somebody else acted

    def _show(self, view: ModelView, patient: Patient, want: ModelState | None) -> None:
        """Gauges of one model; the promise's share and burn where there is one."""
        config, name = self._plane.config(view.name), view.name
        promise = promise_of(config)
        patient.ticks += 1
        patient.ready_ticks += view.ready
        self._window.objective(name, promise.threshold_s if promise is not None else None)
        condition = patient.condition
        if want is not None and want.split is not None:
            condition = Condition.WATCHING if want.split.stage == "watch" else Condition.TRIAL
        gauge = self._metrics.gauge
        for one in Condition:
            gauge("hone_model_state", name, one.value, value=float(one is condition))
        lately = self._window.since(name, view.active, self._window.now() - LATELY_S)
        if lately.compared:
            gauge("hone_fidelity_ratio", name, view.active, value=lately.agreed / lately.compared)
        drift = self._plane.drift(name)
        if drift is not None:
            gauge("hone_drift_score", name, value=drift)
        facts: JSON = {
            "condition": condition.value, "p95_s": lately.total.quantile(0.95), "requests_per_s": round(lately.requests / LATELY_S, 3),
            "availability": round(patient.ready_ticks / patient.ticks, 5), "drift": drift,
            "fidelity": {"agreed": lately.agreed, "compared": lately.compared} if lately.compared else None,
            "cost_ratio": cost_ratio(lately, patient.normal) if patient.normal.known else None,
            "objective": promise.text if promise is not None else "", "trend": self._trend(view),
        }  # fmt: skip
        if promise is not None and lately.requests:
            facts["attained"] = round(lately.within / lately.requests, 5)
            gauge("hone_slo_attainment_ratio", name, value=lately.within / lately.requests)
            rates = burn(promise.share, lambda seconds: self._window.good_and_bad(name, seconds)).rates
            for seconds, rate in rates.items():
                if rate is not None:
                    gauge("hone_burn_rate", name, f"{seconds:.0f}", value=rate)
            facts["burn"] = {f"{seconds:.0f}": rate for seconds, rate in rates.items()}
        if patient.incident is not None:
            facts["suspicions"] = [one.text for one in patient.incident.suspicions]
            if patient.incident.diagnosis is not None:
                facts["cause"], facts["why"] = patient.incident.diagnosis.cause.value, patient.incident.diagnosis.text
        self._said[name] = facts

    def _trend(self, view: ModelView) -> float | None:
        """p95 of the last minute over that of the four before; None without enough answers."""
        now = self._window.now()
        newest, older = self._window.since(view.name, view.active, now - 60), self._window.since(view.name, view.active, now - 300)
        if newest.requests < 20 or older.requests < 2 * newest.requests:
            return None
        first, last = older.total.quantile(0.95), newest.total.quantile(0.95)
        return last / first if first and last else None

    # ---- deciding
    async def _look(self, view: ModelView, patient: Patient, want: ModelState, views: list[ModelView]) -> None:
        config = self._plane.config(view.name)
        if want.split is not None:
            if want.split.stage == "watch":
                await self._watch(view, patient, want, config)
            return
        patient.watch_since = 0.0
        await self._set_ladder(view, patient, want, config)
        blocks = self._window.closed(view.name, view.active, SETTLE_BLOCKS)
        blocks = [block for block in blocks if block.began >= view.active_since]
        found = self._suspicions(view, blocks, patient, config)
        fresh = bool(blocks) and blocks[-1].ended > patient.seen_until
        if blocks:
            patient.seen_until = max(patient.seen_until, blocks[-1].ended)
        if not found:
            if fresh and not view.rung:
                patient.normal = with_news(learned(patient.normal, blocks[-1], view.memory_bytes), blocks[-1])
            await self._calm(view, patient, fresh)
            return
        patient.calm = 0
        if view.rung and all(one.kind in (Kind.LATENCY, Kind.REFUSALS, Kind.COST) for one in found):
            return  # stepped down for load: no blame until it is back
        incident = patient.incident
        known = incident is not None and not _news(found, incident)
        if incident is not None and known and (monotonic() < incident.look_after or (incident.acted_at and self._acting(view, incident))):
            return
        if self._busy is None or self._busy.done():
            self._busy = asyncio.create_task(self._investigate(view, patient, want, found, views), name=f"investigate-{view.name}")
            self._busy.add_done_callback(_report)

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
        """What looks wrong now. Faults count from the open block on; a due event asks for a look once there is traffic to look at."""
        now = self._window.now()
        lately = self._window.since(view.name, view.active, max(view.active_since, now - LATELY_S))
        opened = self._window.since(view.name, view.active, max(view.active_since, now - self._window.block_s))
        promise = promise_of(config)
        burning = burn(promise.share, lambda seconds: self._window.good_and_bad(view.name, seconds)) if promise is not None else None
        seen = Seen(blocks, lately, view.memory_bytes, view.recent_deaths, view.recent_kills)
        found = suspicions(seen, patient.normal, config, promise, burning) if blocks or view.recent_deaths else []
        urgent = suspicions(Seen([opened], Block(now, now), view.memory_bytes, 0), Normal(), config, None, None)
        kinds = {one.kind for one in found}
        found += [one for one in urgent if one.kind in (Kind.ERRORS, Kind.NON_FINITE) and one.kind not in kinds]
        if patient.due and lately.requests >= 20:
            found.append(Suspicion(Kind.EVENT, f"a {patient.event}: is it what it was proven to be?", {"event": patient.event}))
        return found

    def _acting(self, view: ModelView, incident: Incident) -> bool:
        """A remedy is under way, or so fresh that the blocks since do not show it yet."""
        open_job = any(
            job.model == view.name and job.state is not JobState.FINISHED and job.actor == "hone" for job in self._state.jobs.values()
        )
        return open_job or monotonic() - incident.acted_at < (SETTLE_BLOCKS + 1) * self._window.block_s

    async def _calm(self, view: ModelView, patient: Patient, fresh: bool) -> None:
        """Nothing is suspected; after some blocks in a row an incident is over."""
        incident = patient.incident
        patient.calm += fresh
        if incident is None or incident.looking or patient.calm < SETTLE_BLOCKS or (incident.acted_at and self._acting(view, incident)):
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
            incident = patient.incident = Incident(monotonic(), found)
        elif incident.acted_at and incident.diagnosis is not None:
            cause = incident.diagnosis.cause
            patient.failures[cause] = patient.failures.get(cause, 0) + 1
        incident.suspicions, incident.looks, patient.due = found, incident.looks + 1, False
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
        incident.diagnosis, incident.acted_at = diagnosis, 0.0
        self._metrics.count("hone_diagnoses", view.name, diagnosis.cause.value)
        decided = self._plan(view, patient, want, incident, diagnosis)
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
        incident.look_after = monotonic() + AGAIN_S * 2.0 ** min(6, incident.looks - 1)
        if decided.action in (Action.NOTHING, Action.STEP_DOWN):
            return
        incident.tried.add(decided.action)
        incident.look_after = 0.0
        await self._act(view, decided, diagnosis, faulty(incident.suspicions))
        incident.acted_at = monotonic()

    async def _blame(
        self, view: ModelView, patient: Patient, want: ModelState, found: list[Suspicion], views: list[ModelView]
    ) -> Diagnosis:  # fmt: skip
        """Experiments where only they can tell, then the rules."""
        block = self._window.since(
            view.name, view.active, max(view.active_since, self._window.now() - (SETTLE_BLOCKS + 1) * self._window.block_s)
        )
        others = sum(1 for name, one in self._patients.items() if name != view.name and one.incident is not None)
        event = patient.event if monotonic() - patient.event_at < LATELY_S else ""

        def findings(again: Replay | None = None, fresh: FreshRunner | None = None) -> Findings:
            return Findings(
                found, block, patient.normal, self._host, self._cores, view.settings.instances, view.settings.intra_op_threads, others,
                len(views), monotonic() - view.active_since < YOUNG_S and event == "swap", self._plane.drift(view.name), again, fresh, event,
            )  # fmt: skip

        fresh: FreshRunner | None = None
        if needs_probe(findings()):
            probe = await self._plane.against_fresh(view.name, PROBE_S)
            fresh = FreshRunner(probe.cpu, probe.wall) if probe is not None else None
            diagnosis = diagnose(findings(None, fresh))
            if diagnosis.cause is Cause.PROCESS:
                return diagnosis
        if not needs_replay(findings(None, fresh)):
            return diagnose(findings(None, fresh))
        with self._window.background("replay"):
            began = monotonic()
            again = await replay(self._bench, want, view.active, view.settings, self._settings.job_memory_bytes)
            self._metrics.count("hone_background_seconds", "replay", by=monotonic() - began)
        return diagnose(findings(again, fresh))

    def _plan(self, view: ModelView, patient: Patient, want: ModelState, incident: Incident, diagnosis: Diagnosis) -> Plan:
        config, state = self._plane.config(view.name), self._state
        own = [job for job in state.jobs.values() if job.model == view.name and job.actor == "hone" and job.requested_at > time() - DAY_S]
        tried = {
            tuple(str(step["method"]) for step in recipe)
            for job in state.jobs.values()
            if job.model == view.name and job.golden_sha256 == want.golden_sha256 and job.state is JobState.FINISHED
            and job.outcome in ("refused", "nothing_changed", "not_applicable", "promoted") and diagnosis.cause is not Cause.INPUT
            for recipe in job.tries
        }  # fmt: skip
        proven = [
            built.version for built in reversed(want.built)
            if not built.removed and built.golden_sha256 == want.golden_sha256 and built.version != view.active
            and dict(built.verdicts).get(self._host_class) is Verdict.PASSED and built.version not in want.left
        ]  # fmt: skip
        faults = faulty(incident.suspicions)
        spent = sum(max(0.0, job.finished_at - job.requested_at) for job in own if job.state is JobState.FINISHED)
        failures = patient.failures.get(diagnosis.cause, 0)
        latest = max(own, key=lambda job: job.requested_at, default=None)
        again = (
            {Action.OPTIMIZE, Action.TUNE} if latest is not None and latest.outcome == "inconclusive" else set()
        )  # the host was too loud
        situation = Situation(
            view.active, want.golden, want.previous if want.previous not in want.left else "", proven, want.rungs, frozenset(tried), frozenset(incident.tried - again),
            want.mode or config.mode, state.frozen,
            sum(1 for job in state.jobs.values() if job.model == view.name and job.state is not JobState.FINISHED),
            0 if want.golden in want.left else config.budget.builds - sum(len(job.candidates) for job in own), config.budget.swaps - sum(job.outcome == "promoted" for job in own),
            config.budget.job_cpu_s - spent, config.source is not None and config.samples.train is not None,
            max(0.0, incident.acted_at + wait_after(failures) - monotonic()) if incident.acted_at else 0.0, faults,
        )  # fmt: skip
        return plan(diagnosis, situation, config)

    async def _act(self, view: ModelView, decided: Plan, diagnosis: Diagnosis, fault: bool) -> None:
        reason = f"{diagnosis.cause.value}: {diagnosis.text}"
        match decided.action:
            case Action.RESTART:
                await self._plane.renew(view.name)
                await self._say("runner.restarted", view, {"summary": f"a fresh runner took over: {diagnosis.text}"})
            case Action.ROLL_BACK:
                await asyncio.to_thread(self._commands.rollback, view.name, "hone", reason, fault)
                self._metrics.count("hone_rollbacks", view.name, diagnosis.cause.value)
            case Action.SWITCH if not decided.waits:
                await asyncio.to_thread(
                    self._commands.promote, view.name, decided.version, "hone", reason, decided.version.isdigit(), fault=fault
                )  # fmt: skip
            case Action.TUNE | Action.OPTIMIZE | Action.RECALIBRATE:
                config = self._plane.config(view.name)
                recipes: list[list[str | JSON]] = [list(recipe) for recipe in decided.tries]
                tries = await asyncio.to_thread(parse_tries, recipes, config.allow, view.name)
                await asyncio.to_thread(self._commands.optimize, view.name, tries, reason, "auto", "hone")

    # ---- after a promotion
    async def _watch(self, view: ModelView, patient: Patient, want: ModelState, config: ModelConfig) -> None:
        """The previous version still takes a share: both are compared, at the same time, until one thing is clear."""
        split = want.split
        if split is None or view.active != want.desired:
            return
        patient.watch_since = patient.watch_since or self._window.cut(view.name)
        judgement = compared(self._window, view.name, split.version, view.active, patient.watch_since, view, config)
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


def faulty(found: Sequence[Suspicion]) -> bool:
    """Wrong or missing answers, not slow ones: leaving such a version needs neither budget nor agreement, and it is not gone back to."""
    return any(one.kind in (Kind.ERRORS, Kind.DEATHS, Kind.NON_FINITE, Kind.FIDELITY) for one in found)


def _news(found: Sequence[Suspicion], incident: Incident) -> bool:
    """Whether something is wrong now that was not when it was last looked into: what is known of the incident does not explain it."""
    return bool({one.kind for one in found} - {one.kind for one in incident.suspicions} - {Kind.EVENT})


def _report(task: asyncio.Task[None]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    if isinstance(error, StoreUnavailable | HoneError):
        log.warning("an investigation could not be brought to its end, and is begun again: %s", error)
    else:
        log.error("an investigation failed", exc_info=error)
