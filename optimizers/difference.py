"""How far two sets of outputs are apart, element by element. What that means for quality is not said here (optimizers.fidelity)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def scale_of(values: list[NDArray[Any]]) -> float:
    """The largest finite magnitude among float outputs; 1 where there is none."""
    if values[0].dtype.kind != "f":
        return 1.0
    finite = [float(np.max(np.abs(v[np.isfinite(v)]), initial=0.0)) for v in values]
    return max(finite) or 1.0


def scales_of(outputs: list[Any]) -> list[float]:
    return [scale_of([values]) for values in outputs]


def difference(expected: list[Any], seen: list[Any], scales: list[float]) -> float:
    """The worst difference over all outputs as a share of each one's scale; infinite where shapes, NaN or integers differ."""
    return max((_difference(a, b, scale) for a, b, scale in zip(expected, seen, scales, strict=True)), default=0.0)


def _difference(expected: Any, seen: Any, scale: float) -> float:
    a, b = np.asarray(expected), np.asarray(seen)
    if a.shape != b.shape:
        return float("inf")
    if a.dtype.kind != "f":
        if a.dtype.itemsize == 1 and a.dtype.kind in "iu":
            return float(np.max(np.abs(a.astype(int) - b.astype(int)), initial=0)) / 255
        return 0.0 if np.array_equal(a, b) else float("inf")
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)) or not np.array_equal(a[~np.isfinite(a)], b[~np.isfinite(b)], equal_nan=True):
        return float("inf")
    finite = np.isfinite(a)
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0.0)) / scale


def root_mean_square(expected: list[Any], seen: list[Any]) -> float:
    """The worst relative root-mean-square difference of float outputs; of others the share of elements that differ."""
    worst = 0.0
    for a, b in zip(expected, seen, strict=True):
        if np.shape(a) != np.shape(b):
            return float("inf")
        if a.dtype.kind != "f":
            worst = max(worst, float(np.mean(a != b)))
        elif not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        else:
            a, b = np.nan_to_num(a.astype("f8"), posinf=0, neginf=0), np.nan_to_num(b.astype("f8"), posinf=0, neginf=0)
            worst = max(worst, float(np.sqrt(np.mean((a - b) ** 2) / (np.mean(a**2) or 1.0))))
    return worst
