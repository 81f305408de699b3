"""Heavy one-off work in a child process: `run_task` starts `python -m optimizers.task`, bounds it and brings back its answer.

The child gets one JSON line on stdin and answers in JSON lines: {"progress": …} any number of times, then {"result": …, "cpu_s": …} or
{"error": TEXT, "kind": FAILURE, "cpu_s": …}. This module knows nothing of what the kinds do; the child's side is optimizers.task_child.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from optimizers.base import Progress
from optimizers.host import spare_ratio

KINDS: Final[dict[str, str]] = {
    "inspect": "optimizers.inspect:run",
    "optimize": "optimizers.recipe:run",
    "golden": "optimizers.golden:golden_outputs",
    "quick_check": "optimizers.golden:quick_check",
    "tune": "optimizers.tune:run",
    "verify": "optimizers.judge:run",
    "blame": "optimizers.blame:run",
    "unpack": "optimizers.packed:run",
    "samples": "optimizers.sample_function:run",
}
"""Kind of task -> 'module:function'. The function takes (request: dict, budget: Budget) and returns a JSON-able dict or dataclass."""

CANCEL_GRACE_S: Final = 5.0
TIME_GRACE_S: Final = 3.0
STDERR_KEPT: Final = 8192
LINE_LIMIT: Final = 1 << 26
REAP_S: Final = 2.0
"""So long a killed process may take until it is gone."""
LEAST_SPARE: Final = 0.1
"""Share of the cores that must be free for a task to run only where nobody else wants them."""
_SCHEDULERS: Final = {"other": os.SCHED_OTHER, "batch": os.SCHED_BATCH, "idle": os.SCHED_IDLE}
_ROOT: Final = Path(__file__).resolve().parent.parent


class Failure(StrEnum):
    """Why a task brought no result."""

    NOT_APPLICABLE = "NotApplicable"
    REJECTED = "Rejected"
    CANCELLED = "Cancelled"
    TIMEOUT = "Timeout"
    OUT_OF_MEMORY = "OutOfMemory"
    DIED = "Died"
    ERROR = "Error"


class TaskFailed(Exception):
    """A task ended without a result. `stderr` is the tail of what the child wrote there (with its traceback, where there is one)."""

    def __init__(self, kind: Failure, text: str, stderr: str = "") -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text
        self.stderr = stderr


@dataclass(frozen=True, slots=True)
class TaskLimits:
    """Bounds of one task child. `memory_bytes` bounds its private writable memory (RLIMIT_DATA), 0 is no bound.

    `scheduler` is 'other', 'batch', 'idle' (runs only where nobody else wants the core) or 'spare': idle where cores have time to spare when
    it starts, else other, since there is no way back from idle without privileges, and on a full host nothing would ever come of it.
    `cpus` empty: the parent's.
    `scratch` is the folder in which a temporary one is made for the task; empty is the system's.
    """

    seconds: float = 600.0
    threads: int = 1
    device: str = "cpu"
    memory_bytes: int = 0
    nice: int = 19
    scheduler: str = "spare"
    cpus: tuple[int, ...] = ()
    oom_score_adj: int = 900
    scratch: str = ""
    seed: int = 0


async def run_task(
    kind: str,
    request: Mapping[str, Any],
    limits: TaskLimits = TaskLimits(),
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: asyncio.Event | None = None,
    on_spent: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Run one task in a child of its own session and return its result; raise TaskFailed when there is none.

    `on_spent` is told once, at the end, how many CPU seconds it took; for a child that was killed, how many seconds it ran. When `cancelled` is set the child is asked to stop and killed after a grace time. Whatever happens (this coroutine cancelled, time
    over, this process killed) the child and its descendants end, and its scratch folder is removed (but for a killed parent).
    """
    scratch = tempfile.mkdtemp(prefix="hone-task-", dir=limits.scratch or None)
    began = time.monotonic()
    answer: dict[str, Any] | None = None
    try:
        if limits.scheduler == "spare":
            limits = replace(limits, scheduler=await asyncio.to_thread(spare_or_other, limits.cpus))
        process = await _start(limits)
        try:
            async with asyncio.timeout(limits.seconds + TIME_GRACE_S):
                answer = await _converse(process, _message(kind, request, limits, scratch), on_progress, cancelled)
            if "result" in answer:
                return dict(answer["result"])
            raise TaskFailed(Failure(answer["kind"]), str(answer["error"]), answer["stderr"])
        except TimeoutError:
            raise TaskFailed(Failure.TIMEOUT, f"{kind}: not done within {limits.seconds:.0f} s, and ended") from None
        finally:
            await _end(process)
    finally:
        if on_spent is not None:
            on_spent(answer["cpu_s"] if answer is not None else time.monotonic() - began)
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)


def run_task_sync(
    kind: str,
    request: Mapping[str, Any],
    limits: TaskLimits = TaskLimits(),
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """`run_task` for callers without an event loop; `cancelled` is asked ten times a second."""

    async def run() -> dict[str, Any]:
        stop = asyncio.Event()
        asking = asyncio.create_task(_ask(cancelled, stop)) if cancelled else None
        try:
            return await run_task(kind, request, limits, on_progress, stop)
        finally:
            if asking:
                asking.cancel()

    return asyncio.run(run())


async def _ask(cancelled: Callable[[], bool], stop: asyncio.Event) -> None:
    while not cancelled():  # noqa: ASYNC110  a callable can only be asked
        await asyncio.sleep(0.1)
    stop.set()


def _message(kind: str, request: Mapping[str, Any], limits: TaskLimits, scratch: str) -> bytes:
    limit_values = {**asdict(limits), "scratch": scratch}
    return json.dumps({"kind": kind, "request": dict(request), "limits": limit_values, "watched": True}).encode() + b"\n"


async def _start(limits: TaskLimits) -> asyncio.subprocess.Process:
    """Thread counts must stand in the environment before the first numerics library is imported, so they are set here. The service's own
    settings, tokens and the journal's password among them, are no business of a child that runs other people's models and code."""
    policy, threads = policy_of(limits), str(max(1, limits.threads))
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")}
    environment = {**inherited, **dict.fromkeys(names, threads), "MALLOC_ARENA_MAX": "2", "PYTHONUNBUFFERED": "1"}
    environment.pop("ORT_INTRA_OP_NUM_THREADS", None)
    # -P and a path appended: neither the working folder nor ours may shadow the standard library.
    bootstrap = f"import sys; sys.path.append({str(_ROOT)!r}); from optimizers.task_child import main; sys.exit(main())"
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", bootstrap, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True, limit=LINE_LIMIT
    )  # fmt: skip
    with contextlib.suppress(OSError):
        lower(process.pid, limits.nice)  # from its first import on: an interpreter's start is felt by who is served beside it
        os.sched_setscheduler(process.pid, policy, os.sched_param(0))
    return process


def spare_or_other(cpus: Sequence[int] = ()) -> str:
    """The scheduler 'idle' where cores have time to spare, by a look of 0.2 s, else 'other'."""
    return "idle" if spare_ratio(affinity=cpus or None) >= LEAST_SPARE else "other"


def policy_of(limits: TaskLimits) -> int:
    """The kernel's number of a scheduler."""
    return _SCHEDULERS[spare_or_other(limits.cpus) if limits.scheduler == "spare" else limits.scheduler]


def lower(pid: int, nice: int) -> None:
    """Give a process that leads its own session a priority no higher than `nice`, and its session the weight that goes with it.

    Where the kernel shares cores by session (autogroups, sched(7)), a session's weight counts, not its processes'.
    """
    os.setpriority(os.PRIO_PROCESS, pid, max(nice, os.getpriority(os.PRIO_PROCESS, pid)))
    if os.getsid(pid) == pid:  # not a terminal's, in which others run
        with contextlib.suppress(OSError), open(f"/proc/{pid}/autogroup", "w") as group:
            group.write(str(nice))


async def _converse(
    process: asyncio.subprocess.Process,
    message: bytes,
    on_progress: Callable[[Progress], None] | None,
    cancelled: asyncio.Event | None,
) -> dict[str, Any]:
    assert process.stdout and process.stderr
    await _say(process, message)
    errors = asyncio.create_task(_tail(process.stderr))
    stopping = asyncio.create_task(_stop_when(cancelled, process)) if cancelled else None
    try:
        answer = await _answer(process.stdout, on_progress)
        if answer is None:
            code = await process.wait()
            _kill(process)
            raise TaskFailed(*_obituary(code, cancelled is not None and cancelled.is_set()), await errors)
        if "result" not in answer:
            _kill(process)
            answer["stderr"] = await errors
        return answer
    finally:
        both = [task for task in (errors, stopping) if task]
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _say(process: asyncio.subprocess.Process, message: bytes) -> None:
    """To a child that may be dead already: its exit status tells the rest."""
    assert process.stdin
    with contextlib.suppress(ConnectionError, RuntimeError):  # uvloop's word for a pipe that it has closed itself
        process.stdin.write(message)
        await process.stdin.drain()


async def _answer(lines: asyncio.StreamReader, on_progress: Callable[[Progress], None] | None) -> dict[str, Any] | None:
    """Read up to the last line: a result or an error. None when the child ended without one."""
    while line := await lines.readline():
        try:
            said = json.loads(line)
        except ValueError:
            return None  # cut off in mid-line: the child died while writing
        if "progress" not in said:
            return dict(said)
        if on_progress:
            on_progress(Progress(**said["progress"]))
    return None


async def _tail(stream: asyncio.StreamReader) -> str:
    kept = b""
    while block := await stream.read(65536):
        kept = (kept + block)[-STDERR_KEPT:]
    return kept.decode(errors="replace")


async def _stop_when(cancelled: asyncio.Event, process: asyncio.subprocess.Process) -> None:
    await cancelled.wait()
    await _say(process, b"cancel\n")
    await asyncio.sleep(CANCEL_GRACE_S)
    _kill(process)


def _obituary(code: int, cancelled: bool) -> tuple[Failure, str]:
    if cancelled:
        return Failure.CANCELLED, "cancelled; it did not stop by itself and was killed"
    if code == -signal.SIGKILL:
        return Failure.OUT_OF_MEMORY, "the task was killed (SIGKILL): most likely the kernel was out of memory"
    if code < 0:
        return Failure.DIED, f"the task was ended by {signal.Signals(-code).name}: native code crashed on this model"
    return Failure.DIED, f"the task ended with exit status {code} and without an answer"


def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill the child's whole group: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Nothing of the child is left afterwards: no process of its group, no pipe, no transport."""
    assert process.stdin and process.stdout and process.stderr
    _kill(process)
    process.stdin.close()
    await asyncio.gather(process.wait(), _tail(process.stdout), _tail(process.stderr))
    await _reap(process.pid)


async def _reap(group: int) -> None:
    """Where we are process 1 of a container, what the child left of its group (its guardian at least) is ours to bury."""
    until = time.monotonic() + REAP_S
    with contextlib.suppress(ChildProcessError):  # none is ours
        while time.monotonic() < until:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:  # noqa: ASYNC222  it does not wait
                await asyncio.sleep(0.01)


if __name__ == "__main__":
    from optimizers.task_child import main

    sys.exit(main())
