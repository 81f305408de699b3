"""Deaths of runners in an earlier life of this server, from the journal: a version that takes everything down with it must not begin anew each time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from app.domain import Event
from app.store.kinds import version_of

ANEW: Final = frozenset({"desired.changed", "model.deployed", "model.removed"})
"""What came before one of these says nothing of the version that serves since."""


@dataclass(frozen=True, slots=True)
class PastDeath:
    """`age_s` at the time of the look."""

    age_s: float
    outside: bool


def past_deaths(newest_first: Iterable[Event], now: float, most_s: float, before: float) -> dict[tuple[str, str], list[PastDeath]]:
    """By model and version, those of the last `most_s` seconds that were written until `before` (unix seconds, as `now`)."""
    found: dict[tuple[str, str], list[PastDeath]] = {}
    over: set[str] = set()
    for event in newest_first:
        if event.at < now - most_s:
            break
        if event.kind in ANEW:
            over.add(event.model)
        elif event.kind == "runner.died" and event.model not in over and event.at <= before:
            death = PastDeath(max(0.0, now - event.at), "from outside" in str(event.data.get("reason")))
            found.setdefault((event.model, version_of(event)), []).append(death)
    return found
