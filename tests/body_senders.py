"""Clients that send bodies, in pieces or not at all, and what is watched beside them."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import orjson

from app.api.bodies import Message
from app.api.offload import Offload

MB = 1 << 20


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 120))


@asynccontextmanager
async def offload(**kwargs: Any) -> AsyncIterator[Offload]:
    work = Offload(**kwargs)
    try:
        yield work
    finally:
        await work.close()


def large_json(count: int) -> tuple[bytes, np.ndarray[Any, Any]]:
    array = np.random.default_rng(0).normal(size=count).astype("f4")
    tensor = {"name": "x", "datatype": "FP32", "shape": [count], "data": array}
    return orjson.dumps({"id": "7", "inputs": [tensor], "parameters": {"priority": 3}}, option=orjson.OPT_SERIALIZE_NUMPY), array


def sender(*messages: Message, then: Message | None = None) -> Callable[[], Awaitable[Message]]:
    return sender_of(messages, then)


def sender_of(messages: Iterable[Message], then: Message | None = None) -> Callable[[], Awaitable[Message]]:
    waiting = iter(messages)

    async def receive() -> Message:
        await asyncio.sleep(0)
        return next(waiting, None) or then or {"type": "http.disconnect"}

    return receive


def chunks(body: bytes, size: int) -> Iterable[Message]:
    for at in range(0, len(body), size):
        yield {"type": "http.request", "body": body[at : at + size], "more_body": at + size < len(body)}


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
