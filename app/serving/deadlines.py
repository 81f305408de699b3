"""Deadlines of one version's requests: refused at once where they cannot be met, answered the moment they pass. Never ends a runner.

One timer serves all: armed for the earliest. It knows requests and rates, not runners.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from time import monotonic

from app.domain import RuntimeSettings
from app.errors import CannotMeetDeadline, DeadlineExceeded
from app.serving.batcher import Queue, Work
from app.serving.rates import ENOUGH, STALE_S, Rates


def check(work: Work, queue: Queue, rates: Rates, settings: RuntimeSettings, now: float) -> None:
    """Raise DeadlineExceeded where it has passed, CannotMeetDeadline where what is queued before it leaves no time.

    Never without data: some batches must have been measured, the last of them lately.
    """
    if work.deadline is None:
        return
    left_s = work.deadline - now
    if left_s <= 0:
        raise DeadlineExceeded("the deadline had passed before the request was queued")
    if rates.batches < ENOUGH or now - rates.last_at > STALE_S:
        return
    before = queue.rows_before(work.priority)
    if rates.slowest_s * (before + 1) < left_s:
        return  # even if each row before it were a call of the slowest kind
    needed_s = rates.least_drain_s(before, settings.batch_limit, settings.instances) + rates.least_wall_s(work.rows)
    if needed_s > left_s:
        raise CannotMeetDeadline(
            f"{before} rows are before this request and it would take {needed_s * 1e3:.1f} ms or more; its deadline is in {left_s * 1e3:.1f} ms"
        )


class Deadlines:
    """`waiting` lists all work not yet answered; `drop` takes one out of the queue."""

    def __init__(self, loop: asyncio.AbstractEventLoop, waiting: Callable[[], Iterable[Work]], drop: Callable[[Work], None]) -> None:
        self._loop = loop
        self._waiting = waiting
        self._drop = drop
        self._timer: asyncio.TimerHandle | None = None
        self._at = 0.0

    def watch(self, deadline: float) -> None:
        """Look again when this deadline passes, at the latest."""
        if self._timer is not None:
            if deadline >= self._at:
                return
            self._timer.cancel()
        self._at = deadline
        self._timer = self._loop.call_later(max(0.0, deadline - monotonic()), self._look)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        now = monotonic()
        earliest: float | None = None
        for work in list(self._waiting()):
            if work.deadline is None or work.future.done():
                continue
            if work.deadline <= now:
                place = "queued" if work.queued else "running"
                waited_ms = (now - work.enqueued_at) * 1e3
                self._drop(work)
                work.fail(DeadlineExceeded(f"the deadline passed while the request was {place} ({waited_ms:.0f} ms)"))
            elif earliest is None or work.deadline < earliest:
                earliest = work.deadline
        if earliest is not None:
            self.watch(earliest)
