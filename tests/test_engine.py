"""One loaded version under use and abuse: batching, deadlines, failures, deaths, hangs, and that everything returns to zero."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from onnx import helper

from app.domain import InferenceRequest, RuntimeSettings
from app.errors import (
    CannotMeetDeadline,
    Conflict,
    DeadlineExceeded,
    HoneError,
    ModelFailed,
    NotReady,
    Quarantined,
    QueueFull,
    RunnerLost,
)
from app.serving.engine import BatchReport, Engine, Quarantine, hash_inputs
from app.serving.ledger import CoreLedger
from app.serving.watch import Judgement, Patience, Sight, Usual, judge, seen
from tests import models
from tests.engines import Start, anyio_backend, forkserver, request, start, until, values

__all__ = ["anyio_backend", "forkserver", "start"]
pytestmark = pytest.mark.anyio

ONES = np.ones((1, 4), np.float32)


def is_idle(engine: Engine) -> bool:
    dispatcher = engine._dispatcher
    counts = (
        engine.inflight,
        engine.queued,
        dispatcher.queue.rows,
        dispatcher.busy,
        dispatcher._account.running,
        dispatcher._account.wanted,
    )
    return counts == (0,) * 6


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


async def busy(engine: Engine, turns: int = 1_500_000) -> asyncio.Task[Any]:
    """One call that keeps the runner of an `endless` model busy for a while."""
    task = asyncio.create_task(engine.infer(request(x=np.ones(2, np.float32), n=np.array([turns]))))
    await until(lambda: engine._dispatcher.busy == 1)
    return task


def short(**given: Any) -> InferenceRequest:
    return request(x=np.ones(2, np.float32), n=np.array([1]), **given)


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


# ---- death ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["idle", "in mid-batch"])
async def test_killed_from_outside_callers_get_their_answer_and_nobody_is_blamed(when: str, start: Start, tmp_path: Path) -> None:
    """Case 47: again and again; who waits gets the retry's answer or a 503 within two seconds, new requests wait for the new runner."""
    deaths: list[tuple[str, int, tuple[str, ...]]] = []
    engine = await start(models.endless(tmp_path / "m.onnx"), batch_limit=4, on_death=lambda *death: deaths.append(death))
    longest = 0.0
    turns = np.array([20_000])
    for _ in range(10):
        pid = engine.pid
        tasks = []
        if when == "in mid-batch":
            tasks = [asyncio.create_task(engine.infer(request(x=np.ones(2, np.float32), n=turns))) for _ in range(6)]
            await until(lambda: engine._dispatcher.busy == 1)
        os.kill(pid, signal.SIGKILL)
        began = monotonic()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        longest = max(longest, monotonic() - began)
        assert all(not isinstance(a, BaseException) or isinstance(a, RunnerLost) for a in answers), answers
        assert values(await engine.infer(short())).tolist() == [1, 1]
        assert engine.pid != pid
    assert longest < 4.0
    assert len(deaths) == 10
    assert all("killed from outside" in reason for reason, _, _ in deaths)
    assert engine.distinct_killers == 0
    assert len(engine.quarantine) == 0
    assert engine.restarts == 10
    assert is_idle(engine)


async def test_two_runners_at_once_and_while_the_batch_is_written(start: Start, tmp_path: Path) -> None:
    engines = [await start(models.identity(tmp_path / f"{n}.onnx"), instances=2) for n in range(2)]
    large = np.ones((1, 3_000_000), np.float32)
    for _ in range(3):
        tasks = [asyncio.create_task(engine.infer(request(x=large))) for engine in engines for _ in range(3)]
        await asyncio.sleep(0.002)
        for engine in engines:
            if engine.pid:
                os.kill(engine.pid, signal.SIGKILL)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(a, RunnerLost) or (not isinstance(a, BaseException) and np.array_equal(values(a), large)) for a in answers)
        await until(lambda: all(engine.alive and is_idle(engine) for engine in engines))


async def test_tokens_that_come_back_from_the_dead_do_not_send_work_after_them(start: Start, tmp_path: Path) -> None:
    """Found under load: the ledger woke the very engine whose runner had just died, and its next batch was lost for good."""
    ledger = CoreLedger(1)
    engine = await start(models.endless(tmp_path / "m.onnx"), instances=2, batch_limit=1, ledger=ledger)
    company = ledger.join("company", lambda: None)
    company.give(company.take(1, 0.0), 0.0, 0.0)
    long = await busy(engine)
    waiting = asyncio.create_task(engine.infer(short()))
    await until(lambda: engine._dispatcher._account.wanted == 1)
    os.kill(engine.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        try:
            assert (await waiting).outputs
        except RunnerLost:
            pass
    await asyncio.gather(long, return_exceptions=True)
    await until(lambda: engine.alive and is_idle(engine))


async def test_a_sink_that_fails_does_not_keep_the_version_down(start: Start, tmp_path: Path) -> None:
    def on_death(*_: Any) -> None:
        raise OSError("the journal is full")

    engine = await start(models.scaled(tmp_path / "m.onnx"), on_death=on_death)
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: engine.restarts == 1 and engine.alive)
    assert values(await engine.infer(request(x=ONES))).tolist() == [[2, 2, 2, 2]]


async def test_a_row_that_kills_is_found_among_its_mates_and_quarantined(start: Start, tmp_path: Path) -> None:
    deaths: list[tuple[str, int, tuple[str, ...]]] = []
    engine = await start(models.killer(tmp_path / "m.onnx"), batch_limit=8, on_death=lambda *death: deaths.append(death))
    killing = request(x=np.array([models.KILLING_ROW[0]], np.int64), d=np.array([models.KILLING_ROW[1]], np.int64))
    good = [request(x=np.array([n], np.int64), d=np.array([1], np.int64)) for n in range(5)]
    tasks = [asyncio.create_task(engine.infer(item)) for item in [*good[:3], killing, *good[3:]]]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    refused = answers.pop(3)
    assert isinstance(refused, Quarantined | RunnerLost)
    assert [values(answer).tolist() for answer in answers if not isinstance(answer, BaseException)] == [[n] for n in range(5)]
    await until(lambda: len(engine.quarantine) == 1)
    assert engine.distinct_killers == 1
    assert len(deaths) == 2
    assert all("SIGFPE" in reason for reason, _, _ in deaths)
    assert deaths[1][2] == (hash_inputs(killing),), "the second time it was alone"
    await until(lambda: engine.alive)
    pid = engine.pid
    with pytest.raises(Quarantined, match="very input ended a runner of m:1"):
        await engine.infer(killing)
    assert values(await engine.infer(good[2])).tolist() == [2]
    assert engine.pid == pid
    assert is_idle(engine)


async def test_different_killers_are_counted_and_starts_in_a_row_are_paced(start: Start, tmp_path: Path) -> None:
    engine = await start(models.killer(tmp_path / "m.onnx"), batch_limit=1)
    for rows in (1, 2):
        killing = request(
            x=np.full(rows, models.KILLING_ROW[0], np.int64), d=np.full(rows, models.KILLING_ROW[1], np.int64)
        )  # fmt: skip
        with pytest.raises((Quarantined, RunnerLost)):
            await engine.infer(killing)
        await until(lambda rows=rows: engine.distinct_killers == rows and engine.alive)  # type: ignore[misc]
    assert engine.restarts == 4
    assert [len(death.hashes) for death in engine.deaths] == [1] * 4
    assert values(await engine.infer(request(x=np.array([6], np.int64), d=np.array([3], np.int64)))).tolist() == [2]


def test_the_quarantine_forgets_the_oldest() -> None:
    quarantine = Quarantine(limit=2)
    for name in "abc":
        quarantine.add(name, f"because of {name}")
    assert [quarantine.reason(name) for name in "abc"] == [None, "because of b", "because of c"]


def test_the_hash_tells_names_types_shapes_and_values_apart() -> None:
    base = {"x": np.zeros((1, 4), np.float32)}
    others: list[dict[str, Any]] = [
        {"y": base["x"]}, {"x": base["x"].astype(np.int32)}, {"x": base["x"].reshape(2, 2)}, {"x": base["x"] + 1}, base | {"y": base["x"]},
    ]  # fmt: skip
    hashes = {hash_inputs(request(**arrays)) for arrays in [base, *others]}
    assert len(hashes) == 1 + len(others)
    assert all(len(digest) == hashlib.sha256().digest_size * 2 for digest in hashes)


async def test_a_runner_that_cannot_come_back_says_so_and_comes_back_when_it_can(start: Start, tmp_path: Path) -> None:
    path = models.scaled(tmp_path / "m.onnx")
    engine = await start(path)
    content = path.read_bytes()
    path.write_bytes(b"gone wrong" * 20)
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: not engine.alive)

    async def refused() -> bool:
        try:
            await engine.infer(request(x=ONES, deadline=monotonic() + 10))
        except RunnerLost as error:
            return error.retry_after_s > 0 and "refuses m.onnx" in str(error)
        return False

    for _ in range(200):
        if await refused():
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("the engine never said why it cannot answer")
    path.write_bytes(content)
    await until(lambda: engine.alive)
    assert values(await engine.infer(request(x=ONES))).tolist() == [[2, 2, 2, 2]]


# ---- hanging --------------------------------------------------------------------------------------------------------


async def test_a_stopped_runner_is_replaced_and_its_caller_answered(start: Start, tmp_path: Path) -> None:
    engine = await start(models.scaled(tmp_path / "m.onnx"))
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)
    began = monotonic()
    assert values(await engine.infer(request(x=ONES))).tolist() == [[2, 2, 2, 2]]
    assert monotonic() - began < 10
    assert engine.pid != pid
    assert "was stopped (state T)" in engine.deaths[0].reason
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
    monkeypatch.setattr("app.serving.engine._REST_S", 0.2)
    await engine.infer(request(x=image))
    await until(lambda: held() < warm - (16 << 20))
    results = await asyncio.gather(*(engine.infer(request(x=image)) for _ in range(64)))
    assert len(results) == 64 and not engine.deaths, "batches are answered as before"


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
