"""Brings jobs to their end on the server that serves: verifies what workers built, tunes, promotes what passed, says why the rest did not.

One per server, active where it holds the store's lease. Every step is an event, so that the next holder goes on after a crash.
Judging runs in task children of lowest priority inside this server's own quota; rollback never needs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import asdict
from time import monotonic, time
from typing import Any, Final

from app.catalog.cards import BuiltCard, Cards
from app.catalog.repository import Repository
from app.catalog.state_folder import StateFolder
from app.control.bench import Bench, Workpiece
from app.control.commands import Commands
from app.control.endings import is_server_side, outcome_without_winner, summary_of, told, unneeded
from app.control.expected import in_order
from app.control.live_tune import Plane
from app.control.rollout import Rollout
from app.control.steps import is_recalibration, target_of
from app.control.tally import JobTally
from app.control.tuning import Tuning
from app.control.verification import (
    VERIFY_S,
    Judged,
    best,
    held_back,
    judged,
    may_promote_alone,
    proof_of,
    question,
)  # fmt: skip
from app.domain import JSON, Event, Job, JobState, ModelState, RuntimeSettings, State, Verdict
from app.errors import Conflict, HoneError, NotAllowed
from app.settings import Settings
from app.store.base import Journal, StoreUnavailable
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window
from optimizers.base import Progress
from optimizers.host import parse_target
from optimizers.task import Failure, TaskFailed, TaskLimits, run_task

log = logging.getLogger("hone.control")
LEASE: Final = "control"
LEASE_S: Final = 10.0
LOOK_S: Final = 0.3
PROGRESS_S: Final = 30.0
ACTIVATION_S: Final = 180.0


class JobKeeper:
    """Owns jobs between the worker's `built` and the end."""

    def __init__(
        self, journal: Journal, commands: Commands, repository: Repository, state: StateFolder, cards: Cards, host_class: str, cores: int,
        settings: Settings, metrics: Metrics, window: Window, rollout: Rollout, plane: Plane, replica: str,
    ) -> None:  # fmt: skip
        self._journal, self._commands, self._bench = journal, commands, Bench(repository, state, cards)
        self._cards, self._host_class, self._settings, self._metrics = cards, host_class, settings, metrics
        self._window, self._rollout, self._plane, self._replica = window, rollout, plane, replica
        self._leads_until = 0.0
        self.refused = ""
        """Why the store takes nothing, though it may well be read: full, read-only."""
        self._fallback = RuntimeSettings(cores, 1, 16, 512)
        self._tally = JobTally(metrics)
        self._seen = State()
        self._cpu_s: dict[str, float] = {}
        """CPU seconds of each open job's tasks here."""
        self._concluding: dict[str, asyncio.Task[None]] = {}
        """By model: one job of each, so that a canary of one model holds up no repair of another."""
        self._measuring = asyncio.Lock()
        self._tuning = Tuning(self._bench, plane, self._measuring)

    async def run(self) -> None:
        try:
            while True:
                await self._bounded(self._look())
                await asyncio.sleep(LOOK_S)
        finally:
            tasks = list(self._concluding.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        if await self._lead():
            await self._pass(await asyncio.to_thread(self._journal.state))

    async def _bounded(self, work: Coroutine[Any, Any, None]) -> None:
        """It may fail, and is begun again later."""
        try:
            await work
        except StoreUnavailable:
            await asyncio.sleep(2.0)
        except HoneError as error:
            log.warning("%s", error)
        except Exception:
            log.exception("a pass of the job keeper failed")
            await asyncio.sleep(2.0)

    @property
    def leads(self) -> bool:
        """Whether this server holds the control lease: it alone decides, for all that share the store."""
        return monotonic() < self._leads_until

    async def _lead(self) -> bool:
        began = monotonic()
        try:
            held = await asyncio.to_thread(self._journal.acquire, LEASE, self._replica, LEASE_S)
        except StoreUnavailable as error:
            self.refused = str(error)
            raise
        self.refused = ""
        if not held or began > self._leads_until:
            self._tally.lapsed()
        self._leads_until = began + LEASE_S if held else 0.0
        return held

    async def _pass(self, state: State) -> None:
        self._tally.count(state)
        for job in in_order([job for job in state.jobs.values() if job.state is not JobState.FINISHED], time()):
            await self._advance(job)

    async def _advance(self, job: Job) -> None:
        """One step of one job."""
        if job.state is JobState.REQUESTED and is_server_side(job):
            await self._say("job.claimed", job, worker=f"server {self._replica}", attempt=job.attempt + 1)
            await self._say("job.built", job, attempt=job.attempt + 1, candidates=[], report={})
        elif job.state is JobState.BUILDING and (job.cancel_asked or job.worker.startswith("server ")):
            if await asyncio.to_thread(self._journal.acquire, f"job:{job.id}", self._replica, LEASE_S):
                await asyncio.to_thread(self._journal.release, f"job:{job.id}", self._replica)
                if job.cancel_asked:
                    await self._end(job, outcome="cancelled", report={"reason": "its worker is gone"})
                else:  # a server that died between the two events
                    await self._say("job.built", job, attempt=job.attempt, candidates=[], report={})
        elif job.state in (JobState.BUILT, JobState.VERIFYING):
            open_task = self._concluding.get(job.model)
            if open_task is None or open_task.done():
                self._concluding[job.model] = asyncio.create_task(self._bounded(self._conclude(job)), name=f"conclude-{job.id}")

    # ---- the end of a job
    async def _conclude(self, job: Job) -> None:
        now = (await asyncio.to_thread(self._journal.state)).jobs.get(job.id)
        if now is None or now.state is JobState.FINISHED:
            return  # it ended since it was looked at
        if job.state is JobState.BUILT:
            await self._say("job.verifying", job)
        stop = asyncio.Event()
        watch = asyncio.create_task(self._watch(job, stop), name=f"watch-{job.id}")
        try:
            outcome, candidate, report = await self._judge(job, stop)
        except TaskFailed as failure:
            cancelled = failure.kind is Failure.CANCELLED
            if cancelled and not await self._cancel_asked(job):
                return  # the lease went to another, who goes on with it
            outcome, candidate, report = "cancelled" if cancelled else "failed", "", {"reason": failure.text}
        except StoreUnavailable:
            raise
        except (HoneError, OSError) as error:
            outcome, candidate, report = "failed", "", {"reason": str(error)}
        except Exception as error:
            log.exception("job %s could not be judged", job.id)
            outcome, candidate, report = "failed", "", {"reason": f"internal error: {type(error).__name__}: {error}; the log tells more"}
        finally:
            watch.cancel()
        report = {**job.report, **report}
        report["cpu_s"] = round(float(job.report.get("cpu_s") or 0.0) + self._cpu_s.pop(job.id, 0.0), 1)
        report["summary"] = summary_of(report)
        await self._end(job, outcome=outcome, candidate=candidate, report=report)
        await self._remove_unneeded(job.model)

    async def _cancel_asked(self, job: Job) -> bool:
        now = (await asyncio.to_thread(self._journal.state)).jobs.get(job.id)
        return now is None or now.cancel_asked or now.state is JobState.FINISHED

    async def _remove_unneeded(self, model: str) -> None:
        """Weights that nobody needs go; cards, proofs and events stay."""
        state = await asyncio.to_thread(self._journal.state)
        want = state.models.get(model)
        if want is None:
            return
        for version in unneeded(want, list(state.jobs.values()), self._host_class):
            try:
                await asyncio.to_thread(self._commands.let_go, model, version, "hone", "not needed")
            except Conflict:
                continue  # somebody promoted it meanwhile
            await asyncio.to_thread(self._cards.remove_weights, model, version)

    async def _judge(self, job: Job, stop: asyncio.Event) -> tuple[str, str, JSON]:
        """(outcome, version, report) of everything that the job built or asked for."""
        piece = await asyncio.to_thread(self._bench.workpiece, job.model, job.golden, job.golden_sha256)
        seen = [await self._verify(job, piece, version, stop, proof_only=True) for version in self._versions_to_prove(job)]
        if seen:
            passed = all(one.verdict is Verdict.PASSED for one in seen)
            return "proven" if passed else seen[0].verdict.value, seen[0].version, {"verdicts": [told(one) for one in seen]}
        if (resumed := await self._already_taken(job)) is not None:
            return resumed
        seen = [await self._verify(job, piece, version, stop, proof_only=False) for version in job.candidates]
        winner = best(seen)
        report: JSON = {"verdicts": [told(one) for one in seen]}
        if winner is not None:
            settings = await self._tuned_candidate(job, piece, winner, stop, report)
            return await self._take(job, piece, winner, settings, report, stop)
        if any(recipe and recipe[-1]["method"] == "tune" and len(recipe) == 1 for recipe in job.tries):
            return await self._tune_active(job, piece, stop, report)
        outcome = outcome_without_winner(seen, job)
        left_open = [one.version for one in seen if one.verdict in (Verdict.INCONCLUSIVE, Verdict.NO_DATA)]
        return outcome, left_open[0] if outcome == "inconclusive" and left_open else "", report

    def _versions_to_prove(self, job: Job) -> list[str]:
        return [str(step["version"]) for recipe in job.tries for step in recipe if step["method"] == "verify"]

    async def _verify(self, job: Job, piece: Workpiece, version: str, stop: asyncio.Event, proof_only: bool) -> Judged:
        """Judge one version here; its proof and the event are written before this returns."""
        want = await self._want(job)
        card = await asyncio.to_thread(self._bench.card, piece, version)
        lossless = isinstance(card, BuiltCard) and bool(card.draft.facts) and bool(card.draft.facts[-1].get("lossless"))
        with self._bench.scratch() as folder:
            request = await asyncio.to_thread(
                question, self._bench, piece, want, version, self._host_class, self._fallback, folder, proof_only, lossless,
                is_recalibration(job),
            )  # fmt: skip
            report = await self._task("verify", request, VERIFY_S + 120, job, stop)
        before = self._bench.settings(piece, want, version, self._host_class, self._fallback)
        proof = proof_of(card, want.golden_sha256, self._host_class, report, before)
        await asyncio.to_thread(self._cards.write_proof, card, proof)
        found = judged(version, report, lossless)
        self._metrics.count("hone_verdicts", "offline", found.verdict.value)
        if version != piece.golden.version:
            data = {"version": version, "host_class": self._host_class, "verdict": found.verdict.value, "summary": found.summary}
            await asyncio.to_thread(self._journal.append, Event("version.verified", job.model, version, job.id, data=data))
        return found

    async def _take(
        self, job: Job, piece: Workpiece, winner: Judged, settings: RuntimeSettings | None, report: JSON, stop: asyncio.Event
    ) -> tuple[str, str, JSON]:
        """Promote the winner, or leave it for a person to."""
        await self._want(job)
        waits = may_promote_alone(winner, piece) if job.promote == "auto" else "promotion was asked to be manual"
        waits = waits or await self._made_for_others(job, winner.version)
        waits = waits or await self._held_back(job, piece)
        if waits:
            return "kept", winner.version, report | {"waits": waits}

        def hindered() -> str:
            return "the job was cancelled" if stop.is_set() else held_back(self._seen, job.model, piece.config)

        promoted = None
        try:
            end = await self._rollout.run(job.model, winner.version, piece.config, job.id, hindered)
            report["canary"] = end.text
            if stop.is_set():
                raise TaskFailed(Failure.CANCELLED, "cancelled during its canary")
            if not end.skipped:
                self._metrics.count("hone_verdicts", "canary", end.verdict.value)
            if end.verdict is Verdict.FAILED:
                return "refused", "", report | {"reason": f"canary: {end.text}"}
            if waits := await self._held_back(job, piece):
                return "kept", winner.version, report | {"waits": waits}
            if end.verdict is not Verdict.PASSED:
                waits = f"the canary stayed undecided ({end.text}); it is proven, promote it by hand"
                return "kept", winner.version, report | {"waits": waits}
            await self._want(job)
            share = 0.0 if end.skipped else piece.config.rollout.watch_share
            reason = f"job {job.id}: {winner.summary}"
            try:
                promoted = await asyncio.to_thread(
                    self._commands.promote, job.model, winner.version, "hone", reason, False, settings, share
                )  # fmt: skip
            except NotAllowed as error:
                return "kept", winner.version, report | {"waits": str(error)}
        finally:
            if promoted is None:
                await self._rollout.clear(job.model, winner.version, job.id)
        return await self._taken(job, winner.version, promoted.seq, report)

    async def _held_back(self, job: Job, piece: Workpiece) -> str:
        """`held_back`, by what the journal says at this moment."""
        self._seen = await asyncio.to_thread(self._journal.state)
        return held_back(self._seen, job.model, piece.config)

    async def _made_for_others(self, job: Job, version: str) -> str:
        """Why a version that was built for another class of hosts does not take over here by itself; '' where it was not."""
        card = await asyncio.to_thread(self._cards.card, job.model, version)
        target = target_of(job.tries[card.draft.try_index]) if isinstance(card, BuiltCard) else ""
        if not target or parse_target(target).key == self._host_class:
            return ""
        return f"it was made for {target}, and is unproven there: run hone verify {job.model}:{version} on such a host"

    async def _already_taken(self, job: Job) -> tuple[str, str, JSON] | None:
        """The end of a job whose winner was promoted by an earlier holder of the lease, who did not live to say so."""
        want = await self._want(job)
        if want.desired not in job.candidates:
            return None
        for event in await asyncio.to_thread(self._journal.read, 0, 1000, job.model, True):
            if event.kind == "desired.changed" and event.version == want.desired:
                return await self._taken(job, want.desired, event.seq, await asyncio.to_thread(self._told_before, want))
        return None

    def _told_before(self, want: ModelState) -> JSON:
        """The report on a version that was judged and promoted already, as its proof has it."""
        proof = self._cards.proof(self._cards.card(want.name, want.desired), want.golden_sha256, self._host_class)
        verdicts = [] if proof is None else [{"version": want.desired, "verdict": proof.verdict.value, "summary": proof.summary}]
        return {"verdicts": verdicts, "notes": ["promoted before the server was started again"]}

    async def _taken(self, job: Job, version: str, since: int, report: JSON) -> tuple[str, str, JSON]:
        """Wait until the promoted version serves; where it does not, go back to the one before."""
        if await self._activated(job.model, version, since):
            return "promoted", version, report
        await self._undo(job, version)
        reason = f"version {version} passed, but did not load; the version before goes on serving"
        return "failed", version, report | {"reason": reason}

    async def _undo(self, job: Job, version: str) -> None:
        want = await self._want(job)
        if want.desired == version and want.previous:
            await asyncio.to_thread(self._commands.leave, job.model, "hone", f"version {version} did not load")

    async def _activated(self, model: str, version: str, since: int) -> bool:
        """Wait, bounded, for the data plane to say, later than event `since`, that it serves `version`, or that it does not load."""
        after, until = since, monotonic() + ACTIVATION_S
        while monotonic() < until:
            for event in await asyncio.to_thread(self._journal.read, after, 500, model):
                after = event.seq
                if event.version == version and event.kind == "version.activated":
                    return True
                if event.version == version and event.kind == "version.failed":
                    return False
            await asyncio.to_thread(self._journal.wait, after, 1.0)
        return False

    # ---- tuning
    async def _tuned_candidate(
        self, job: Job, piece: Workpiece, winner: Judged, stop: asyncio.Event, report: JSON
    ) -> RuntimeSettings | None:
        """Settings for the winner, where its recipe ends with tune."""
        card = await asyncio.to_thread(self._cards.card, job.model, winner.version)
        recipe = job.tries[card.draft.try_index] if isinstance(card, BuiltCard) else ()
        if not recipe or recipe[-1]["method"] != "tune":
            return None
        want = await self._want(job)
        before = self._bench.settings(piece, want, winner.version, self._host_class, self._fallback)
        tuned, report["tune"] = await self._tune(job, piece, winner.version, before, recipe[-1], stop)
        return tuned

    async def _tune_active(self, job: Job, piece: Workpiece, stop: asyncio.Event, report: JSON) -> tuple[str, str, JSON]:
        """Better settings for what serves now: a new generation, not a new version."""
        want = await self._want(job)
        before = self._bench.settings(piece, want, want.desired, self._host_class, self._fallback)
        step = next(recipe[-1] for recipe in job.tries if recipe and recipe[-1]["method"] == "tune")
        tuned, report["tune"] = await self._tune(job, piece, want.desired, before, step, stop)
        if tuned is None or tuned == before:
            open_end = report["tune"].get("verdict") == "inconclusive"
            return "inconclusive" if open_end else "nothing_changed", want.desired, report
        waits = "promotion was asked to be manual" if job.promote != "auto" else await self._held_back(job, piece)
        if not waits and (await self._want(job)).desired != want.desired:
            waits = f"it was measured for version {want.desired}, which was replaced meanwhile"
        if waits:
            return "kept", want.desired, report | {"settings": asdict(tuned), "waits": waits}
        reason = f"job {job.id}: {report['tune'].get('summary', 'tuned')}"
        await asyncio.to_thread(self._commands.change_settings, job.model, tuned, "hone", reason, before)
        return "promoted", want.desired, report

    async def _tune(
        self, job: Job, piece: Workpiece, version: str, before: RuntimeSettings, step: Mapping[str, Any], stop: asyncio.Event
    ) -> tuple[RuntimeSettings | None, JSON]:  # fmt: skip
        async def ask(request: JSON, seconds: float) -> dict[str, Any]:
            return await self._task("tune", request, seconds, job, stop)

        async def serves() -> str:
            return (await self._want(job)).desired

        return await self._tuning.tune(piece, version, before, step, ask, serves, stop.is_set)

    # ---- helpers
    async def _task(self, kind: str, request: Mapping[str, Any], seconds: float, job: Job, stop: asyncio.Event) -> dict[str, Any]:
        loop = asyncio.get_running_loop()

        def progress(seen: Progress) -> None:
            loop.run_in_executor(None, self._post, job, seen)

        def spend(cpu_s: float) -> None:
            self._cpu_s[job.id] = self._cpu_s.get(job.id, 0.0) + cpu_s

        async with self._measuring:  # two at once would measure each other
            began = monotonic()
            try:
                with self._bench.scratch() as scratch:
                    limits = TaskLimits(seconds, threads=1, memory_bytes=self._settings.job_memory_bytes, nice=10, scratch=str(scratch))
                    with self._window.background(kind):
                        return await run_task(kind, request, limits, progress, stop, spend)
            finally:
                self._metrics.count("hone_background_seconds", kind, by=monotonic() - began)

    def _post(self, job: Job, seen: Progress) -> None:
        try:
            self._journal.post(f"job:{job.id}", asdict(seen), PROGRESS_S)
        except StoreUnavailable:
            log.debug("the progress of %s could not be shown", job.id)

    async def _watch(self, job: Job, stop: asyncio.Event) -> None:
        """Keep the lease, and set `stop` when the job is cancelled or superseded meanwhile."""
        while not stop.is_set():
            try:
                held = await self._lead()
                self._seen = await asyncio.to_thread(self._journal.state)
                now = self._seen.jobs.get(job.id)
                if not held or now is None or now.cancel_asked or now.state is JobState.FINISHED:
                    stop.set()
            except StoreUnavailable:
                log.warning("the journal is away while %s is judged", job.id)
            await asyncio.sleep(1.0)

    async def _want(self, job: Job) -> ModelState:
        state = (await asyncio.to_thread(self._journal.state)).models.get(job.model)
        if state is None or state.golden_sha256 != job.golden_sha256:
            raise Conflict(f"golden of {job.model!r} changed or the model is gone while job {job.id} ran; nothing is published")
        return state

    async def _say(self, kind: str, job: Job, **data: Any) -> None:
        await asyncio.to_thread(self._journal.append, Event(kind, job.model, "", job.id, data=data))

    async def _end(self, job: Job, **data: Any) -> None:
        self._tally.ended(job.id)
        await self._say("job.finished", job, **data)
