"""Brings jobs to their end on the server that serves: verifies what workers built, tunes, promotes what passed, says why the rest did not.

One per server, active where it holds the store's lease. Every step is an event, so that the next holder goes on after a crash.
Judging runs in task children of lowest priority inside this server's own quota; rollback never needs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from time import monotonic, time
from typing import Any, Final

from app.catalog.cards import BuiltCard, Cards
from app.catalog.repository import Repository
from app.catalog.state_folder import StateFolder
from app.control.bench import Bench, Workpiece
from app.control.builders import machine
from app.control.choices import promises_no_time
from app.control.commands import Commands
from app.control.endings import is_server_side, summary_of, told, unneeded, without_winner
from app.control.expected import in_order
from app.control.live_tune import Plane
from app.control.reach import Away, Shown
from app.control.rollout import Rollout
from app.control.steps import is_recalibration
from app.control.taking import Taking
from app.control.tally import JobTally
from app.control.tuning import Tuning
from app.control.verification import Judged, best, judged, may_promote_alone, proof_of, question
from app.domain import JSON, Event, Job, JobState, RuntimeSettings, State, Verdict
from app.errors import Conflict, HoneError, NotAllowed
from app.settings import Settings
from app.store.base import Journal, StoreUnavailable
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window
from optimizers.allocator import give_back
from optimizers.catalogue import catalogue
from optimizers.host import room_for_a_task
from optimizers.task import Failure, TaskFailed, TaskLimits, run_task

log = logging.getLogger("hone.control")
LEASE: Final = "control"
LEASE_S: Final = 10.0
RELEASE_S: Final = 1.0
LOOK_S: Final = 0.3
PROGRESS_S: Final = 30.0
MOST_JUDGINGS: Final = 5
"""So many servers may begin to judge a job and end before they are done: what takes a server down would else do so at each start."""


class JobKeeper:
    """Owns jobs between the worker's `built` and the end."""

    def __init__(
        self, journal: Journal, commands: Commands, repository: Repository, state: StateFolder, cards: Cards, host_class: str, cores: int,
        settings: Settings, metrics: Metrics, window: Window, rollout: Rollout, plane: Plane, replica: str,
    ) -> None:  # fmt: skip
        self._journal, self._commands, self._bench = journal, commands, Bench(repository, state, cards)
        self._cards, self._host_class, self._settings, self._metrics = cards, host_class, settings, metrics
        self._window, self._replica = window, replica
        self._taking = Taking(journal, commands, cards, host_class, rollout, metrics, replica)
        self._leads_until = 0.0
        self._led: bool | None = None
        self.may_lead: Callable[[], bool] = lambda: True
        """Not while its models are being loaded: what it cannot judge yet another may, or it a moment later; a job would end as failed."""
        self.refused = ""
        """Why the store takes nothing, though it may well be read: full, read-only."""
        self._fallback = RuntimeSettings(cores, 1, 16, 512)
        self._tally = JobTally(metrics)
        self._cpu_s: dict[str, float] = {}
        """CPU seconds of each open job's tasks here."""
        self._begun: set[str] = set()
        """Jobs that were begun to be judged by this very process."""
        self._concluding: dict[str, asyncio.Task[None]] = {}
        """By model: one job of each, so that a canary of one model holds up no repair of another."""
        self._measuring = asyncio.Lock()
        self._tuning = Tuning(self._bench, plane, self._measuring)

    async def run(self) -> None:
        try:
            await self._bounded(self._read_methods())
            while True:
                await self._bounded(self._look())
                await asyncio.sleep(LOOK_S)
        finally:
            tasks = list(self._concluding.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._give_up_lease()

    async def _read_methods(self) -> None:
        """The first reading takes 60 ms, which no request should wait for."""
        await asyncio.to_thread(catalogue)

    async def _give_up_lease(self) -> None:
        """Another server decides at once, not when the lease has run out. A store that is away holds up no end."""
        if self.leads:
            with suppress(StoreUnavailable, TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self._journal.release, LEASE, self._replica), RELEASE_S)

    async def _look(self) -> None:
        if self.may_lead() and await self._lead():
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
        if held is not self._led:
            log.info("this server decides from now on" if held else "another server that shares the journal decides")
        self._led = held
        self._leads_until = began + LEASE_S if held else 0.0
        return held

    async def _pass(self, state: State) -> None:
        self._tally.count(state)
        for job in in_order([job for job in state.jobs.values() if job.state is not JobState.FINISHED], time()):
            await self._advance(job)

    async def _advance(self, job: Job) -> None:
        """One step of one job."""
        if job.state is JobState.REQUESTED and is_server_side(job):
            await self._say("job.claimed", job, worker=f"server {self._replica}", machine=machine(), attempt=job.attempt + 1)
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
        if now.state is JobState.VERIFYING:  # proven again from the start; who judged its canary is gone, or could not reach the store
            await self._taking.end_trials(now)
        job = await self._begin(now)
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
            await asyncio.to_thread(give_back)  # the samples that it was judged with are gone
        await self._taking.end_trials(job)
        report = {**job.report, **report}
        report["cpu_s"] = round(float(job.report.get("cpu_s") or 0.0) + self._cpu_s.pop(job.id, 0.0), 1)
        report["summary"] = summary_of(report)
        await self._end(job, outcome=outcome, candidate=candidate, report=report)
        await self._remove_unneeded(job.model)

    async def _begin(self, job: Job) -> Job:
        """Count that judging is begun; once in each process, since a store that was away meanwhile is no end of a server."""
        if job.state is JobState.VERIFYING and job.id in self._begun:
            return job
        await self._say("job.verifying", job, **({"judging": job.judgings + 1} if job.judgings else {}))
        self._begun.add(job.id)
        return replace(job, state=JobState.VERIFYING, judgings=job.judgings + 1)

    async def _cancel_asked(self, job: Job) -> bool:
        now = (await asyncio.to_thread(self._journal.state)).jobs.get(job.id)
        return now is None or now.cancel_asked or now.state is JobState.FINISHED

    async def _remove_unneeded(self, model: str) -> None:
        """Weights that nobody needs go; cards, proofs and events stay. Not while all is frozen: a person is to look first, also at what the
        journal lost, and weights do not come back."""
        state = await asyncio.to_thread(self._journal.state)
        want = state.models.get(model)
        if want is None or state.frozen:
            return
        for version in unneeded(want, list(state.jobs.values()), self._host_class):
            try:
                await asyncio.to_thread(self._commands.let_go, model, version, "hone", "not needed")
            except Conflict:
                continue  # somebody promoted it meanwhile
            await asyncio.to_thread(self._cards.remove_weights, model, version)

    async def _judge(self, job: Job, stop: asyncio.Event) -> tuple[str, str, JSON]:
        """(outcome, version, report) of everything that the job built or asked for."""
        proofs = self._versions_to_prove(job)
        if not proofs and (resumed := await self._taking.already_taken(job)) is not None:
            return resumed
        if job.judgings > MOST_JUDGINGS:
            raise TaskFailed(
                Failure.DIED,
                f"{MOST_JUDGINGS} times the server ended while it was judged, and may have ended of it (of too little memory, say); "
                "look into the server's log, and ask for it again",
            )
        piece = await asyncio.to_thread(self._bench.workpiece, job.model, job.golden, job.golden_sha256)
        seen = [await self._verify(job, piece, version, stop, proof_only=True) for version in proofs]
        if seen:
            passed = all(one.verdict is Verdict.PASSED for one in seen)
            return "proven" if passed else seen[0].verdict.value, seen[0].version, {"verdicts": [told(one) for one in seen]}
        seen = [await self._verify(job, piece, version, stop, proof_only=False) for version in job.candidates]
        winner, largest = best(seen, alone=job.promote == "auto"), best(seen)
        report: JSON = {"verdicts": [told(one) for one in seen]}
        if winner is not None:
            if largest is not None and largest is not winner:
                report["also"] = f"{largest.version} gains more: {may_promote_alone(largest)}"
            settings = await self._tuned_candidate(job, piece, winner, stop, report)
            return await self._taking.take(job, piece, winner, settings, report, stop)
        if any(recipe and recipe[-1]["method"] == "tune" and len(recipe) == 1 for recipe in job.tries):
            tuned, version, report = await self._tune_active(job, piece, stop, report)
            return *without_winner(seen, job, (tuned, version)), report
        return *without_winner(seen, job), report

    def _versions_to_prove(self, job: Job) -> list[str]:
        return [str(step["version"]) for recipe in job.tries for step in recipe if step["method"] == "verify"]

    async def _verify(self, job: Job, piece: Workpiece, version: str, stop: asyncio.Event, proof_only: bool) -> Judged:
        """Judge one version here; its proof and the event are written before this returns."""
        want = await self._taking.want(job)
        card = await asyncio.to_thread(self._bench.card, piece, version)
        lossless = isinstance(card, BuiltCard) and bool(card.draft.facts) and bool(card.draft.facts[-1].get("lossless"))
        for_bytes = isinstance(card, BuiltCard) and promises_no_time([str(step.get("method")) for step in card.draft.recipe])
        with self._bench.scratch() as folder:
            request = await asyncio.to_thread(
                question, self._bench, piece, want, version, self._host_class, self._fallback, folder, self._settings.proof_seconds,
                proof_only, lossless, is_recalibration(job) or for_bytes,
            )  # fmt: skip
            report = await self._task("verify", request, self._settings.proof_seconds + 120, job, stop)
        before = self._bench.settings(piece, want, version, self._host_class, self._fallback)
        proof = proof_of(card, want.golden_sha256, self._host_class, report, before)
        await asyncio.to_thread(self._cards.write_proof, card, proof)
        found = judged(version, report, lossless, piece.samples.owner_named)
        self._metrics.count("hone_verdicts", "offline", found.verdict.value)
        if version != piece.golden.version:
            data = {"version": version, "host_class": self._host_class, "verdict": found.verdict.value, "summary": found.summary}
            await asyncio.to_thread(self._journal.append, Event("version.verified", job.model, version, job.id, data=data))
        return found

    # ---- tuning
    async def _tuned_candidate(
        self, job: Job, piece: Workpiece, winner: Judged, stop: asyncio.Event, report: JSON
    ) -> RuntimeSettings | None:
        """Settings for the winner, where its recipe ends with tune."""
        card = await asyncio.to_thread(self._cards.card, job.model, winner.version)
        recipe = job.tries[card.draft.try_index] if isinstance(card, BuiltCard) else ()
        if not recipe or recipe[-1]["method"] != "tune":
            return None
        want = await self._taking.want(job)
        before = self._bench.settings(piece, want, winner.version, self._host_class, self._fallback)
        tuned, report["tune"] = await self._tune(job, piece, winner.version, before, recipe[-1], stop)
        return tuned

    async def _tune_active(self, job: Job, piece: Workpiece, stop: asyncio.Event, report: JSON) -> tuple[str, str, JSON]:
        """Better settings for what serves now: a new generation, not a new version."""
        want = await self._taking.want(job)
        before = self._bench.settings(piece, want, want.desired, self._host_class, self._fallback)
        step = next(recipe[-1] for recipe in job.tries if recipe and recipe[-1]["method"] == "tune")
        tuned, report["tune"] = await self._tune(job, piece, want.desired, before, step, stop)
        if tuned is None or tuned == before:
            open_end = report["tune"].get("verdict") == "inconclusive"
            return "inconclusive" if open_end else "nothing_changed", want.desired, report
        waits = "promotion was asked to be manual" if job.promote != "auto" else await self._taking.held_back(job, piece)
        if not waits and (await self._taking.want(job)).desired != want.desired:
            waits = f"it was measured for version {want.desired}, which was replaced meanwhile"
        reason = f"job {job.id}: {report['tune'].get('summary', 'tuned')}"
        try:
            if not waits:
                await asyncio.to_thread(self._commands.change_settings, job.model, tuned, "hone", reason, before)
                return "promoted", want.desired, report
        except NotAllowed as error:  # frozen since it was looked at
            waits = str(error)
        return "kept", want.desired, report | {"settings": asdict(tuned), "waits": waits}

    async def _tune(
        self, job: Job, piece: Workpiece, version: str, before: RuntimeSettings, step: Mapping[str, Any], stop: asyncio.Event
    ) -> tuple[RuntimeSettings | None, JSON]:  # fmt: skip
        async def ask(request: JSON, seconds: float) -> dict[str, Any]:
            return await self._task("tune", request, seconds, job, stop)

        async def serves() -> str:
            return (await self._taking.want(job)).desired

        found = await self._tuning.tune(piece, version, before, step, ask, serves, stop.is_set)
        if stop.is_set():
            raise TaskFailed(Failure.CANCELLED, "cancelled while its settings were measured")
        return found

    # ---- helpers
    async def _task(self, kind: str, request: Mapping[str, Any], seconds: float, job: Job, stop: asyncio.Event) -> dict[str, Any]:
        def spend(cpu_s: float) -> None:
            self._cpu_s[job.id] = self._cpu_s.get(job.id, 0.0) + cpu_s

        shown = Shown(self._journal, f"job:{job.id}", PROGRESS_S)
        async with self._turn(stop):  # two at once would measure each other
            began = monotonic()
            try:
                memory = await asyncio.to_thread(room_for_a_task, self._settings.job_memory_bytes)
                with self._bench.scratch() as scratch:
                    limits = TaskLimits(seconds, threads=1, memory_bytes=memory, nice=10, scratch=str(scratch))
                    with self._window.background(kind):
                        return await run_task(kind, request, limits, shown, stop, spend)
            finally:
                self._metrics.count("hone_background_seconds", kind, by=monotonic() - began)

    @asynccontextmanager
    async def _turn(self, stop: asyncio.Event) -> AsyncIterator[None]:
        """A turn at measuring, which others may take minutes for. Raises TaskFailed where the job is cancelled while it waits for it."""
        turn, cancelled = asyncio.create_task(self._measuring.acquire()), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({turn, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            if not turn.done():
                raise TaskFailed(Failure.CANCELLED, "cancelled while it waited for its turn to be measured")
            yield
        finally:
            cancelled.cancel()
            if turn.done() and not turn.cancelled():
                self._measuring.release()
            turn.cancel()

    async def _watch(self, job: Job, stop: asyncio.Event) -> None:
        """Keep the lease, and set `stop` when the job is cancelled or superseded meanwhile."""
        away = Away(log)
        while not stop.is_set():
            try:
                held = await self._lead()
                state = self._taking.seen = await asyncio.to_thread(self._journal.state)
                now = state.jobs.get(job.id)
                if not held or now is None or now.cancel_asked or now.state is JobState.FINISHED:
                    stop.set()
                away.back()
            except StoreUnavailable as error:
                away.gone(f"while {job.id} is judged", error)
            await asyncio.sleep(1.0)

    async def _say(self, kind: str, job: Job, **data: Any) -> None:
        await asyncio.to_thread(self._journal.append, Event(kind, job.model, "", job.id, data=data))

    async def _end(self, job: Job, **data: Any) -> None:
        self._tally.ended(job.id)
        await self._say("job.finished", job, **data)
        self._begun.discard(job.id)
