"""Intervals of two samples against tables, published examples and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizers.two_samples import _rank_sum_cut, ratio, share, share_difference, shift


def test_shift_by_hand() -> None:
    # Differences of {1, 2, 4} and {3, 7}: 2, 1, -1, 6, 5, 3; their median is 2.5. Three and two values prove nothing.
    found = shift([1, 2, 4], [3, 7])
    assert found.estimate == 2.5 and (found.low, found.high) == (-math.inf, math.inf)


@pytest.mark.parametrize(("m", "n", "critical"), [(4, 4, 0), (5, 5, 2), (5, 8, 6), (8, 8, 13), (10, 10, 23), (20, 20, 127)])
def test_critical_values_are_those_of_the_tables(m: int, n: int, critical: int) -> None:
    """Mann–Whitney's U at 5 %, two-sided: reject at the value or below; the interval starts at the next difference."""
    assert _rank_sum_cut(m, n, 0.025) == critical + 1


def test_too_few_values_bound_nothing() -> None:
    assert shift([1.0, 2.0, 3.0], [9.0, 8.0, 7.0]).low == -math.inf
    assert math.isnan(shift([], [1.0]).estimate) and math.isnan(ratio([math.nan], [1.0]).estimate)


def test_many_values_use_the_normal_approximation_consistently() -> None:
    assert _rank_sum_cut(40, 41, 0.025) == pytest.approx(_rank_sum_cut(40, 40, 0.025) * 41 / 40, rel=0.01)


@given(
    st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30),
    st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30),
    st.floats(0.01, 100),
)  # fmt: skip
def test_a_ratio_scales_with_its_side_and_turns_over(first: list[float], other: list[float], factor: float) -> None:
    plain, scaled, turned = ratio(first, other), ratio(first, [v * factor for v in other]), ratio(other, first)
    assert scaled.estimate == pytest.approx(plain.estimate * factor, rel=1e-6)
    assert turned.estimate == pytest.approx(1 / plain.estimate, rel=1e-6)
    assert turned.high == pytest.approx(1 / plain.low if plain.low else math.inf, rel=1e-6)
    assert plain.low <= plain.estimate <= plain.high


def test_the_interval_covers_as_often_as_it_says_with_heavy_tails_and_unequal_sizes() -> None:
    rng = np.random.default_rng(2)
    found = [ratio(rng.lognormal(0, 0.5, 200), rng.lognormal(math.log(1.2), 0.5, 50), 0.98) for _ in range(400)]
    covered = sum(one.low <= 1.2 <= one.high for one in found) / len(found)
    assert 0.96 <= covered <= 0.995


def test_ties_widen_and_do_not_invent_a_difference() -> None:
    assert shift([3.0] * 60, [3.0] * 60) == shift([1.0] * 60, [1.0] * 60)
    assert (shift([3.0] * 60, [3.0] * 60).low, shift([3.0] * 60, [3.0] * 60).high) == (0, 0)
    coarse = np.random.default_rng(0).integers(1, 4, (2, 80)).astype(float)
    assert shift(coarse[0].tolist(), coarse[1].tolist()).low <= 0 <= shift(coarse[0].tolist(), coarse[1].tolist()).high


def test_zeros_and_what_is_not_finite_do_not_break_a_ratio() -> None:
    dirty = [math.nan, math.inf, 0.0] + [2.0] * 60
    found = ratio([1.0] * 60, dirty)
    assert found.estimate == pytest.approx(2.0) and found.low == pytest.approx(2.0)


def test_a_few_wild_values_move_little() -> None:
    rng = np.random.default_rng(4)
    calm, other = rng.lognormal(0, 0.1, 100), rng.lognormal(0, 0.1, 100)
    wild = other.copy()
    wild[:4] = 1000.0
    assert ratio(calm, wild).estimate == pytest.approx(ratio(calm, other).estimate, rel=0.02)


@pytest.mark.parametrize(
    ("first", "other", "low", "high"),
    [((48, 80), (56, 70), 0.0524, 0.3339), ((3, 10), (9, 10), 0.1705, 0.8090), ((2, 7), (6, 7), 0.0582, 0.8062), ((0, 29), (5, 56), -0.0381, 0.1926)],
)  # fmt: skip
def test_the_difference_of_shares_is_newcombes(first: tuple[int, int], other: tuple[int, int], low: float, high: float) -> None:
    """Table II of the paper, method 10."""
    found = share_difference(first, other)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_shares_without_data_say_nothing() -> None:
    assert math.isnan(share(0, 0).estimate) and (share(0, 0).low, share(0, 0).high) == (0.0, 1.0)
    assert (share_difference((0, 0), (1, 2)).low, share_difference((0, 0), (1, 2)).high) == (-1.0, 1.0)
    assert share(0, 100).low == 0 and share(0, 100).high == pytest.approx(0.037, abs=1e-3)
