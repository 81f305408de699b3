"""A model that takes more than its share gives way to lighter ones, and stands firm again where that would starve it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from app.errors import QueueFull
from app.serving.engine import Engine
from app.serving.ledger import CoreLedger
from app.serving.manners import AFTER_S, FIRM_S, MOST_BETWEEN_S, STARVED_S, Manners
from app.serving.room import OVERRUN_S
from tests import models
from tests.engines import Start, anyio_backend, forkserver, request, start, until

__all__ = ["anyio_backend", "forkserver", "start"]
ROW = np.zeros((1, 4), np.float32)


def test_who_is_heavy_for_a_while_gives_way_as_long_as_somebody_lighter_is_there() -> None:
    manners = Manners()
    assert not manners.look(1.5, True, True, 10.0)
    assert not manners.look(0.5, True, True, 10.3), "one busy moment is none"
    assert not manners.look(1.5, True, True, 10.4)
    assert manners.look(1.5, True, True, 10.4 + AFTER_S)
    assert manners.look(0.7, True, True, 12.0), "neither heavy nor light"
    assert not manners.look(0.5, True, False, 12.5)
    assert not manners.look(1.5, False, True, 13.0) and not manners.look(1.5, False, True, 15.0)


def test_who_is_asked_for_more_than_it_can_answer_is_heavy_whatever_it_gets() -> None:
    manners = Manners()
    assert not manners.look(0.5, True, True, 10.0, overrun=True)
    assert manners.look(0.5, True, True, 10.0 + AFTER_S, overrun=True)
    assert manners.look(0.5, True, True, 10.1 + AFTER_S, overrun=False), "as long as something waits"
    assert not manners.look(0.5, True, False, 10.2 + AFTER_S, overrun=False)


def test_who_is_starved_stands_firm_for_a_while_and_then_for_longer() -> None:
    manners = Manners()
    now = 0.0
    for times in (1, 2, 4):
        manners.look(1.5, True, True, now)
        assert manners.look(1.5, True, True, now + AFTER_S)
        assert manners.look(0.1, True, True, now + 1.0), "one look is not enough"
        assert manners.look(0.5, True, True, now + 1.5)
        assert manners.look(0.1, True, True, now + 2.0), "counted from anew"
        assert manners.look(0.1, True, True, now + 1.9 + STARVED_S)
        assert not manners.look(0.1, True, True, now + 2.0 + STARVED_S)
        until = now + 2.0 + STARVED_S + times * FIRM_S
        assert not manners.look(1.5, True, True, until - 0.1)
        now = until


def test_the_time_in_which_it_gave_way_is_counted_from_look_to_look_and_not_over_a_rest() -> None:
    manners = Manners()
    for now in (0.0, AFTER_S):
        manners.look(1.5, True, True, now)
    assert manners.yields and manners.yielded_s == 0.0
    for look in range(1, 5):
        manners.look(1.5, True, True, AFTER_S + 0.25 * look)
    assert manners.yielded_s == 1.0
    manners.look(1.5, False, True, 60.0)
    assert manners.yielded_s == 1.0 + MOST_BETWEEN_S, "it had nothing to do meanwhile"
    manners.look(1.5, False, True, 60.25)
    assert manners.yielded_s == 1.0 + MOST_BETWEEN_S


def test_shares_are_of_versions_and_company_is_another_model() -> None:
    ledger = CoreLedger(2)
    heavy, other_version = ledger.join("a:1", lambda: None), ledger.join("a:2", lambda: None)
    assert heavy.take(1, 0.01) and other_version.take(1, 0.01)
    assert not heavy.has_lighter_company(), "a canary of the same model is none"
    light = ledger.join("b:1", lambda: None)
    light.take(1, 0.01)
    assert heavy.has_lighter_company()
    light.overrun = True
    assert not heavy.has_lighter_company(), "who refuses callers is not content with little"
    light.overrun = False
    heavy.pay(1.0, monotonic())
    light.pay(1.0, monotonic())
    assert heavy.of_share() == pytest.approx(1.5, rel=0.05), "1 core of two thirds"
    assert not heavy.has_lighter_company(), "both take more than their share"


def policies(engine: Engine) -> list[int]:
    assert engine._dispatcher._runner is not None
    return [os.sched_getscheduler(instance.tid) for instance in engine._dispatcher._runner.instances if instance.tid]


@pytest.mark.anyio
async def test_who_refuses_for_want_of_room_is_overrun_for_a_moment(start: Start, tmp_path: Path) -> None:
    engine = await start(models.slow(tmp_path / "hot.onnx"), model="hot", batch_limit=1, queue_limit=2)
    room = engine._dispatcher.room
    await engine.infer(request(x=ROW))
    assert not room.overrun(monotonic())
    answers = await asyncio.gather(*[engine.infer(request(x=ROW)) for _ in range(12)], return_exceptions=True)
    assert any(isinstance(answer, QueueFull) for answer in answers)
    assert room.overrun(monotonic()) and not room.overrun(monotonic() + OVERRUN_S)


@pytest.mark.anyio
async def test_threads_of_a_heavy_model_are_idle_ones_while_a_light_one_is_active(start: Start, tmp_path: Path) -> None:
    ledger = CoreLedger(1)
    hot = await start(models.slow(tmp_path / "hot.onnx"), ledger=ledger, model="hot", batch_limit=1)
    light = await start(models.slow(tmp_path / "light.onnx", inner=16), ledger=ledger, model="light")
    flooding, company = True, True

    async def flood() -> None:
        while flooding:
            await hot.infer(request(x=ROW))

    async def now_and_then() -> None:
        while company:
            await light.infer(request(x=ROW))
            await asyncio.sleep(0.1)

    async def comes(policy: int) -> bool:
        until = monotonic() + 10
        while monotonic() < until and policies(hot) != [policy]:
            await asyncio.sleep(0.05)
        return policies(hot) == [policy]

    floods, visits = [asyncio.create_task(flood()) for _ in range(4)], asyncio.create_task(now_and_then())
    try:
        assert await comes(os.SCHED_IDLE)
        assert policies(light) == [os.SCHED_OTHER]
        await until(lambda: hot.yielded_s > 0)
        assert light.yielded_s == 0
        hot.firm = True
        assert await comes(os.SCHED_OTHER), "while it is compared it gives way to nobody"
        hot.firm = False
        assert await comes(os.SCHED_IDLE)
        company = False
        await visits
        assert await comes(os.SCHED_OTHER), "nobody else is active"
    finally:
        flooding = company = False
        await asyncio.gather(*floods, visits)
