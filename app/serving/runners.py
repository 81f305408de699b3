"""The server's handle on one runner process: start it, give it instances, notice its end, end it.

Life is read from the control socket and a pidfd, never by asking a process library. It knows nothing of requests or batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson

from app import errors
from app.domain import RuntimeSettings, Signature
from app.errors import ModelRejected, NotReady
from app.serving import procfs
from app.serving.forkserver import Child, ForkServer, reap_adopted
from app.serving.shm import Arena, write_all

HELLO_S: Final = 5.0
"""A forked child that has not reported by then is given up, and a spawned one takes its place."""
_SAMPLE_S: Final = 0.02
_STATUS_S: Final = 1.0
_REPORT_BYTES: Final = 1 << 17


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """One version as a runner needs it. `path` is model.onnx, or weights for kind "torch" with `factory` FILE.py:FUNCTION (absolute)."""

    model: str
    version: str
    generation: int
    path: str
    signature: Signature
    settings: RuntimeSettings
    kind: str = "onnx"
    factory: str = ""
    memory_limit_bytes: int = 0
    oom_score_adj: int = 0
    second_session: bool = True

    @property
    def name(self) -> str:
        return f"{self.model}:{self.version}"


@dataclass(frozen=True, slots=True)
class Opened:
    """What the runner said when its session was open and warm."""

    load_s: float
    ready_s: float
    warm_up: tuple[dict[str, Any], ...]


_SENT: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGIO)
"""Signals that no work of a runner's own brings about."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a runner ended. `own_fault` is set where its work, not somebody outside, must have ended it; None where nobody can tell."""

    reason: str
    own_fault: bool | None


class Instance:
    """One thread of a runner as the server sees it: a socket, an arena, and the batch in flight, if any."""

    __slots__ = ("arena", "batch", "number", "sent_at", "sock", "threads", "tid", "yields")

    def __init__(self, number: int, sock: socket.socket, threads: int) -> None:
        self.number = number
        self.sock = sock
        self.threads = threads
        self.arena = Arena()
        self.batch: Any = None
        self.sent_at = 0.0
        self.tid = 0
        self.yields = False
        """Its thread runs only where nobody else wants the core."""

    def give_way(self) -> None:
        """There is no way back for the thread (where RLIMIT_NICE is 0, as nearly everywhere): another instance takes its place then."""
        if self.tid and not self.yields:
            with contextlib.suppress(OSError):  # it has just ended
                os.sched_setscheduler(self.tid, os.SCHED_IDLE, os.sched_param(0))
                self.yields = True


class Runner:
    """Made by start(). `on_exit` is called once, on the loop, when the process ends without having been asked to."""

    def __init__(self, spec: RunnerSpec, forkserver: ForkServer, on_exit: Callable[[Runner], None]) -> None:
        self.spec = spec
        self.alive = False
        self.instances: list[Instance] = []
        self.opened = Opened(0.0, 0.0, ())
        self.settled_bytes = 0
        self._on_lone: Callable[[Runner], None] | None = None
        self._killed: Ending | None = None
        self._forkserver = forkserver
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._child = Child(0, -1)
        self._control: socket.socket | None = None
        self._lifeline = -1
        self._numbers = 0
        self._report: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._ending_asked = False
        self._oom_kills = procfs.oom_kills()

    @classmethod
    async def start(cls, spec: RunnerSpec, forkserver: ForkServer, on_exit: Callable[[Runner], None], timeout_s: float = 300.0) -> Runner:
        """Fork, open the session, warm it. Raises ModelRejected or Unsupported with the reason; then nothing is left behind."""
        runner = cls(spec, forkserver, on_exit)
        started = time.monotonic()
        try:
            await runner._born()
            ready_s = time.monotonic() - started
            report = await runner._open(timeout_s)
        except BaseException:
            await asyncio.shield(runner.end(0.0))
            raise
        runner.settled_bytes = procfs.private_bytes(runner.pid) or 0
        runner.opened = Opened(report["load_s"], ready_s, tuple(report["warm_up"]))
        return runner

    @property
    def pid(self) -> int:
        return self._child.pid

    # ---- birth

    async def _born(self) -> None:
        """A process that said hello. Fresh sockets for each try, so that a late child of an earlier one finds nobody and ends."""
        for attempt in (self._forkserver.fork, self._forkserver.fork, self._forkserver.spawn):
            with contextlib.suppress(ConnectionError, TimeoutError):
                await self._try(attempt)
                return
            await self._bury()
        raise NotReady(f"no process could be started for {self.spec.name}; the log of the server says why", retry_after_s=5.0)

    async def _try(self, attempt: Callable[[tuple[int, int]], Any]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lifeline_r, self._lifeline = os.pipe()
        ours.setblocking(False)
        self._control = ours
        self._report = self._loop.create_future()
        try:
            self._child = await attempt((theirs.fileno(), lifeline_r))
        finally:
            theirs.close()
            os.close(lifeline_r)
        self.alive = True
        self._loop.add_reader(self._child.pidfd, self._on_pidfd)
        self._loop.add_reader(ours.fileno(), self._on_control)
        async with asyncio.timeout(HELLO_S):
            await asyncio.shield(self._report)

    async def _open(self, timeout_s: float) -> dict[str, Any]:
        self._report = self._loop.create_future()
        body = orjson.dumps(self.spec)
        fd = os.memfd_create("hone-spec", os.MFD_CLOEXEC)
        try:
            write_all(fd, [body])
            self._order({"do": "open", "size": len(body)}, [fd])
        except OSError as error:
            raise NotReady(f"the process of {self.spec.name} ended before it could load: {error}", retry_after_s=1.0) from error
        finally:
            os.close(fd)
        report = await self._opening(timeout_s)
        if "failed" in report:
            raise getattr(errors, report["failed"], ModelRejected)(report["text"])
        return report

    async def _opening(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the session, watching what the process takes: some files take gigabytes at their first run (case 53)."""
        limit = self.spec.memory_limit_bytes
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SAMPLE_S if limit else timeout_s):
                    return await asyncio.shield(self._report)
            if limit and (procfs.private_bytes(self.pid) or 0) > limit:
                raise ModelRejected(
                    f"{self.spec.name} took more than the {limit >> 20} MiB it may take here while it loaded; "
                    "give the server more memory (or limits.memory_mb in model.yaml, where that is the bound), or serve a smaller version"
                )
            if time.monotonic() > deadline:
                raise ModelRejected(f"{self.spec.name} was not loaded and warm within {timeout_s:.0f} s")

    # ---- life

    def open_lone(self, on_lone: Callable[[Runner], None]) -> None:
        """Open a second session, of `lone_threads`, beside the one that serves; `on_lone` is called once an instance may be added to it."""
        self._on_lone = on_lone
        self._order({"do": "lone"})

    def add_instance(self, on_reply: Callable[[Instance], None], lone: bool = False) -> Instance:
        """One more thread in the runner; usable at once (the socket holds what is sent before the thread reads). `lone`: on the second session."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._numbers += 1
        settings = self.spec.settings
        instance = Instance(self._numbers, ours, settings.lone_threads if lone else settings.intra_op_threads)
        try:
            self._order({"do": "instance", "id": instance.number, "lone": lone}, [theirs.fileno(), instance.arena.fd])
        except OSError:
            self._close_instance(instance)
            raise
        finally:
            theirs.close()
        self.instances.append(instance)
        self._loop.add_reader(ours.fileno(), on_reply, instance)
        return instance

    def remove_instance(self, instance: Instance) -> None:
        """Let a free instance go: its thread ends at the closed socket, its arena with its last mapping."""
        self.instances.remove(instance)
        self._loop.remove_reader(instance.sock.fileno())
        self._close_instance(instance)

    def trim(self, at_rest: bool = False) -> None:
        """Ask for freed memory to go back to the kernel, and give back the arenas of free instances. `at_rest`: at once, not with the next run."""
        for instance in self.instances:
            if instance.batch is None:
                instance.arena.trim()
        with contextlib.suppress(OSError):
            self._order({"do": "trim", "at_rest": at_rest})

    def kill(self, reason: str, own_fault: bool) -> None:
        """End it now; on_exit follows, with this reason."""
        if self.alive:
            self._killed = self._killed or Ending(reason, own_fault)
            signal.pidfd_send_signal(self._child.pidfd, signal.SIGKILL)

    async def ending(self) -> Ending:
        """Why it ended, once it has."""
        status = await self._forkserver.status(self._child, _STATUS_S)
        if self._killed is not None:
            return self._killed
        if status is None:
            return Ending("the runner ended, nobody could tell how", None)
        if status == -signal.SIGKILL and procfs.oom_kills() > self._oom_kills:
            return Ending("the runner was killed for want of memory", True)
        if -status in _SENT:
            return Ending(f"the runner was killed from outside ({_signal_name(-status)})", False)
        if status < 0:
            return Ending(f"the runner crashed: {_signal_name(-status)}", True)
        return Ending(f"the runner ended with exit code {status}", True)

    # ---- end

    async def end(self, grace_s: float = 1.0) -> None:
        """Ask it to stop, kill it where it does not, close everything. May be called again, and for a runner that is dead."""
        self._ending_asked = True
        if self.alive and grace_s > 0:
            with contextlib.suppress(OSError):
                self._order({"do": "stop"})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._ended.wait()
        await self._bury()

    async def _bury(self) -> None:
        if self.alive:
            signal.pidfd_send_signal(self._child.pidfd, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    await self._ended.wait()
        self._ended.clear()
        for instance in self.instances:
            self._loop.remove_reader(instance.sock.fileno())
            self._close_instance(instance)
        self.instances.clear()
        if self._control is not None:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._child.spawned is not None:
            await asyncio.to_thread(self._child.spawned.wait)
        elif self._child.pidfd >= 0:
            reap_adopted(self._child.pidfd)
        if self._child.pidfd >= 0:
            self._loop.remove_reader(self._child.pidfd)
            os.close(self._child.pidfd)
        self._child = Child(self._child.pid, -1)
        self.alive = False
        if not self._report.done():
            self._report.cancel()

    # ---- the loop's callbacks

    def _order(self, order: dict[str, Any], fds: list[int] | None = None) -> None:
        if self._control is None:
            raise BrokenPipeError("the runner's control socket is closed")
        socket.send_fds(self._control, [orjson.dumps(order)], fds or [])

    def _on_control(self) -> None:
        assert self._control is not None
        while True:
            try:
                message = self._control.recv(_REPORT_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                message = b""
            if not message:  # the pidfd tells the rest
                self._loop.remove_reader(self._control.fileno())
                return
            self._take(orjson.loads(message))

    def _take(self, report: dict[str, Any]) -> None:
        if "instance" in report:
            for instance in self.instances:
                if instance.number == report["instance"]:
                    instance.tid = report["tid"]
        elif "lone" in report:
            self.settled_bytes = procfs.private_bytes(self.pid) or self.settled_bytes
            if self._on_lone is not None:
                self._on_lone(self)
        elif not self._report.done():
            self._report.set_result(report)

    def _on_pidfd(self) -> None:
        self._loop.remove_reader(self._child.pidfd)
        self.alive = False
        self._ended.set()
        if not self._report.done():
            self._loop.create_task(self._fail_report(self._report), name=f"ending of {self.spec.name}")
        elif not self._ending_asked:
            self._on_exit(self)

    async def _fail_report(self, report: asyncio.Future[dict[str, Any]]) -> None:
        ending = await self.ending()
        if not report.done():
            report.set_exception(ModelRejected(f"{self.spec.name} did not load: {ending.reason}"))
            report.exception()  # where nobody waits any more, nobody needs to hear

    @staticmethod
    def _close_instance(instance: Instance) -> None:
        instance.sock.close()
        instance.arena.close()


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
