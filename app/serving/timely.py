"""Who is served first while more comes than can be answered as promised: those who can still be answered in time.

In order of arrival everybody would wait for as long as the queue is, and nobody be in time. So who has waited too long is passed by those
who have not, and is answered when nobody in time waits, in calls that stay short, and by each eighth call; where the queue is full, the one
who is late longest makes room. Nothing is refused that would not have been, and whoever is in time is served in order of arrival. (Dropping
at the head and serving the newest first under overload: Maurer, "Fail at Scale", ACM Queue 13(8), 2015; Nichols and Jacobson, "Controlling
Queue Delay", ACM Queue 10(5), 2012.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from app.serving.batcher import Queue, Work

PRESSED_S: Final = 1.0
"""So long after somebody fell behind, half of the time that an answer may wait is kept for what calls take beyond what is expected."""
SPARE: Final = 0.5
LATE_SHARE: Final = 0.125
"""Of what is promised, the most that a call takes which is made or made larger for those that are late."""
LATE_TURN: Final = 8
"""Each eighth call is for who is late: else, where callers wait for their answers before they ask again, the first one in time would be served for
ever and the others never, and who looks at the answers alone would see nothing wrong."""


class Timely:
    """What is promised to one version's callers: an answer within `patience_s`, infinite where nothing is."""

    __slots__ = ("_passed", "_pressed_until", "patience_s")

    def __init__(self) -> None:
        self.patience_s = math.inf
        self._pressed_until = -math.inf
        self._passed = 0
        """Calls in a row that passed somebody who is late."""

    def take(self, queue: Queue, limit: int, rows_within: Callable[[float, int], int]) -> list[Work]:
        """The next batch of `queue` (`Queue.take`), by turns for those who are late, who also join a call that stays short: `rows_within` says of
        seconds and a limit how many rows that are."""
        fill = rows_within(self.late_call_s, limit) if queue.late else 0
        batch = queue.take(limit, self._passed >= LATE_TURN - 1, fill)
        self._passed = self._passed + 1 if queue.late and not any(work.late for work in batch) else 0
        return batch

    @property
    def late_call_s(self) -> float:
        """How long a call may take for the sake of those that are late anyway: who comes while it runs waits for its end."""
        return self.patience_s * LATE_SHARE

    def sort_out(self, queue: Queue, call_s: Callable[[int], float], now: float) -> None:
        """Let those fall behind who would be answered too late, `call_s` being the expected seconds of a call with so many rows."""
        if self.patience_s == math.inf:
            return
        for head in queue.heads():
            late: Work | None = head
            while late is not None and self._late(late, call_s(late.rows), now):
                self._pressed_until = now + PRESSED_S
                level = late.level
                queue.fall_behind(late)
                late = next((other for other in queue.heads() if other.level == level), None)

    def makes_room(self, queue: Queue, rows: int, call_s: Callable[[int], float]) -> Work | None:
        """Who makes room for a request of `rows` rows that can be in time, where the queue is full; None: nobody."""
        return queue.oldest_late() if call_s(rows) < self.patience_s else None

    def _late(self, work: Work, call_s: float, now: float) -> bool:
        """False where not even a call by itself is as quick as promised: nobody is in time then."""
        may_wait_s = self.patience_s - call_s
        waited_s = now - (work.request.received_at or work.enqueued_at)
        return may_wait_s > 0 and waited_s > may_wait_s * (SPARE if now < self._pressed_until else 1.0)
