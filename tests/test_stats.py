"""Bounds and intervals against numbers worked out by hand or taken from tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizers.stats import NEVER, Z95, hodges_lehmann, least_samples, mean_bounds, paired_difference, trimmed_mean, wilson, z_for


def test_ninety_nine_percent_takes_268_samples_without_a_miss() -> None:
    assert least_samples(0.99) == 268
    assert wilson(268, 268)[0] >= 0.99 > wilson(267, 267)[0]
    assert least_samples(0.95) == 52
    assert least_samples(1.0) == NEVER


def test_wilson_by_hand() -> None:
    # 8 of 10 at z = 2: middle (0.8 + 0.2) / 1.4 = 0.714286, half 2 * sqrt(0.016 + 0.01) / 1.4 = 0.230350
    low, high = wilson(8, 10, 2.0)
    assert low == pytest.approx(0.483936, abs=1e-6)
    assert high == pytest.approx(0.944636, abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_holds_the_share_and_narrows_with_data(n: int, share: float) -> None:
    low, high = wilson(share * n, n)
    wider = wilson(share * n / 4, n / 4)  # type: ignore[arg-type]
    assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1
    assert wider[0] <= low + 1e-9 and high <= wider[1] + 1e-9


def test_more_tests_need_stronger_evidence() -> None:
    assert z_for(1) == pytest.approx(1.6449, abs=1e-4)
    assert z_for(10) == pytest.approx(2.5758, abs=1e-4)


def test_paired_difference_without_discordant_pairs_is_wilsons() -> None:
    low, high = paired_difference(0, 0, 268)
    assert -low == pytest.approx(1 - wilson(268, 268)[0], abs=1e-9)
    assert high == pytest.approx(-low, abs=1e-9)


@pytest.mark.parametrize(("lost", "won", "n"), [(12, 2, 50), (0, 5, 40), (7, 7, 300)])
def test_paired_difference_ends_where_the_score_test_rejects(lost: int, won: int, n: int) -> None:
    """The statistic at each bound, with the constrained maximum likelihood found on a grid instead of in closed form, is just z."""
    for d, sign in zip(paired_difference(lost, won, n), (1, -1), strict=True):
        q = np.linspace(max(0.0, -d) + 1e-9, (1 - d) / 2 - 1e-9, 400_001)  # share of lost pairs; won is q + d, the rest agrees
        likelihood = lost * np.log(q) + won * np.log(q + d) + (n - lost - won) * np.log(1 - 2 * q - d)
        best = q[np.argmax(likelihood)]
        statistic = (won - lost - n * d) / math.sqrt(n * (2 * best + d * (1 - d)))
        assert statistic == pytest.approx(sign * Z95, abs=2e-3)


def test_paired_difference_turns_with_its_sides() -> None:
    low, high = paired_difference(3, 9, 200)
    other_low, other_high = paired_difference(9, 3, 200)
    assert (low, high) == pytest.approx((-other_high, -other_low))
    assert low < 0.03 < high


@pytest.mark.parametrize(("freedom", "t"), [(1, 6.314), (2, 2.920), (3, 2.353), (4, 2.132), (9, 1.833), (29, 1.699), (999, 1.6464)])
def test_mean_bounds_use_students_t(freedom: int, t: float) -> None:
    values = np.random.default_rng(0).standard_normal(freedom + 1)
    low, high = mean_bounds(values)
    half = t * values.std(ddof=1) / math.sqrt(freedom + 1)
    assert (high - low) / 2 == pytest.approx(half, rel=4e-3)
    assert mean_bounds(values[:1]) == (-math.inf, math.inf)


def test_trimmed_mean_leaves_out_a_tenth_at_each_end() -> None:
    assert trimmed_mean([100.0, *range(1, 9), -100.0]) == pytest.approx(4.5)
    assert trimmed_mean([2.0, 4.0]) == 3.0


def test_hodges_lehmann_by_hand() -> None:
    # Pairwise means of 1, 2, 4: 1, 1.5, 2, 2.5, 3, 4; their median is 2.25.
    assert hodges_lehmann([1, 2, 4]).estimate == 2.25
    assert math.isinf(hodges_lehmann([1, 2, 4]).low)


def test_signed_rank_interval_as_in_the_tables() -> None:
    # n = 6, two-sided 95 %: critical sum 0, so the interval runs over all pairwise means; n = 10: critical sum 8, the 9th from each end.
    six = np.array([1.0, 2, 3, 4, 5, 6])
    assert (hodges_lehmann(six).low, hodges_lehmann(six).high) == (1, 6)
    assert math.isinf(hodges_lehmann(six[:5]).low)
    ten = np.array([0.3, 1.1, 1.9, 2.2, 3.4, 4.6, 5.1, 6.7, 7.7, 9.2])
    means = sorted((ten[i] + ten[j]) / 2 for i in range(10) for j in range(i, 10))
    assert (hodges_lehmann(ten).low, hodges_lehmann(ten).high) == (means[8], means[-9])


def test_a_wild_value_moves_it_little() -> None:
    calm = np.random.default_rng(1).normal(1.0, 0.01, 24)
    wild = calm.copy()
    wild[3] = 50
    assert abs(hodges_lehmann(wild).estimate - hodges_lehmann(calm).estimate) < 0.01


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = sum(found.low <= 0 <= found.high for found in (hodges_lehmann(rng.standard_t(3, 15)) for _ in range(1000)))
    assert 930 <= covered <= 970


def test_many_values_use_the_normal_approximation_consistently() -> None:
    values = np.random.default_rng(3).normal(0, 1, 81)
    exact, approximate = hodges_lehmann(values[:80]), hodges_lehmann(values)
    assert approximate.high - approximate.low == pytest.approx(exact.high - exact.low, rel=0.1)
    assert pytest.approx(1.644854) == Z95
