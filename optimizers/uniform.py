"""The reference of uniform quantization, affine and symmetric, per tensor and per channel, 2 to 8 bits; slow where exactness asks for it.

    affine       q = round((x − x_min) / (x_max − x_min) · (2ᵇ − 1))               x̂ = x_min + q · (x_max − x_min) / (2ᵇ − 1)
    symmetric    q = round(x / s), s = max|x| / (2ᵇ⁻¹ − 1), |q| ≤ 2ᵇ⁻¹ − 1         x̂ = q · s
    with a zero point (as ONNX has it): q = clip(round(x / s) + z), x̂ = (q − z) · s, zero itself always on the grid

Rounding is half to even and exact: what float64 cannot tell from a tie is decided in rational arithmetic.
Jacob et al. 2018 (arXiv:1712.05877); Krishnamoorthi 2018 (arXiv:1806.08342).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Integers = NDArray[np.int64]
BITS: Final = range(2, 9)
_NEAR_TIE: Final = 1e-9


@dataclass(frozen=True)
class Grid:
    """x̂ = (q − zero_point) · scale for q in low..high. Per channel `scale` and `zero_point` are 1-d along `axis`, else 0-d (float64, int64)."""

    scale: Array
    zero_point: Integers
    low: int
    high: int
    axis: int | None = None


def symmetric_grid(values: Array, bits: int, axis: int | None = None) -> Grid:
    """The signed grid around zero that spans max|values|; all zeros give scale 1."""
    top = 2 ** (_checked(bits) - 1) - 1
    peak = _reduce(np.abs(np.asarray(values, np.float64)), np.max, axis)
    scale = np.where(peak > 0, peak / top, 1.0)
    return Grid(scale, np.zeros(scale.shape, np.int64), -top, top, axis)


def affine_grid(low: Array | float, high: Array | float, bits: int, signed: bool = False, axis: int | None = None) -> Grid:
    """The grid with a zero point over [low, high], widened to hold zero. Scalars per tensor, 1-d per channel."""
    levels = 2 ** _checked(bits) - 1
    bottom = -(2 ** (bits - 1)) if signed else 0
    least, most = np.minimum(np.asarray(low, np.float64), 0.0), np.maximum(np.asarray(high, np.float64), 0.0)
    scale = np.where(most > least, (most - least) / levels, 1.0)
    zero_point = np.clip(np.rint(bottom - least / scale), bottom, bottom + levels).astype(np.int64)
    return Grid(scale, zero_point, bottom, bottom + levels, axis)


def grid_of(values: Array, bits: int, symmetric: bool, axis: int | None = None) -> Grid:
    """The grid that spans `values` (their range; around zero when `symmetric`)."""
    if symmetric:
        return symmetric_grid(values, bits, axis)
    return affine_grid(_reduce(values, np.min, axis), _reduce(values, np.max, axis), bits, axis=axis)


def quantize(values: Array, grid: Grid) -> Integers:
    """Codes of `values` on `grid`: nearest, ties to even, beyond the ends the end."""
    scale, zero_point = _spread(grid.scale, values, grid.axis), _spread(grid.zero_point, values, grid.axis)
    return np.asarray(np.clip(_round_ratio(values, scale) + zero_point, grid.low, grid.high), np.int64)


def dequantize(codes: Integers, grid: Grid) -> Array:
    return (codes - _spread(grid.zero_point, codes, grid.axis)) * _spread(grid.scale, codes, grid.axis)


def mean_square_error(values: Array, grid: Grid, weights: Array | None = None) -> float:
    """Mean of (x − x̂)², weighted where `weights` are given (a histogram's counts over its centres)."""
    errors = (np.asarray(values, np.float64) - dequantize(quantize(values, grid), grid)) ** 2
    return float(np.average(errors, weights=weights))


def encode_affine(values: Array, bits: int, axis: int | None = None) -> tuple[Integers, Array, Array]:
    """The plain formula without a zero point: (codes 0..2ᵇ−1, x_min, x_max). A constant gives zeros."""
    levels = 2 ** _checked(bits) - 1
    low, high = (_reduce(np.asarray(values, np.float64), how, axis) for how in (np.min, np.max))
    least, span = _spread(low, values, axis), _spread(np.where(high > low, high - low, 1.0), values, axis)
    ratio = np.asarray((np.asarray(values, np.float64) - least) / span * levels)
    codes = np.rint(ratio)
    for at in map(tuple, np.argwhere(_near_tie(ratio))):
        x, x_min = Fraction(float(values[at])), Fraction(float(np.broadcast_to(least, ratio.shape)[at]))
        x_max = Fraction(float(np.broadcast_to(_spread(high, values, axis), ratio.shape)[at]))
        codes[at] = round((x - x_min) / (x_max - x_min) * levels) if x_max > x_min else 0
    return codes.astype(np.int64), low, high


def decode_affine(codes: Integers, low: Array, high: Array, bits: int, axis: int | None = None) -> Array:
    """x_min + q (x_max − x_min) / (2ᵇ − 1)."""
    least, most = _spread(low, codes, axis), _spread(high, codes, axis)
    return np.asarray(least + codes * (most - least) / (2 ** _checked(bits) - 1))


def _round_ratio(values: Array, scale: Array) -> Array:
    ratio = np.asarray(np.asarray(values, np.float64) / scale)
    rounded = np.rint(ratio)
    scales = np.broadcast_to(scale, ratio.shape)
    for at in map(tuple, np.argwhere(_near_tie(ratio))):
        rounded[at] = round(Fraction(float(values[at])) / Fraction(float(scales[at])))
    return rounded


def _near_tie(ratio: Array) -> NDArray[np.bool_]:
    return np.asarray(np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) <= _NEAR_TIE * np.maximum(1.0, np.abs(ratio)))


def _reduce(values: Array, how: Any, axis: int | None) -> Array:
    others = None if axis is None else tuple(i for i in range(np.ndim(values)) if i != axis % np.ndim(values))
    return np.asarray(how(np.asarray(values, np.float64), axis=others))


def _spread(per_channel: Array, like: Array, axis: int | None) -> Array:
    """Shaped to broadcast along `axis` of `like`."""
    if axis is None or np.ndim(per_channel) == 0:
        return np.asarray(per_channel)
    shape = [1] * np.ndim(like)
    shape[axis] = -1
    return np.asarray(per_channel).reshape(shape)


def _checked(bits: int) -> int:
    if bits not in BITS:
        raise ValueError(f"bits must be from {BITS[0]} to {BITS[-1]}, not {bits}")
    return bits
