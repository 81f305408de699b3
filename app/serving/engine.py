"""One loaded version: its runner, its queue, and what happens when the runner fails it.

A runner that ends unasked is replaced; what was in it is tried again, as app.serving.inquest says. It knows no HTTP, and nothing of
other versions: cores are shared through the ledger alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import Final

from app.domain import OWN, InferenceRequest, InferenceResult, RuntimeSettings
from app.errors import Conflict, HoneError, NotReady, Quarantined, RunnerLost
from app.serving import procfs
from app.serving.answers import BatchReport
from app.serving.at_work import Mark
from app.serving.batcher import Work
from app.serving.dispatcher import Dispatcher
from app.serving.forkserver import ForkServer
from app.serving.inquest import Death, Inquest
from app.serving.ledger import CoreLedger
from app.serving.quarantine import Quarantine, hash_inputs, hash_of
from app.serving.runners import Ending, Opened, Runner, RunnerSpec
from app.serving.upkeep import Upkeep
from app.serving.watch import Patience, judge, look

__all__ = ["BatchReport", "Death", "Engine", "Quarantine", "RunnerSpec", "hash_inputs"]

ANSWER_S: Final = 1.8
"""Callers whose runner was lost have their answer, or a 503, after this long."""
_PAUSES_S: Final = (0.0, 0.0, 0.1, 0.5, 2.0, 5.0, 15.0, 30.0)
"""Before the n-th start in a row that no finished batch separates from the last end."""
WATCH_S: Final = 0.25
_log = logging.getLogger("hone.engine")


class Engine:
    """Made by start(). `on_death(reason, pid, hashes)` is called for each unasked end of a runner."""

    def __init__(
        self, spec: RunnerSpec, forkserver: ForkServer, ledger: CoreLedger, observer: Callable[[BatchReport], None] | None,
        on_death: Callable[[str, int, tuple[str, ...]], None] | None, quarantine: Quarantine | None, patience: Patience,
        killers: set[str] | None = None, mark: Mark | None = None,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.inflight = 0
        self.firm = False
        """It gives way to no other model: its time is being compared with another's."""
        self.killers: set[str] = killers if killers is not None else set()
        self.quarantine = quarantine if quarantine is not None else Quarantine()
        self._inquest = Inquest(spec.name, self.quarantine, self.killers, on_death)
        self.deaths: Sequence[Death] = self._inquest.deaths
        self.restarts = 0
        self._forkserver = forkserver
        self._dispatcher = Dispatcher(spec, ledger, observer, mark)
        self._runner: Runner | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._down = ""
        self._closed = ""
        self._idle = asyncio.Event()
        self._idle.set()
        self._past_cpu_s = 0.0
        self._last_cpu_s = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._patience = patience
        self._upkeep = Upkeep()
        self._recycling: asyncio.Task[None] | None = None
        self._endings: set[asyncio.Task[None]] = set()
        self.recycles = 0
        self._failures = 0
        self._completed_at_death = 0

    @classmethod
    async def start(
        cls,
        spec: RunnerSpec,
        *,
        forkserver: ForkServer,
        ledger: CoreLedger,
        observer: Callable[[BatchReport], None] | None = None,
        on_death: Callable[[str, int, tuple[str, ...]], None] | None = None,
        quarantine: Quarantine | None = None,
        patience: Patience = Patience(),  # noqa: B008 - frozen
        killers: set[str] | None = None,
        mark: Mark | None = None,
        timeout_s: float = 300.0,
    ) -> Engine:
        """Session open and warm. Raises ModelRejected, Unsupported or NotReady with the reason; nothing is left behind then."""
        engine = cls(spec, forkserver, ledger, observer, on_death, quarantine, patience, killers, mark)
        try:
            engine._adopt(await Runner.start(spec, forkserver, engine._on_exit, timeout_s))
        except BaseException:
            await engine._dispatcher.close()
            raise
        return engine

    # ---- facts

    @property
    def alive(self) -> bool:
        """A runner is there and takes work."""
        return self._runner is not None and self._runner.alive and not self._closed

    @property
    def pid(self) -> int:
        return self._runner.pid if self._runner is not None else 0

    @property
    def queued(self) -> int:
        return self._dispatcher.queue.length + len(self._dispatcher.suspects)

    @property
    def backlog_s(self) -> float:
        """Seconds until all that waits now is answered, by what calls took lately."""
        return self._dispatcher.room.drain_s(self._dispatcher.queue.rows)

    def promise(self, threshold_s: float, caller_share: float) -> None:
        """How long an answer may take (infinite where nothing is promised), and how much of what waits may be one caller's (`room.py`)."""
        self._dispatcher.timely.patience_s, self._dispatcher.room.caller_share = threshold_s, caller_share

    @property
    def settings(self) -> RuntimeSettings:
        return self._dispatcher.settings

    @property
    def opened(self) -> Opened:
        """What the (latest) runner said of its start."""
        return self._runner.opened if self._runner is not None else Opened(0.0, 0.0, ())

    @property
    def distinct_killers(self) -> int:
        """How many different inputs killed a runner when run alone."""
        return len(self.killers)

    @property
    def notes(self) -> tuple[str, ...]:
        """What an operator should know of how it is served."""
        why = self._dispatcher.unbatchable_because
        return (f"served unbatched: {why}",) if why else ()

    @property
    def yielded_s(self) -> float:
        """Seconds in which it gave way to lighter models (`manners.py`)."""
        return self._dispatcher.manners.yielded_s

    def memory_bytes(self) -> int:
        """PSS of the runner; 0 while there is none. For polls, off the event loop."""
        return procfs.pss_bytes(self.pid) or 0 if self.pid else 0

    def cpu_seconds(self) -> float:
        """CPU seconds of all runners this engine ever had. For polls, off the event loop."""
        self._see_cpu(self._runner)
        return self._past_cpu_s + self._last_cpu_s

    # ---- the hot path

    async def infer(self, request: InferenceRequest) -> InferenceResult:
        """Answer one validated request. Raises the errors of app.errors; cancelling the caller drops what is still queued."""
        if self._closed or self._down:
            raise self._unavailable()
        if self.quarantine:
            await self._refuse_quarantined(request)
        work = self._dispatcher.submit(request)
        if request.caller is not OWN:
            self._upkeep.asked = True
        self.inflight += 1
        self._idle.clear()
        if self._watch is None:
            self._keep_watch()
        try:
            return await work.future
        except asyncio.CancelledError:
            self._dispatcher.drop(work)
            raise
        finally:
            del work  # an error that it was answered with holds this frame
            self.inflight -= 1
            if not self.inflight:
                self._idle.set()

    def refuse_if_full(self) -> None:
        """Raise QueueFull if the queue has no place: worth knowing before a body is read and parsed."""
        self._dispatcher.refuse_if_full()

    def _unavailable(self) -> HoneError:
        if self._closed:
            return NotReady(f"{self.spec.name} {self._closed}")
        return RunnerLost(f"the runner of {self.spec.name} is down: {self._down}", retry_after_s=self._pause_s() + 1)

    async def _refuse_quarantined(self, request: InferenceRequest) -> None:
        digest = await hash_of(request)
        reason = self.quarantine.reason(digest)
        if reason is not None:
            raise Quarantined(f"this very input ended a runner of {self.spec.name} when run alone ({reason}); it is not tried again")

    # ---- settings and end

    def apply(self, settings: RuntimeSettings) -> None:
        """Change batch limit, instances and queue limit on the live runner. Raises Conflict where the change needs a new session."""
        if self.spec.settings.needs_new_session(settings):
            raise Conflict("threads, spinning, graph level and session options need a new session: start another engine and swap")
        self.spec = replace(self.spec, settings=settings)
        self._dispatcher.resize(settings)

    def rank(self, oom_score_adj: int) -> None:
        """Say who dies first when memory runs out (larger: sooner); later runners of this engine inherit it."""
        self.spec = replace(self.spec, oom_score_adj=oom_score_adj)
        if self._runner is not None:
            procfs.set_oom_score(self._runner.pid, oom_score_adj)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those inside; False where some are left after `timeout_s`."""
        self._closed = self._closed or "is being replaced"
        return await self.idle(timeout_s)

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight, bounded; new requests may still come."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End the runner; whoever still waits gets NotReady."""
        self._closed = "was unloaded"
        for timer in (self._watch, self._rest):
            if timer is not None:
                timer.cancel()
        for task in (self._recovery, self._recycling):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._dispatcher.fail_waiting(NotReady(f"{self.spec.name} was unloaded"))
        for batch in self._dispatcher.detach():
            for work in batch.work:
                work.fail(NotReady(f"{self.spec.name} was unloaded"))
        await self._dispatcher.close()
        if self._runner is not None:
            self._keep_cpu(self._runner)
            await self._runner.end()
            self._runner = None
        if self._endings:
            await asyncio.wait(self._endings)

    # ---- life and death of runners

    def _adopt(self, runner: Runner) -> None:
        self._runner = runner
        if not runner.alive:
            self._on_exit(runner)
            return
        self._down = ""
        self._dispatcher.attach(runner)
        self._keep_watch()

    def _see_cpu(self, runner: Runner | None) -> None:
        facts = procfs.facts(runner.pid) if runner is not None and runner.pid else None
        if facts is not None:
            self._last_cpu_s = max(self._last_cpu_s, facts.cpu_s)

    def _keep_cpu(self, runner: Runner) -> None:
        """What a runner used until its end counts on; a zombie still tells."""
        self._see_cpu(runner)
        self._past_cpu_s += self._last_cpu_s
        self._last_cpu_s = 0.0

    def _on_exit(self, runner: Runner) -> None:
        if runner is not self._runner or self._closed:
            return
        lost = [batch.work for batch in self._dispatcher.detach()]
        self._keep_cpu(runner)
        self._runner = None
        loop = asyncio.get_running_loop()
        waiting = {work for group in lost for work in group} | set(self._dispatcher.queue)
        loop.call_later(ANSWER_S, self._give_up, waiting)
        self._recovery = loop.create_task(self._recover(runner, lost), name=f"recovery of {self.spec.name}")

    def _give_up(self, waiting: set[Work]) -> None:
        error = RunnerLost(f"the runner of {self.spec.name} ended and no other answered in time; try again")
        for work in waiting:
            if not work.future.done():
                self._dispatcher.drop(work)
                work.fail(error)

    async def _recover(self, runner: Runner, lost: list[list[Work]]) -> None:
        try:
            ending = await runner.ending()
        finally:
            self._end_soon(runner)
        try:
            if self._dispatcher.completed > self._completed_at_death:
                self._failures = 0
            self._completed_at_death = self._dispatcher.completed
            self._dispatcher.retry(await self._inquest.hold(ending, runner.pid, lost))
        except Exception:  # noqa: BLE001 - a sink's fault must not keep the version from coming back; callers are answered by _give_up
            _log.exception("%s: the death of its runner could not be told", self.spec.name)
        while not self._closed:
            pause_s = self._pause_s()
            if pause_s:
                self._down = f"{ending.reason}; the next start is in {pause_s:g} s"
                self._dispatcher.fail_waiting(self._unavailable())
                await asyncio.sleep(pause_s)
            self._failures += 1
            self.restarts += 1
            try:
                self._adopt(await Runner.start(self.spec, self._forkserver, self._on_exit))
                return
            except HoneError as error:
                ending = Ending(str(error), None)
            except Exception as error:  # noqa: BLE001 - no descriptors left, no memory: try again later, as long as it is wanted
                _log.exception("%s: no runner could be started", self.spec.name)
                ending = Ending(f"no runner could be started: {error}", None)

    def _pause_s(self) -> float:
        return _PAUSES_S[min(self._failures, len(_PAUSES_S) - 1)]

    # ---- watching

    def _look(self) -> None:
        """While there is work, look a few times a second; an idle engine costs nothing."""
        self._watch = None
        runner = self._runner
        if runner is None or self._closed:
            return
        now = monotonic()
        self._dispatcher.mind_company(self.firm)
        for instance, batch in self._dispatcher.in_flight():
            if now - batch.sent_at < self._patience.glance_s:
                continue
            batch.sight = look(runner.pid, instance.tid, instance.threads, self._dispatcher.busy, batch.sight, now)
            judgement = judge(batch.sight, self._dispatcher.usual(batch), self._patience, now) if batch.sight is not None else None
            if judgement is not None:
                runner.kill(judgement.reason, judgement.own_fault)
                break
        if self._upkeep.due(self.inflight > 0, now):
            self._look_at_memory(runner, now)
        if self.inflight or self._dispatcher.busy or self._dispatcher.suspects:
            self._keep_watch()
            return
        if self._rest is not None:
            self._rest.cancel()
        self._rest = asyncio.get_running_loop().call_later(self._upkeep.rest_s(), self._at_rest)

    def _at_rest(self) -> None:
        self._rest = None
        if self._runner is not None and not self._closed and not self.inflight and not self._dispatcher.busy:
            self._upkeep.asked = False
            self._dispatcher.mind_company(True)
            self._runner.trim(at_rest=True)

    def _keep_watch(self) -> None:
        if self._watch is None and not self._closed:
            self._watch = asyncio.get_running_loop().call_later(WATCH_S, self._look)

    def _look_at_memory(self, runner: Runner, now: float) -> None:
        self._see_cpu(runner)
        used, limit = procfs.private_bytes(runner.pid) or 0, self.spec.memory_limit_bytes
        if self._upkeep.trims(used, runner.settled_bytes, self.inflight > 0, now):
            runner.trim()
        if self._upkeep.recycles(used, limit, now):
            self._recycling = asyncio.get_running_loop().create_task(self._recycle(used), name=f"recycling of {self.spec.name}")

    async def _recycle(self, used: int) -> None:
        """A runner that grew past its bound makes way for a fresh one."""
        limit = self.spec.memory_limit_bytes
        _log.warning("%s: its runner holds %d MiB of at most %d; a fresh one takes over", self.spec.name, used >> 20, limit >> 20)
        try:
            await self.renew()
        except HoneError as error:
            _log.warning("%s: no fresh runner: %s", self.spec.name, error)

    async def renew(self) -> None:
        """A fresh runner takes over and the present one ends, without a failed request. Raises what starting one raises."""
        fresh = await Runner.start(self.spec, self._forkserver, self._on_exit)
        spare, old = fresh, self._runner
        try:
            if old is not None and not self._closed and await self._dispatcher.hand_over(fresh):
                self._keep_cpu(old)
                self._runner, spare = fresh, old
                self.recycles += 1
                if not fresh.alive:
                    self._on_exit(fresh)
        finally:
            self._end_soon(spare)

    def _end_soon(self, runner: Runner) -> None:
        """End a runner in the background; stop() waits for it."""
        task = asyncio.get_running_loop().create_task(runner.end(), name=f"end of a runner of {self.spec.name}")
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
