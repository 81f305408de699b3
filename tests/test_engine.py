"""One loaded version under use: batching, settings, deadlines, memory, its end, and that everything returns to zero."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from onnx import helper

from app.domain import OWN, RuntimeSettings
from app.errors import CannotMeetDeadline, Conflict, DeadlineExceeded, HoneError, ModelFailed, NotReady, QueueFull
from app.serving.engine import BatchReport
from tests import models
from tests.engine_load import ONES, busy, is_idle, short
from tests.engines import Start, anyio_backend, forkserver, request, start, until, values

__all__ = ["anyio_backend", "forkserver", "start"]
pytestmark = pytest.mark.anyio


# ---- batching -------------------------------------------------------------------------------------------------------


async def test_what_gathers_while_the_runner_works_goes_as_one_batch_and_each_gets_its_own(start: Start, tmp_path: Path) -> None:
    reports: list[BatchReport] = []
    engine = await start(models.linear(tmp_path / "m.onnx"), batch_limit=8, observer=reports.append)
    rng = np.random.default_rng(0)
    sent: list[dict[str, Any]] = [
        {name: rng.normal(size=(rows, 4)).astype(np.float32) for name in "abcd"} for rows in [1, 2, 3, 1, 1, 5, 8, 9, 1, 1] * 4
    ]
    answers = await asyncio.gather(*(engine.infer(request(**arrays)) for arrays in sent))
    for arrays, answer in zip(sent, answers, strict=True):
        expected = sum(arrays[name].sum(1, keepdims=True) * (i + 1) for i, name in enumerate("abcd"))
        assert np.allclose(values(answer), expected, atol=1e-4)
        assert answer.batch_rows >= len(arrays["a"])
        assert (answer.model, answer.version, answer.generation) == ("m", "1", 1)
    assert sum(report.requests for report in reports) == len(sent)
    assert sum(report.rows for report in reports) == sum(len(arrays["a"]) for arrays in sent)
    assert len(reports) < len(sent)
    assert all(report.rows <= 8 or report.requests == 1 for report in reports)
    assert all(len(report.queue_s) == report.requests for report in reports)
    assert is_idle(engine)


async def test_shapes_that_differ_do_not_mix_and_all_are_answered(start: Start, tmp_path: Path) -> None:
    engine = await start(models.identity(tmp_path / "m.onnx"), batch_limit=8)
    sent = [np.full((rows, width), width, np.float32) for width in (1, 2, 3) for rows in (1, 2)] * 5
    answers = await asyncio.gather(*(engine.infer(request(x=array)) for array in sent))
    assert all(np.array_equal(values(answer), array) for array, answer in zip(sent, answers, strict=True))


async def test_a_version_that_is_not_batchable_runs_each_request_alone(start: Start, tmp_path: Path) -> None:
    path = models.dependent_rows(tmp_path / "m.onnx")
    engine = await start(path, signature=models.signature_of(path, batchable=False), batch_limit=8)
    answers = await asyncio.gather(*(engine.infer(request(x=np.full((1, 4), n, np.float32))) for n in range(8)))
    assert all(np.array_equal(values(answer), np.zeros((1, 4))) for answer in answers)


async def test_a_batch_whose_output_has_no_rows_is_run_again_alone_and_that_is_remembered(start: Start, tmp_path: Path) -> None:
    """The proof at deploy said batchable; the running model says otherwise: nobody gets a wrong answer."""
    engine = await start(models.summing(tmp_path / "m.onnx"), batch_limit=8)
    answers = await asyncio.gather(*(engine.infer(request(x=np.array([n], np.float32))) for n in range(6)))
    assert [values(answer).tolist() for answer in answers] == [[n] for n in range(6)]
    assert engine.notes == ("served unbatched: an output had not one row for each input row of a batch",)


async def test_a_row_that_the_model_refuses_does_not_fail_its_batch_mates(start: Start, tmp_path: Path) -> None:
    engine = await start(models.failing(tmp_path / "m.onnx"), batch_limit=16)
    answers = await asyncio.gather(*(engine.infer(request(index=np.array([n]))) for n in (1, 99, 3, -99, 5)), return_exceptions=True)
    assert [type(answer) for answer in answers[1::2]] == [ModelFailed, ModelFailed]
    assert [values(answer).tolist() for answer in answers[::2] if not isinstance(answer, BaseException)] == [[10], [30], [50]]
    assert is_idle(engine)


async def test_no_memory_left_is_not_the_request_s_fault(start: Start, tmp_path: Path) -> None:
    nodes = [helper.make_node("ConstantOfShape", ["n"], ["big"]), helper.make_node("ReduceSum", ["big"], ["y"], keepdims=1)]
    path = models.save(tmp_path / "m.onnx", nodes, [models.value("n", "INT64", [1])], [models.value("y", "FP32", [1])])
    engine = await start(path, signature=models.signature_of(path, batchable=False), spec={"memory_limit_bytes": 512 << 20})
    with pytest.raises(NotReady, match="no memory left"):
        await engine.infer(request(n=np.array([8 << 30])))
    assert values(await engine.infer(request(n=np.array([10]))))[0] == 0 and not engine.deaths


async def test_settings_change_on_the_live_runner(start: Start, tmp_path: Path) -> None:
    engine = await start(models.linear(tmp_path / "m.onnx"), batch_limit=1)
    pid = engine.pid

    async def burst() -> set[int]:
        arrays: dict[str, Any] = {name: np.ones((1, 4), np.float32) for name in "abcd"}
        return {answer.batch_rows for answer in await asyncio.gather(*(engine.infer(request(**arrays)) for _ in range(40)))}

    def threads() -> int:
        return len(os.listdir(f"/proc/{engine.pid}/task"))

    assert await burst() == {1}
    base = threads()
    engine.apply(replace(engine.settings, batch_limit=16, instances=3))
    assert max(await burst()) > 1
    assert threads() == base + 2
    engine.apply(replace(engine.settings, instances=1))
    await burst()
    await until(lambda: threads() == base)
    assert engine.pid == pid
    with pytest.raises(Conflict, match="new session"):
        engine.apply(replace(engine.settings, intra_op_threads=2))


async def test_a_full_queue_refuses_with_a_time_to_come_back(start: Start, tmp_path: Path) -> None:
    engine = await start(models.heavy(tmp_path / "m.onnx", layers=8), batch_limit=1, queue_limit=4)
    x = np.ones((1, 1024), np.float32)
    for _ in range(3):
        await engine.infer(request(x=x))
    answers = await asyncio.gather(*(engine.infer(request(x=x)) for _ in range(20)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, QueueFull)]
    assert len(refused) >= 10
    assert "4 of 4 requests wait" in str(refused[0])
    assert 0.05 <= refused[0].retry_after_s <= 60
    assert is_idle(engine)


# ---- deadlines and leaving ------------------------------------------------------------------------------------------


async def test_a_deadline_that_passes_in_the_queue_is_answered_at_once_and_never_run(start: Start, tmp_path: Path) -> None:
    reports: list[BatchReport] = []
    engine = await start(models.endless(tmp_path / "m.onnx"), observer=reports.append)
    long = await busy(engine)
    began = monotonic()
    with pytest.raises(DeadlineExceeded, match="passed while the request was queued"):
        await engine.infer(short(deadline=monotonic() + 0.2))
    assert 0.15 < monotonic() - began < 5
    assert engine.queued == 0
    assert not long.done()
    long.cancel()
    await until(lambda: is_idle(engine), 60)
    assert len(reports) == 1, "only the long call was run"


async def test_a_deadline_that_passes_while_running_is_answered_and_the_runner_lives_on(start: Start, tmp_path: Path) -> None:
    engine = await start(models.endless(tmp_path / "m.onnx"))
    pid = engine.pid
    with pytest.raises(DeadlineExceeded, match="passed while the request was running"):
        await engine.infer(request(x=np.ones(2, np.float32), n=np.array([1_500_000]), deadline=monotonic() + 0.2))
    assert values(await engine.infer(short())).tolist() == [1, 1]
    assert engine.pid == pid
    assert is_idle(engine)


async def test_a_deadline_that_cannot_be_met_is_refused_at_once_but_never_without_data(start: Start, tmp_path: Path) -> None:
    engine = await start(models.heavy(tmp_path / "m.onnx", layers=8), batch_limit=1)
    x = np.ones((1, 1024), np.float32)
    with pytest.raises(DeadlineExceeded) as first:
        await engine.infer(request(x=x, deadline=monotonic() + 1e-5))
    assert not isinstance(first.value, CannotMeetDeadline)
    for _ in range(8):
        await engine.infer(request(x=x))
    waiting = [asyncio.create_task(engine.infer(request(x=x))) for _ in range(30)]
    await asyncio.sleep(0)
    with pytest.raises(CannotMeetDeadline, match=r"rows are before this request and it would take .* or more; its deadline is in"):
        await engine.infer(request(x=x, deadline=monotonic() + engine._dispatcher.rates.wall_s(1) * 2))
    assert (await engine.infer(request(x=x, deadline=monotonic() + 60))).outputs
    await asyncio.gather(*waiting)


async def test_large_requests_are_answered_while_others_hold_all_threads(start: Start, tmp_path: Path) -> None:
    """As calls to a store that hangs do."""
    engine = await start(models.identity(tmp_path / "m.onnx"))
    freed = threading.Event()
    holding = [asyncio.get_running_loop().run_in_executor(None, freed.wait, 60) for _ in range(64)]
    large = np.ones((1, 1_000_000), np.float32)
    try:
        async with asyncio.timeout(20):
            assert np.array_equal(values(await engine.infer(request(x=large))), large)
    finally:
        freed.set()
        await asyncio.gather(*holding)


async def test_a_request_larger_than_any_before_is_not_refused_by_the_time_of_small_ones(start: Start, tmp_path: Path) -> None:
    engine = await start(models.scaled(tmp_path / "m.onnx"))
    for _ in range(8):
        await engine.infer(request(x=ONES))
    rows = 200_000
    large = np.ones((rows, ONES.shape[1]), np.float32)
    deadline = monotonic() + max(5.0, engine._dispatcher.rates.wall_s(1) * rows / 4)
    assert values(await engine.infer(request(x=large, deadline=deadline))).shape == large.shape


async def test_an_expired_deadline_is_not_even_queued(start: Start, tmp_path: Path) -> None:
    engine = await start(models.scaled(tmp_path / "m.onnx"))
    with pytest.raises(DeadlineExceeded, match="had passed before"):
        await engine.infer(request(x=ONES, deadline=monotonic() - 1))


async def test_a_caller_who_leaves_takes_its_queued_work_along(start: Start, tmp_path: Path) -> None:
    reports: list[BatchReport] = []
    engine = await start(models.endless(tmp_path / "m.onnx"), observer=reports.append)
    long = await busy(engine, 200_000)
    waiting = [asyncio.create_task(engine.infer(short())) for _ in range(10)]
    await asyncio.sleep(0)
    assert engine.queued == 10
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert engine.queued == 0
    await long
    await until(lambda: is_idle(engine))
    assert sum(report.requests for report in reports) == 1


async def test_priority_one_overtakes_the_rest(start: Start, tmp_path: Path) -> None:
    engine = await start(models.endless(tmp_path / "m.onnx"), batch_limit=1)
    long = await busy(engine, 100_000)
    order: list[str] = []

    async def call(name: str, priority: int) -> None:
        await engine.infer(short(priority=priority))
        order.append(name)

    await asyncio.gather(call("low", 9), call("default", 0), call("high", 1), long)
    assert order == ["high", "default", "low"]


async def test_after_cancels_timeouts_and_refusals_every_count_is_zero_and_capacity_is_whole(start: Start, tmp_path: Path) -> None:
    """Case 55, in small: a third leave, a third time out, some do not decode, and the runner is killed in between."""
    engine = await start(models.failing(tmp_path / "m.onnx"), batch_limit=4, instances=2, queue_limit=64)
    rng = random.Random(3)

    async def one(number: int) -> None:
        await asyncio.sleep(rng.random())
        deadline = monotonic() + rng.choice([0.0005, 0.002, 30])
        call = engine.infer(request(index=np.array([rng.choice([1, 2, 99])]), deadline=deadline))
        try:
            await asyncio.wait_for(call, rng.choice([0.0005, 0.003, 30]))
        except (HoneError, TimeoutError):
            pass
        if number == 500:
            os.kill(engine.pid, signal.SIGKILL)

    await asyncio.gather(*(one(number) for number in range(1500)))
    await until(lambda: engine.alive and is_idle(engine))
    answers = await asyncio.gather(*(engine.infer(request(index=np.array([2]))) for _ in range(64)))
    assert {tuple(values(answer).tolist()) for answer in answers} == {(20.0,)}


# ---- memory ---------------------------------------------------------------------------------------------------------


async def test_memory_is_level_over_many_shapes_and_comes_back_afterwards(start: Start, tmp_path: Path) -> None:
    """Case 51: four hundred requests over a hundred sizes, twice; then small ones only."""
    from app.serving import procfs

    engine = await start(models.many_shapes(tmp_path / "m.onnx"), batch_limit=1)
    rng = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in rng.integers(32, 200, 2)) for _ in range(60)]
    settled = procfs.private_bytes(engine.pid) or 0

    async def round_of_all() -> int:
        for height, width in sizes:
            await engine.infer(request(x=np.zeros((1, 3, height, width), np.float32)))
        return procfs.private_bytes(engine.pid) or 0

    await round_of_all()
    second = await round_of_all()
    third = await round_of_all()
    assert third < second * 1.25 + (4 << 20)
    runner = engine._runner
    assert runner is not None
    runner.trim()
    for _ in range(3):
        await engine.infer(request(x=np.zeros((1, 3, 32, 32), np.float32)))
    runner.trim()
    await until(lambda: (procfs.private_bytes(engine.pid) or 0) < settled + (24 << 20))


async def test_a_runner_at_rest_gives_back_what_only_batches_need(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.serving import procfs

    engine = await start(models.resnetish_cnn(tmp_path / "m.onnx", size=64), batch_limit=64)

    def held() -> int:
        return procfs.private_bytes(engine.pid) or 0

    image = np.zeros((1, 3, 64, 64), np.float32)
    warm = held()
    monkeypatch.setattr("app.serving.upkeep.REST_S", 0.2)
    await engine.infer(request(x=image))
    await until(lambda: held() < warm - (16 << 20))
    results = await asyncio.gather(*(engine.infer(request(x=image)) for _ in range(64)))
    assert len(results) == 64 and not engine.deaths, "batches are answered as before"


async def test_a_runner_that_nobody_asked_rests_at_once(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.serving import procfs

    engine = await start(models.resnetish_cnn(tmp_path / "m.onnx", size=64), batch_limit=64)
    warm = procfs.private_bytes(engine.pid) or 0
    monkeypatch.setattr("app.serving.upkeep.UNASKED_REST_S", 0.1)
    image = np.zeros((1, 3, 64, 64), np.float32)
    await engine.infer(replace(request(x=image), caller=OWN))
    await until(lambda: (procfs.private_bytes(engine.pid) or 0) < warm - (16 << 20))


async def test_a_runner_that_outgrows_its_bound_makes_way_without_a_failed_request(start: Start, tmp_path: Path) -> None:
    engine = await start(models.many_shapes(tmp_path / "m.onnx"), batch_limit=1)
    pid = engine.pid
    engine.spec = replace(engine.spec, memory_limit_bytes=30 << 20)
    stop = monotonic() + 30
    count = 0
    while engine.pid == pid and monotonic() < stop:
        await engine.infer(request(x=np.zeros((1, 3, 256, 256), np.float32)))
        count += 1
    assert engine.pid != pid
    assert engine.recycles == 1
    assert not engine.deaths
    assert values(await engine.infer(request(x=np.zeros((1, 3, 32, 32), np.float32)))).shape == (1, 32, 32, 32)
    assert count > 0


# ---- the end --------------------------------------------------------------------------------------------------------


async def test_drain_answers_what_is_inside_and_refuses_what_comes(start: Start, tmp_path: Path) -> None:
    engine = await start(models.endless(tmp_path / "m.onnx"))
    long = await busy(engine, 100_000)
    waiting = asyncio.create_task(engine.infer(short()))
    await asyncio.sleep(0)
    assert await engine.drain(0.0) is False
    with pytest.raises(NotReady, match="is being replaced"):
        await engine.infer(short())
    assert await engine.drain(60.0) is True
    assert (await long).outputs
    assert (await waiting).outputs


async def test_stop_leaves_nobody_waiting_and_no_process(start: Start, tmp_path: Path) -> None:
    engine = await start(models.endless(tmp_path / "m.onnx"))
    long = await busy(engine, 1 << 40)
    waiting = asyncio.create_task(engine.infer(short()))
    await asyncio.sleep(0)
    pid, used = engine.pid, engine.cpu_seconds()
    await engine.stop()
    for task in (long, waiting):
        with pytest.raises(NotReady, match="was unloaded"):
            await task
    await until(lambda: not os.path.exists(f"/proc/{pid}"))
    assert not engine.alive
    assert engine.cpu_seconds() >= used
    await engine.stop()


async def test_cpu_seconds_add_up_over_restarts(start: Start, tmp_path: Path) -> None:
    engine = await start(models.endless(tmp_path / "m.onnx"))
    await engine.infer(request(x=np.ones(2, np.float32), n=np.array([100_000])))
    before = engine.cpu_seconds()
    assert before > 0.02
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: engine.restarts == 1 and engine.alive)
    assert engine.cpu_seconds() >= before


def test_settings_that_need_a_new_session_are_told_apart() -> None:
    base = RuntimeSettings()
    assert not base.needs_new_session(replace(base, instances=4, batch_limit=1, queue_limit=9))
    assert base.needs_new_session(replace(base, spin_duration_us=100))
