"""One caller's flood beside another caller, on a real runner."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.domain import OWN
from app.errors import CallerLimited
from app.serving.engine import Engine
from app.serving.room import FLOOD, OTHERS_S
from tests import models
from tests.engines import Start, anyio_backend, forkserver, request, start

__all__ = ["anyio_backend", "forkserver", "start"]
ROW = np.zeros((1, 4), np.float32)


async def engine_of(start: Start, tmp_path: Path, **given: int) -> Engine:
    """One that knows how long its calls take."""
    engine = await start(models.slow(tmp_path / "m.onnx"), batch_limit=1, **given)
    for _ in range(6):
        await engine.infer(request(x=ROW))
    return engine


async def flooded(engine: Engine, *callers: str) -> list[object]:
    """What came of one request of each of `callers`, all at once, in their order."""
    asked = [engine.infer(replace(request(x=ROW), caller=caller)) for caller in callers]
    return list(await asyncio.gather(*asked, return_exceptions=True))


def limited(ends: list[object]) -> list[bool]:
    assert all(not isinstance(end, Exception) or isinstance(end, CallerLimited) for end in ends)
    return [isinstance(end, CallerLimited) for end in ends]


@pytest.mark.anyio
async def test_who_floods_waits_outside_before_others_wait_too_long(start: Start, tmp_path: Path) -> None:
    engine = await engine_of(start, tmp_path)
    call_s = engine._dispatcher.rates.wall_s(1)
    engine.promise(80 * call_s, 0.75)  # a quarter of it is 20 calls
    ends = limited(await flooded(engine, "polite", *["flood"] * 60, "polite"))
    assert not ends[0] and not ends[-1] and not any(ends[1:17]) and all(ends[-10:-1])
    assert any(limited(await flooded(engine, *["flood"] * 60))), "the other was here a moment ago, and may come again"
    await asyncio.sleep(OTHERS_S)
    assert not any(limited(await flooded(engine, *["flood"] * 60))), "nobody else is here"
    await flooded(engine, "prober")
    assert not any(limited(await flooded(engine, *["flood"] * 60))), "who asks now and then is nobody to keep room for"
    assert not any(limited(await flooded(engine, *["one", "other"] * 30))), "two who are alike are no flood"
    engine.promise(80 * call_s, 1.0)
    assert not any(limited(await flooded(engine, "polite", *["flood"] * 60))), (
        "behind proxies who is one caller and who many cannot be told"
    )


@pytest.mark.anyio
async def test_without_a_promise_only_a_half_full_queue_is_shared(start: Start, tmp_path: Path) -> None:
    engine = await engine_of(start, tmp_path, queue_limit=60)
    ends = limited(await flooded(engine, "polite", *["flood"] * 40, "polite"))
    assert not any(ends[:28]) and all(ends[33:-1]) and not ends[-1]


@pytest.mark.anyio
async def test_a_flood_of_few_requests_with_many_rows_is_one_as_well(start: Start, tmp_path: Path) -> None:
    engine = await start(models.slow(tmp_path / "m.onnx"), batch_limit=4)
    rows = np.zeros((16, 4), np.float32)
    for _ in range(6):
        await engine.infer(request(x=rows))
    engine.promise(16 * engine._dispatcher.rates.wall_s(16), 0.75)  # a quarter of it is four such calls
    asked = [("polite", ROW), *[("flood", rows)] * (FLOOD + 1), ("polite", ROW)]
    answers = (engine.infer(replace(request(x=x), caller=caller)) for caller, x in asked)
    ends = limited(list(await asyncio.gather(*answers, return_exceptions=True)))
    assert not ends[0] and not ends[-1] and not any(ends[1:4]) and all(ends[FLOOD - 1 : -1])
    assert engine.queued == 0 and not engine._dispatcher.queue.callers and not engine._dispatcher.queue.caller_rows


@pytest.mark.anyio
async def test_a_question_of_our_own_makes_nobody_a_flood(start: Start, tmp_path: Path) -> None:
    engine = await engine_of(start, tmp_path)
    engine.promise(40 * engine._dispatcher.rates.wall_s(1), 0.75)
    assert not any(limited(await flooded(engine, "alone", OWN, *["alone"] * 40, OWN)))
