"""How fast a model uses up what its latency objective lets it miss: multi-window burn rates.

Pure: counts in, facts out. Windows and factors are the SRE workbook's (ch. 5), for an error budget of 30 days.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from app.catalog.model_config import CLEARLY_MISSED

LEAST_ANSWERS: Final = 20
"""Fewer answers than this in a window are no data."""
PAIRS: Final = ((3600.0, 300.0, 14.4), (21600.0, 1800.0, 6.0))
"""(long, short, factor): both windows must burn faster than the factor. Over two pairs a fast and a slow burn are told from noise."""


@dataclass(frozen=True, slots=True)
class Burn:
    """Share of bad answers over what may be bad, in each window; None where it has too few answers."""

    rates: dict[float, float | None]
    fires: bool


def burn(share: float, good_and_bad: Callable[[float], tuple[int, int]]) -> Burn:
    """Burn rates of a promise that `share` of the answers are good; `good_and_bad(seconds)` counts the latest answers."""
    budget = 1 - share
    rates: dict[float, float | None] = {}
    for window in sorted({window for long, short, _ in PAIRS for window in (long, short)}):
        good, bad = good_and_bad(window)
        total = good + bad
        rates[window] = bad / total / budget if total >= LEAST_ANSWERS else None
    limits = [(rates[long], rates[short], min(factor, CLEARLY_MISSED / budget)) for long, short, factor in PAIRS]
    fires = any(_above(long, limit) and _above(short, limit) for long, short, limit in limits)
    return Burn(rates, fires)


def _above(rate: float | None, factor: float) -> bool:
    return rate is not None and rate > factor
