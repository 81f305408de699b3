"""Continuous batching, as plain data: which queued requests share the next call, and who is next.

A free instance takes at once what is queued, up to the batch limit; no timer (design 2). It knows no sockets, processes or event loop;
who is too late to be answered as promised is told from outside (`timely.py`), and is served when nobody in time waits.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from typing import Final, TypeAlias

from app.domain import InferenceRequest, InferenceResult, Tensor
from app.errors import HoneError

DEFAULT_PRIORITY: Final = 5
"""The level of requests that name none (0): below 1 to 4, above 6 and on."""

Key: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, datatype and shape without the rows of each input: equal keys may share a call."""


class Work:
    """One request on its way through a version. `alone` forbids company; `tries` counts calls that were lost with their runner.

    `level` is the line that it waits in: of its priority, and behind all of that priority once it is late.
    """

    __slots__ = ("alone", "deadline", "enqueued_at", "future", "key", "level", "priority", "queue_s", "queued", "request", "rows", "tries")

    def __init__(
        self, request: InferenceRequest, key: Key, rows: int, alone: bool, future: asyncio.Future[InferenceResult], now: float
    ) -> None:
        self.request = request
        self.key = key
        self.rows = rows
        self.alone = alone
        self.future = future
        self.priority = request.priority or DEFAULT_PRIORITY
        self.level = 2 * self.priority
        self.deadline = request.deadline
        self.enqueued_at = now
        self.queue_s = 0.0
        self.queued = False
        self.tries = 0

    @property
    def late(self) -> bool:
        return bool(self.level & 1)

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
    """Waiting work: by priority, those in time before those that are late, then in order of arrival; each batch is made around the one
    that has waited longest of the first of these.

    Every piece of work is in its level's line and, unless alone, in its key's line; `queued` says whether it is still to be taken.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._order: list[int] = []
        self.length = 0
        self.rows = 0
        self.late = 0
        self.late_rows = 0
        self.callers: dict[str, int] = {}
        self.caller_rows: dict[str, int] = {}

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Work]:
        return (work for level in self._order for work in self._levels[level].line if work.queued and work.level == level)

    def push(self, work: Work, front: bool = False) -> None:
        work.queued = True
        self.length += 1
        self.rows += work.rows
        self._late(work, 1)
        caller = work.request.caller
        self.callers[caller] = self.callers.get(caller, 0) + 1
        self.caller_rows[caller] = self.caller_rows.get(caller, 0) + work.rows
        self._level(work.level).push(work, front)

    def _level(self, number: int) -> _Level:
        level = self._levels.get(number)
        if level is None:
            level = self._levels[number] = _Level(number)
            insort(self._order, number)
        return level

    def _late(self, work: Work, sign: int) -> None:
        if work.late:
            self.late += sign
            self.late_rows += sign * work.rows

    @property
    def front_rows(self) -> int:
        """Rows of those in time; of all where all are late."""
        return self.rows - self.late_rows or self.rows

    def heads(self) -> list[Work]:
        """Of each priority the one in time that has waited longest."""
        return [head for number in self._order if not number & 1 and (head := self._levels[number].head()) is not None]

    def fall_behind(self, work: Work) -> None:
        """It cannot be answered as promised any more: all of its priority that can go first. It must be one of `heads`."""
        level = self._levels[work.level]
        level.line.popleft()
        level.waiting -= 1
        if not level.waiting:
            self._forget(work.level)
        work.level |= 1
        self._late(work, 1)
        self._level(work.level).push(work, False)

    def oldest_late(self) -> Work | None:
        """Of the last priority that has some the late one that has waited longest."""
        if not self.late:
            return None
        return next((head for number in reversed(self._order) if number & 1 and (head := self._levels[number].head()) is not None), None)

    def drop(self, work: Work) -> None:
        """Take one out of turn (expired, cancelled); its place in the lines is cleared as they move."""
        if work.queued:
            work.queued = False
            self.length -= 1
            self.rows -= work.rows
            self._late(work, -1)
            self._less(work)
            if not self.length:
                self._clear()
            else:
                self._left(work.level)

    def take(self, limit: int, late: bool = False, fill: int = 0) -> list[Work]:
        """The next batch: up to `limit` rows that may share a call, or one request alone, whatever its rows. `late`: of the first priority those
        that are late, where it has some. Those that are late join those in time up to `fill` rows."""
        batch: list[Work] = []
        rows = 0
        key: Key | None = None
        order = [self._order[0] | 1] if late and self._order and self._order[0] | 1 in self._levels else self._order
        for number in order:
            level = self._levels[number]
            most = limit
            if number & 1 and key is not None and not batch[0].late:
                most = min(limit, fill)
                if rows >= most:
                    continue  # who is in time does not wait for a larger call
            level.sweep()
            if key is None:
                first = level.first()
                if first is None:
                    continue
                self._taken(first, batch)
                if first.alone:
                    break
                if first.rows >= limit:
                    level.forget(first.key)
                    break
                key, rows = first.key, first.rows
            for work in level.alike(key, most - rows):
                self._taken(work, batch)
                rows += work.rows
        if not self.length:
            self._clear()
        elif len(self._order) > 1:
            for number in [number for number in self._order if not self._levels[number].waiting]:
                self._forget(number)
        return batch

    def _less(self, work: Work) -> None:
        caller = work.request.caller
        left = self.callers[caller] - 1
        if left > 0:
            self.callers[caller] = left
            self.caller_rows[caller] -= work.rows
        else:
            del self.callers[caller], self.caller_rows[caller]

    def rows_before(self, priority: int) -> int:
        """Rows that will be served before a new request of this priority."""
        if not self._order or self._order[-1] <= 2 * priority:
            return self.rows
        return sum(work.rows for work in self if work.level <= 2 * priority)

    def _taken(self, work: Work, batch: list[Work]) -> None:
        work.queued = False
        self._less(work)
        self.length -= 1
        self.rows -= work.rows
        self._late(work, -1)
        batch.append(work)
        self._levels[work.level].stale()

    def _left(self, number: int) -> None:
        """One of this level is not waited for any more; a level of none goes, for callers may name ever new ones."""
        level = self._levels[number]
        level.stale()
        if not level.waiting:
            self._forget(number)

    def _forget(self, number: int) -> None:
        del self._levels[number]
        del self._order[bisect_left(self._order, number)]

    def _clear(self) -> None:
        self._levels.clear()
        self._order.clear()
        self.rows = self.late = self.late_rows = 0


class _Level:
    """The lines of one priority's timely or late work. Work that left out of turn stays in them until it comes to the front, or until half of them
    is such work."""

    __slots__ = ("_alike", "_number", "_stale", "line", "waiting")

    def __init__(self, number: int) -> None:
        self._number = number
        self.line: deque[Work] = deque()
        self._alike: dict[Key, deque[Work]] = {}
        self._stale = 0
        self.waiting = 0

    def stale(self) -> None:
        """One more has left; swept before the next batch is made, never while one is."""
        self._stale += 1
        self.waiting -= 1

    def sweep(self) -> None:
        if self._stale > 64 and self._stale * 2 > len(self.line):
            self.line = deque(work for work in self.line if self._waits(work))
            self._alike.clear()
            for work in self.line:
                if not work.alone:
                    self._alike.setdefault(work.key, deque()).append(work)
            self._stale = 0

    def push(self, work: Work, front: bool) -> None:
        self.waiting += 1
        lines = [self.line] if work.alone else [self.line, self._alike.setdefault(work.key, deque())]
        for line in lines:
            if front:
                line.appendleft(work)
            else:
                line.append(work)

    def _waits(self, work: Work) -> bool:
        return work.queued and work.level == self._number

    def head(self) -> Work | None:
        """The one that has waited longest; it stays."""
        while self.line:
            if self._waits(self.line[0]):
                return self.line[0]
            self.line.popleft()
        return None

    def first(self) -> Work | None:
        return self.line.popleft() if self.head() is not None else None

    def forget(self, key: Key) -> None:
        """Let go of what was taken from the front of this key's line: it may hold large bodies, which would all be freed when the queue is empty."""
        line = self._alike.get(key)
        while line and not self._waits(line[0]):
            line.popleft()
        if not line:
            self._alike.pop(key, None)

    def alike(self, key: Key, rows: int) -> Iterator[Work]:
        line = self._alike.get(key)
        while line:
            work = line[0]
            if self._waits(work):
                if work.rows > rows:
                    return
                rows -= work.rows
                yield work
            line.popleft()
        self._alike.pop(key, None)
