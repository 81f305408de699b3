"""The server's handle on its fork server: start it before the event loop, order runners from it, start it again if it dies.

A fork server of our own rather than multiprocessing's: that one imports the parent's __main__ again in each child, keeps a resource
tracker, and leaves its socket in /tmp when the server is killed (CPython 3.11.1 and later, since CVE-2022-42919). Here one unnamed
socket pair is all there is. Runners outlive it: their life is read from their own sockets and pidfds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

PRELOAD: Final = ("numpy", "onnxruntime", "app.serving.runner")
_ONE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_DROPPED: Final = ("ORT_INTRA_OP_NUM_THREADS", "ORT_INTER_OP_NUM_THREADS")
_STATUSES_KEPT: Final = 256
_FORK_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Child:
    """A runner process just born. `pidfd` is the owner's to close, `nursery` the process that forked and reaps it.

    `spawned` is set where no fork server could be used: then it is ours to reap.
    """

    pid: int
    pidfd: int
    nursery: int = 0
    spawned: subprocess.Popen[bytes] | None = None


class ForkServer:
    """start() and close() may be called outside any event loop; the rest on one loop at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._orders: dict[int, asyncio.Future[Child]] = {}
        self._statuses: OrderedDict[int, int] = OrderedDict()
        self._waiters: dict[int, asyncio.Future[int]] = {}
        self._next = 0
        self.restarts = 0

    @property
    def pid(self) -> int:
        """Of the fork server's process; 0 where there is none."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start the process without waiting for its imports (about 150 ms); orders wait in the socket meanwhile."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = _spawn("app.serving.nursery", (theirs.fileno(),), PRELOAD)
        ours.setblocking(False)
        self._sock = ours

    def close(self) -> None:
        """End the fork server; runners that live are not touched."""
        self._detach()
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            _end(self._process)
            self._process = None

    async def fork(self, fds: tuple[int, int]) -> Child:
        """A new runner with (control socket, lifeline). Raises ConnectionError or TimeoutError; another try needs other sockets."""
        sock, loop = self._attached()
        self._next += 1
        order = self._next
        answer: asyncio.Future[Child] = loop.create_future()
        self._orders[order] = answer
        try:
            socket.send_fds(sock, [orjson.dumps({"fork": order})], fds)
            async with asyncio.timeout(_FORK_S):
                return await answer
        except BlockingIOError as error:
            raise ConnectionError("the fork server's socket is full") from error
        except BrokenPipeError:
            self._lost()
            raise
        except BaseException:
            _let_go(answer)
            raise
        finally:
            self._orders.pop(order, None)

    async def spawn(self, fds: tuple[int, int]) -> Child:
        """A runner without the fork server: slower (130-200 ms), for when a forked one did not report."""
        answer = asyncio.ensure_future(asyncio.to_thread(_spawned_runner, tuple(map(os.dup, fds))))
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(_let_go)
            raise

    async def status(self, child: Child, timeout_s: float) -> int | None:
        """Exit status as in subprocess (negative: the signal); None where nobody could tell in time."""
        if child.spawned is not None:
            return await asyncio.to_thread(_waited, child.spawned, timeout_s)
        if (known := self._statuses.get(child.pid)) is not None:
            return known
        reap_adopted(child.pidfd)
        if child.nursery != self.pid or self._loop is not asyncio.get_running_loop():
            return None
        waiter: asyncio.Future[int] = self._loop.create_future()
        self._waiters[child.pid] = waiter
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except (TimeoutError, ConnectionError):
            return None
        finally:
            self._waiters.pop(child.pid, None)

    def _attached(self) -> tuple[socket.socket, asyncio.AbstractEventLoop]:
        loop = asyncio.get_running_loop()
        if self._sock is None:
            self.start()
        assert self._sock is not None
        if self._loop is not loop:
            self._detach()
            loop.add_reader(self._sock.fileno(), self._on_report)
            self._loop = loop
        return self._sock, loop

    def _detach(self) -> None:
        if self._loop is not None and self._sock is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._sock.fileno())
        self._loop = None

    def _on_report(self) -> None:
        assert self._sock is not None
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._sock, 4096, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                message = b""
            if not message:
                self._lost()
                return
            self._take(orjson.loads(message), fds)

    def _take(self, report: dict[str, int], fds: list[int]) -> None:
        if "forked" in report:
            answer = self._orders.get(report["forked"])
            if answer is None or answer.done():  # given up: the runner sees its sockets closed and ends
                os.close(fds[0])
            else:
                os.set_inheritable(fds[0], False)
                answer.set_result(Child(report["pid"], fds[0], self.pid))
            return
        self._statuses[report["exited"]] = report["status"]
        if len(self._statuses) > _STATUSES_KEPT:
            self._statuses.popitem(last=False)
        waiter = self._waiters.get(report["exited"])
        if waiter is not None and not waiter.done():
            waiter.set_result(report["status"])

    def _lost(self) -> None:
        """The fork server died: start another; orders not answered are repeated by those who wait for them."""
        pending: list[asyncio.Future[Any]] = [*self._orders.values(), *self._waiters.values()]
        self.close()
        for future in pending:
            if not future.done():
                future.set_exception(ConnectionError("the fork server died"))
        self.restarts += 1
        self.start()
        with contextlib.suppress(RuntimeError):
            self._attached()


def _let_go(answer: asyncio.Future[Child]) -> None:
    """Close what a caller who gave up in the very moment of the answer never got; the runner sees its sockets closed and ends."""
    if answer.done() and not answer.cancelled() and answer.exception() is None:
        child = answer.result()
        os.close(child.pidfd)
        if child.spawned is not None:
            child.spawned.kill()
            child.spawned.wait()


def _spawn(module: str, fds: tuple[int, ...], arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """Run `module.main(*fds, *arguments)` in a fresh interpreter that imports from where this one does, but not its __main__."""
    root = str(Path(__file__).resolve().parents[2])
    path = [root, *(entry for entry in sys.path if entry and entry != root)]
    call = ", ".join([*map(str, fds), *map(repr, arguments)])
    code = f"import sys; sys.path[:] = {path!r}; from {module} import main; main({call})"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=fds, env=_environment())


def _environment() -> dict[str, str]:
    """One thread for BLAS (a forked child must not need its pool), and neither tokens of ours nor thread counts of ONNX Runtime's.

    ONNX Runtime 1.32 keeps a telemetry database in HOME and a connection to its vendor, opened at import; children would share both.
    """
    kept = {"ORT_DISABLE_TELEMETRY": "1"} | {
        key: value for key, value in os.environ.items() if not key.startswith("HONE_") and key not in _DROPPED
    }
    return kept | _ONE_THREAD


def _spawned_runner(fds: tuple[int, ...]) -> Child:
    """Takes the descriptors over: whoever ordered it may have given up and closed theirs, and their numbers be others' by now."""
    try:
        process = _spawn("app.serving.runner", fds, ())
    finally:
        for fd in fds:
            os.close(fd)
    return Child(process.pid, os.pidfd_open(process.pid), spawned=process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _waited(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


def reap_adopted(pidfd: int) -> None:
    """Where we are process 1 of a container, orphans of a dead fork server become ours to reap."""
    with contextlib.suppress(ChildProcessError, OSError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
