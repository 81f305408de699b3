"""How long batches of a version take here, learned from each one: for deadlines, Retry-After, fair shares, and to know the absurd.

Buckets are powers of two of rows. Pure arithmetic; `now` comes in as an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_SHARE: Final = 0.1
_BUCKETS: Final = 24
ENOUGH: Final = 5
"""Batches seen before a refusal may rest on the average."""
STALE_S: Final = 2.0
"""After this long without a batch the average may be of other times: one request is let in to find out."""


class Rates:
    """Exponentially weighted averages per bucket, and the worst CPU time seen in each."""

    def __init__(self) -> None:
        self.batches = 0
        self.last_at = 0.0
        self._wall_s = [0.0] * _BUCKETS
        self._cpu_s = [0.0] * _BUCKETS
        self._seen = [0] * _BUCKETS
        self._most = 0
        """Buckets up to the largest seen."""
        self._worst_cpu_s = [0.0] * _BUCKETS
        self._worst_wall_s = [0.0] * _BUCKETS
        self.slowest_s = 0.0
        """The largest of the averages: no call is expected to take longer, whatever its rows were seen to be."""

    def learn(self, rows: int, wall_s: float, cpu_s: float, now: float) -> None:
        bucket = _bucket(rows)
        seen = self._seen[bucket]
        share = max(_SHARE, 1 / (seen + 1))
        self._wall_s[bucket] += (wall_s - self._wall_s[bucket]) * share
        self._cpu_s[bucket] += (cpu_s - self._cpu_s[bucket]) * share
        self._worst_cpu_s[bucket] = max(self._worst_cpu_s[bucket], cpu_s)
        self._worst_wall_s[bucket] = max(self._worst_wall_s[bucket], wall_s)
        self._seen[bucket] = seen + 1
        self._most = max(self._most, bucket + 1)
        self.slowest_s = max(self._wall_s)
        self.batches += 1
        self.last_at = now

    def wall_s(self, rows: int) -> float:
        """Expected seconds of a call with so many rows; 0.0 while nothing is known. Unseen sizes go by the nearest one seen."""
        return self._wall(rows, in_part=False)

    def least_wall_s(self, rows: int) -> float:
        """What a call with so many rows takes at least: as long as the largest one seen that is no larger; 0.0 where none was.

        Small calls are mostly overhead: a thousand rows need not take a thousand times as long as one, and who is refused for that never shows it.
        """
        for bucket in range(_bucket(rows), -1, -1):
            if self._seen[bucket]:
                return self._wall_s[bucket]
        return 0.0

    def reaches(self, rows: int) -> bool:
        """Whether a call as large as this, or larger, was seen."""
        return any(self._seen[_bucket(rows) :])

    def cpu_s(self, rows: int) -> float:
        """Expected CPU seconds of a call with so many rows."""
        return self._nearest(self._cpu_s, rows)

    def worst_cpu_s(self, rows: int) -> float:
        return self._nearest(self._worst_cpu_s, rows)

    def worst_wall_s(self, rows: int) -> float:
        return self._nearest(self._worst_wall_s, rows)

    def drain_s(self, rows: int, limit: int, lanes: int) -> float:
        """Seconds until so many queued rows have been served, in batches of `limit` on `lanes` instances. Where only larger calls were seen, whose
        requests bring more rows than a batch takes, a row costs what it does in those."""
        return _drained(rows, limit, lanes, lambda size: self._wall(size, in_part=True))

    def least_drain_s(self, rows: int, limit: int, lanes: int) -> float:
        """As `drain_s`, by what is known to be needed."""
        return _drained(rows, limit, lanes, self.least_wall_s)

    def rows_within(self, seconds: float, limit: int) -> int:
        """The most rows, at least one, whose expected CPU time stays within `seconds`."""
        rows = limit
        while rows > 1 and self.cpu_s(rows) > seconds:
            rows //= 2
        return rows

    def _wall(self, rows: int, in_part: bool) -> float:
        """No more than larger calls take: under load there are no small ones, and what the last of them took may be of a bad moment long ago."""
        wall_s = self._nearest(self._wall_s, rows, in_part)
        for bucket in range(_bucket(rows) + 1, self._most):
            if self._seen[bucket] and self._wall_s[bucket] < wall_s:
                wall_s = self._wall_s[bucket]
        return wall_s

    def _nearest(self, values: list[float], rows: int, in_part: bool = False) -> float:
        bucket = _bucket(rows)
        if self._seen[bucket]:
            return values[bucket]
        for distance in range(1, _BUCKETS):
            if bucket - distance >= 0 and self._seen[bucket - distance]:
                return values[bucket - distance] * float(1 << distance)
            if bucket + distance < _BUCKETS and self._seen[bucket + distance]:
                return values[bucket + distance] / (1 << distance if in_part else 1)
        return 0.0


def _drained(rows: int, limit: int, lanes: int, wall_s: Callable[[int], float]) -> float:
    if rows <= 0:
        return 0.0
    size = min(rows, max(1, limit))
    return wall_s(size) * (rows / size) / max(1, lanes)


def _bucket(rows: int) -> int:
    return min(_BUCKETS - 1, max(0, rows - 1).bit_length())
