"""What the tests of the engine share: a fork server, engines that are stopped in the end, and requests made from arrays."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.domain import InferenceRequest, InferenceResult, RuntimeSettings, Signature, Tensor
from app.serving.engine import Engine, RunnerSpec
from app.serving.forkserver import ForkServer
from app.serving.ledger import CoreLedger
from tests.models import signature_of

Start = Callable[..., Awaitable[Engine]]
KEPT = ("ledger", "on_death", "observer", "quarantine", "patience", "timeout_s")
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def forkserver() -> Iterator[ForkServer]:
    server = ForkServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
async def start(forkserver: ForkServer) -> AsyncIterator[Start]:
    """start(path, batch_limit=..., signature=..., on_death=...): an engine that is stopped when the test ends."""
    ledger = CoreLedger(2)
    engines: list[Engine] = []

    async def begin(
        path: Path, *, model: str = "m", signature: Signature | None = None, spec: dict[str, Any] | None = None, **given: Any
    ) -> Engine:
        kept: dict[str, Any] = {"ledger": ledger} | {name: given.pop(name) for name in KEPT if name in given}
        engine = await Engine.start(
            RunnerSpec(model, "1", 1, str(path), signature or signature_of(path), RuntimeSettings(**given), **(spec or {})),
            forkserver=forkserver, **kept,
        )  # fmt: skip
        engines.append(engine)
        return engine

    yield begin
    for engine in engines:
        await engine.stop()


def tensor(name: str, array: Any, datatype: str = "") -> Tensor:
    values = np.asarray(array)
    return Tensor(name, datatype or DATATYPES[str(values.dtype)], values.shape, values.tobytes())


def request(deadline: float | None = None, priority: int = 0, outputs: tuple[str, ...] | None = None, **arrays: Any) -> InferenceRequest:
    tensors = [tensor(name, array) for name, array in arrays.items()]
    return InferenceRequest(tensors, deadline=deadline, priority=priority, outputs=outputs)


def values(result: InferenceResult, name: str | None = None) -> NDArray[Any]:
    """One output as an array."""
    found = next(item for item in result.outputs if name is None or item.name == name)
    dtype = {wire: numpy for numpy, wire in DATATYPES.items()}[found.datatype]
    return np.frombuffer(found.data, dtype).reshape(found.shape)


def gone(pid: int) -> bool:
    """No process of this number, and no zombie either."""
    return not os.path.exists(f"/proc/{pid}")


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for a condition; fails with its name where it does not come."""
    end = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"{condition} did not come true within {timeout_s} s"
        await asyncio.sleep(0.01)
