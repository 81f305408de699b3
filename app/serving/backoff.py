"""When a version that failed may be tried again, and what its failure is an answer to."""

from __future__ import annotations

from time import monotonic
from typing import Final

RETRY_FIRST_S: Final = 2.0
RETRY_MOST_S: Final = 300.0


class Backoff:
    """Growing waits per version, forgotten when anything about it changed (its identity)."""

    def __init__(self) -> None:
        self._failed: dict[str, tuple[object, int, float]] = {}
        self._generations: dict[str, int] = {}

    def blocked(self, version: str, identity: object) -> bool:
        known = self._failed.get(version)
        return known is not None and known[0] == identity and monotonic() < known[2]

    def failed(self, version: str, identity: object, generation: int) -> int:
        """Note a failure while `generation` was wanted; returns how many in a row."""
        known = self._failed.get(version)
        count = known[1] + 1 if known is not None and known[0] == identity else 1
        self._failed[version] = (identity, count, monotonic() + min(RETRY_MOST_S, RETRY_FIRST_S * 2 ** (count - 1)))
        self._generations[version] = generation
        return count

    def failed_for(self, version: str, generation: int) -> bool:
        """Whether the last failure came when `generation`, or a later one, was wanted: an earlier one's is no answer to who asks now."""
        return self._generations.get(version, -1) >= generation

    def forget(self, version: str) -> None:
        self._failed.pop(version, None)
