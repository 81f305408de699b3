"""Counting instructions: by the kernel's own clock of a thread, which every machine has, and by the hardware where there is such a counter."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from optimizers import instructions
from optimizers.arm import Worker
from optimizers.instructions import SOFTWARE, TASK_CLOCK, Counter
from optimizers.measure import Arm, compare
from optimizers.session import Feeds, Settings
from tests.judged_models import deep

QUIET_THREAD: Final = Settings().one_quiet_thread()


@pytest.fixture
def clock() -> Counter:
    try:
        return Counter(SOFTWARE, TASK_CLOCK)
    except OSError as refused:
        pytest.skip(f"perf_event_open is not allowed here: {refused}")


def work(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def row() -> Feeds:
    return {"x": np.ones((4, 128), np.float32)}


def test_a_counter_counts_its_own_thread_and_stands_while_it_sleeps(clock: Counter) -> None:
    before, began = clock.read(), time.thread_time()
    work(0.05)
    worked, took = clock.read(), time.thread_time() - began
    time.sleep(0.05)
    other = threading.Thread(target=work, args=(0.05,))
    other.start()
    other.join()
    after = clock.read()
    clock.close()
    assert before is not None and worked is not None and after is not None
    assert 0.9 * took < (worked - before) / 1e9 < 2 * took, "the hypervisor may have taken some of it, which thread_time leaves out"
    assert (after - worked) / 1e9 < 0.02, "neither sleep nor another thread's work"


def test_each_call_has_its_number_where_one_thread_does_the_work(tmp_path: Path, clock: Counter) -> None:
    worker = Worker(counter=clock)
    worker.open(str(deep(tmp_path / "m.onnx", 20)), QUIET_THREAD)
    worker.keep(0, row())
    piece = worker.time(0, 20, 1, 0.0)
    assert len(piece.instructions) == 20
    assert sum(piece.instructions) / 1e9 == pytest.approx(sum(piece.cpu_s), rel=0.3)
    worker.settings = Settings(intra_op_threads=2)
    assert worker.time(0, 2, 1, 0.0).instructions == (), "helpers do part of the work"


def test_what_shared_the_hardware_is_no_number(clock: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "read", lambda fd, size: b"".join(number.to_bytes(8, "little") for number in (100, 50, 25)))
    assert clock.read() is None


def test_under_a_filter_of_system_calls_it_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's would end the process."""
    monkeypatch.setattr(instructions, "_filtered", lambda: True)
    monkeypatch.setattr(Counter, "__init__", lambda self: pytest.fail("tried"))
    assert Counter.or_none() is None


def test_two_files_are_compared_by_instructions_where_they_are_counted(tmp_path: Path) -> None:
    shallow, deeper = deep(tmp_path / "shallow.onnx", 20), deep(tmp_path / "deep.onnx", 40)
    with Arm(shallow, QUIET_THREAD) as first, Arm(deeper, QUIET_THREAD) as other:
        found = compare(first, other, row(), 4, seconds=4)
    if Counter.or_none() is None:
        assert found.instructions is None and found.to_json()["instructions_ratio"] is None
        return
    assert found.instructions is not None and math.isfinite(found.instructions.high)
    assert 1.5 < found.instructions.low <= found.instructions.high < 2.1
    assert found.instructions.high - found.instructions.low < 0.02
