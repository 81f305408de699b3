"""One batch's way to an instance of a runner and back: bytes into the arena, a description through the socket, the reply out again.

It knows neither which requests wait nor what their answers mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import orjson

from app.serving.batcher import Work
from app.serving.layout import Described, Plan, gather
from app.serving.runners import Instance
from app.serving.shm import read_all, write_all
from app.serving.watch import Sight

LARGE_BYTES: Final = 1 << 20
"""Copies of more than this are made in a thread: they would hold up the event loop."""
COPIES: Final = 4
"""So many are made at once, in threads that nothing else uses: a journal that hangs may hold all of those that everybody shares."""
_MESSAGE_BYTES: Final = 64 << 10


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


@dataclass(slots=True)
class Reply:
    """What came back: outputs, or the kind and text of a failure. Seconds; `used` is how far the arena was filled."""

    compute_s: float
    cpu_s: float
    wait_s: float
    used: int
    described: list[Described]
    data: bytes
    failed: str = ""
    text: str = ""


Answered = Callable[[Instance, Batch, Reply], None]
Broken = Callable[[Instance, Batch, Exception], None]


class Exchange:
    """`answered` is called with each reply, `broken` where this side could not move the bytes (no memory left for the arena)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, answered: Answered, broken: Broken) -> None:
        self._loop = loop
        self._answered = answered
        self._broken = broken
        self._copies: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(COPIES, thread_name_prefix="hone-copy")

    def send(self, instance: Instance, batch: Batch) -> None:
        instance.batch = batch
        if batch.plan.payload > LARGE_BYTES:
            self._copy(self._send_large(instance, batch))
            return
        try:
            write_all(instance.arena.fd, gather(batch.work, batch.plan))
        except OSError as error:
            self._loop.call_soon(self._broken, instance, batch, error)
            return
        _post(instance, batch)

    def on_readable(self, instance: Instance) -> None:
        """For the event loop: a reply lies in the instance's socket, or the runner is gone."""
        try:
            message = instance.sock.recv(_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        batch: Batch | None = instance.batch
        if not message or batch is None:  # gone: the pidfd tells the rest
            self._loop.remove_reader(instance.sock.fileno())
            return
        if message[:1] == b"@":
            start, size = map(int, message[1:].split(b","))
            message = read_all(instance.arena.fd, size, start)
        failed, compute_ns, cpu_ns, wait_ns, *outcome = orjson.loads(message)
        times = compute_ns * 1e-9, cpu_ns * 1e-9, wait_ns * 1e-9
        if failed:
            self._answered(instance, batch, Reply(*times, 0, [], b"", *outcome))
            return
        base, total, described = outcome
        reply = Reply(*times, base + total, described, b"")
        if total > LARGE_BYTES:
            self._copy(self._receive_large(instance, batch, reply, base, total))
            return
        if total:
            reply.data = read_all(instance.arena.fd, total, base)
        self._answered(instance, batch, reply)

    async def close(self) -> None:
        """Returns when no thread copies any more."""
        if self._copies:
            await asyncio.wait(self._copies)
        self._threads.shutdown(wait=False)

    def _copy(self, copying: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(copying, name="copy of a large batch")
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _send_large(self, instance: Instance, batch: Batch) -> None:
        try:
            await self._in_thread(instance, write_all, gather(batch.work, batch.plan))
        except OSError as error:
            if instance.batch is batch:
                self._broken(instance, batch, error)
            return
        if instance.batch is batch:
            _post(instance, batch)

    async def _receive_large(self, instance: Instance, batch: Batch, reply: Reply, base: int, total: int) -> None:
        try:
            reply.data = await self._in_thread(instance, read_all, total, base)
        except (OSError, EOFError) as error:
            if instance.batch is batch:
                self._broken(instance, batch, error)
            return
        if instance.batch is batch:
            self._answered(instance, batch, reply)

    async def _in_thread(self, instance: Instance, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function` on a duplicate of the arena: the runner may die, and its arenas be closed, while a thread is at it."""
        fd = os.dup(instance.arena.fd)
        try:
            return await self._loop.run_in_executor(self._threads, function, fd, *arguments)
        finally:
            os.close(fd)


def _post(instance: Instance, batch: Batch) -> None:
    message = batch.plan.message
    if len(message) > _MESSAGE_BYTES:
        os.pwrite(instance.arena.fd, message, batch.plan.end)
        message = b"@%d,%d" % (batch.plan.end, len(message))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead: the pidfd will say so
        instance.sock.send(message)
