"""A runner that dies: callers get their answer, a row that kills is found among its mates, and the version comes back."""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest

from app.errors import Quarantined, RunnerLost
from app.serving.engine import Quarantine, hash_inputs
from app.serving.ledger import CoreLedger
from tests import models
from tests.engine_load import ONES, busy, is_idle, short
from tests.engines import Start, anyio_backend, forkserver, request, start, until, values

__all__ = ["anyio_backend", "forkserver", "start"]
pytestmark = pytest.mark.anyio


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


async def test_instances_for_which_no_descriptor_was_left_come_when_there_is_one(start: Start, tmp_path: Path) -> None:
    """Even the only one: a runner without any would let all wait until their deadlines, for ever."""
    engine = await start(models.identity(tmp_path / "m.onnx"), instances=1)
    runner = engine._runner
    assert runner is not None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        runner.remove_instance(runner.instances[0])
        engine._dispatcher.attach(runner)  # as a fresh one
        engine.apply(replace(engine.settings, instances=2))
        assert not runner.instances
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    async with asyncio.timeout(5):
        await engine.infer(request(x=np.ones((1, 4), np.float32)))
    assert len(runner.instances) == 2


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
