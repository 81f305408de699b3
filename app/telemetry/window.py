"""What each version did lately: blocks of a few seconds with sketches and counts, cheap enough for every request (about 4 µs).

It records and merges; what is normal, suspicious or promised is app.control's to say. All times are seconds of time.monotonic().
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

from app.domain import Observation
from app.telemetry.block import Block, Cost, Totals, bucket_of
from app.telemetry.likeness import Row

BLOCK_S: Final = 5.0
KEPT_BLOCKS: Final = 150
"""Twelve minutes of blocks of five seconds: as long as a canary or a watch looks back. A busy version's block takes some 40 KB."""
KEPT_MINUTES: Final = 360
"""Six hours of counts by the minute: the longest window of a burn rate."""
PHASES_S: Final = 60.0
ENOUGH: Final = 20
"""Requests, or calls, of which a stretch tells something: its quantiles, its costs."""
GATHERED_S: Final = 60.0
"""Blocks with fewer are gathered until they hold enough, or for so long: what one request in two seconds costs is known after a minute."""
KEPT_GATHERED: Final = 4
KEPT_CALLS: Final = 8
"""Ends of the newest calls: of so many that run at once the rest before each is told."""
LEAST_CPU_S: Final = 1e-6
SERVER_FAULTS: Final = frozenset({500, 502, 503})
EXPIRED: Final = 504


class Track:
    """The blocks of one version, the one that runs last."""

    __slots__ = ("_block_s", "_ends", "_gathering", "_rested_s", "before", "blocks", "gathered", "open")

    def __init__(self, now: float, block_s: float) -> None:
        self._block_s = block_s
        self.blocks: deque[Block] = deque(maxlen=KEPT_BLOCKS)
        self.open = Block(now, now + block_s)
        self.before = Totals()
        self._ends: deque[float] = deque(maxlen=KEPT_CALLS)
        self._rested_s = math.inf
        self.gathered: deque[Block] = deque(maxlen=KEPT_GATHERED)
        """The newest stretches with enough requests: a busy version's are its blocks."""
        self._gathering: Block | None = None

    @property
    def began(self) -> float:
        return (self.blocks[0] if self.blocks else self.open).began

    def at(self, now: float) -> Block:
        """The block that `now` falls into; those that ended before are closed."""
        if now >= self.open.ended:
            self._close()
            missed = int((now - self.open.ended) // self._block_s)
            began = self.open.ended + missed * self._block_s
            self.open = Block(began, began + self._block_s)
        return self.open

    def cut(self, now: float) -> None:
        """End the open block here, so that what follows is counted apart from what was."""
        block = self.at(now)
        if block.began < now:
            block.ended = now
            self._close()
            self.open = Block(now, now + self._block_s)

    def afresh(self, now: float) -> None:
        """End the open block here, and gather from here on."""
        self.cut(now)
        self.gathered.clear()
        self._gathering = None

    def _close(self) -> None:
        self.before = self.before.plus(self.open)
        self.blocks.append(self.open)
        self._gather()

    def _gather(self) -> None:
        closed, before = self.open, self._gathering
        if closed.disturbed and closed.offered < ENOUGH:
            return  # what Hone itself does now and then is not to spoil a whole minute
        whole = closed
        if before is not None and closed.began - before.ended <= 2 * self._block_s and closed.offered < ENOUGH:
            whole = Block(before.began, closed.ended)
            whole.merge(before)
            whole.merge(closed)
        enough = closed.offered >= ENOUGH or min(whole.offered, whole.calls) >= ENOUGH
        self._gathering = None if enough or whole.seconds >= GATHERED_S else whole
        if self._gathering is None:
            self.gathered.append(whole)

    def rested_s(self, began: float, ended: float) -> float:
        """Note a call, and tell how long the one before it had been over; of calls that run beside others, what that was for the first of them."""
        self._rested_s = min((began - end for end in self._ends if end <= began), default=self._rested_s)
        self._ends.append(ended)
        return self._rested_s

    def since(self, began: float, now: float, sketches: bool = True) -> Block:
        """All blocks that began at or after `began`, merged, the open one with them."""
        merged, opened = Block(began, now), self.at(now)  # first: it may close a block
        for block in (*self.blocks, opened):
            if block.began >= began and block.offered + block.failed_calls + block.calls + block.compared + block.deaths + block.labelled:
                merged.merge(block, sketches)
        merged.began, merged.ended = began, now
        return merged

    def closed(self, count: int, now: float) -> list[Block]:
        """The newest `count` closed blocks, the oldest first."""
        self.at(now)
        return list(self.blocks)[-count:]

    def all_closed(self, now: float) -> list[Block]:
        """All closed blocks, and what was made of them (a block may come twice)."""
        self.at(now)
        return [*self.blocks, *self.gathered, *([self._gathering] if self._gathering is not None else [])]

    def told(self, count: int, since: float, now: float) -> list[Block]:
        """The newest `count` gathered stretches that began at `since` or later and followed each other, the oldest first.

        None once they are older than the next one ought to be: then less comes, or nobody asks any more. What was gathered from before `since` on
        is dropped.
        """
        self.at(now)
        if self._gathering is not None and self._gathering.began < since:
            self._gathering = None
        found: list[Block] = []
        ends = now
        for block in reversed(self.gathered):
            if block.began < since or ends - block.ended > block.seconds + self._block_s:
                break
            found.insert(0, block)
            ends = block.began
        return found[-count:]


class Window:
    """All tracks of one server. Recording methods run on the event loop; reading ones are called there as well."""

    def __init__(self, block_s: float = BLOCK_S, clock: Callable[[], float] = monotonic) -> None:
        self.block_s = block_s
        self.tracks: dict[tuple[str, str], Track] = {}
        self.minutes: dict[str, deque[list[int]]] = defaultdict(lambda: deque(maxlen=KEPT_MINUTES))
        """Per model [minute, good, bad] answers in the user's eyes."""
        self._thresholds: dict[str, float] = {}
        self._clock = clock
        self._background: dict[str, int] = defaultdict(int)

    # ---- recording
    def observe(self, seen: Observation) -> None:
        """One finished request."""
        if seen.limited:
            return
        now = self._clock()
        block = self._block(seen.model, seen.version, now)
        if seen.code == 200:
            block.requests += 1
            block.rows += seen.rows
            block.total_s += seen.total_s
            block.queue_s += seen.queue_s
            edge_s = seen.decode_s + seen.encode_s
            block.edge_s += edge_s
            block.total.add(seen.total_s)
            block.queue.add(seen.queue_s)
            block.compute.add(seen.compute_s)
            block.edge.add(edge_s)
            good = seen.total_s <= self._thresholds.get(seen.model, math.inf)
            block.within += good
        elif seen.code in SERVER_FAULTS:
            block.failures += 1
            good = False
        elif seen.code == 429:
            block.refused += 1
            good = False
        elif seen.code == EXPIRED:
            block.expired += 1
            good = False
        else:
            return  # the caller's own fault says nothing of the model
        minutes, minute = self.minutes[seen.model], int(now // 60)
        if not minutes or minutes[-1][0] != minute:
            minutes.append([minute, 0, 0])
        minutes[-1][1 if good else 2] += 1

    def called(self, model: str, version: str, rows: int, row_bytes: int, compute_s: float, cpu_s: float, wait_s: float) -> None:
        """One call of the model with `rows` rows of `row_bytes` bytes each."""
        now = self._clock()
        block = self._block(model, version, now)
        track = self.tracks[model, version]
        block.calls += 1
        block.called_rows += rows
        block.compute_s += compute_s
        block.cpu_s += cpu_s
        block.wait_s += wait_s
        if cpu_s > LEAST_CPU_S:
            block.stretch.add(compute_s / cpu_s)
        bucket = bucket_of(rows, row_bytes, track.rested_s(now - compute_s, now))
        cost = block.costs.get(bucket)
        if cost is None:
            cost = block.costs[bucket] = Cost()
        cost.calls += 1
        cost.rows += rows
        cost.cpu_s += cpu_s
        cost.cpu.add(max(LEAST_CPU_S, cpu_s / rows))

    def failed(self, model: str, version: str) -> None:
        """A version failed a request that another answered in its place: no caller saw it, the judge must."""
        self._block(model, version, self._clock()).failures += 1

    def model_failed(self, model: str, version: str) -> None:
        """The model itself failed on a request, and its caller was told so."""
        self._block(model, version, self._clock()).failed_calls += 1

    def answered_non_finite(self, model: str, version: str, poisoned: bool = False) -> None:
        """An answer holds NaN or infinity; `poisoned`: so did the request."""
        block = self._block(model, version, self._clock())
        if poisoned:
            block.poisoned += 1
        else:
            block.non_finite += 1

    def died(self, model: str, version: str) -> None:
        self._block(model, version, self._clock()).deaths += 1

    def compared(self, model: str, version: str, agreed: float, rows: Iterable[Row] = ()) -> None:
        """A live request was answered by golden too, and so much of it (0 to 1) alike; `rows` of it where both gave scores of classes."""
        block = self._block(model, version, self._clock())
        block.compared += 1
        block.agreed += agreed
        block.likeness.add(rows)

    def labelled(self, model: str, version: str, right: bool) -> None:
        """A true label came for one of its answers."""
        block = self._block(model, version, self._clock())
        block.labelled += 1
        block.right += right

    @contextmanager
    def background(self, kind: str) -> Iterator[None]:
        """While Hone itself uses the cores (jobs, replay, probes): blocks that see it are marked, and detection looks past them."""
        self._background[kind] += 1
        self._mark()
        try:
            yield
        finally:
            self._mark()
            self._background[kind] -= 1

    @property
    def disturbed(self) -> bool:
        return any(self._background.values())

    def mark(self) -> None:
        """What others of ours do on this host now (a worker's job) disturbs the open blocks."""
        self._mark()

    def objective(self, model: str, threshold_s: float | None) -> None:
        """Count which answers of `model` come within `threshold_s`, those of the closed blocks too; its burn rates begin anew with another."""
        known, limit_s = self._thresholds.get(model, math.inf), math.inf if threshold_s is None else threshold_s
        if limit_s == known:
            return
        self._thresholds[model] = limit_s
        self.minutes.pop(model, None)
        for track in (track for (name, _), track in self.tracks.items() if name == model):
            for block in track.all_closed(self._clock()):
                block.within = round(block.requests * (1 - block.total.share_above(limit_s)))

    def forget(self, keep: set[tuple[str, str]]) -> None:
        """Drop the tracks of versions that are gone, once their last block is old."""
        old = self._clock() - KEPT_BLOCKS * self.block_s
        for key in [key for key, track in self.tracks.items() if key not in keep and track.open.ended < old]:
            del self.tracks[key]

    # ---- reading
    def now(self) -> float:
        return self._clock()

    def cut(self, model: str) -> float:
        """Begin new blocks for all versions of `model`; returns now, from which on `since` counts."""
        now = self._clock()
        for (name, _), track in self.tracks.items():
            if name == model:
                track.cut(now)
        return now

    def afresh(self, model: str) -> None:
        """What comes from now on is gathered apart from what was: something changed that the numbers will show."""
        now = self._clock()
        for track in (track for (name, _), track in self.tracks.items() if name == model):
            track.afresh(now)

    def since(self, model: str, version: str, began: float, sketches: bool = True) -> Block:
        """What `version` did from `began` on; empty where it did nothing. Without sketches it has counts and no quantiles."""
        now = self._clock()
        track = self.tracks.get((model, version))
        return track.since(began, now, sketches) if track is not None else Block(began, now)

    def phases(self, model: str, version: str, share: float, seconds: float = PHASES_S) -> dict[str, float]:
        """That quantile of each phase of the answers of the last `seconds`, in seconds; nothing without answers."""
        track, now = self.tracks.get((model, version)), self._clock()
        if track is None:
            return {}
        merged, opened = Block(now - seconds, now), track.at(now)
        for block in (*track.blocks, opened):
            if block.ended > now - seconds:
                merged.with_phases(block)
        found = {"queue": merged.queue.quantile(share), "compute": merged.compute.quantile(share), "edge": merged.edge.quantile(share)}
        return {name: value for name, value in found.items() if value is not None}

    def closed(self, model: str, version: str, count: int) -> list[Block]:
        track = self.tracks.get((model, version))
        return track.closed(count, self._clock()) if track is not None else []

    def gathered(self, model: str, version: str, count: int, since: float) -> list[Block]:
        """Closed blocks as those above, but each with ENOUGH requests, or as long as GATHERED_S: of little traffic several are one."""
        track = self.tracks.get((model, version))
        return track.told(count, since, self._clock()) if track is not None else []

    def totals(self, model: str, version: str) -> Totals:
        """What `version` did so far; for differences."""
        track = self.tracks.get((model, version))
        if track is None:
            return Totals()
        opened = track.at(self._clock())  # may close a block, which is of what was before from then on
        return track.before.plus(opened)

    def rate(self, model: str, seconds: float) -> float:
        """Answers a second of all versions together, over the last `seconds` or since the model answers at all; never over less than a block."""
        now = self._clock()
        tracks = [track for (name, _), track in self.tracks.items() if name == model]
        began = max(now - seconds, min((track.began for track in tracks), default=now))
        return sum(track.since(began, now, False).requests for track in tracks) / max(self.block_s, now - began)

    def good_and_bad(self, model: str, seconds: float) -> tuple[int, int]:
        """Answers of the last `seconds`, by whether they were what the objective promises."""
        oldest = (self._clock() - seconds) / 60
        counted = [row for row in self.minutes.get(model, ()) if row[0] + 1 > oldest]
        return sum(row[1] for row in counted), sum(row[2] for row in counted)

    def _block(self, model: str, version: str, now: float) -> Block:
        track = self.tracks.get((model, version))
        if track is None:
            track = self.tracks[model, version] = Track(now, self.block_s)
        block = track.at(now)
        if self._background and not block.disturbed:
            block.disturbed = self.disturbed
        return block

    def _mark(self) -> None:
        now = self._clock()
        for track in self.tracks.values():
            track.at(now).disturbed = True
