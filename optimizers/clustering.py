"""Levels for values on a line: k-means (weighted or not) and entropy-constrained, both by Lloyd's turns on sorted values with prefix sums.

Lloyd 1982, shared weights as in Deep Compression (Han et al. 2016, arXiv:1510.00149), started from the density of Panter and Dite 1951;
min D + λR as Chou, Lookabaugh and Gray 1989.
Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TURNS: Final = 300
BINS: Final = 1024


@dataclass(frozen=True)
class Levels:
    """A value between edges[k − 1] and edges[k] is coded k, and decoded to centres[k]."""

    centres: Array
    edges: Array

    def codes(self, values: NDArray[Any]) -> NDArray[np.int64]:
        return np.searchsorted(self.edges, values).astype(np.int64)


@dataclass(frozen=True)
class _Sorted:
    """Values in order, and the sums of w, wx and wx² up to each."""

    values: Array
    weight: Array
    first: Array
    second: Array

    @classmethod
    def of(cls, values: NDArray[Any], weights: NDArray[Any] | None) -> _Sorted:
        order = np.argsort(values, kind="stable")
        x = values[order].astype(np.float64)
        w = np.ones(len(x)) if weights is None else weights[order].astype(np.float64)
        return cls(x, *(np.concatenate([[0.0], np.cumsum(part)]) for part in (w, w * x, w * x * x)))

    def cells(self, edges: Array) -> tuple[Array, Array, Array]:
        """Weight, Σ wx and error around its own mean of each cell."""
        cuts = np.concatenate([[0], np.searchsorted(self.values, edges), [len(self.values)]])
        weight, first, second = (np.diff(sums[cuts]) for sums in (self.weight, self.first, self.second))
        return weight, first, np.maximum(second - first**2 / np.maximum(weight, 1e-300), 0.0)


def kmeans(values: NDArray[Any], count: int, weights: NDArray[Any] | None = None) -> Levels:
    """At most `count` levels that minimize Σ w (x − c)²; where there are no more distinct values than that, those."""
    return _kmeans(_Sorted.of(values, weights), count)


def kmeans_errors(values: NDArray[Any], counts: Sequence[int], weights: NDArray[Any] | None = None) -> list[float]:
    """Σ w (x − c)² that k-means leaves with each number of levels."""
    data = _Sorted.of(values, weights)
    return [float(data.cells(_kmeans(data, count).edges)[2].sum()) for count in counts]


def _kmeans(data: _Sorted, count: int) -> Levels:
    values = data.values
    distinct = values[np.flatnonzero(np.diff(values, prepend=-np.inf))]
    if len(distinct) <= count:
        return Levels(distinct, (distinct[:-1] + distinct[1:]) / 2)
    centres = _start(data, count)
    for _ in range(TURNS):
        weight, first, error = data.cells((centres[:-1] + centres[1:]) / 2)
        moved = np.where(weight > 0, first / np.maximum(weight, 1e-300), centres)
        moved = np.sort(_refilled(moved, weight, error))
        if np.allclose(moved, centres, rtol=0, atol=1e-9 * (values[-1] - values[0])):
            break
        centres = moved
    return Levels(centres, (centres[:-1] + centres[1:]) / 2)


def entropy_constrained(values: NDArray[Any], count: int, rate: float) -> Levels:
    """At most `count` levels that minimize D + λR: D = E(x − c)², R the entropy of the codes in bits.

    λ = `rate` · 2 ln 2 · (error of k-means with as many levels), the slope of the best curve there: dD/dR = −2 ln 2 · D at high rates.
    """
    start = kmeans(values, count)
    data = _Sorted.of(values, None)
    error = data.cells(start.edges)[2].sum() / len(data.values)
    price = rate * 2 * np.log(2) * error
    centres, edges = start.centres, start.edges
    for _ in range(TURNS if price > 0 else 0):
        weight, first, _ = data.cells(edges)
        used = weight > 0
        moved = first[used] / weight[used]
        kept, cuts = _envelope(moved, -price * np.log2(weight[used] / len(data.values)))
        same = len(cuts) == len(edges) and np.allclose(cuts, edges, rtol=0, atol=1e-9 * (centres[-1] - centres[0]))
        centres, edges = moved[kept], cuts
        if same:
            break
    weight, first, _ = data.cells(edges)
    return Levels(np.where(weight > 0, first / np.maximum(weight, 1), centres), edges)


def entropy_bits(codes: NDArray[Any]) -> float:
    """Shannon's bound: bits a code on average."""
    counts = np.bincount(codes.ravel())
    share = counts[counts > 0] / codes.size
    return float(-(share * np.log2(share)).sum())


def _start(data: _Sorted, count: int) -> Array:
    """Levels as dense as the cube root of the values are, which is best where there are many."""
    ends = np.linspace(data.values[0], data.values[-1], BINS + 1)
    dense = np.cbrt(data.cells(ends[1:-1])[0])
    reached = np.concatenate([[0.0], np.cumsum(dense)]) / max(dense.sum(), 1e-300)
    return np.asarray(np.interp((np.arange(count) + 0.5) / count, reached, ends))


def _refilled(centres: Array, weight: Array, error: Array) -> Array:
    """Levels that nothing fell to are put beside those with the largest errors."""
    empty = np.flatnonzero(weight == 0)
    worst = np.argsort(-error, kind="stable")[: len(empty)]
    spread = np.sqrt(error[worst] / np.maximum(weight[worst], 1e-300))
    moved = centres.copy()
    moved[empty] = centres[worst] + spread
    return moved


def _envelope(centres: Array, prices: Array) -> tuple[list[int], Array]:
    """Which of the parabolas (x − c)² + price are lowest somewhere, and where the one gives way to the next."""
    kept: list[int] = []
    cuts: list[float] = []
    for k in range(len(centres)):
        while kept:
            j = kept[-1]
            cut = (centres[j] + centres[k]) / 2 + (prices[k] - prices[j]) / (2 * max(centres[k] - centres[j], 1e-300))
            if cuts and cut <= cuts[-1]:
                kept.pop()
                cuts.pop()
                continue
            cuts.append(float(cut))
            break
        kept.append(k)
    return kept, np.array(cuts)
