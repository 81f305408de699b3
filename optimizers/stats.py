"""Bounds and intervals that verdicts rest on: shares, paired differences, means, and ratios of paired timings. Pure numpy; no model here.

All one-sided bounds are at 95 %. A share's bound is Wilson's (1927): without a miss its lower bound is n / (n + z²), so 99 % takes 268 samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

Z95: Final = NormalDist().inv_cdf(0.95)
NEVER: Final = 1 << 62
EXACT_UP_TO: Final = 80
"""Pairs up to which the signed-rank distribution is counted; beyond, its normal approximation is good to four digits."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate between two bounds, which are infinite where the data cannot say."""

    estimate: float
    low: float
    high: float

    def exp(self) -> Interval:
        """From the log scale back to a ratio."""
        return Interval(math.exp(self.estimate), _exp(self.low), _exp(self.high))


def wilson(hits: float, n: int, z: float = Z95) -> tuple[float, float]:
    """One-sided lower and upper bound (each at the level of `z`) of a share, from `hits` of `n`. (0, 1) without data."""
    if n == 0:
        return 0.0, 1.0
    share, extra = hits / n, z * z / n
    middle = share + extra / 2
    half = z * math.sqrt(max(0.0, share * (1 - share) / n + extra / n / 4))
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


def least_samples(floor: float) -> int:
    """Samples without a miss that it takes for Wilson's lower bound to reach `floor`: 268 for 0.99, 52 for 0.95, NEVER for 1."""
    if floor >= 1:
        return NEVER
    return max(1, math.ceil(round(floor * Z95 * Z95 / (1 - floor), 9)))


def z_for(tests: int) -> float:
    """z of a one-sided 95 % statement about the worst of `tests` (Bonferroni)."""
    return NormalDist().inv_cdf(1 - 0.05 / max(1, tests))


def paired_difference(lost: int, won: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Bounds of (won - lost) / n for paired yes/no outcomes: Tango's score interval (Statistics in Medicine 17, 1998).

    `lost` counts pairs that were right before and wrong now, `won` the reverse. With no discordant pair it is Wilson's interval.
    """
    if n == 0:
        return -1.0, 1.0
    return -_tango_upper(lost, won, n, z), _tango_upper(won, lost, n, z)


def mean_bounds(values: NDArray[np.float64]) -> tuple[float, float]:
    """One-sided 95 % bounds of the mean by Student's t; infinite below two values."""
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    mean = float(values.mean())
    half = _t95(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def trimmed_mean(values: Sequence[float] | NDArray[np.float64], share: float = 0.1) -> float:
    """Mean without the `share` lowest and the `share` highest values."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    cut = int(len(ordered) * share)
    return float(ordered[cut : len(ordered) - cut].mean())


def hodges_lehmann(values: Sequence[float] | NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """Location of symmetric noise around one value: median of all pairwise means, interval by inverting Wilcoxon's signed-rank test.

    Robust where a mean is not: a few wild values do not move it. Bounds are infinite below the count that the confidence needs (6 for 95 %).
    """
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    if n == 0:
        return Interval(math.nan, -math.inf, math.inf)
    upper = np.triu_indices(n)
    means = np.sort((data[upper[0]] + data[upper[1]]) / 2)
    cut = _signed_rank_cut(n, (1 - confidence) / 2)
    if cut == 0:
        return Interval(float(np.median(means)), -math.inf, math.inf)
    return Interval(float(np.median(means)), float(means[cut - 1]), float(means[len(means) - cut]))


@cache
def _signed_rank_cut(n: int, tail: float) -> int:
    """The largest c with P(T ≤ c - 1) ≤ tail for the signed-rank sum T of n values."""
    if n > EXACT_UP_TO:
        mean, spread = n * (n + 1) / 4, math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return max(0, math.floor(mean + NormalDist().inv_cdf(tail) * spread))
    counts = np.zeros(n * (n + 1) // 2 + 1)
    counts[0] = 1
    for rank in range(1, n + 1):
        counts[rank:] = counts[rank:] + counts[:-rank]
    return int(np.searchsorted(np.cumsum(counts) / 2.0**n, tail, side="right"))


def _tango_upper(b: int, c: int, n: int, z: float) -> float:
    """The largest difference d = (b - c) / n that is not rejected at z, by bisection on the score statistic."""

    def statistic(d: float) -> float:
        linear = -b - c + (2 * n - b + c) * d
        other = (math.sqrt(max(0.0, linear * linear + 8 * n * c * d * (1 - d))) - linear) / (4 * n)
        variance = n * (2 * other + d * (1 - d))
        return (b - c - n * d) / math.sqrt(variance) if variance > 0 else 0.0

    low, high = (b - c) / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if statistic(middle) > -z else (low, middle)
    return high


def _t95(freedom: int) -> float:
    """95 % quantile of Student's t (Cornish–Fisher expansion; within 0.3 % from 4 degrees of freedom, exact for 1 to 3)."""
    exact = {1: 6.313752, 2: 2.919986, 3: 2.353363}
    if freedom in exact:
        return exact[freedom]
    z, f = Z95, freedom
    return (
        z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2) + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
