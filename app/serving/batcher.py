"""Continuous batching, as plain data: which queued requests share the next call, how they lie in the arena, whose output is whose.

A free instance takes at once what is queued, up to the batch limit; no timer (design 2). It knows no sockets, processes or event loop.
"""

from __future__ import annotations

import asyncio
import math
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import orjson

from app.domain import BYTES, DATATYPE_SIZES, Buffer, InferenceRequest, InferenceResult, Tensor
from app.errors import HoneError, InvalidRequest
from app.serving.shm import aligned, padding, size_of

DEFAULT_PRIORITY: Final = 5
"""The level of requests that name none (0): below 1 to 4, above 6 and on."""
_KEPT_PLANS: Final = 256

Key: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, datatype and shape without the rows of each input: equal keys may share a call."""


class Work:
    """One request on its way through a version. `alone` forbids company; `tries` counts calls that were lost with their runner."""

    __slots__ = ("alone", "deadline", "enqueued_at", "future", "key", "priority", "queue_s", "queued", "request", "rows", "tries")

    def __init__(
        self, request: InferenceRequest, key: Key, rows: int, alone: bool, future: asyncio.Future[InferenceResult], now: float
    ) -> None:
        self.request = request
        self.key = key
        self.rows = rows
        self.alone = alone
        self.future = future
        self.priority = request.priority or DEFAULT_PRIORITY
        self.deadline = request.deadline
        self.enqueued_at = now
        self.queue_s = 0.0
        self.queued = False
        self.tries = 0

    def fail(self, error: HoneError) -> None:
        """Answer with an error, unless an answer was given already."""
        if not self.future.done():
            self.future.set_exception(error)


def key_of(inputs: list[Tensor], batchable: bool) -> tuple[Key, int, bool]:
    """(key, rows, alone) of a request. Alone where rows are not proven independent, missing, none, or not the same for all inputs."""
    if batchable and inputs:
        shape = inputs[0].shape
        rows = shape[0] if shape else 0
        if rows and all(t.shape and t.shape[0] == rows for t in inputs):
            return tuple([(t.name, t.datatype, t.shape[1:]) for t in inputs]), rows, False
    return tuple([(t.name, t.datatype, t.shape) for t in inputs]), 1, True


class Queue:
    """Waiting work: by priority, then in order of arrival; each batch is made around the one that has waited longest.

    Every piece of work is in its level's line and, unless alone, in its key's line; `queued` says whether it is still to be taken.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._order: list[int] = []
        self.length = 0
        self.rows = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Work]:
        return (work for priority in self._order for work in self._levels[priority].line if work.queued)

    def push(self, work: Work, front: bool = False) -> None:
        level = self._levels.get(work.priority)
        if level is None:
            level = self._levels[work.priority] = _Level()
            insort(self._order, work.priority)
        work.queued = True
        self.length += 1
        self.rows += work.rows
        level.push(work, front)

    def drop(self, work: Work) -> None:
        """Take one out of turn (expired, cancelled); its place in the lines is cleared as they move."""
        if work.queued:
            work.queued = False
            self.length -= 1
            self.rows -= work.rows
            if not self.length:
                self._clear()
            else:
                self._levels[work.priority].stale()

    def take(self, limit: int) -> list[Work]:
        """The next batch: up to `limit` rows that may share a call, or one request alone, whatever its rows."""
        batch: list[Work] = []
        rows = 0
        key: Key | None = None
        for priority in self._order:
            level = self._levels[priority]
            level.sweep()
            if key is None:
                first = level.first()
                if first is None:
                    continue
                self._taken(first, batch)
                if first.alone or first.rows >= limit:
                    break
                key, rows = first.key, first.rows
            for work in level.alike(key, limit - rows):
                self._taken(work, batch)
                rows += work.rows
        if not self.length:
            self._clear()
        return batch

    def rows_before(self, priority: int) -> int:
        """Rows that will be served before a new request of this priority."""
        if not self._order or self._order[-1] <= priority:
            return self.rows
        return sum(work.rows for work in self if work.priority <= priority)

    def _taken(self, work: Work, batch: list[Work]) -> None:
        work.queued = False
        self.length -= 1
        self.rows -= work.rows
        batch.append(work)
        self._levels[work.priority].stale()

    def _clear(self) -> None:
        self._levels.clear()
        self._order.clear()
        self.rows = 0


class _Level:
    """One priority's lines. Work that left out of turn stays in them until it comes to the front, or until half of them is such work."""

    __slots__ = ("_alike", "_stale", "line")

    def __init__(self) -> None:
        self.line: deque[Work] = deque()
        self._alike: dict[Key, deque[Work]] = {}
        self._stale = 0

    def stale(self) -> None:
        """One more has left; swept before the next batch is made, never while one is."""
        self._stale += 1

    def sweep(self) -> None:
        if self._stale > 64 and self._stale * 2 > len(self.line):
            self.line = deque(work for work in self.line if work.queued)
            self._alike.clear()
            for work in self.line:
                if not work.alone:
                    self._alike.setdefault(work.key, deque()).append(work)
            self._stale = 0

    def push(self, work: Work, front: bool) -> None:
        lines = [self.line] if work.alone else [self.line, self._alike.setdefault(work.key, deque())]
        for line in lines:
            if front:
                line.appendleft(work)
            else:
                line.append(work)

    def first(self) -> Work | None:
        while self.line:
            work = self.line.popleft()
            if work.queued:
                return work
        return None

    def alike(self, key: Key, rows: int) -> Iterator[Work]:
        line = self._alike.get(key)
        while line:
            work = line[0]
            if work.queued:
                if work.rows > rows:
                    return
                rows -= work.rows
                yield work
            line.popleft()
        self._alike.pop(key, None)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a batch of one kind lies in the arena: the message that says so, the padding behind each input, and the bytes up to there."""

    message: bytes
    pads: tuple[bytes, ...]
    payload: int
    end: int


class Planner:
    """Plans of recent kinds of batches; dynamic shapes make many kinds, so the oldest go."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Any, Plan] = OrderedDict()

    def plan(self, batch: list[Work], rows: int, texts_out: bool) -> Plan:
        """`texts_out`: the version has BYTES outputs, which only the runner can cut into each request's part."""
        first = batch[0]
        outputs = wanted(batch)
        sizes = None
        if any(item[1] == BYTES for item in first.key):
            sizes = [sum(size_of(work.request.inputs[i].data) for work in batch) for i in range(len(first.key))]
        parts = [work.rows for work in batch] if texts_out and len(batch) > 1 else None
        if sizes is not None or parts is not None:
            return _planned(first, rows, outputs, sizes, parts)
        kind = (first.key, first.alone, rows, outputs)
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = _planned(first, rows, outputs, None, None)
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return plan


def _planned(first: Work, rows: int, outputs: tuple[str, ...] | None, sizes: list[int] | None, parts: list[int] | None) -> Plan:
    inputs: list[tuple[str, str, tuple[int, ...], int, int]] = []
    pads: list[bytes] = []
    offset = payload = 0
    for index, (name, datatype, shape) in enumerate(first.key):
        whole = shape if first.alone else (rows, *shape)
        size = sizes[index] if sizes is not None and datatype == BYTES else math.prod(whole) * DATATYPE_SIZES[datatype]
        inputs.append((name, datatype, whole, offset, size))
        pads.append(padding(size))
        payload += size
        offset = aligned(offset + size)
    return Plan(orjson.dumps([inputs, outputs, offset, parts]), tuple(pads), payload, offset)


def wanted(batch: list[Work]) -> tuple[str, ...] | None:
    """The outputs that the batch must compute: all, or those that any request of it named."""
    first = batch[0].request.outputs
    if len(batch) == 1 or all(work.request.outputs == first for work in batch):
        return first
    names: dict[str, None] = {}
    for work in batch:
        if work.request.outputs is None:
            return None
        names.update(dict.fromkeys(work.request.outputs))
    return tuple(names)


def gather(batch: list[Work], plan: Plan) -> list[Buffer]:
    """The batch's buffers in arena order: each input's rows of all requests, then its padding."""
    buffers: list[Buffer] = []
    for index, pad in enumerate(plan.pads):
        buffers += [work.request.inputs[index].data for work in batch]
        if pad:
            buffers.append(pad)
    return buffers


class Sizes:
    """Bytes per row of each input of recent kinds of requests, to check a request at the cost of a look-up."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[int, ...]] = {}

    def check(self, inputs: list[Tensor], key: Key, rows: int) -> None:
        """Raise InvalidRequest where bytes are not what the shape says: one wrong size would shift its batch-mates."""
        sizes = self._known.get(key)
        if sizes is None:
            if len(self._known) >= _KEPT_PLANS:
                self._known.clear()
            sizes = self._known[key] = tuple([_row_size(*item) for item in key])
        for tensor, size in zip(inputs, sizes, strict=True):
            data = tensor.data
            given = len(data) if type(data) is bytes else size_of(data)
            if given != size * rows and size >= 0:
                raise InvalidRequest(
                    f"input {tensor.name!r}: shape {list(tensor.shape)} of {tensor.datatype} takes {size * rows} bytes, not {given}"
                )


def _row_size(name: str, datatype: str, shape: tuple[int, ...]) -> int:
    if datatype == BYTES:
        return -1
    if datatype not in DATATYPE_SIZES:
        raise InvalidRequest(f"input {name!r}: datatype {datatype!r} is unknown; it is one of {', '.join(DATATYPE_SIZES)}, {BYTES}")
    return math.prod(shape) * DATATYPE_SIZES[datatype]


Described: TypeAlias = tuple[str, str, list[int], int, int, list[int] | None]


def split(batch: list[Work], described: list[Described], data: bytes, rows: int) -> list[list[Tensor]] | None:
    """Each request's outputs, as slices of `data`; None where an output has not one row for each input row (rows are not independent)."""
    view = memoryview(data)
    if len(batch) == 1:
        tensors = [Tensor(name, datatype, tuple(shape), view[at : at + size]) for name, datatype, shape, at, size, _ in described]
        return [_asked(batch[0], tensors)]
    answers: list[list[Tensor]] = [[] for _ in batch]
    for name, datatype, shape, at, size, parts in described:
        if not shape or shape[0] != rows:
            return None
        tail = tuple(shape[1:])
        per_row = size // rows
        for index, work in enumerate(batch):
            part = per_row * work.rows if parts is None else parts[index]
            answers[index].append(Tensor(name, datatype, (work.rows, *tail), view[at : at + part]))
            at += part
    return [_asked(work, tensors) for work, tensors in zip(batch, answers, strict=True)]


def _asked(work: Work, tensors: list[Tensor]) -> list[Tensor]:
    names = work.request.outputs
    if names is None:
        return tensors
    by_name = {tensor.name: tensor for tensor in tensors}
    return [by_name[name] for name in names]
