"""What a paired replay found, and what it amounts to: ratios with the limits above which they are blamed, in words and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Self

import numpy as np

from optimizers.measure import LOUD, Quietness, Series, interval_json
from optimizers.stats import Interval, trimmed_mean

PLACEMENTS: Final = 4
"""So many times a file must be found slower, each time with its weights elsewhere in memory, before it is blamed.

Where the weights happen to lie moves the cost of a session for as long as it lives: by 1 % where they fit the cache, by up to 25 % where they
do not (48 MB beside 32 MB of L3; the same bytes on both sides). The session opened first tends to be the slower one, so sides take turns.
"""
CLEAR: Final = 1.5
CLEAR_PLACEMENTS: Final = 2
"""What lies this far above its limit, or takes more instructions by as much as the limit, no placement explains: seen in so many, it is enough."""
PROOF_SPREAD: Final = 0.05
"""How well a ratio of two different files is known from another time: beside other neighbours the same two gave 0.94 to 1.10 of it."""


class Finding(StrEnum):
    """What the replay shows. More than one may hold."""

    VERSION_SLOWER = "version_slower"
    INPUT_COSTLIER = "input_costlier"
    AS_PROVEN = "as_proven"
    INCONCLUSIVE = "inconclusive"
    NOT_POSSIBLE = "not_possible"


class Outcome(StrEnum):
    """Where a ratio's interval lies to its limit."""

    ABOVE = "above"
    WITHIN = "within"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Proven:
    """What the proof says: CPU time of live over other, and CPU seconds per row of each where they were recorded (0: not)."""

    rows_ratio: Interval = Interval(1.0, 1.0, 1.0)
    live_cpu_s: float = 0.0
    other_cpu_s: float = 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Self:
        given = data or {}
        ratio = given.get("rows_ratio")
        known = ratio if isinstance(ratio, Mapping) else {} if ratio is None else {"estimate": ratio}
        estimate = float(known.get("estimate") or 1.0)
        spread = PROOF_SPREAD if known else 0.0
        low, high = (float(known.get(name) or estimate) for name in ("low", "high"))
        found = Interval(estimate, min(low, estimate * (1 - spread)), max(high, estimate * (1 + spread)))
        return cls(found, *(float(given.get(name) or 0.0) for name in ("live_cpu_s", "other_cpu_s")))


@dataclass(frozen=True)
class Weighed:
    """One comparison: a ratio of CPU times per row, what was expected of it, and the limit above which it is blamed.

    `instructions` is the same ratio of instructions retired, None where they are not counted. `one_file`: both sides run it, on other inputs.
    """

    ratio: Interval
    limit: float
    rounds: int
    quiet: Quietness
    expected: float = 1.0
    instructions: Interval | None = None
    one_file: bool = False

    @property
    def more_work(self) -> bool:
        """More instructions than the limit allows: no neighbour and no placement adds any. As many of them may take longer, so less says nothing."""
        return self.instructions is not None and self.instructions.low > self.limit

    @property
    def longer(self) -> Outcome:
        """What the CPU time alone says."""
        if not self.quiet.cpu_counts:
            return Outcome.UNKNOWN
        return Outcome.ABOVE if self.ratio.low > self.limit else Outcome.WITHIN if self.ratio.high <= self.limit else Outcome.UNKNOWN

    @property
    def by_instructions(self) -> bool:
        """They decide where time cannot, and about one file alone: two do the same work by different ones, and only time compares those."""
        return self.one_file and self.more_work and self.longer is Outcome.UNKNOWN

    @property
    def outcome(self) -> Outcome:
        return Outcome.ABOVE if self.by_instructions else self.longer

    @property
    def deciding(self) -> Interval:
        return self.instructions if self.instructions is not None and self.by_instructions else self.ratio

    @property
    def clear(self) -> bool:
        return self.outcome is Outcome.ABOVE and (self.more_work or self.ratio.low > CLEAR * self.limit)

    @property
    def over_expected(self) -> Interval:
        return Interval(*(value / self.expected for value in (self.ratio.estimate, self.ratio.low, self.ratio.high)))

    def __str__(self) -> str:
        if not (math.isfinite(self.ratio.low) and math.isfinite(self.ratio.high)):
            return f"{self.rounds} rounds in the time given, too few for an interval"
        counted = f", instructions × {self.instructions.estimate:.3f}" if self.instructions is not None else ""
        return f"× {self.ratio.estimate:.2f} [{self.ratio.low:.2f}, {self.ratio.high:.2f}], limit {self.limit:.2f}{counted}"

    def to_json(self) -> dict[str, Any]:
        return {
            "ratio": interval_json(self.ratio), "expected": self.expected, "limit": self.limit, "outcome": self.outcome.value, "rounds": self.rounds,
            "quiet": self.quiet.to_json(), "instructions_ratio": self.instructions and interval_json(self.instructions),
        }  # fmt: skip


@dataclass(frozen=True)
class Fresh:
    """CPU seconds per row of a fresh session of the live file on the frozen samples."""

    cpu_s_per_row: float
    p10_s: float
    p90_s: float
    calls: int

    @classmethod
    def of(cls, series: Series, rows: int) -> Self:
        p10, p90 = (float(v) / rows for v in np.quantile(series.cpu_s, [0.1, 0.9]))
        return cls(trimmed_mean(series.cpu_s) / rows, p10, p90, len(series.cpu_s))

    def to_json(self) -> dict[str, Any]:
        return {"cpu_s_per_row": self.cpu_s_per_row, "p10_s": self.p10_s, "p90_s": self.p90_s, "calls": self.calls}


@dataclass(frozen=True)
class BlameReport:
    """`version`: live file over other file, again and again as long as it is above its limit; `input`: recent inputs over usual ones."""

    version: tuple[Weighed, ...] = ()
    input: Weighed | None = None
    fresh: Fresh | None = None
    proof: Proven = Proven()
    usual: str = "frozen"
    notes: tuple[str, ...] = field(default=())
    impossible: str = ""
    """Why the live file could not be held to the other."""
    seconds: float = 0.0

    @property
    def weighed(self) -> tuple[Weighed, ...]:
        return self.version if self.input is None else (*self.version, self.input)

    @property
    def findings(self) -> tuple[Finding, ...]:
        found = []
        if enough_placements(self.version) and all(one.outcome is Outcome.ABOVE for one in self.version):
            found.append(Finding.VERSION_SLOWER)
        if self.input is not None and self.input.outcome is Outcome.ABOVE:
            found.append(Finding.INPUT_COSTLIER)
        if found:
            return tuple(found)
        if self.impossible:
            return (Finding.NOT_POSSIBLE,)
        within = self.weighed and not self.notes and all(one.outcome is Outcome.WITHIN for one in self.weighed)
        return (Finding.AS_PROVEN if within else Finding.INCONCLUSIVE,)

    @property
    def quiet(self) -> Quietness:
        """The loudest that it was."""
        found = [one.quiet for one in self.weighed]
        return Quietness(max((q.waiting_ratio for q in found), default=0.0), max((q.steal_ratio for q in found), default=0.0))

    @property
    def text(self) -> str:
        said = [f"its file against the other's, CPU time per row {', then '.join(map(str, self.version))}"] if self.version else []
        said += [f"recent inputs against {self.usual} ones, CPU time per row {self.input}"] if self.input else []
        if not self.quiet.cpu_counts and any(one.outcome is Outcome.UNKNOWN for one in self.weighed):
            said.append(
                f"the host was too busy to measure: threads waited for a core {self.quiet.waiting_ratio:.0%} of the time (bound {LOUD:.0%})"
            )
        said += [self.impossible] if self.impossible else []
        return f"{', '.join(self.findings)}: {'; '.join((*said, *self.notes))}"

    def to_json(self) -> dict[str, Any]:
        mildest = min(self.version, key=lambda one: one.ratio.estimate, default=None)
        over = self.fresh.cpu_s_per_row / self.proof.live_cpu_s if self.fresh and self.proof.live_cpu_s else None
        return {
            "findings": [finding.value for finding in self.findings], "text": self.text, "impossible": self.impossible,
            "version_over_proof": interval_json(mildest.over_expected) if mildest else None,
            "input_ratio": interval_json(self.input.deciding) if self.input else None, "version": [one.to_json() for one in self.version], "input": self.input and self.input.to_json(), "input_by": "instructions" if self.input and self.input.by_instructions else "CPU time",
            "usual": self.usual,
            "fresh": self.fresh and self.fresh.to_json(), "fresh_over_proof": over,
            "quiet": self.quiet.to_json(), "cpu_counts": self.quiet.cpu_counts, "seconds": self.seconds,
        }  # fmt: skip


def enough_placements(weighed: Sequence[Weighed]) -> bool:
    """Whether a file that was found slower in each of them is to be blamed."""
    return len(weighed) >= PLACEMENTS or (len(weighed) >= CLEAR_PLACEMENTS and all(one.clear for one in weighed))
