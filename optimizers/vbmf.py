"""The rank of a matrix under noise, by empirical variational Bayesian matrix factorization: no threshold to choose, the noise is estimated too.

Nakajima et al. 2013, Global Analytic Solution of Fully-observed Variational Bayesian Matrix Factorization (JMLR 14).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

GRID: Final = 400
"""The free energy has several minima over the noise, so it is looked at on a grid of its logarithm."""
TINY: Final = 1e-12


def rank_of(matrix: NDArray[Any]) -> int:
    """How many singular values of `matrix` [L, M] stand above the noise; 0 where none does."""
    short, long = sorted(matrix.shape)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    power = np.maximum(values**2, TINY * max(float(values[0]) ** 2, TINY))
    alpha = short / long
    tau = 2.5129 * np.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)
    noise = _noise(power, short, long, alpha, threshold)
    return int((power > long * noise * threshold).sum())


def _noise(power: NDArray[Any], short: int, long: int, alpha: float, threshold: float) -> float:
    """The variance of the noise, of least free energy between its bounds."""
    most = min(int(np.ceil(short / (1 + alpha))) - 1, short - 1)
    upper = power.sum() / (short * long)
    lower = max(power[most] / (long * threshold), power[most:].mean() / long)
    grid = np.geomspace(min(lower, upper), upper, GRID)
    return float(grid[int(np.argmin([_free_energy(power / (long * each), alpha, threshold) for each in grid]))])


def _free_energy(x: NDArray[Any], alpha: float, threshold: float) -> float:
    """For singular values with power x, in units of the noise, up to a constant."""
    signal, noise = x[x > threshold], x[x <= threshold]
    tau = 0.5 * (signal - (1 + alpha) + np.sqrt((signal - (1 + alpha)) ** 2 - 4 * alpha))
    said = signal - tau + np.log((tau + 1) / signal) + alpha * np.log(tau / alpha + 1)
    return float((noise - np.log(noise)).sum() + said.sum())
