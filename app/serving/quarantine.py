"""Inputs that ended a runner when run alone, by hash: they are refused from then on. It knows no runner."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from typing import Final

from app.domain import InferenceRequest
from app.serving.shm import size_of

LARGE_BYTES: Final = 128 << 10
"""More than this is hashed in a thread."""


class Quarantine:
    """Inputs, by hash, that killed a runner when run alone; the oldest are forgotten."""

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._hashes: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, digest: str, reason: str) -> None:
        self._hashes[digest] = reason
        if len(self._hashes) > self._limit:
            self._hashes.popitem(last=False)

    def reason(self, digest: str) -> str | None:
        return self._hashes.get(digest)


def hash_inputs(request: InferenceRequest) -> str:
    """sha256 over names, datatypes, shapes and data."""
    digest = hashlib.sha256()
    for tensor in request.inputs:
        digest.update(f"{tensor.name}\0{tensor.datatype}\0{tensor.shape}\0".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


async def hash_of(request: InferenceRequest) -> str:
    """As hash_inputs, without holding up the event loop."""
    if sum(size_of(tensor.data) for tensor in request.inputs) > LARGE_BYTES:
        return await asyncio.to_thread(hash_inputs, request)
    return hash_inputs(request)
