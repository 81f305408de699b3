"""Who may still queue: a full queue, one caller's flood, and who makes room where somebody in it is late already."""

from __future__ import annotations

from typing import Final

from app.domain import RuntimeSettings
from app.errors import CallerLimited, QueueFull
from app.serving.batcher import Queue, Work
from app.serving.rates import Rates
from app.serving.timely import Timely

FLOOD: Final = 8
"""So many requests may wait for any caller, whatever share of the queue they are."""


class Room:
    """Of one version's queue. `caller_share`: how much of what waits may be one caller's until half of what is promised."""

    def __init__(self, name: str, queue: Queue, timely: Timely, rates: Rates, settings: RuntimeSettings) -> None:
        self.caller_share = 1.0
        self.settings = settings
        self._name, self._queue, self._timely, self._rates = name, queue, timely, rates

    def drain_s(self, rows: int) -> float:
        """Seconds until so many rows have been served."""
        return self._rates.drain_s(rows, self.settings.batch_limit, self.settings.instances)

    def look(self) -> None:
        """Raise QueueFull where one more request would be refused, whatever it asks."""
        if self._queue.length >= self.settings.queue_limit and not self._queue.late:
            raise self._full()

    def share(self, caller: str) -> None:
        """Raise CallerLimited for one who has most of what waits already: others are served as ever. From a queue that is half full on, and where more
        than `caller_share` is its own as soon as the rest would wait for half as long as is promised, which is before the ladder costs them quality."""
        held, length, callers = self._queue.callers.get(caller, 0), self._queue.length, len(self._queue.callers)
        if held < FLOOD or callers < 2 or 2 * held <= length:
            return
        full = 2 * length >= self.settings.queue_limit
        if not full and (held <= self.caller_share * length or self.drain_s(self._queue.rows) <= self._timely.patience_s / 2):
            return
        raise CallerLimited(
            f"this caller has {held} of the {length} requests that wait for {self._name}; retry later: others share its queue",
            retry_after_s=min(60.0, max(0.05, self.drain_s(held))),
        )

    def make(self, work: Work) -> None:
        """Where the queue is full the one who is late longest goes, with QueueFull; raised for `work` where nobody may."""
        if self._queue.length < self.settings.queue_limit:
            return
        late, error = self._timely.makes_room(self._queue, work.rows, self._rates.wall_s), self._full()
        if late is None:
            raise error
        self._queue.drop(late)
        late.fail(error)

    def _full(self) -> QueueFull:
        length, limit = self._queue.length, self.settings.queue_limit
        return QueueFull(
            f"the queue of {self._name} is full: {length} of {limit} requests wait; retry later or raise queue_limit",
            retry_after_s=min(60.0, max(0.05, self.drain_s(self._queue.rows))),
        )
