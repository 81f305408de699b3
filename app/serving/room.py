"""Who may still queue: a full queue, one caller's flood, and who makes room where somebody in it is late already."""

from __future__ import annotations

import math
from collections import deque
from time import monotonic
from typing import Final

from app.domain import OWN, RuntimeSettings
from app.errors import CallerLimited, QueueFull
from app.serving.batcher import Queue, Work
from app.serving.rates import Rates
from app.serving.timely import Timely

FLOOD: Final = 8
"""So many requests may wait for any caller, whatever share of the queue they are, unless their rows are many."""
FLOOD_PATIENCE: Final = 0.25
"""Of the time that is promised, what one caller's flood may wait: what runs already, and the other's own call, take their part of it too."""
OVERRUN_S: Final = 1.0
"""So long after somebody was refused for want of room more is asked than can be answered."""
OTHERS_S: Final = 2.0
"""Who came and came again so lately is kept room for, though nothing of theirs waits at this moment."""


class Room:
    """Of one version's queue. `caller_share`: how much of what waits may be one caller's until half of what is promised."""

    def __init__(self, name: str, queue: Queue, timely: Timely, rates: Rates, settings: RuntimeSettings) -> None:
        self.caller_share = 1.0
        self.settings = settings
        self._refused_at = -math.inf
        self._caller = ""
        self._changes: deque[float] = deque(maxlen=3)
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
        than `caller_share` (of requests or of rows) is its own as soon as the rest would wait for a quarter of what is promised, which is before the
        ladder costs them quality."""
        if caller == OWN:
            return
        if caller != self._caller:
            self._changes.append(monotonic())
            self._caller = caller
        queue = self._queue
        held, length = queue.callers.get(caller, 0), queue.length
        if not held or not self._shared():
            return
        rows, long_s = queue.caller_rows[caller], FLOOD_PATIENCE * self._timely.patience_s
        most = max(held / length, rows / queue.rows)
        full = held >= FLOOD and 2 * held > length and 2 * length >= self.settings.queue_limit
        long = most > self.caller_share and self.drain_s(queue.rows) > long_s and (held >= FLOOD or self.drain_s(rows) > long_s)
        if full or long:
            self._refused_at = monotonic()
            raise CallerLimited(
                f"this caller has {held} of the {length} requests that wait for {self._name}; retry later: others share its queue",
                retry_after_s=min(60.0, max(0.05, self.drain_s(rows))),
            )

    def _shared(self) -> bool:
        """Somebody else waits too, or came between this caller's requests more than once: a prober now and then is nobody to keep room for."""
        if len(self._queue.callers) - (OWN in self._queue.callers) > 1:
            return True
        return len(self._changes) == self._changes.maxlen and monotonic() - self._changes[0] <= OTHERS_S

    def make(self, work: Work) -> None:
        """Where the queue is full the one who is late longest goes, with QueueFull; raised for `work` where nobody may."""
        if self._queue.length < self.settings.queue_limit:
            return
        late, error = self._timely.makes_room(self._queue, work.rows, self._rates.wall_s), self._full()
        if late is None:
            raise error
        self._queue.drop(late)
        late.fail(error)

    def overrun(self, now: float) -> bool:
        """Whether more is asked than it can answer."""
        return now - self._refused_at < OVERRUN_S

    def _full(self) -> QueueFull:
        self._refused_at = monotonic()
        length, limit = self._queue.length, self.settings.queue_limit
        return QueueFull(
            f"the queue of {self._name} is full: {length} of {limit} requests wait; retry later or raise queue_limit",
            retry_after_s=min(60.0, max(0.05, self.drain_s(self._queue.rows))),
        )
