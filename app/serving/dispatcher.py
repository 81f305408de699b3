"""The queue and the instances of one version: takes batches, sends them to the runner, hands out the answers.

It knows neither how a runner comes to life nor what to do when it dies: then it gives back what was in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import orjson

from app.domain import BYTES, InferenceRequest, InferenceResult, RuntimeSettings
from app.errors import CannotMeetDeadline, DeadlineExceeded, HoneError, InvalidRequest, ModelFailed, QueueFull
from app.serving.batcher import Plan, Planner, Queue, Sizes, Work, gather, key_of, split
from app.serving.ledger import PATIENCE_S, CoreLedger
from app.serving.rates import ENOUGH, STALE_S, Rates
from app.serving.runners import Instance, Runner, RunnerSpec
from app.serving.shm import read_all, write_all
from app.serving.watch import Sight, Usual

LARGE_BYTES: Final = 1 << 20
"""Copies of more than this are made in a thread: they would hold up the event loop."""
QUANTUM_S: Final = 0.01
"""While other models are active, no batch of several rows is expected to take longer than this: they wait for its end."""
_MESSAGE_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one finished batch cost, for those who count. Seconds; `queue_s` has one entry per request."""

    rows: int
    requests: int
    compute_s: float
    cpu_s: float
    wait_s: float
    queue_s: tuple[float, ...]


class Batch:
    """Work that shares one call."""

    __slots__ = ("expected_s", "plan", "rows", "sent_at", "sight", "tokens", "work")

    def __init__(self, work: list[Work], rows: int, plan: Plan, tokens: int, expected_s: float, sent_at: float) -> None:
        self.work = work
        self.rows = rows
        self.plan = plan
        self.tokens = tokens
        self.expected_s = expected_s
        self.sent_at = sent_at
        self.sight: Sight | None = None

    @property
    def kind(self) -> int:
        """Its size in units of 64 bytes: what batches of a version with many shapes are compared by."""
        return self.plan.end // 64


class Dispatcher:
    """`attach` a runner and it serves; `detach` and it queues. Settings change between two batches."""

    def __init__(self, spec: RunnerSpec, ledger: CoreLedger, observer: Callable[[BatchReport], None] | None = None) -> None:
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
        self._runner: Runner | None = None
        self._free: list[Instance] = []
        self._busy = 0
        self._solo = False
        self._held = False
        self._quiet = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._account = ledger.join(spec.name, self.pump)
        self._pump_due = False
        self._expiry: asyncio.TimerHandle | None = None
        self._expires_at = 0.0
        self._asking: asyncio.TimerHandle | None = None
        self._copies: set[asyncio.Task[None]] = set()

    # ---- requests come

    def submit(self, request: InferenceRequest) -> Work:
        """Queue a request. Raises QueueFull, DeadlineExceeded, CannotMeetDeadline or InvalidRequest (a size that does not add up)."""
        now = monotonic()
        if self.queue.length >= self.settings.queue_limit:
            raise self._full()
        key, rows, alone = key_of(request.inputs, self.batchable)
        self._sizes.check(request.inputs, key, rows)
        work = Work(request, key, rows, alone, self._loop.create_future(), now)
        if work.deadline is not None:
            self._check_deadline(work, now)
        self.queue.push(work)
        self._pump_soon()
        return work

    def retry(self, lost: list[Work]) -> None:
        """Take lost work first, each piece with nothing else in the runner, so that a killer can be told from its neighbours."""
        self.suspects.extend(lost)
        self._pump_soon()

    def drop(self, work: Work) -> None:
        """Its caller is gone: what is queued is not run."""
        self.queue.drop(work)
        self._withdraw_if_idle()

    def fail_waiting(self, error: HoneError, among: set[Work] | None = None) -> None:
        """Answer those that wait (all, or those in `among`) with `error`; suspects stay to be tried, for others' sake."""
        for work in [*self.queue, *self.suspects]:
            if among is None or work in among:
                self.queue.drop(work)
                _fail(work, error)
        self._withdraw_if_idle()

    def _full(self) -> QueueFull:
        limit = self.settings.queue_limit
        wait_s = self.rates.drain_s(self.queue.rows, self.settings.batch_limit, self.settings.instances)
        return QueueFull(
            f"the queue of {self._spec.name} is full: {self.queue.length} of {limit} requests wait; retry later or raise queue_limit",
            retry_after_s=min(60.0, max(0.05, wait_s)),
        )

    def _check_deadline(self, work: Work, now: float) -> None:
        assert work.deadline is not None
        left_s = work.deadline - now
        if left_s <= 0:
            raise DeadlineExceeded("the deadline had passed before the request was queued")
        rates = self.rates
        if rates.batches >= ENOUGH and now - rates.last_at < STALE_S:
            before = self.queue.rows_before(work.priority)
            needed_s = rates.drain_s(before, self.settings.batch_limit, self.settings.instances) + rates.wall_s(work.rows)
            if needed_s > left_s:
                raise CannotMeetDeadline(
                    f"{before} rows are before this request and it would take about {needed_s * 1e3:.1f} ms; "
                    f"its deadline is in {left_s * 1e3:.1f} ms"
                )
        self._expire_at(work.deadline)

    # ---- batches go

    def attach(self, runner: Runner) -> None:
        self._runner = runner
        self._free = []
        self._busy = 0
        self._solo = False
        self.resize(self.settings)

    def resize(self, settings: RuntimeSettings) -> None:
        """Take new live settings: instances are added at once and removed as they become free."""
        self.settings = settings
        runner = self._runner
        if runner is None or not runner.alive:
            return
        with contextlib.suppress(OSError):
            while len(runner.instances) < settings.instances:
                self._free.append(runner.add_instance(self._on_reply))
        while len(runner.instances) > settings.instances and self._free:
            runner.remove_instance(self._free.pop())
        self._pump_soon()

    def detach(self) -> list[Batch]:
        """No runner any more: the batches that were in flight, oldest first."""
        runner, self._runner = self._runner, None
        if runner is None:
            return []
        lost = [instance.batch for instance in runner.instances if instance.batch is not None]
        for batch in lost:
            self._account.give(batch.tokens, batch.expected_s, 0.0)
        for instance in runner.instances:
            instance.batch = None
        self._free = []
        self._busy = 0
        self._solo = False
        self._quiet.set()
        self._account.withdraw()
        return sorted(lost, key=lambda batch: batch.sent_at)

    async def close(self) -> None:
        """Stop for good; returns when no thread copies for it any more."""
        for timer in (self._expiry, self._asking):
            if timer is not None:
                timer.cancel()
        self._account.close()
        if self._copies:
            await asyncio.wait(self._copies)

    def usual(self, batch: Batch) -> Usual:
        """What batches like this one took at worst."""
        costs = self.costs
        return Usual(costs.batches >= ENOUGH, costs.worst_wall_s(batch.kind), costs.worst_cpu_s(batch.kind))

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
            limit = self.settings.batch_limit
            if limit > 1 and self._account.has_company():
                limit = self.rates.rows_within(QUANTUM_S, limit)
            expected_s = self.rates.cpu_s(min(limit, self.queue.rows or 1))
            tokens = self._account.take(self.settings.intra_op_threads, expected_s)
            if not tokens:
                self._ask_again_in(PATIENCE_S)
                return
            self._solo = bool(self.suspects)
            work = [self.suspects.popleft()] if self.suspects else self.queue.take(limit)
            self._send(self._free.pop(), work, tokens, expected_s)
        self._account.withdraw()

    def _ask_again_in(self, seconds: float) -> None:
        """The ledger wakes who is next when tokens come free; where none do for long, patience has an end and somebody must ask."""
        if self._asking is None:
            self._asking = self._loop.call_later(seconds * 1.05, self._ask)

    def _ask(self) -> None:
        self._asking = None
        self.pump()

    def _ready(self) -> bool:
        if self._held or self._solo or not self._free or self._busy >= self.settings.instances:
            return False
        return not self._busy if self.suspects else self.queue.length > 0

    def _withdraw_if_idle(self) -> None:
        if not self.queue.length and not self.suspects:
            self._account.withdraw()

    def _send(self, instance: Instance, work: list[Work], tokens: int, expected_s: float) -> None:
        rows = work[0].rows if len(work) == 1 else sum([item.rows for item in work])
        plan = self._planner.plan(work, rows, self._texts_out)
        now = monotonic()
        for item in work:
            item.queue_s = now - item.enqueued_at
        batch = Batch(work, rows, plan, tokens, expected_s, now)
        instance.batch = batch
        self._busy += 1
        if plan.payload > LARGE_BYTES:
            self._copy(self._send_large(instance, batch))
            return
        write_all(instance.arena.fd, gather(work, plan))
        self._post(instance, batch)

    async def _send_large(self, instance: Instance, batch: Batch) -> None:
        fd = os.dup(instance.arena.fd)  # the runner may die, and its arenas be closed, while a thread writes
        try:
            await self._loop.run_in_executor(None, write_all, fd, gather(batch.work, batch.plan))
        finally:
            os.close(fd)
        if instance.batch is batch:
            self._post(instance, batch)

    def _post(self, instance: Instance, batch: Batch) -> None:
        message = batch.plan.message
        if len(message) > _MESSAGE_BYTES:
            os.pwrite(instance.arena.fd, message, batch.plan.end)
            message = b"@%d,%d" % (batch.plan.end, len(message))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead: the pidfd will say so, and detach() returns the batch
            instance.sock.send(message)

    # ---- answers come

    def _on_reply(self, instance: Instance) -> None:
        try:
            message = instance.sock.recv(_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        batch: Batch | None = instance.batch
        if not message or batch is None:
            self._loop.remove_reader(instance.sock.fileno())
            return
        if message[:1] == b"@":
            start, size = map(int, message[1:].split(b","))
            message = read_all(instance.arena.fd, size, start)
        reply = orjson.loads(message)
        if reply[0]:
            self._release(instance, batch, reply, 0)
            self._failed(batch, reply[4], reply[5])
            self._pump_soon()
            return
        base, total = reply[4], reply[5]
        if total > LARGE_BYTES:
            self._copy(self._receive_large(instance, batch, reply))
            return
        data = read_all(instance.arena.fd, total, base) if total else b""
        self._release(instance, batch, reply, base + total)
        self.pump()
        self._answer(batch, reply, data)

    async def _receive_large(self, instance: Instance, batch: Batch, reply: list[Any]) -> None:
        fd = os.dup(instance.arena.fd)
        try:
            data = await self._loop.run_in_executor(None, read_all, fd, reply[5], reply[4])
        finally:
            os.close(fd)
        if instance.batch is batch:
            self._release(instance, batch, reply, reply[4] + reply[5])
            self._pump_soon()
        self._answer(batch, reply, data)

    def _copy(self, copying: Any) -> None:
        task = self._loop.create_task(copying, name=f"copy for {self._spec.name}")
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    def _release(self, instance: Instance, batch: Batch, reply: list[Any], used: int) -> None:
        now = monotonic()
        cpu_s = reply[2] * 1e-9
        instance.batch = None
        instance.arena.settle(max(used, batch.plan.end))
        self._busy -= 1
        self._solo = False
        self._quiet.set()
        self.completed += 1
        self.rates.learn(batch.rows, now - batch.sent_at, cpu_s, now)
        self.costs.learn(batch.kind, now - batch.sent_at, cpu_s, now)
        runner = self._runner
        if runner is not None and len(runner.instances) > self.settings.instances:
            runner.remove_instance(instance)
        else:
            self._free.append(instance)
        more = self.queue.length or self.suspects
        self._account.give(batch.tokens, batch.expected_s, cpu_s, self.settings.intra_op_threads if more else 0)

    def _answer(self, batch: Batch, reply: list[Any], data: bytes) -> None:
        _, compute_ns, cpu_ns, wait_ns, _, _, described = reply
        answers = split(batch.work, described, data, batch.rows)
        if answers is None:
            self._rows_depend(batch)
            return
        spec, rows = self._spec, batch.rows
        compute_s, cpu_s, wait_s = compute_ns * 1e-9, cpu_ns * 1e-9, wait_ns * 1e-9
        for work, outputs in zip(batch.work, answers, strict=True):
            future = work.future
            if not future.done():
                share = work.rows / rows
                result = InferenceResult(
                    outputs, spec.model, spec.version, spec.generation, work.queue_s, compute_s, rows, cpu_s * share, wait_s * share
                )
                future.set_result(result)
        if self._observer is not None:
            queue_s = tuple([work.queue_s for work in batch.work])
            self._observer(BatchReport(rows, len(batch.work), compute_s, cpu_s, wait_s, queue_s))

    def _failed(self, batch: Batch, kind: str, text: str) -> None:
        """A request that the model cannot take must not fail its batch-mates: each is tried alone."""
        if len(batch.work) > 1:
            self._again_alone(batch)
            return
        error: HoneError = (
            InvalidRequest(text) if kind == "InvalidRequest" else ModelFailed(f"{self._spec.name} failed on this request: {text}")
        )
        _fail(batch.work[0], error)

    def _rows_depend(self, batch: Batch) -> None:
        self.batchable = False
        self.unbatchable_because = "an output had not one row for each input row of a batch"
        self._again_alone(batch)
        self._pump_soon()

    def _again_alone(self, batch: Batch) -> None:
        for work in reversed(batch.work):
            if not work.future.done():
                work.key, work.rows, work.alone = key_of(work.request.inputs, False)
                self.queue.push(work, front=True)

    # ---- deadlines

    def _expire_at(self, deadline: float) -> None:
        """One timer for all deadlines: armed for the earliest."""
        if self._expiry is not None:
            if deadline >= self._expires_at:
                return
            self._expiry.cancel()
        self._expires_at = deadline
        self._expiry = self._loop.call_later(max(0.0, deadline - monotonic()), self._expire)

    def _expire(self) -> None:
        self._expiry = None
        now = monotonic()
        earliest: float | None = None
        waiting = [*self.queue, *self.suspects, *(work for _, batch in self.in_flight() for work in batch.work)]
        for work in waiting:
            if work.deadline is None or work.future.done():
                continue
            if work.deadline <= now:
                place = "queued" if work.queued else "running"
                self.queue.drop(work)
                _fail(
                    work, DeadlineExceeded(f"the deadline passed while the request was {place} ({(now - work.enqueued_at) * 1e3:.0f} ms)")
                )
            elif earliest is None or work.deadline < earliest:
                earliest = work.deadline
        self._withdraw_if_idle()
        if earliest is not None:
            self._expire_at(earliest)


def _fail(work: Work, error: HoneError) -> None:
    if not work.future.done():
        work.future.set_exception(error)
