"""Whether a model keeps what it is held to, and how fast it uses up what its latency objective lets it miss: multi-window burn rates.

Pure: counts in, facts out. Windows and factors are the SRE workbook's (ch. 5), for an error budget of 30 days.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from app.catalog.model_config import CLEARLY_MISSED, Objective
from app.domain import JSON, short
from app.telemetry.block import Block

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
    for window in sorted({window for *both, _ in PAIRS for window in both}):
        good, bad = good_and_bad(window)
        total = good + bad
        rates[window] = bad / total / budget if total >= LEAST_ANSWERS else None
    fires = any(all(_above(rates[window], min(factor, CLEARLY_MISSED / budget)) for window in both) for *both, factor in PAIRS)
    return Burn(rates, fires)


def held_to(objective: Objective, lately: Block, memory_bytes: int) -> list[JSON]:
    """What the model is held to, latency first, each in words with what it is `lately` and whether that keeps it; both None where nothing tells."""
    return [{"promised": text, "now": now, "kept": kept} for text, now, kept in _held_to(objective, lately, memory_bytes)]


def _held_to(objective: Objective, lately: Block, memory_bytes: int) -> Iterator[tuple[str, str | None, bool | None]]:
    for promise in objective.promises:
        yield promise.text, *_now(lately.total.quantile(promise.share), _ms, most=promise.threshold_s)
    if (rate := objective.throughput_rps) is not None:
        come, answered = lately.offered / lately.seconds, lately.requests / lately.seconds
        now = f"{short(answered)} of {short(come)} requests/s that come" if lately.offered else None
        yield f"{rate:g} requests/s", now, not come >= rate > answered if lately.offered else None
    if (errors := objective.error_rate) is not None:
        yield f"errors ≤ {_share(errors)}", *_now(_part(lately.failures, lately.requests + lately.failures), _share, most=errors)
    if (memory := objective.memory_mb) is not None:
        yield f"memory ≤ {_mib(memory)}", *_now(memory_bytes / (1 << 20) or None, _mib, most=memory)
    if (cpu_s := objective.cpu_s_per_request) is not None:
        yield f"CPU ≤ {_ms(cpu_s)} a request", *_now(_part(lately.cpu_s, lately.requests if lately.calls else 0), _ms, most=cpu_s)
    if (fidelity := objective.fidelity) is not None:
        yield f"agreement ≥ {_share(fidelity)}", *_now(_part(lately.agreed, lately.compared), _share, least=fidelity)
    if (availability := objective.availability) is not None:
        yield f"answered ≥ {_share(availability)}", *_now(_part(lately.requests, lately.offered), _share, least=availability)


def _now(value: float | None, words: Callable[[float], str], least: float = 0.0, most: float = math.inf) -> tuple[str | None, bool | None]:
    return (None, None) if value is None else (words(value), least <= value <= most)


def _part(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _share(share: float) -> str:
    return f"{short(share * 100, 5)}%"


def _mib(mib: float) -> str:
    return f"{short(mib, 4)} MiB"


def _ms(seconds: float) -> str:
    return f"{short(seconds * 1e3)} ms"


def _above(rate: float | None, factor: float) -> bool:
    return rate is not None and rate > factor
