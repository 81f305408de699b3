"""How a version's answers stand to golden's on the same live requests: agreement by golden's class, and the paired shift of entropy and margin.

Sums only, cheap to merge; what is too little, and what asks for a look, is app.control's to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Row(NamedTuple):
    """One row that golden and another version both answered. Entropies in nats, margins are the best probability less the second."""

    group: int
    same: bool
    entropy: float
    other_entropy: float
    margin: float
    other_margin: float


@dataclass(slots=True)
class Paired:
    """Differences of one figure, other less golden, and how golden's own spreads."""

    count: int = 0
    difference: float = 0.0
    golden: float = 0.0
    squares: float = 0.0

    def add(self, golden: float, other: float) -> None:
        self.count += 1
        self.difference += other - golden
        self.golden += golden
        self.squares += golden * golden

    def merge(self, other: Paired) -> None:
        self.count += other.count
        self.difference += other.difference
        self.golden += other.golden
        self.squares += other.squares

    @property
    def effect(self) -> float:
        """Mean difference in standard deviations of golden's own figure (Glass's Δ, 1976), at least a hundredth of a unit wide."""
        if not self.count:
            return 0.0
        mean = self.golden / self.count
        spread = math.sqrt(max(0.0, self.squares / self.count - mean * mean))
        return self.difference / self.count / max(0.01, spread)


@dataclass(slots=True)
class Likeness:
    """Of many rows. `groups` has (agreed, compared) by golden's class."""

    groups: dict[int, tuple[int, int]] = field(default_factory=dict)
    entropy: Paired = field(default_factory=Paired)
    margin: Paired = field(default_factory=Paired)

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._count(row.group, int(row.same), 1)
            self.entropy.add(row.entropy, row.other_entropy)
            self.margin.add(row.margin, row.other_margin)

    def merge(self, other: Likeness) -> None:
        for group, (agreed, compared) in other.groups.items():
            self._count(group, agreed, compared)
        self.entropy.merge(other.entropy)
        self.margin.merge(other.margin)

    def _count(self, group: int, agreed: int, compared: int) -> None:
        known = self.groups.get(group, (0, 0))
        self.groups[group] = known[0] + agreed, known[1] + compared
