"""When a runner is asked to give freed memory back, and when a fresh one takes its place since it grew past its bound. Pure; it reads no memory."""

from __future__ import annotations

from typing import Final

LOOK_S: Final = 2.0
TRIM_IDLE_S, TRIM_BUSY_S = 2.0, 30.0
RECYCLE_S: Final = 60.0
SLACK_BYTES: Final = 64 << 20
"""A runner may hold this much more than after its warm-up before it is asked to give freed memory back."""
REST_S: Final = 30.0
"""After so long without a request a runner gives back what only batches need: it is there again after the first one (1 to 2 ms for a small model)."""
UNASKED_REST_S: Final = 1.0
"""The same where only Hone itself has asked since it was loaded, or since it last gave back: many models are loaded, few are asked."""


class Upkeep:
    """Of one engine. Bytes are those that the runner holds alone."""

    __slots__ = ("_looked_at", "_recycled_at", "_trimmed_at", "asked")

    def __init__(self) -> None:
        self.asked = False
        """Somebody other than Hone asked since the runner last gave back what only batches need."""
        self._looked_at = 0.0
        self._trimmed_at = -TRIM_BUSY_S
        self._recycled_at = -RECYCLE_S

    def due(self, busy: bool, now: float) -> bool:
        """Whether to look at its memory now: each few seconds, and whenever it has nothing to do."""
        if busy and now - self._looked_at <= LOOK_S:
            return False
        self._looked_at = now
        return True

    def trims(self, used: int, settled: int, busy: bool, now: float) -> bool:
        """`settled`: what it held after its warm-up."""
        if used <= settled + SLACK_BYTES or now - self._trimmed_at <= (TRIM_BUSY_S if busy else TRIM_IDLE_S):
            return False
        self._trimmed_at = now
        return True

    def rest_s(self) -> float:
        """How long a runner without work keeps what only batches need."""
        return REST_S if self.asked else UNASKED_REST_S

    def recycles(self, used: int, limit: int, now: float) -> bool:
        """`limit`: 0 for none."""
        if not limit or used <= limit or now - self._recycled_at <= RECYCLE_S:
            return False
        self._recycled_at = now
        return True
