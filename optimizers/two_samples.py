"""Two independent samples against each other: shift and ratio without assumptions on their distribution, and the difference of two shares.

For arms that ran at the same time on different requests (a canary); paired timings have `optimizers.stats`. Intervals are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from optimizers.stats import Interval, wilson

Values: TypeAlias = Sequence[float] | NDArray[np.float64]
EXACT_UP_TO: Final = 1600
"""Pairs (m × n) up to which the Mann–Whitney distribution is counted; beyond, its normal approximation is good to three digits."""
LEAST: Final = 1e-9
RESAMPLES: Final = 999
"""A clock that did not move counts as a nanosecond: a ratio needs values above zero."""


def shift(first: Values, other: Values, confidence: float = 0.95) -> Interval:
    """How far `other` lies above `first`: median of all pairwise differences (Hodges–Lehmann), interval by inverting Mann–Whitney's test.

    A few wild values do not move it. Ties make the interval wider than it need be, never narrower (Lehmann, *Nonparametrics*, 1975).
    Values that are not finite are left out. Bounds are infinite below the counts that the confidence needs (4 and 4 for 95 %).
    """
    a, b = (np.asarray(finite(values), dtype=np.float64) for values in (first, other))
    pairs = len(a) * len(b)
    if not pairs:
        return Interval(math.nan, -math.inf, math.inf)
    differences = np.sort(np.subtract.outer(b, a), axis=None)
    estimate = float(np.median(differences))
    cut = _rank_sum_cut(*sorted((len(a), len(b))), round((1 - confidence) / 2, 12))
    if cut == 0:
        return Interval(estimate, -math.inf, math.inf)
    return Interval(estimate, float(differences[cut - 1]), float(differences[pairs - cut]))


def ratio(first: Values, other: Values, confidence: float = 0.95) -> Interval:
    """`other` over `first` for positive values: the shift of their logarithms. 1 is no difference; nan without data on both sides."""
    logs = [[math.log(max(value, LEAST)) for value in finite(values)] for values in (first, other)]
    found = shift(logs[0], logs[1], confidence)
    return found if math.isnan(found.estimate) else found.exp()


def mean_ratio(first: Values, other: Values, confidence: float = 0.95) -> Interval:
    """Mean of `other` over the mean of `first`, by the percentile bootstrap (Efron 1979; 999 resamples, always the same); nan without data.

    What `ratio`, a shift of the middle, does not see: some calls that cost many times as much.
    """
    a, b = (np.array(finite(values)) for values in (first, other))
    if not len(a) or not len(b) or a.mean() <= 0:
        return Interval(math.nan, 0.0, math.inf)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1) for values in (a, b)]
    low, high = np.quantile(means[1] / np.maximum(means[0], LEAST), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(b.mean() / a.mean()), float(low), float(high))


def share(hits: float, n: int, confidence: float = 0.95) -> Interval:
    """A share with Wilson's interval (1927). Without data nothing is known: nan in [0, 1]."""
    return Interval(hits / n if n else math.nan, *wilson(hits, n, _z(confidence)))


def share_difference(first: tuple[float, int], other: tuple[float, int], confidence: float = 0.95) -> Interval:
    """The share of `other` (hits, n) minus that of `first`: Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, method 10)."""
    a, b = share(*first, confidence), share(*other, confidence)
    if not first[1] or not other[1]:
        return Interval(math.nan, -1.0, 1.0)
    below = math.hypot(b.estimate - b.low, a.high - a.estimate)
    above = math.hypot(b.high - b.estimate, a.estimate - a.low)
    difference = b.estimate - a.estimate
    return Interval(difference, difference - below, difference + above)


def finite(values: Values) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


@cache
def _rank_sum_cut(m: int, n: int, tail: float) -> int:
    """The largest c with P(U ≤ c - 1) ≤ tail for Mann–Whitney's U of m and n values without ties."""
    if m * n > EXACT_UP_TO:
        mean, spread = m * n / 2, math.sqrt(m * n * (m + n + 1) / 12)
        return max(0, math.floor(mean + NormalDist().inv_cdf(tail) * spread))
    counts = np.zeros(m * n + 1)
    counts[0] = 1
    for i in range(1, m + 1):  # the Gaussian binomial: × (1 - q^(n+i)) / (1 - q^i)
        counts[n + i :] = counts[n + i :] - counts[: max(0, len(counts) - n - i)]
        for at in range(i, len(counts)):
            counts[at] += counts[at - i]
    return int(np.searchsorted(np.cumsum(counts) / math.comb(m + n, m), tail, side="right"))
