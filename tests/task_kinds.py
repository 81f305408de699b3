"""Functions that tests/test_task.py runs in task children, named as 'tests.task_kinds:NAME'."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from optimizers.base import Budget, NotApplicable, Progress, Rejected


def echo(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    print("a library that prints to stdout must not spoil the answer")
    os.system("echo nor must a program")
    for i in range(3):
        budget.on_progress(Progress("echo", f"step {i}", (i + 1) / 3, {"i": i}))
        time.sleep(0.15)
    return {
        "request": request,
        "threads": budget.threads,
        "seed": budget.seed,
        "scratch": budget.scratch,
        "nan": float("nan"),
        "path": Path("x"),
    }


def _autogroup() -> str:
    """Name and weight of the session's group, where the kernel has such groups."""
    path = Path("/proc/self/autogroup")
    return path.read_text() if path.exists() else ""


def surroundings(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    return {
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "scheduler": os.sched_getscheduler(0),
        "autogroup": _autogroup(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "omp": os.environ["OMP_NUM_THREADS"],
        "oom": int(Path("/proc/self/oom_score_adj").read_text()),
        "settings": [name for name in os.environ if name.startswith("HONE_")],
        "stdin": sys.stdin.read(),
        "first_on_path": sys.path[0],
    }


def raises(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    errors = {"NotApplicable": NotApplicable, "Rejected": Rejected, "ValueError": ValueError, "MemoryError": MemoryError}
    raise errors[request["error"]](request["text"])


def crashes(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    sys.stderr.write("last words\n")
    sys.stderr.flush()
    if request["how"] == "segfault":
        ctypes.string_at(0)
    if request["how"] == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def sleeps(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """Starts a grandchild, writes both process ids to request['pids'] and sleeps; obeys cancelling unless told to be deaf."""
    grandchild = subprocess.Popen(["sleep", "600"])
    Path(request["pids"]).write_text(f"{os.getpid()} {grandchild.pid}")
    (Path(budget.scratch) / "half-built").write_text("x")
    while True:
        time.sleep(0.02)
        if not request.get("deaf"):
            budget.tick("sleeps", "sleeping", 0.5)


def takes_memory(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    return {"taken": len(bytearray(request["bytes"]))}


def spins(request: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """Uses so many CPU seconds itself, and as many in a child."""
    code = f"import time\nwhile time.process_time() < {request['seconds']}: pass"
    exec(code)
    subprocess.run([sys.executable, "-c", code], check=True)
    return {}
