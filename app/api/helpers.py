"""Helper processes for long work on large bodies: JSON, which holds the interpreter's lock, and (un)packing. Knows no HTTP.

A job travels as one packet over a socket pair, with its body's memfd beside it; so does the answer, its tensors in a memfd.
Life and death are read from the socket. Helpers start when first needed, end when idle, and are replaced when they die.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, Final, cast

import app.errors
from app.api.memfd import Memfd
from app.api.wire import ParsedRequest, Reply, chosen, compress, encode_response, parse_infer, unpack
from app.domain import Buffer, InferenceRequest, InferenceResult, Tensor
from app.errors import HoneError, NotReady, PayloadTooLarge, QueueFull

_PACKET_BYTES: Final = 65536
_NUMBER: Final = struct.Struct("<Q")
_ALIGNMENT: Final = 64
_PARCEL: Final = "parcel"


class HelperUnavailable(Exception):
    """No helper process could be started; the caller has another way."""


class HelperPool:
    """At most `size` helpers, each with one job at a time; `queue_limit` jobs may wait for one."""

    def __init__(self, context: ForkServerContext, size: int, queue_limit: int = 128, idle_s: float = 60.0, job_s: float = 120.0) -> None:
        self._context = context
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
            helper = await asyncio.get_running_loop().run_in_executor(None, _Helper, self._context)
        except (OSError, EOFError, MemoryError) as error:
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

    def __init__(self, context: ForkServerContext) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process: BaseProcess = context.Process(target=serve, args=(theirs,), name="hone-json-helper", daemon=True)
            try:
                self._process.start()
            except BaseException:
                self._socket.close()
                raise
        self._socket.setblocking(False)
        self._timer: asyncio.TimerHandle | None = None
        self._watched = False
        self.pid = self._process.pid or 0

    async def ask(self, packet: bytes, memory: Memfd) -> tuple[bytes, list[Memfd]] | None:
        socket.send_fds(self._socket, [packet], [memory.fd])
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._socket, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._socket)
        answer, fds, _, _ = socket.recv_fds(self._socket, _PACKET_BYTES, 1)
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
        self._process.join(1.0)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(5.0)


# ---- what a job carries ----------------------------------------------------------------------------------------------


def pack_parcel(content: object) -> Memfd:
    """`content` in new shared memory: a table of sizes, its pickle, then its large buffers, aligned."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(stream), *(buffer.raw() for buffer in buffers)]
    memory = Memfd.new([b"".join(map(_NUMBER.pack, (len(parts), *map(len, parts))))])
    at = _NUMBER.size * (1 + len(parts))
    for part in parts:
        at = _aligned(at)
        memory.skip_to(at)
        memory.write(part)
        at += len(part)
    return memory


def open_parcel(memory: Memfd) -> Any:
    """The content of a parcel; its large buffers are slices of the mapped memory."""
    view = memory.map()
    (count,) = _NUMBER.unpack_from(view, 0)
    at = _NUMBER.size * (1 + count)
    parts = []
    for index in range(count):
        (size,) = _NUMBER.unpack_from(view, _NUMBER.size * (1 + index))
        at = _aligned(at)
        parts.append(view[at : at + size])
        at += size
    return pickle.loads(parts[0], buffers=parts[1:])


def encode_parcel(result: InferenceResult, parsed: ParsedRequest) -> Memfd:
    """A parcel for `HelperPool.encode`: the outputs that are wanted and the reply's form, without the inputs."""
    outputs = [_out_of_band(tensor) for tensor, _ in chosen(result, parsed)]
    form = ParsedRequest(InferenceRequest([]), parsed.id, parsed.outputs, parsed.binary_default)
    return pack_parcel((replace(result, outputs=outputs), form))


def reply_parcel(reply: Reply) -> Memfd:
    """A parcel of a reply, as `HelperPool.compress` takes it."""
    return pack_parcel(replace(reply, parts=list(map(_aside, reply.parts))))


def _out_of_band(tensor: Tensor) -> Tensor:
    return replace(tensor, data=_aside(tensor.data))


def _aside(data: Buffer) -> Buffer:
    """Marked for pickle to leave out of its stream."""
    return cast(Buffer, pickle.PickleBuffer(data))


def _aligned(at: int) -> int:
    return -(-at // _ALIGNMENT) * _ALIGNMENT


def _open_answer(answer: bytes, memories: list[Memfd]) -> Any:
    outcome = pickle.loads(answer)
    if outcome is None:
        return memories[0]
    if outcome == _PARCEL:
        return open_parcel(memories[0])
    kind, text = outcome
    error: type[HoneError] = getattr(app.errors, kind)
    raise error(text)


# ---- in the helper ---------------------------------------------------------------------------------------------------


def serve(channel: socket.socket) -> None:
    """A helper's whole life: jobs from the socket until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")
    channel.setblocking(True)
    while True:
        packet, fds, _, _ = socket.recv_fds(channel, _PACKET_BYTES, 1)
        if not packet:
            return
        answer, memories = _answer(packet, Memfd(fds[0]))
        try:
            socket.send_fds(channel, [answer], [memory.fd for memory in memories])
        except BrokenPipeError:
            return


def _answer(packet: bytes, memory: Memfd) -> tuple[bytes, list[Memfd]]:
    try:
        return _do(memory, *pickle.loads(packet))
    except HoneError as error:
        return pickle.dumps((type(error).__name__, str(error))), []
    except MemoryError:
        return pickle.dumps((PayloadTooLarge.__name__, "there is not enough memory for this body; send it as binary, or in parts")), []


def _do(memory: Memfd, what: str, *how: Any) -> tuple[bytes, list[Memfd]]:
    if what == "unpack":
        return pickle.dumps(None), [Memfd.new(unpack(memory.map(), *how))]
    if what == "parse":
        parsed = parse_infer(memory.map(), how[0], None, how[1])
        parsed.request.inputs = [_out_of_band(tensor) for tensor in parsed.request.inputs]
        parcel = pack_parcel(parsed)
    elif what == "encode":
        parcel = reply_parcel(encode_response(*open_parcel(memory)))
    else:
        parcel = reply_parcel(compress(open_parcel(memory), *how))
    return pickle.dumps(_PARCEL), [parcel]
