"""Helper processes for long work on large bodies: JSON, which holds the interpreter's lock, and (un)packing. Knows no HTTP.

A job travels as one packet over a socket pair, with its body's memfd beside it; so does the answer, its tensors in a memfd.
Life and death are read from the socket. Helpers start when first needed, end when idle, and are replaced when they die.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import app.errors
from app.api.helper_process import PACKET_BYTES, PARCEL
from app.api.memfd import Memfd
from app.api.parcels import open_parcel
from app.api.wire import ParsedRequest, Reply
from app.errors import HoneError, NotReady, QueueFull

_IMPORT_FROM: Final = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]


class HelperUnavailable(Exception):
    """No helper process could be started; the caller has another way."""


class HelperPool:
    """At most `size` helpers, each with one job at a time; `queue_limit` jobs may wait for one."""

    def __init__(self, size: int, queue_limit: int = 128, idle_s: float = 60.0, job_s: float = 120.0) -> None:
        self._queue_limit = queue_limit
        self._idle_s = idle_s
        self._job_s = job_s
        self._slots = asyncio.Semaphore(size)
        self._idle: list[_Helper] = []
        self._jobs: set[asyncio.Task[Any]] = set()
        self._size = size
        self.started = 0

    async def parse(self, body: Memfd, header_length: int | None, received_at: float | None) -> ParsedRequest:
        """`wire.parse_infer` on a body in shared memory."""
        parsed: ParsedRequest = await self._run(("parse", header_length, received_at), body)
        return parsed

    async def encode(self, parcel: Memfd) -> Reply:
        """`wire.encode_response` on what `encode_parcel` packed."""
        reply: Reply = await self._run(("encode",), parcel)
        return reply

    async def compress(self, parcel: Memfd, encoding: str) -> Reply:
        """`wire.compress` on what `reply_parcel` packed."""
        reply: Reply = await self._run(("compress", encoding), parcel)
        return reply

    async def unpack(self, body: Memfd, encoding: str, limit: int) -> Memfd:
        """`wire.unpack` on a body in shared memory, into shared memory."""
        memory: Memfd = await self._run(("unpack", encoding, limit), body)
        return memory

    @property
    def pids(self) -> list[int]:
        """Of the idle helpers."""
        return [helper.pid for helper in self._idle]

    async def close(self) -> None:
        for task in list(self._jobs):
            task.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        while self._idle:
            await self._end(self._idle.pop())

    async def _run(self, job: tuple[Any, ...], memory: Memfd) -> Any:
        if len(self._jobs) >= self._size + self._queue_limit:
            raise QueueFull(f"{len(self._jobs)} large JSON bodies are being read or written, the limit; send them as binary, or later", 1.0)
        task = asyncio.get_running_loop().create_task(self._job(pickle.dumps(job), Memfd(os.dup(memory.fd))), name="hone-helper-job")
        self._jobs.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)  # whoever asked may leave; the helper is free again only when it has answered

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._jobs.discard(task)
        if not task.cancelled():
            task.exception()

    async def _job(self, packet: bytes, memory: Memfd) -> Any:
        with contextlib.closing(memory):
            async with self._slots:
                for _ in range(2):
                    helper = self._pick() or await self._start()
                    answer = await self._ask(helper, packet, memory)
                    if answer is not None:
                        return _open_answer(*answer)
                raise NotReady("the process that reads and writes large JSON died twice over this body; send it as binary, or try again")

    def _pick(self) -> _Helper | None:
        if not self._idle:
            return None
        helper = self._idle.pop()
        helper.unwatch()
        return helper

    async def _start(self) -> _Helper:
        try:
            helper = await asyncio.get_running_loop().run_in_executor(None, _Helper)
        except (OSError, MemoryError) as error:
            raise HelperUnavailable(str(error)) from error
        self.started += 1
        return helper

    async def _ask(self, helper: _Helper, packet: bytes, memory: Memfd) -> tuple[bytes, list[Memfd]] | None:
        """The answer, or None where the helper died over it."""
        try:
            async with asyncio.timeout(self._job_s):
                answer = await helper.ask(packet, memory)
        except (OSError, TimeoutError):  # TimeoutError is an OSError, but says something else
            answer = None
        except asyncio.CancelledError:
            await asyncio.shield(self._end(helper))
            raise
        if answer is None:
            await self._end(helper)
            return None
        self._idle.append(helper)
        helper.watch(self._idle_s, self._retire)
        return answer

    def _retire(self, helper: _Helper) -> None:
        if helper in self._idle:
            self._idle.remove(helper)
            helper.unwatch()
            task = asyncio.get_running_loop().create_task(self._end(helper), name="hone-helper-end")
            self._jobs.add(task)
            task.add_done_callback(self._forget)

    async def _end(self, helper: _Helper) -> None:
        helper.unwatch()
        await asyncio.get_running_loop().run_in_executor(None, helper.end)


class _Helper:
    """One helper process and our end of its socket. Starting and ending block."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            code = f"import sys; sys.path[:] = {_IMPORT_FROM!r}; from app.api.helper_process import main; main({theirs.fileno()})"
            command = [sys.executable, "-c", code]
            try:  # a process group of its own, for Ctrl-C is the server's to hear
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), env=_environment(), process_group=0
                )
            except BaseException:
                self._socket.close()
                raise
        self._socket.setblocking(False)
        self._timer: asyncio.TimerHandle | None = None
        self._watched = False
        self.pid = self._process.pid

    async def ask(self, packet: bytes, memory: Memfd) -> tuple[bytes, list[Memfd]] | None:
        socket.send_fds(self._socket, [packet], [memory.fd])
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._socket, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._socket)
        answer, fds, _, _ = socket.recv_fds(self._socket, PACKET_BYTES, 1)
        return (answer, [Memfd(fd) for fd in fds]) if answer else None

    def watch(self, idle_s: float, retire: Callable[[_Helper], None]) -> None:
        """While idle: readable means dead, and `idle_s` without work is enough."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, retire, self)
        self._timer = loop.call_later(idle_s, retire, self)
        self._watched = True

    def unwatch(self) -> None:
        if self._watched and self._timer is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._timer.cancel()
            self._watched = False

    def end(self) -> None:
        self._socket.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment() -> dict[str, str]:
    """Without tokens of ours, and with one thread for BLAS."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _open_answer(answer: bytes, memories: list[Memfd]) -> Any:
    outcome = pickle.loads(answer)
    if not memories and (outcome is None or outcome == PARCEL):  # the kernel drops what finds no descriptor here
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    if outcome is None:
        return memories[0]
    if outcome == PARCEL:
        return open_parcel(memories[0])
    kind, text = outcome
    error: type[HoneError] = getattr(app.errors, kind)
    raise error(text)
