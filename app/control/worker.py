"""`hone worker`: claims jobs from the journal, builds each in a bounded child, publishes the result as a version, and goes on.

It never judges and never promotes. Killed at any moment it loses nothing: the claim's lease runs out, another attempt begins, and a try
that was published already is found by its card.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import time
from typing import Any, Final

from app.catalog.card_facts import signature_of
from app.catalog.cards import BuiltCard, Cards, Draft, RowsProof
from app.catalog.repository import Repository
from app.catalog.sample_sources import MOST_SAMPLES
from app.catalog.samples import TRAIN_SAMPLES
from app.catalog.state_folder import StateFolder
from app.control.bench import Bench, Workpiece
from app.control.builders import machine, worker_name
from app.control.choices import exports
from app.control.endings import is_server_side
from app.control.expected import in_order
from app.control.reach import Away, Reach, Shown
from app.control.steps import is_recalibration, target_of
from app.control.verification import SERVER_SIDE
from app.domain import JSON, Event, Job, JobState, State
from app.errors import Conflict, HoneError, NotAllowed
from app.plain import log_to_stderr
from app.settings import Settings
from app.store.base import Journal, StoreUnavailable
from app.store.open import open_journal
from app.telemetry.exposition import serve_metrics
from app.telemetry.metrics import Metrics
from optimizers.allocator import few_arenas, give_back
from optimizers.base import Need, Progress
from optimizers.catalogue import catalogue, config_types
from optimizers.host import room_for_a_task
from optimizers.task import Failure, TaskFailed, TaskLimits, lower, run_task

log = logging.getLogger("hone.worker")
LEASE_S: Final = 10.0
RENEW_S: Final = 5.0
BOARD_S: Final = 15.0
SETTLE_S: Final = 0.5
PROGRESS_S: Final = 60.0
MOST_ATTEMPTS: Final = 5
"""A job that ends its workers (all memory taken, a machine that goes down) is given up after so many."""
NICE: Final = 10
"""Packing samples for a job takes a tenth of a second: no request on the same cores waits for that."""


class Worker:
    """One building process. `name` is unique; its leases carry it."""

    def __init__(self, settings: Settings, journal: Journal, bench: Bench, metrics: Metrics) -> None:
        self._settings, self._journal, self._bench, self._metrics = settings, journal, bench, metrics
        self.name = worker_name()
        self._stopping = asyncio.Event()
        self._doing = ""
        self._cpu_s = 0.0
        """CPU seconds of the present job's tasks."""
        self._reach, self._away = Reach(journal, self._stopping), Away(log)

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        board = asyncio.create_task(self._show_alive(), name="board")
        try:
            while not self._stopping.is_set():
                try:
                    job = await self._claim()
                    self._away.back()
                    if job is not None:
                        await self._work(job)
                        continue
                except StoreUnavailable as error:
                    self._away.gone("and no job can be claimed", error)
                    await self._rest(2.0)
                except Exception:
                    log.exception("a pass of the worker failed")
                    await self._rest(2.0)
                await self._rest(SETTLE_S)
        finally:
            board.cancel()

    # ---- claiming
    async def _claim(self) -> Job | None:
        """The first job that needs building and that nobody builds; claimed by lease, then by the log's order."""
        state = await self._reach.state()
        if state.frozen or not state.seq:
            return None  # a store that was emptied is not believed: what was learned of a job stays until a person has looked
        await asyncio.to_thread(self._sweep_checkpoints, state)
        for seen in in_order(state.jobs.values(), time()):
            if not _wants_a_worker(seen) or not await asyncio.to_thread(self._journal.acquire, f"job:{seen.id}", self.name, LEASE_S):
                continue
            job = (await asyncio.to_thread(self._journal.state)).jobs.get(seen.id)
            if job is None or not _wants_a_worker(job):  # whoever held the lease until now has done it
                await asyncio.to_thread(self._journal.release, f"job:{seen.id}", self.name)
                continue
            attempt = job.attempt + 1
            data = {"worker": self.name, "machine": machine(), "attempt": attempt}
            await asyncio.to_thread(self._journal.append, Event("job.claimed", job.model, "", job.id, data=data))
            now = (await asyncio.to_thread(self._journal.state)).jobs.get(job.id)
            if now is not None and (now.worker, now.attempt, now.state) == (self.name, attempt, JobState.BUILDING):
                if attempt <= MOST_ATTEMPTS:
                    return now
                reason = f"{MOST_ATTEMPTS} workers in turn ended while they built it; the last one's log, or the kernel's, may tell why"
                await self._say("job.finished", now, outcome="failed", report={"reason": reason})
            await asyncio.to_thread(self._journal.release, f"job:{job.id}", self.name)
        return None

    def _sweep_checkpoints(self, state: State) -> None:
        """Those of jobs that are built, finished or gone."""
        kept = self._bench.state.checkpoints
        for folder in kept.iterdir() if kept.is_dir() else ():
            job = state.jobs.get(folder.name)
            if job is None or not _wants_a_worker(job):
                shutil.rmtree(folder, ignore_errors=True)

    # ---- building
    async def _work(self, job: Job) -> None:
        log.info("job %s: %s for %s (attempt %d)", job.id, _tries(job), job.model, job.attempt)
        self._doing, self._cpu_s = job.id, 0.0
        self._metrics.gauge("hone_worker_busy", value=1)
        stop = asyncio.Event()
        watch = asyncio.create_task(self._watch(job, stop), name=f"watch-{job.id}")
        try:
            candidates, report = await self._build(job, stop)
            if not stop.is_set():
                await self._say("job.built", job, candidates=candidates, report=report)
            elif await self._cancel_asked(job):
                await self._say("job.finished", job, outcome="cancelled", report={"reason": "cancelled", **report})
        except StoreUnavailable:
            raise
        except (HoneError, OSError) as error:
            await self._say("job.finished", job, outcome="failed", report={"reason": str(error), "cpu_s": round(self._cpu_s, 1)})
        except Exception as error:
            log.exception("job %s could not be built", job.id)
            reason = f"internal error: {type(error).__name__}: {error}"
            await self._say("job.finished", job, outcome="failed", report={"reason": reason, "cpu_s": round(self._cpu_s, 1)})
        finally:
            watch.cancel()
            self._doing = ""
            self._metrics.gauge("hone_worker_busy", value=0)
            await asyncio.to_thread(give_back)
            await asyncio.to_thread(self._journal.release, f"job:{job.id}", self.name)

    async def _cancel_asked(self, job: Job) -> bool:
        """True where somebody cancelled it; else the worker ends or the claim was lost, and another goes on."""
        now = (await self._reach.state_at_last()).jobs.get(job.id)
        return now is not None and now.cancel_asked

    async def _build(self, job: Job, stop: asyncio.Event) -> tuple[list[str], JSON]:
        """Candidates of all tries, and what became of each try."""
        await asyncio.to_thread(self._post, f"job:{job.id}", asdict(Progress("samples", "reading", 0.0)), PROGRESS_S)
        trains = _trains(job)
        most = TRAIN_SAMPLES if trains else MOST_SAMPLES
        piece = await asyncio.to_thread(
            self._bench.workpiece, job.model, job.golden, job.golden_sha256, most, is_recalibration(job), trains
        )
        await asyncio.to_thread(self._bench.cards.require_space, piece.golden.bytes)
        candidates: list[str] = []
        exported: BuiltCard | None = None
        skipped: list[JSON] = []
        tries: list[JSON] = []
        for index, recipe in enumerate(job.tries):
            steps = [{k: v for k, v in step.items() if k != "recent"} for step in recipe if step["method"] not in SERVER_SIDE]
            if not steps or stop.is_set():
                continue
            try:
                version, facts = await self._try(job, piece, index, steps, stop, exported)
            except TaskFailed as failure:
                if failure.kind is Failure.CANCELLED:
                    break
                said = {"try": [step["method"] for step in recipe], "kind": failure.kind.value, "reason": failure.text}
                skipped.append(said)
                log.info("job %s: %s: %s", job.id, "+".join(said["try"]), failure.text)
                continue
            candidates.append(version)
            exported = exported or await asyncio.to_thread(self._exported, job.model, version)
            tries.append({"try": [step["method"] for step in recipe], "version": version, **facts})
        return candidates, {"built": tries, "skipped": skipped, "cpu_s": round(self._cpu_s, 1)}

    def _exported(self, model: str, version: str) -> BuiltCard | None:
        """The version, where it is golden's export and no more: alternatives that begin with it need not make it again."""
        card = self._bench.cards.card(model, version)
        return card if isinstance(card, BuiltCard) and _is_export(card.draft.recipe) else None

    async def _try(
        self, job: Job, piece: Workpiece, index: int, steps: list[JSON], stop: asyncio.Event, exported: BuiltCard | None
    ) -> tuple[str, JSON]:
        known = [
            card
            for card in await asyncio.to_thread(self._bench.cards.built, job.model)
            if (card.draft.job, card.draft.try_index) == (job.id, index)
        ]
        if known:
            await self._announce(job, known[0].version, known[0].sha256, known[0].bytes, known[0].draft)
            return known[0].version, {"published": "by an earlier attempt"}
        with self._bench.scratch() as folder:
            keep = self._bench.state.checkpoints / job.id / str(index)
            request = await asyncio.to_thread(self._request, piece, steps, folder, keep, exported)
            result = await self._task("optimize", request, job, stop)
            built = Path(str(result["path"])).parent
            inspected = result["inspection"]
            signature = signature_of(inspected)
            rows = RowsProof(bool(inspected["rows"]["independent"]), str(inspected["rows"]["reason"]))
            facts = [dict(fact) for fact in result.get("facts", [])]
            serving = {
                **inspected["serving"],
                **{k: v for k, v in (result.get("settings") or {}).items() if k in {"graph_level", "session_options"}},
            }
            facts.append({"method": "inspect", "serving": serving, "lossless": _is_lossless(steps)})
            recipe = tuple(dict(step) for step in result["recipe"])
            draft = Draft(
                job.id, index, job.golden, job.golden_sha256, job.golden, recipe, signature, rows, job.reason, tuple(facts)
            )  # fmt: skip
            state = (await self._reach.state_at_last()).models.get(job.model)
            if state is None or state.golden_sha256 != job.golden_sha256:
                raise Conflict(f"golden of {job.model!r} changed or the model is gone; nothing is published")
            taken = [version.version for version in state.built]
            card = await asyncio.to_thread(self._bench.cards.publish, job.model, built, draft, taken)
        await self._announce(job, card.version, card.sha256, card.bytes, draft)
        return card.version, {"bytes": card.bytes, "seconds": round(float(result.get("seconds") or 0.0), 1)}

    async def _announce(self, job: Job, version: str, sha256: str, size: int, draft: Draft) -> None:
        data = {
            "version": version, "parent": draft.parent, "golden_sha256": job.golden_sha256, "recipe": [dict(step) for step in draft.recipe],
            "sha256": sha256, "bytes": size,
        }  # fmt: skip
        await self._reach.append_at_last(Event("version.published", job.model, version, job.id, data=data))

    def _request(self, piece: Workpiece, steps: list[JSON], folder: Path, keep: Path, exported: BuiltCard | None) -> JSON:
        paths = piece.samples.save(folder)
        source = piece.config.source
        described: JSON | None = None
        if piece.golden.kind == "torch":
            described = {**self._bench.torch_source(piece, piece.golden.version), "weights": str(piece.golden_path)}
        elif source is not None:
            file, function = self._bench.repository.factory(piece.config) if self._bench.repository.factories else ("", "")
            weights = piece.golden_path.parent / source.weights
            described = {"factory": f"{file}:{function}", "weights": str(weights)} if file and weights.is_file() else None
        samples: dict[str, str] = {name: paths[name] for name in ("calibration", "train") if name in paths}
        begun: JSON = {"path": str(piece.golden_path), "recipe": steps}
        if exported is not None and len(steps) > 1 and _is_export(steps[:1]):
            facts = [fact for fact in exported.draft.facts if fact["method"] == steps[0]["method"]]
            begun = {
                "path": str(self._bench.cards.path(exported)),
                "recipe": steps[1:],
                "done": list(exported.draft.recipe),
                "facts": facts,
            }
        return {
            **begun,
            "target": target_of(steps),
            "scratch": str(folder),
            "keep": str(keep),
            "task": piece.config.task,
            "samples": samples,
            "stacked": piece.samples.calibration.stacked,
            "origins": {name: getattr(piece.samples, name).origin for name in samples},
            "source": described,
        }

    async def _task(self, kind: str, request: Mapping[str, Any], job: Job, stop: asyncio.Event) -> dict[str, Any]:
        memory = await asyncio.to_thread(room_for_a_task, self._settings.job_memory_bytes)
        shown = Shown(self._journal, f"job:{job.id}", PROGRESS_S)
        with self._bench.scratch() as scratch:
            limits = TaskLimits(
                seconds=self._settings.job_seconds, threads=self._settings.job_threads, device=self._settings.job_device,
                memory_bytes=memory, nice=19, scratch=str(scratch),
            )  # fmt: skip
            return await run_task(kind, request, limits, shown, stop, self._spend)

    def _spend(self, cpu_s: float) -> None:
        self._cpu_s += cpu_s

    # ---- staying known
    async def _watch(self, job: Job, stop: asyncio.Event) -> None:
        """Keep the claim while the job is built, and stop it when it is cancelled, superseded or the worker ends."""
        while not stop.is_set():
            try:
                held = await asyncio.to_thread(self._journal.acquire, f"job:{job.id}", self.name, LEASE_S)
                now = (await self._reach.state()).jobs.get(job.id)
                self._away.back()
                gone = now is None or now.state is not JobState.BUILDING or now.attempt != job.attempt
                if not held or gone or (now is not None and now.cancel_asked) or self._stopping.is_set():
                    stop.set()
            except StoreUnavailable as error:
                self._away.gone(f"while {job.id} is built", error)
            await asyncio.sleep(1.0)

    async def _show_alive(self) -> None:
        while True:
            facts = {"name": self.name, "pid": os.getpid(), "job": self._doing, "methods": _methods()}
            await asyncio.to_thread(self._post, f"worker:{self.name}", facts, BOARD_S)
            await asyncio.sleep(RENEW_S)

    def _post(self, key: str, value: JSON, ttl_s: float) -> None:
        try:
            self._journal.post(key, value, ttl_s)
        except StoreUnavailable:
            log.debug("the board is away")

    async def _say(self, kind: str, job: Job, **data: Any) -> None:
        event = Event(kind, job.model, "", job.id, f"worker {self.name}", {"attempt": job.attempt, **data})
        await self._reach.append_at_last(event)

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass


def _is_lossless(steps: list[JSON]) -> bool:
    types = config_types()
    return all(types[str(step["method"])].lossless for step in steps)


def _is_export(steps: Sequence[Mapping[str, Any]]) -> bool:
    return tuple(step["method"] for step in steps) == exports()


def _trains(job: Job) -> bool:
    """Whether a step learns from samples, more of which make it better."""
    types, learning = config_types(), {Need.TRAINING, Need.LABELLED}
    return any(learning & types[str(step["method"])].needs for recipe in job.tries for step in recipe if step["method"] in types)


def _wants_a_worker(job: Job) -> bool:
    """Not built yet, or its builder may have died: the lease tells."""
    return job.state in (JobState.REQUESTED, JobState.BUILDING) and not is_server_side(job) and not job.worker.startswith("server ")


def _tries(job: Job) -> str:
    return " | ".join("+".join(str(step["method"]) for step in recipe) for recipe in job.tries)


def _methods() -> list[str]:
    return sorted(entry.method for entry in catalogue() if entry.available)


def run_worker(settings: Settings) -> int:
    """Work until a signal; the job in hand is given back. Returns the exit status."""
    log_to_stderr(settings.log_level)
    few_arenas()
    lower(os.getpid(), NICE)
    state = StateFolder(settings.state).prepare()
    repository = Repository(settings.repository, settings.allowed_roots, settings.factories, state.unpacked)
    journal = open_journal(settings.journal)
    metrics = Metrics()
    metrics.gauge("hone_worker_busy", value=0)
    worker = Worker(settings, journal, Bench(repository, state, Cards(state)), metrics)
    asyncio.run(_run(worker, settings, metrics))
    journal.close()
    return 0


def _tokens(settings: Settings) -> list[str]:
    """Who may read metrics where they need a token: the same as on the server, as far as it is known here."""
    own = ""
    with contextlib.suppress(OSError):
        own = settings.admin_token or (settings.state / "admin-token").read_text(encoding="utf-8").strip()
    return [token for token in (own, settings.viewer_token) if token]


async def _run(worker: Worker, settings: Settings, metrics: Metrics) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, worker.stop)
    if settings.worker_port and settings.metrics != "off":
        tokens = (lambda: _tokens(settings)) if settings.metrics == "admin" else None
        try:
            serve_metrics(settings.host, settings.worker_port, metrics, tokens)
        except OSError as error:
            place = f"{settings.host}:{settings.worker_port}"
            raise NotAllowed(f"cannot listen on {place}: {error.strerror}; choose another with --port or HONE_WORKER_PORT") from None
    log.info("worker %s waits for jobs", worker.name)
    await worker.run()
