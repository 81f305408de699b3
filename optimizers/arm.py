"""One arm of a comparison: a fresh process that holds one session (or PyTorch module), does what it is told over a pipe, and times itself.

A candidate that crashes, hangs or leaks takes down its arm and not the judge. This is the child's side; `measure.Arm` is the parent's.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any, Final

from optimizers.instructions import Counter
from optimizers.session import TYPES, Feeds, Settings, TensorInfo, call, from_bfloat16, has_bfloat16, open_session, runnable, tensors
from optimizers.torch_module import TorchMissing, TorchModule, TorchSource, import_torch

_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Opened:
    """What a session says of itself, and the seconds it took to open."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    load_s: float


@dataclass(frozen=True)
class Slice:
    """A few calls in a row. Seconds per call; `cpu_s` is the calling thread's with one thread, else the process's.

    `ran_s` and `waited_s` are the kernel's account of the threads over the slice: on a core, and runnable but waiting for one.
    `instructions` are the calling thread's, a number for each call; empty where they are not counted, or other threads help.
    """

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    elapsed_s: float
    ran_s: float
    waited_s: float
    instructions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Load:
    """A slice at saturation: all instances calling back to back."""

    calls_per_s: float
    elapsed_s: float
    cpu_s: float
    ran_s: float
    waited_s: float


@dataclass
class Worker:
    """What runs the model, and the inputs kept for timing."""

    run: Callable[[Feeds], list[Any]] | None = None
    settings: Settings = field(default_factory=Settings)
    kept: dict[int, Feeds] = field(default_factory=dict)
    pool: tuple[int, ...] = ()
    """The threads that the session made to help the calling one."""
    counter: Counter | None = None
    """Of the instructions of the thread that opened the session."""

    def open(self, path: str, settings: Settings, source: TorchSource | None = None) -> Opened:
        before, started = _threads(), time.perf_counter()
        run, inputs, outputs = _onnx(path, settings) if source is None else _torch(path, settings, source)
        self.pool = tuple(sorted(_threads() - before))
        self.run, self.settings = run, settings
        self.counter = self.counter or Counter.or_none()
        return Opened(inputs, outputs, time.perf_counter() - started)

    def pin(self, cpus: tuple[int, ...]) -> None:
        for thread in _threads():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cpus)

    def spread(self, cpus: tuple[int, ...]) -> None:
        """The calling thread and those that help it each on a core of its own, where there are as many."""
        self.pin(cpus)
        threads = (threading.get_native_id(), *self.pool)
        for thread, cpu in zip(threads, cpus, strict=False) if len(threads) <= len(cpus) else ():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, (cpu,))

    def call(self, batches: list[Feeds]) -> list[list[Any]]:
        return [self._run(runnable(feeds)) for feeds in batches]

    def keep(self, key: int, feeds: Feeds) -> None:
        self.kept[key] = runnable(feeds)

    def time(self, key: int, calls: int, warm: int, pause_s: float) -> Slice:
        feeds = self.kept[key]
        for _ in range(warm):
            self._run(feeds)
        alone = self.settings.intra_op_threads == 1
        clock = time.thread_time if alone else time.process_time
        counted = self.counter.read if alone and self.counter is not None else lambda: None
        wall: list[float] = []
        cpu: list[float] = []
        instructions: list[int] = []
        (ran, waited), begun = scheduling(), time.perf_counter()
        for _ in range(calls):
            if pause_s:
                time.sleep(pause_s)
            before = counted()
            wall_from, cpu_from = time.perf_counter(), clock()
            self._run(feeds)
            cpu.append(clock() - cpu_from)
            wall.append(time.perf_counter() - wall_from)
            if before is not None and (after := counted()) is not None:
                instructions.append(after - before)
        (ran_to, waited_to), ended = scheduling(), time.perf_counter()
        return Slice(tuple(wall), tuple(cpu), ended - begun, ran_to - ran, waited_to - waited, tuple(instructions))

    def saturate(self, key: int, seconds: float) -> Load:
        """All instances call back to back for `seconds`. Threads stay until the kernel's account of them was read."""
        feeds, count = self.kept[key], self.settings.instances
        rates, until = [0.0] * count, math.inf
        started, finished, read = threading.Barrier(count + 1), threading.Barrier(count + 1), threading.Event()

        def loop(index: int) -> None:
            self._run(feeds)
            started.wait()
            begun, calls = time.perf_counter(), 0
            while not calls or time.perf_counter() < until:
                self._run(feeds)
                calls += 1
            rates[index] = calls / (time.perf_counter() - begun)
            finished.wait()
            read.wait()

        threads = [threading.Thread(target=loop, args=(i,), daemon=True) for i in range(count)]
        for thread in threads:
            thread.start()
        started.wait()
        begun, cpu, (ran, waited) = time.perf_counter(), time.process_time(), scheduling()
        until = begun + seconds
        finished.wait()
        elapsed, cpu_to, (ran_to, waited_to) = time.perf_counter() - begun, time.process_time(), scheduling()
        read.set()
        for thread in threads:
            thread.join()
        return Load(sum(rates), elapsed, cpu_to - cpu, ran_to - ran, waited_to - waited)

    def _run(self, feeds: Feeds) -> list[Any]:
        assert self.run is not None, "open comes first"
        return self.run(feeds)


_Runnable = tuple[Callable[[Feeds], list[Any]], tuple[TensorInfo, ...], tuple[TensorInfo, ...]]


def _onnx(path: str, settings: Settings) -> _Runnable:
    session = open_session(path, settings)
    inputs, outputs = tensors(session.get_inputs()), tensors(session.get_outputs())
    if has_bfloat16(session):
        return lambda feeds: call(session, feeds), inputs, outputs
    return lambda feeds: list(session.run(None, feeds)), inputs, outputs


def _torch(path: str, settings: Settings, source: TorchSource) -> _Runnable:
    """In ONNX Runtime's terms, so that it may be held to a session: types and shapes as declared; bfloat16 comes out as float32."""
    module = TorchModule(source, path, settings.intra_op_threads)
    inputs = _declared(source.inputs, source.input_shapes)
    outputs = _declared(source.outputs, source.output_shapes)
    halves = {name for name, datatype in source.outputs if datatype == "BF16"}

    def run(feeds: Feeds) -> list[Any]:
        return [from_bfloat16(value) if name in halves else value for name, value in module.run(feeds).items()]

    return run, inputs, outputs


def _declared(given: tuple[tuple[str, str], ...], shapes: tuple[tuple[int, ...], ...]) -> tuple[TensorInfo, ...]:
    """Without shapes nothing is said of them."""
    sizes = [tuple(size if size >= 0 else None for size in shape) for shape in shapes] or [()] * len(given)
    return tuple(TensorInfo(name, TYPES.get(datatype, datatype), shape) for (name, datatype), shape in zip(given, sizes, strict=True))


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def scheduling(pid: int | str = "self") -> tuple[float, float]:
    """Seconds that a process's threads ran, and waited for a core while they could have run; zeros where the kernel does not say."""
    ran = waited = 0
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return 0.0, 0.0
    for task in tasks:
        try:
            fields = (task / "schedstat").read_text().split()
        except OSError:
            continue
        ran, waited = ran + int(fields[0]), waited + int(fields[1])
    return ran / 1e9, waited / 1e9


def serve(connection: Connection) -> None:
    """Answer requests (name, arguments) until the other side closes."""
    worker = Worker()
    actions: dict[str, Callable[..., Any]] = {
        name: getattr(worker, name) for name in ("open", "pin", "spread", "call", "keep", "time", "saturate")
    }  # fmt: skip
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        if name == "twin":
            connection = _forked(connection)
            continue
        try:
            answer = actions[name](*arguments)
        except Exception as error:  # noqa: BLE001  the boundary of the process: the other side decides what an error means
            connection.send((False, f"{type(error).__name__}: {error}"))
        else:
            connection.send((True, answer))


def _forked(connection: Connection) -> Connection:
    """Become two processes, before anything is open: one stays on `connection`, the other serves on the descriptor that comes through it.

    torch is there by then; where it is not installed, whoever opens a module says so.
    """
    fd = recv_handle(connection)
    with contextlib.suppress(TorchMissing):
        import_torch()
    if pid := os.fork():
        os.close(fd)
        connection.send((True, pid))
        return connection
    _end_with_parent()
    connection.close()
    return Connection(fd)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    """Serve on the file descriptor named by the first argument, until the parent closes it or dies."""
    _end_with_parent()
    serve(Connection(int(sys.argv[1])))
    os._exit(0)
