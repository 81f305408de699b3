"""The loop of one instance inside a runner: read a batch's description, compute on the arena, write outputs behind the inputs, answer.

It knows what a model can do (run) but not which library does it. Times are measured here, around the run alone.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import orjson

from app.domain import BYTES
from app.errors import InvalidRequest
from app.serving.runner_tensors import Array, Described, describe, strings, view
from app.serving.shm import Mapping, write_all

MESSAGE_BYTES: Final = 64 << 10
"""Longer descriptions of a batch travel through the arena."""
_CACHED_CALLS: Final = 64

Named = tuple[str, str, Array]


class Model(Protocol):
    """What a runner needs from a version, whatever computes it."""

    def run(self, outputs: Sequence[str] | None, feeds: dict[str, Array]) -> list[Named]:
        """All or the named outputs as (name, datatype, array)."""

    def trim(self) -> None:
        """Give back memory that earlier, larger runs needed."""


@dataclass(slots=True)
class Call:
    """A batch's description, understood. Views stay valid while the arena's mapping does; BYTES are decoded at each call."""

    feeds: dict[str, Array]
    texts: list[tuple[str, list[int], int, int]]
    outputs: list[str] | None
    end: int
    rows: list[int] | None


class Meter:
    """CPU time of a call: the thread's own where it computes alone; else the process's, each moment shared by the calls that run then."""

    def __init__(self, own_thread: bool) -> None:
        self._own_thread = own_thread
        self._lock = threading.Lock()
        self._running = 0
        self._share_ns = 0
        self._at_ns = 0

    def start(self) -> int:
        if self._own_thread:
            return time.thread_time_ns()
        with self._lock:
            began = self._advance()
            self._running += 1
            return began

    def stop(self, began: int) -> int:
        if self._own_thread:
            return time.thread_time_ns() - began
        with self._lock:
            ended = self._advance()
            self._running -= 1
            return ended - began

    def _advance(self) -> int:
        """What a call that had run all the time would have been charged until now."""
        now = time.process_time_ns()
        if self._running:
            self._share_ns += (now - self._at_ns) // self._running
        self._at_ns = now
        return self._share_ns


class Instance:
    """One thread's loop: read a description, compute, write outputs behind the inputs, answer."""

    def __init__(self, model: Model, sock: socket.socket, arena: int, meter: Meter) -> None:
        self._model = model
        self._sock = sock
        self._mapping = Mapping(arena)
        self._calls: dict[bytes, Call] = {}
        self._meter = meter

    def serve(self) -> None:
        """Answer batches until the server closes the socket."""
        waits = _open_waits()
        outcome: tuple[Any, ...]
        buffer = bytearray(MESSAGE_BYTES)
        window = memoryview(buffer)
        while size := self._sock.recv_into(buffer):
            wall, wait, cpu = time.perf_counter_ns(), _waited(waits), self._meter.start()
            try:
                described, base, total = self._compute(bytes(window[:size]))
                outcome, failed, end = (base, total, described), 0, base + total
            except Exception as error:  # noqa: BLE001 - the loop's boundary: whatever a model raises is that batch's answer
                outcome, failed, end = _explained(error), 1, 0
            cpu_ns = self._meter.stop(cpu)
            self._answer([failed, time.perf_counter_ns() - wall, cpu_ns, _waited(waits) - wait, *outcome], end)
        if waits >= 0:
            os.close(waits)
        os.close(self._mapping.fd)
        self._sock.close()

    def _compute(self, message: bytes) -> tuple[list[Described], int, int]:
        call = self._calls.get(message) or self._understood(message)
        feeds = call.feeds
        if call.texts:
            memory, _ = self._mapping.reach(call.end)
            feeds = dict(feeds)
            for name, shape, offset, size in call.texts:
                feeds[name] = strings(memory[offset : offset + size], name, shape)
        described, buffers, total = describe(self._model.run(call.outputs, feeds), call.rows)
        if buffers:
            write_all(self._mapping.fd, buffers, call.end)
        return described, call.end, total

    def _understood(self, message: bytes) -> Call:
        body = message
        if message[:1] == b"@":
            start, size = map(int, message[1:].split(b","))
            body = os.pread(self._mapping.fd, size, start)
        inputs, outputs, end, rows = orjson.loads(body)
        memory, fresh = self._mapping.reach(end)
        if fresh or len(self._calls) >= _CACHED_CALLS:
            self._calls.clear()
        fixed = {name: view(memory, datatype, shape, offset) for name, datatype, shape, offset, _ in inputs if datatype != BYTES}
        texts = [(name, shape, offset, size) for name, datatype, shape, offset, size in inputs if datatype == BYTES]
        call = Call(fixed, texts, outputs, end, rows)
        if body is message:
            self._calls[message] = call
        return call

    def _answer(self, reply: list[Any], end: int) -> None:
        message = orjson.dumps(reply)
        if len(message) > MESSAGE_BYTES:
            os.pwrite(self._mapping.fd, message, end)
            message = b"@%d,%d" % (end, len(message))
        self._sock.send(message)


def _open_waits() -> int:
    """This thread's scheduler statistics; -1 where the kernel keeps none."""
    try:
        return os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _waited(fd: int) -> int:
    """Nanoseconds that this thread was ready to run but had no core (proc(5), second field)."""
    if fd < 0:
        return 0
    return int(os.pread(fd, 96, 0).split()[1])


_SOURCE = re.compile(
    r"(?:/[\w.@+~/-]+/)?[\w.]+\.(?:cc|h|cpp|hpp):\d+ "
    r"(?:(?:[\w:<>*&~,]+ )*[\w:~<>]*::[\w~<>]+\([^\n]*?\)(?: const)?(?: \[with [^\]]*\])? |operator\(\) |\w+ )?"
)
"""A place in the runtime's source and the function there, as its messages quote them."""
_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_PATH = re.compile(r"(?<![\w.])/(?:[\w.@+~-]+/)+")


def cleaned(text: str) -> str:
    """A runtime's message without source files, C++ signatures and folders: what a caller may see."""
    text = _PREFIX.sub("", text.strip())
    text = _SOURCE.sub("", text)
    return _PATH.sub("", text)[:2000]


def _explained(error: Exception) -> tuple[str, str]:
    if isinstance(error, InvalidRequest):
        return "InvalidRequest", str(error)
    if isinstance(error, MemoryError) or is_memory(str(error)):
        return "OutOfMemory", cleaned(str(error) or "memory ran out")
    return "ModelFailed", cleaned(str(error) or type(error).__name__)


def is_memory(text: str) -> bool:
    lowered = text.lower()
    return any(word in lowered for word in ("bad_alloc", "bad allocation", "failed to allocate", "allocate memory", "out of memory"))
