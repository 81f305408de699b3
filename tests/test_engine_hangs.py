"""A runner that makes no progress is replaced; one that is slow, waits or reads is left alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from app.errors import Quarantined, RunnerLost
from app.serving.watch import Judgement, Patience, Sight, Usual, judge, seen
from tests import models
from tests.engine_load import ONES, short
from tests.engines import Start, anyio_backend, forkserver, request, start, until, values

__all__ = ["anyio_backend", "forkserver", "start"]
pytestmark = pytest.mark.anyio


async def test_a_stopped_runner_is_replaced_and_its_caller_answered(start: Start, tmp_path: Path) -> None:
    engine = await start(models.scaled(tmp_path / "m.onnx"))
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)
    began = monotonic()
    assert values(await engine.infer(request(x=ONES))).tolist() == [[2, 2, 2, 2]]
    assert monotonic() - began < 10
    assert engine.pid != pid
    assert "was stopped from outside (state T)" in engine.deaths[0].reason
    assert engine.distinct_killers == 0


async def test_cpu_time_far_beyond_the_worst_of_its_kind_is_a_hang_and_its_input_is_quarantined(start: Start, tmp_path: Path) -> None:
    patience = Patience(cpu_floor_s=0.5, cpu_times=5)
    engine = await start(models.endless(tmp_path / "m.onnx"), patience=patience)
    for _ in range(6):
        await engine.infer(short())
    with pytest.raises((RunnerLost, Quarantined)):
        await engine.infer(request(x=np.ones(2, np.float32), n=np.array([1 << 50])))
    await until(lambda: engine.distinct_killers == 1 and engine.alive, 180)
    assert "CPU seconds on a batch whose kind took" in engine.deaths[0].reason
    assert values(await engine.infer(short())).tolist() == [1, 1]


async def test_a_long_call_that_makes_progress_is_left_alone(start: Start, tmp_path: Path) -> None:
    engine = await start(models.endless(tmp_path / "m.onnx"), patience=Patience(stalled_s=0.3, stalled_first_s=0.3))
    pid = engine.pid
    began = monotonic()
    while monotonic() - began < 2.5:
        await engine.infer(request(x=np.ones(2, np.float32), n=np.array([100_000])))
    assert engine.pid == pid


KNOWN = Usual(True, worst_wall_s=0.1, worst_cpu_s=0.05)


def watched(states: str, cpu_step_s: float = 0.0, usual: Usual = KNOWN, step_s: float = 0.25) -> Judgement | None:
    """The judgement after looking at a thread in these states, one look each `step_s`."""
    patience, sight, now, cpu_s = Patience(), None, 0.0, 10.0
    for state in states:
        sight = seen(sight, cpu_s, state, 1, now)
        judgement = judge(sight, usual, patience, now)
        if judgement is not None:
            return judgement
        now, cpu_s = now + step_s, cpu_s + cpu_step_s
    return None


def test_asleep_without_progress_is_a_hang() -> None:
    found = watched("S" * 8)
    assert found is not None
    assert found.own_fault
    assert "no CPU progress for 1.0 s" in found.reason


def test_waiting_for_a_core_or_throttled_is_not() -> None:
    assert watched("R" * 400) is None
    assert watched("SR" * 200) is None


def test_progress_however_slow_is_not() -> None:
    assert watched("S" * 400, cpu_step_s=0.0001) is None


def test_a_kind_that_is_known_to_sleep_is_given_its_time() -> None:
    assert watched("S" * 8, usual=Usual(True, worst_wall_s=5.0)) is None
    assert watched("S" * 80, usual=Usual(True, worst_wall_s=5.0)) is not None


def test_the_first_of_a_kind_is_given_more_time() -> None:
    assert watched("S" * 8, usual=Usual()) is None
    assert watched("S" * 80, usual=Usual()) is not None


def test_stopped_is_somebody_else_s_doing() -> None:
    found = watched("RRRR" + "T" * 8)
    assert found is not None
    assert not found.own_fault


def test_reading_from_a_slow_disk_is_not_a_hang() -> None:
    assert watched("D" * 40) is None


def test_cpu_time_counts_from_the_first_look_and_is_shared_by_those_who_use_it() -> None:
    sight: Sight | None = None
    for turn in range(11):
        sight = seen(sight, 100.0 + turn, "R", 2, float(turn))
    assert sight is not None
    assert sight.used_s == pytest.approx(5.0)
