"""The queue and the instances of one version: takes batches, sends them to the runner, hands out the answers.

It knows neither how a runner comes to life nor what to do when it dies: then it gives back what was in flight. What a reply means to those
who share a batch is app.serving.answers'.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Final

from app.domain import BYTES, OWN, InferenceRequest, RuntimeSettings
from app.errors import HoneError, ModelFailed, NotReady
from app.serving import deadlines
from app.serving.answers import BatchReport, failure_of, hand_out
from app.serving.at_work import Mark
from app.serving.batcher import Queue, Work, key_of
from app.serving.exchange import Batch, Exchange, Reply
from app.serving.layout import Planner, Sizes
from app.serving.ledger import PATIENCE_S, CoreLedger
from app.serving.lone import LoneCalls
from app.serving.manners import Manners
from app.serving.rates import ENOUGH, Rates
from app.serving.room import Room
from app.serving.runners import Instance, Runner, RunnerSpec
from app.serving.timely import Timely
from app.serving.watch import Usual

QUANTUM_S: Final = 0.01
"""While other models are active, no batch of several rows is expected to take longer than this: they wait for its end."""
LONG_CALL_S: Final = 0.001
"""Calls of one row that take longer gain little by company and make it wait; shorter ones are mostly overhead, which a batch shares."""
_log = logging.getLogger("hone.engine")


class Dispatcher:
    """`attach` a runner and it serves; `detach` and it queues. Settings change between two batches."""

    def __init__(
        self, spec: RunnerSpec, ledger: CoreLedger, observer: Callable[[BatchReport], None] | None = None, mark: Mark | None = None
    ) -> None:  # fmt: skip
        self.settings = spec.settings
        self.rates = Rates()
        self.costs = Rates()
        self.queue = Queue()
        self.batchable = spec.signature.batchable
        self.unbatchable_because = ""
        self.completed = 0
        self.suspects: deque[Work] = deque()
        self._spec = spec
        self._texts_out = any(output.datatype == BYTES for output in spec.signature.outputs)
        self._planner = Planner()
        self._sizes = Sizes()
        self._observer = observer
        self._mark = mark or Mark()
        self._runner: Runner | None = None
        self._free: list[Instance] = []
        self.timely = Timely()
        self.room = Room(spec.name, self.queue, self.timely, self.rates, spec.settings)
        self._lone: Instance | None = None
        self._lone_calls = LoneCalls()
        self._may_open_lone = False
        self._was_alone = False
        self._busy = 0
        self._solo = False
        self._held = False
        self.manners = Manners()
        self._quiet = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._account = ledger.join(spec.name, self.pump)
        self._pump_due = False
        self._asking: asyncio.TimerHandle | None = None
        self._exchange = Exchange(self._loop, self._answered, self._broken)
        self._deadlines = deadlines.Deadlines(self._loop, self._unanswered, self.drop)

    # ---- requests come

    def submit(self, request: InferenceRequest) -> Work:
        """Queue a request. Raises QueueFull, DeadlineExceeded, CannotMeetDeadline or InvalidRequest (a size that does not add up)."""
        now = monotonic()
        self.room.look()
        self.room.share(request.caller)
        key, rows, alone = key_of(request.inputs, self.batchable and request.caller is not OWN)  # a probe measures itself alone
        self._sizes.check(request.inputs, key, rows)
        work = Work(request, key, rows, alone, self._loop.create_future(), now)
        if work.deadline is not None:
            deadlines.check(work, self.queue, self.rates, self.settings, now)
            self._deadlines.watch(work.deadline)
        self.room.make(work)
        self.queue.push(work)
        self._pump_soon()
        return work

    def retry(self, lost: list[Work]) -> None:
        """Take lost work first, each piece with nothing else in the runner, so that a killer can be told from its neighbours."""
        self.suspects.extend(lost)
        for work in lost:
            if work.deadline is not None:
                self._deadlines.watch(work.deadline)
        self._pump_soon()

    def drop(self, work: Work) -> None:
        """Its caller is gone: what is queued is not run."""
        self.queue.drop(work)
        self._withdraw_if_idle()

    def fail_waiting(self, error: HoneError) -> None:
        """Answer those that wait with `error`, the suspects too: they stay to be tried, for others' sake."""
        for work in [*self.queue, *self.suspects]:
            self.queue.drop(work)
            work.fail(error)
        self._withdraw_if_idle()

    def refuse_if_full(self) -> None:
        """Raise QueueFull where one more request would be refused, whatever it asks."""
        self.room.look()

    def _unanswered(self) -> list[Work]:
        return [*self.queue, *self.suspects, *(work for _, batch in self.in_flight() for work in batch.work)]

    # ---- batches go

    def attach(self, runner: Runner) -> None:
        self._runner = runner
        self._free, self._lone, self._lone_calls = [], None, LoneCalls()
        self._busy = 0
        self._solo = False
        self.resize(self.settings)

    def resize(self, settings: RuntimeSettings) -> None:
        """Take new live settings: instances are added at once and removed as they become free."""
        self.settings = self.room.settings = settings
        self._may_open_lone = self._spec.second_session and settings.has_lone and self._spec.kind == "onnx"
        runner = self._runner
        if runner is None or not runner.alive:
            return
        with contextlib.suppress(OSError):
            while self._shared(runner) < settings.instances:
                self._free.append(runner.add_instance(self._exchange.on_readable))
        while self._shared(runner) > settings.instances and self._free:
            runner.remove_instance(self._free.pop())
        self._pump_soon()

    def mind_company(self, firm: bool) -> None:
        """Give way to lighter models, or take the core as others do (`firm`: in any case). Calls of several threads cannot: the session owns those."""
        company = not firm and self.settings.intra_op_threads == 1 and self._account.has_lighter_company()
        now, account = monotonic(), self._account
        account.overrun = self.room.overrun(now)
        account.yields = yields = self.manners.look(account.of_share(), company, self.queue.length > 0, now, account.overrun)
        runner = self._runner
        if runner is None or not runner.alive:
            return
        if self._shared(runner) < self.settings.instances:  # no descriptor was left for the others
            self.resize(self.settings)
        for instance in runner.instances:
            if yields and instance is not self._lone:
                instance.give_way()
        if not yields:
            for instance in [free for free in self._free if free.yields]:
                self._free.remove(instance)
                self._replace(runner, instance)

    def _replace(self, runner: Runner, instance: Instance) -> None:
        """Another thread for one that gave way and need not any more; where none can be had, it goes on as it is."""
        try:
            fresh = runner.add_instance(self._exchange.on_readable)
        except OSError:
            fresh = instance
        else:
            runner.remove_instance(instance)
        self._free.append(fresh)

    def _shared(self, runner: Runner) -> int:
        """Instances of the first session."""
        return len(runner.instances) - (self._lone is not None)

    def detach(self) -> list[Batch]:
        """No runner any more: the batches that were in flight, oldest first."""
        runner, self._runner = self._runner, None
        if runner is None:
            return []
        lost: list[Batch] = [instance.batch for instance in runner.instances if instance.batch is not None]
        for instance in runner.instances:
            instance.batch = None
        self._free = []
        if self._busy:
            self._mark.end()
        self._busy = 0
        self._solo = False
        self._quiet.set()
        for batch in lost:  # last: tokens that come back may wake this very engine, which must not send to the dead then
            self._account.give(batch.tokens, batch.expected_s, 0.0)
        self._account.withdraw()
        return sorted(lost, key=lambda batch: batch.sent_at)

    async def close(self) -> None:
        """Stop for good; returns when no thread copies for it any more."""
        self._deadlines.close()
        if self._asking is not None:
            self._asking.cancel()
        self._account.close()
        await self._exchange.close()

    def usual(self, batch: Batch) -> Usual:
        """What batches like this one took at worst; one larger than any before may take what it needs, and attention grows by the square."""
        costs = self.costs
        return Usual(costs.batches >= ENOUGH and costs.reaches(batch.kind), costs.worst_wall_s(batch.kind), costs.worst_cpu_s(batch.kind))

    @property
    def busy(self) -> int:
        """Batches in the runner now."""
        return self._busy

    async def hand_over(self, runner: Runner) -> bool:
        """Send nothing more to the present runner, wait until it has answered, and go on with `runner`; False where the present one is lost."""
        present = self._runner
        self._held = True
        try:
            while self._busy:
                self._quiet.clear()
                await self._quiet.wait()
        finally:
            self._held = False
        if present is None or self._runner is not present:
            return False
        self.detach()
        self.attach(runner)
        return True

    def in_flight(self) -> Iterator[tuple[Instance, Batch]]:
        if self._runner is not None:
            for instance in self._runner.instances:
                if instance.batch is not None:
                    yield instance, instance.batch

    def _pump_soon(self) -> None:
        """At the end of this round of the loop: requests that arrived together share a batch."""
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self._pump_now)

    def _pump_now(self) -> None:
        self._pump_due = False
        self.pump()

    def pump(self) -> None:
        """Give work to free instances while there is both, and cores for it."""
        while self._ready():
            self.timely.sort_out(self.queue, self.rates.wall_s, monotonic())
            limit = self._part(self.settings.batch_limit)
            if limit > 1 and self._account.has_company():
                limit = self.rates.rows_within(QUANTUM_S, limit)
            self._account.late = self._only_late
            if self._account.late:
                limit = self.rates.rows_within(self.timely.late_call_s, limit)
            expected_s = self.rates.cpu_s(min(limit, self.queue.front_rows or 1))
            instance = self._chosen()
            tokens = self._account.take(instance.threads, expected_s)
            if not tokens and instance is self._lone:
                instance = self._free[-1]
                tokens = self._account.take(instance.threads, expected_s)
            if not tokens:
                self._ask_again_in(PATIENCE_S)
                return
            if instance is not self._lone:
                self._free.pop()
            self._solo = bool(self.suspects)
            work = [self.suspects.popleft()] if self.suspects else self.timely.take(self.queue, limit, self.rates.rows_within)
            self._send(instance, work, tokens, expected_s)
        self._account.withdraw()

    def _part(self, limit: int) -> int:
        """How many rows one instance may take: where a call is long, each gets its part of what waits, lest one works while others look on."""
        instances = self.settings.instances
        if limit == 1 or instances == 1 or self.rates.wall_s(1) < LONG_CALL_S:
            return limit
        return min(limit, max(1, -(-self.queue.front_rows // instances)))

    def _chosen(self) -> Instance:
        """The lone instance for a request that, like the one before it, finds nobody else; with company each call does best on its own core."""
        alone = not self._busy and self.queue.length == 1 and not self.suspects
        again = alone and self._was_alone
        self._was_alone = alone
        if again and self._lone is None and self._may_open_lone and self._lone_calls.another(monotonic()):
            self._open_lone()
        return self._lone if again and self._lone is not None else self._free[-1]

    def _open_lone(self) -> None:
        if self._runner is not None:
            with contextlib.suppress(OSError):
                self._runner.open_lone(self._take_lone)

    def _take_lone(self, runner: Runner) -> None:
        if runner is self._runner and runner.alive and self._lone is None:
            with contextlib.suppress(OSError):
                self._lone = runner.add_instance(self._exchange.on_readable, lone=True)

    def _ask_again_in(self, seconds: float) -> None:
        """The ledger wakes who is next when tokens come free; where none do for long, patience has an end and somebody must ask."""
        if self._asking is None:
            self._asking = self._loop.call_later(seconds * 1.05, self._ask)

    def _ask(self) -> None:
        self._asking = None
        self.pump()

    def _ready(self) -> bool:
        lone_runs = self._lone is not None and self._lone.batch is not None
        if self._held or self._solo or not self._free or self._busy - lone_runs >= self.settings.instances:
            return False
        return not self._busy if self.suspects else self.queue.length > 0

    @property
    def _only_late(self) -> bool:
        return 0 < self.queue.late == self.queue.length and not self.suspects

    def _withdraw_if_idle(self) -> None:
        if not self.queue.length and not self.suspects:
            self._account.withdraw()

    def _send(self, instance: Instance, work: list[Work], tokens: int, expected_s: float) -> None:
        rows = work[0].rows if len(work) == 1 else sum([item.rows for item in work])
        plan = self._planner.plan(work, rows, self._texts_out)
        now = monotonic()
        for item in work:
            item.queue_s = now - item.enqueued_at
        self._busy += 1
        if self._busy == 1:
            self._mark.begin()
        self._exchange.send(instance, Batch(work, rows, plan, tokens, expected_s, now))

    # ---- answers come

    def _answered(self, instance: Instance, batch: Batch, reply: Reply) -> None:
        self._release(instance, batch, reply)
        self.pump()  # the runner first: it may compute while the answers are cut
        try:
            if not reply.failed:
                if not hand_out(self._spec, batch, reply, self._observer):
                    self._rows_depend(batch)
            elif len(batch.work) > 1:  # a request that the model cannot take must not fail its batch-mates: each is tried alone
                self._again_alone(batch)
            else:
                batch.work[0].fail(failure_of(self._spec.name, reply))
        except Exception as error:  # noqa: BLE001 - a callback of the loop: callers must not wait for an answer that never comes
            _log.exception("%s: a reply could not be understood", self._spec.name)
            for work in batch.work:
                work.fail(ModelFailed(f"{self._spec.name} answered something that cannot be understood: {error}"))

    def _broken(self, instance: Instance, batch: Batch, error: Exception) -> None:
        """The batch did not reach the runner, or its outputs did not come back."""
        _log.error("%s: a batch could not be moved: %s", self._spec.name, error)
        self._release(instance, batch, None)
        for work in batch.work:
            work.fail(NotReady(f"this request could not be moved: {error}; give the server more memory or descriptors, or send less"))
        self.pump()

    def _release(self, instance: Instance, batch: Batch, reply: Reply | None) -> None:
        """The instance is free again, its tokens are back, and what the call cost is known."""
        now = monotonic()
        cpu_s = reply.cpu_s if reply is not None else 0.0
        instance.batch = None
        instance.arena.settle(max(reply.used if reply is not None else 0, batch.plan.end))
        self._busy -= 1
        if not self._busy:
            self._mark.end()
        self._solo = False
        self._quiet.set()
        self.completed += 1
        if reply is not None and not reply.failed:
            self.rates.learn(batch.rows, now - batch.sent_at, cpu_s, now)
            self.costs.learn(batch.kind, now - batch.sent_at, cpu_s, now)
        runner = self._runner
        if instance is not self._lone:
            if runner is not None and self._shared(runner) > self.settings.instances:
                runner.remove_instance(instance)
            elif instance.yields and not self.manners.yields and runner is not None and runner.alive:
                self._replace(runner, instance)
            else:
                self._free.append(instance)
        more = self.queue.length or self.suspects
        self._account.late = self._only_late
        self._account.give(batch.tokens, batch.expected_s, cpu_s, self.settings.intra_op_threads if more else 0)

    def _rows_depend(self, batch: Batch) -> None:
        self.batchable = False
        self.unbatchable_because = "an output had not one row for each input row of a batch"
        self._again_alone(batch)

    def _again_alone(self, batch: Batch) -> None:
        for work in reversed(batch.work):
            if not work.future.done():
                work.key, work.rows, work.alone = key_of(work.request.inputs, False)
                self.queue.push(work, front=True)
        self._pump_soon()
