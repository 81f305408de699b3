"""The child's side of optimizers.task: take one request from stdin, bound oneself, do it, answer in JSON lines.

Library output cannot mix with the answer: stdout is moved away and file descriptor 1 is made stderr before anything is imported.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import importlib
import json
import math
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

from optimizers.base import Budget, Cancelled, NotApplicable, Progress, Rejected
from optimizers.task import KINDS, Failure, TaskLimits, lower, policy_of

PROGRESS_EVERY_S: Final = 0.1
_PR_SET_PDEATHSIG: Final = 1


def main() -> int:
    control, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    out = os.fdopen(answers, "w", encoding="utf-8")

    def say(**line: Any) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    message = json.loads(_first_line(control))
    limits = TaskLimits(**{**message["limits"], "cpus": tuple(message["limits"].get("cpus", ()))})
    asked_to_stop = threading.Event()
    if message.get("watched"):
        signal.signal(signal.SIGUSR1, lambda *_: asked_to_stop.set())
        _start_guardian(control, answers)
    try:
        apply_limits(limits)
        result = plain(_function(message["kind"])(message["request"], _budget(limits, asked_to_stop, say)))
        say(result=result, cpu_s=_spent_s())
    except Exception as error:  # noqa: BLE001  the boundary of the process: whatever went wrong is the answer
        if not isinstance(error, NotApplicable | Rejected | Cancelled):
            traceback.print_exc()
        say(error=_text(error, limits), kind=_failure(error, asked_to_stop), cpu_s=_spent_s())
    sys.stderr.flush()
    os._exit(0)  # threads of native libraries have nothing left to say


def _spent_s() -> float:
    """CPU seconds of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return round(sum(one.ru_utime + one.ru_stime for one in used), 3)


def _first_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (block := os.read(descriptor, 1 << 16)):
        line += block
    return line


def apply_limits(limits: TaskLimits) -> None:
    """Bound this very process: priority, cores, memory, and that it is the first to go when the machine's memory ends."""
    if limits.cpus:
        os.sched_setaffinity(0, limits.cpus)
    os.sched_setscheduler(0, policy_of(limits), os.sched_param(0))
    lower(os.getpid(), limits.nice)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(limits.oom_score_adj))
    except OSError:
        pass  # a container may forbid it; everything else still holds


def _function(kind: str) -> Callable[[dict[str, Any], Budget], Any]:
    module, _, name = KINDS.get(kind, kind).partition(":")
    if not name:
        raise Rejected(f"no task of kind {kind!r}; there are {', '.join(sorted(KINDS))}")
    function: Callable[[dict[str, Any], Budget], Any] = getattr(importlib.import_module(module), name)
    return function


def _budget(limits: TaskLimits, asked_to_stop: threading.Event, say: Callable[..., None]) -> Budget:
    last = -math.inf

    def report(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_EVERY_S or progress.share >= 1:
            last = now
            say(progress=plain(progress))

    return Budget(
        seconds=limits.seconds, threads=limits.threads, device=limits.device, memory_bytes=limits.memory_bytes, seed=limits.seed,
        scratch=limits.scratch, on_progress=report, cancelled=asked_to_stop.is_set,
    )  # fmt: skip


def _start_guardian(control: int, answers: int) -> None:
    """Fork a process that passes on a cancel and, when the parent is gone, kills the whole group.

    Not a thread: native code may hold the interpreter's lock for ever. Not the kernel's parent-death signal alone: it misses descendants.
    """
    if os.getpid() != os.getsid(0):
        os.setsid()
    child = os.getpid()
    if os.fork():
        os.close(control)
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for descriptor in (answers, 1, 2):
        os.close(descriptor)
    while said := os.read(control, 64):
        if b"cancel" in said and os.getppid() == child:
            os.kill(child, signal.SIGUSR1)
    os.killpg(child, signal.SIGKILL)
    os._exit(0)


def _failure(error: Exception, asked_to_stop: threading.Event) -> Failure:
    match error:
        case NotApplicable():
            return Failure.NOT_APPLICABLE
        case Rejected():
            return Failure.REJECTED
        case Cancelled():
            return Failure.CANCELLED if asked_to_stop.is_set() else Failure.TIMEOUT
    return Failure.OUT_OF_MEMORY if is_out_of_memory(error) else Failure.ERROR


def _text(error: Exception, limits: TaskLimits) -> str:
    if isinstance(error, NotApplicable | Rejected | Cancelled):
        return str(error)
    if is_out_of_memory(error) and limits.memory_bytes:
        return f"needs more memory than its bound of {limits.memory_bytes / 2**20:.0f} MiB ({_brief(error)})"
    return _brief(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Native libraries raise errors of their own when they get no memory; their text is all there is to tell them by."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return any(
        sign in text
        for sign in (
            "bad_alloc",
            "out of memory",
            "failed to allocate memory",
            "bad allocation",
            "not enough memory",
            "cannot allocate memory",
            "can't allocate memory",
            "array is too big",
            "maximum allowed dimension exceeded",
        )
    )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"


def plain(value: Any) -> Any:
    """`value` as JSON has it: dataclasses and arrays unfolded, enums by value, what is not finite as null."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
