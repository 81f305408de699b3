"""What keeps an engine busy in tests, and how one looks that has nothing to do."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from app.domain import InferenceRequest
from app.serving.engine import Engine
from tests.engines import request, until

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


async def busy(engine: Engine, turns: int = 1_500_000) -> asyncio.Task[Any]:
    """One call that keeps the runner of an `endless` model busy for a while."""
    task = asyncio.create_task(engine.infer(request(x=np.ones(2, np.float32), n=np.array([turns]))))
    await until(lambda: engine._dispatcher.busy == 1)
    return task


def short(**given: Any) -> InferenceRequest:
    return request(x=np.ones(2, np.float32), n=np.array([1]), **given)
