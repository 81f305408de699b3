"""The reference quantizer held to exact (rational) arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from optimizers import uniform

FLOATS = hnp.arrays(np.float32, st.integers(1, 12), elements=st.floats(-1000, 1000, width=32))
BITS = st.integers(2, 8)


def exact_affine(values: NDArray[Any], bits: int) -> list[int]:
    x = [Fraction(float(v)) for v in values]
    low, high = min(x), max(x)
    return [round((v - low) / (high - low) * (2**bits - 1)) if high > low else 0 for v in x]


@given(FLOATS, BITS)
@settings(max_examples=150, deadline=None)
def test_affine_is_the_formula(values: NDArray[np.float32], bits: int) -> None:
    codes, low, high = uniform.encode_affine(values, bits)
    assert codes.tolist() == exact_affine(values, bits)
    back = uniform.decode_affine(codes, low, high, bits)
    step = (float(high) - float(low)) / (2**bits - 1)
    assert np.abs(back - values).max() <= step / 2 * (1 + 1e-9)


def test_ties_go_to_even_exactly() -> None:
    """x = 0.1·k is no tie in rationals but looks like one in floats, and 1.5 is one: both must be right."""
    values = np.array([0.0, 0.5, 1.5, 2.5, 3.0])
    assert uniform.encode_affine(values, 2)[0].tolist() == [0, 0, 2, 2, 3]
    grid = uniform.Grid(np.asarray(0.1), np.asarray(0), -127, 127)
    values = np.array([0.05, 0.15, 0.25, 0.35])
    assert uniform.quantize(values, grid).tolist() == [round(Fraction(float(v)) / Fraction(0.1)) for v in values]


@given(FLOATS, BITS)
@settings(max_examples=150, deadline=None)
def test_symmetric_is_the_formula(values: NDArray[np.float32], bits: int) -> None:
    grid = uniform.symmetric_grid(values, bits)
    top = 2 ** (bits - 1) - 1
    scale = Fraction(float(grid.scale))
    assert uniform.quantize(values, grid).tolist() == [max(-top, min(top, round(Fraction(float(v)) / scale))) for v in values]
    if values.any():
        assert abs(float(scale) * top - float(np.abs(values).max())) <= 1e-12 * float(np.abs(values).max())
    assert (grid.low, grid.high) == (-top, top)


@given(FLOATS, BITS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_zero_is_always_on_an_affine_grid(values: NDArray[np.float32], bits: int, signed: bool) -> None:
    grid = uniform.affine_grid(values.min(), values.max(), bits, signed)
    assert grid.low <= int(grid.zero_point) <= grid.high
    assert uniform.dequantize(uniform.quantize(np.zeros(1), grid), grid)[0] == 0
    errors = np.abs(uniform.dequantize(uniform.quantize(values, grid), grid) - values)
    assert errors.max() <= float(grid.scale) * (1 + 1e-9), "a nudged zero point costs at most half a step more"


@pytest.mark.parametrize("symmetric", [True, False])
def test_per_channel_is_per_tensor_of_each_channel(symmetric: bool) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 2)) * np.array([1, 10, 100, 1000])[:, None]
    grid = uniform.grid_of(values, 4, symmetric, axis=1)
    codes = uniform.quantize(values, grid)
    for channel in range(4):
        alone = uniform.grid_of(values[:, channel], 4, symmetric)
        assert np.array_equal(codes[:, channel], uniform.quantize(values[:, channel], alone))
    whole = uniform.grid_of(values, 4, symmetric)
    small = uniform.dequantize(codes, grid)[:, 0] - values[:, 0]
    coarse = uniform.dequantize(uniform.quantize(values, whole), whole)[:, 0] - values[:, 0]
    assert np.mean(small**2) < np.mean(coarse**2) / 100, "a small channel is lost on the grid of a large one"


@pytest.mark.parametrize("axis", [None, 0])
def test_plain_affine_per_channel(axis: int | None) -> None:
    values = np.array([[0.0, 1.0, 2.0, 3.0], [10.0, 10.0, 10.0, 40.0]])
    codes, low, high = uniform.encode_affine(values, 2, axis)
    if axis is None:
        assert codes.tolist() == [exact_affine(values.ravel(), 2)[:4], exact_affine(values.ravel(), 2)[4:]]
    else:
        assert codes.tolist() == [[0, 1, 2, 3], [0, 0, 0, 3]]
        assert np.allclose(uniform.decode_affine(codes, low, high, 2, axis), values)


def test_more_bits_are_never_worse() -> None:
    values = np.random.default_rng(1).normal(size=1000)
    errors = [uniform.mean_square_error(values, uniform.grid_of(values, bits, True)) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1000 * errors[-1]


def test_weighted_error_is_that_of_repeated_values() -> None:
    grid = uniform.affine_grid(0, 1, 3)
    repeated = uniform.mean_square_error(np.array([0.1, 0.1, 0.1, 0.9]), grid)
    assert uniform.mean_square_error(np.array([0.1, 0.9]), grid, np.array([3, 1])) == pytest.approx(repeated)


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="from 2 to 8, not 9"):
        uniform.symmetric_grid(np.ones(1), 9)
