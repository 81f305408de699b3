"""When a version's second session, whose calls take all cores, is worth the memory that it holds: after enough calls that found nobody else.

It knows neither sessions nor cores; it counts.
"""

from __future__ import annotations

from typing import Final

LONE_CALLS: Final = 16
LONE_WITHIN_S: Final = 60.0
"""So many calls that found nobody else, within this time, open the second session: it holds the weights again, so it must be of use."""


class LoneCalls:
    """Calls that found nobody else, of one runner."""

    __slots__ = ("_count", "_since")

    def __init__(self) -> None:
        self._count = 0
        self._since = 0.0

    def another(self, now: float) -> bool:
        """Count one more; true at the one that makes them enough, and never again."""
        if self._count > LONE_CALLS:
            return False
        if not self._count or now - self._since > LONE_WITHIN_S:
            self._count, self._since = 0, now
        self._count += 1
        return self._count > LONE_CALLS
