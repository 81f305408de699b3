"""How cores are shared out within one version: a call that is alone gets all of them in a second session, with company each keeps to one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain import RuntimeSettings
from app.errors import Conflict
from app.serving.engine import BatchReport, Engine
from app.serving.lone import LONE_CALLS, LONE_WITHIN_S, LoneCalls
from app.serving.runners import Instance
from tests import models
from tests.engines import Start, anyio_backend, forkserver, request, start, until, values

__all__ = ["anyio_backend", "forkserver", "start"]
pytestmark = pytest.mark.anyio

ONES = np.ones((1, 4), np.float32)


def lone(engine: Engine) -> Instance | None:
    return engine._dispatcher._lone


def test_enough_calls_within_the_time_are_said_once_and_older_ones_do_not_count() -> None:
    calls = LoneCalls()
    assert not any(calls.another(float(at)) for at in range(LONE_CALLS))
    late = LONE_WITHIN_S + 1
    assert not calls.another(late), "it began too long ago"
    said = [calls.another(late + 1) for _ in range(2 * LONE_CALLS)]
    assert said.index(True) == LONE_CALLS - 1 and sum(said) == 1


async def where(engine: Engine) -> Instance:
    """The instance on which a call alone runs; the model must take some milliseconds, so that it can be seen."""
    task = asyncio.create_task(engine.infer(request(x=ONES[0])))
    await until(lambda: engine._dispatcher.busy == 1)
    (running,) = [instance for instance, _ in engine._dispatcher.in_flight()]
    await task
    return running


async def ready(engine: Engine, row: np.ndarray[Any, Any] = ONES) -> Instance:
    """Call alone until the second session is there."""
    for _ in range(LONE_CALLS + 2):
        await engine.infer(request(x=row))
    await until(lambda: lone(engine) is not None and lone(engine).tid > 0)  # type: ignore[union-attr]
    found = lone(engine)
    assert found is not None
    return found


async def test_calls_in_a_row_run_on_the_second_session_from_the_second_on(start: Start, tmp_path: Path) -> None:
    engine = await start(models.endless(tmp_path / "m.onnx", 20_000), instances=2, lone_threads=2, spin_duration_us=100)
    instance = await ready(engine, ONES[0])
    assert instance.threads == 2
    assert [await where(engine) for _ in range(5)] == [instance] * 5
    await asyncio.gather(*(engine.infer(request(x=ONES[0])) for _ in range(3)))
    assert (await where(engine)).threads == 1, "the one before it had company"
    assert await where(engine) is instance


async def test_it_is_opened_only_for_those_who_call_alone(start: Start, tmp_path: Path) -> None:
    engine = await start(models.scaled(tmp_path / "m.onnx"), instances=2, lone_threads=2, batch_limit=1)
    for _ in range(LONE_CALLS):
        await asyncio.gather(*(engine.infer(request(x=ONES)) for _ in range(4)))
    await asyncio.sleep(0.3)
    assert lone(engine) is None
    await ready(engine)


async def test_requests_with_company_keep_to_the_first_session(start: Start, tmp_path: Path) -> None:
    engine = await start(models.endless(tmp_path / "m.onnx", 20_000), instances=2, lone_threads=2, batch_limit=1)
    instance = await ready(engine, ONES[0])
    tasks = [asyncio.create_task(engine.infer(request(x=ONES[0]))) for _ in range(8)]
    await until(lambda: engine._dispatcher.busy == 2)
    while engine.inflight:
        assert engine._dispatcher.busy <= 2 and instance.batch is None
        await asyncio.sleep(0.001)
    await asyncio.gather(*tasks)


async def test_both_sessions_say_the_same(start: Start, tmp_path: Path) -> None:
    engine = await start(models.scaled(tmp_path / "m.onnx"), instances=2, lone_threads=2)
    first = values(await engine.infer(request(x=ONES)))
    await ready(engine)
    for _ in range(20):
        assert np.allclose(values(await engine.infer(request(x=ONES))), first)


async def test_a_caller_that_arrives_during_a_lone_call_does_not_wait_for_it(start: Start, tmp_path: Path) -> None:
    engine = await start(models.endless(tmp_path / "slow.onnx", 60_000), instances=1, lone_threads=2)
    await ready(engine, ONES[0])
    await engine.infer(request(x=ONES[0]))
    alone = asyncio.create_task(engine.infer(request(x=ONES[0])))
    await until(lambda: lone(engine).batch is not None)  # type: ignore[union-attr]
    second = asyncio.create_task(engine.infer(request(x=ONES[0])))
    await until(lambda: engine._dispatcher.busy == 2)
    await asyncio.gather(alone, second)


async def test_there_is_none_where_none_is_wanted_or_no_room_is_left(start: Start, tmp_path: Path) -> None:
    path = models.scaled(tmp_path / "m.onnx")
    plain = await start(path, instances=2)
    poor = await start(path, lone_threads=2, spec={"second_session": False})
    whole = await start(path, intra_op_threads=2, lone_threads=2)
    for engine in (plain, poor, whole):
        for _ in range(LONE_CALLS + 5):
            await engine.infer(request(x=ONES))
        await asyncio.sleep(0.3)
        assert lone(engine) is None and len(os.listdir(f"/proc/{engine.pid}/task")) <= 4


async def test_a_runner_that_is_replaced_while_the_session_opens_leaves_none_behind(start: Start, tmp_path: Path) -> None:
    engine = await start(models.scaled(tmp_path / "m.onnx"), instances=2, lone_threads=2)
    pid = engine.pid
    for _ in range(LONE_CALLS + 2):
        await engine.infer(request(x=ONES))
    os.kill(pid, 9)
    await until(lambda: engine.alive and engine.pid != pid)
    assert lone(engine) is None
    for _ in range(4):
        await engine.infer(request(x=ONES))
    await ready(engine)


async def test_it_comes_back_with_a_new_runner_and_leaves_with_its_instances(start: Start, tmp_path: Path) -> None:
    engine = await start(models.scaled(tmp_path / "m.onnx"), instances=2, lone_threads=2)
    await ready(engine)
    pid = engine.pid
    os.kill(pid, 9)
    await until(lambda: engine.alive and engine.pid != pid)
    await ready(engine)
    engine.apply(RuntimeSettings(instances=1, lone_threads=2))
    for _ in range(5):
        await engine.infer(request(x=ONES))
    assert lone(engine) is not None
    with pytest.raises(Conflict):
        engine.apply(RuntimeSettings(instances=1))


@pytest.mark.parametrize(("instances", "most"), [(1, 8), (2, 4)])
async def test_what_waits_is_shared_out_where_calls_are_long(start: Start, tmp_path: Path, instances: int, most: int) -> None:
    reports: list[BatchReport] = []
    engine = await start(models.heavy(tmp_path / "m.onnx", width=2048), instances=instances, batch_limit=16, observer=reports.append)
    row = np.ones((1, 2048), np.float32)
    for _ in range(3):
        await engine.infer(request(x=row))
    reports.clear()
    await asyncio.gather(*(engine.infer(request(x=row)) for _ in range(8)))
    assert sum(report.rows for report in reports) == 8
    assert max(report.rows for report in reports) == most


async def test_short_calls_share_a_batch_all_the_same(start: Start, tmp_path: Path) -> None:
    reports: list[BatchReport] = []
    engine = await start(models.scaled(tmp_path / "m.onnx"), instances=2, batch_limit=16, observer=reports.append)
    engine._dispatcher.rates.learn(1, 0.0001, 0.0001, 0.0)
    await asyncio.gather(*(engine.infer(request(x=ONES)) for _ in range(8)))
    assert [report.rows for report in reports] == [8]
