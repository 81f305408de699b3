"""How a batch lies in shared memory, and whose output is whose: joining is listing buffers, splitting is slicing.

It knows no sockets and no order of service.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import orjson

from app.domain import BYTES, DATATYPE_SIZES, Buffer, Tensor
from app.errors import InvalidRequest
from app.serving.batcher import Key, Work
from app.serving.shm import aligned, padding, size_of

_KEPT_PLANS: Final = 256


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
