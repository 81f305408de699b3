"""Who keeps a core for how long: read back from the kernel, where it tells (Linux 6.12 and later)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optimizers.scheduling import SHORT_NS, ask_for_slices
from optimizers.task import TaskLimits, run_task_sync
from tests.models import scaled
from tests.running_server import ROOT, server
from tests.test_swap import children, command


def slice_ns(pid: int | str = "self") -> int:
    """0 where the kernel does not say."""
    try:
        lines = Path(f"/proc/{pid}/sched").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split(":")[1]) for line in lines if line.startswith("se.slice")), 0)


USUAL = slice_ns()
KERNEL = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
tells = pytest.mark.skipif(not USUAL or KERNEL < (6, 12), reason="this kernel does not tell of slices")


def test_asking_changes_neither_policy_nor_nice_value() -> None:
    code = (
        "import os; from optimizers.scheduling import *; os.nice(7); os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0));"
        "said = ask_for_slices(SHORT_NS); print(said, os.sched_getscheduler(0) == os.SCHED_BATCH, os.getpriority(os.PRIO_PROCESS, 0))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    assert said[1:] == ["True", "7"]


def test_real_time_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: os.SCHED_FIFO)
    assert not ask_for_slices(SHORT_NS)


@tells
def test_a_task_has_short_slices_and_its_parent_its_own() -> None:
    found = run_task_sync("tests.task_kinds:own_slice", {}, TaskLimits(30))
    assert found["slice_ns"] == SHORT_NS and slice_ns() == USUAL


@tells
def test_the_server_has_short_slices_and_runners_have_not(tmp_path: Path) -> None:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    with server(tmp_path) as running:
        running.ready("m")
        assert slice_ns(running.process.pid) == SHORT_NS
        below = [pid for child in children(running.process.pid) for pid in (child, *children(child))]
        runners = [pid for pid in below if Path(f"/proc/{pid}/comm").read_text().strip() == "hone-runner"]
        assert runners and all(slice_ns(pid) == USUAL for pid in runners), [command(pid) for pid in below]
