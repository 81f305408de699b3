"""Levels on a line: better than a uniform grid, importance and rate each do what they are for; budgets are kept and the exact program is exact."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optimizers.allotment import Choice, TooTight, allot, exact, total_loss
from optimizers.clustering import Levels, entropy_bits, entropy_constrained, kmeans, kmeans_errors
from optimizers.uniform import mean_square_error, symmetric_grid

BELL = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
TAILS = np.random.default_rng(1).laplace(size=20_000).astype(np.float32)


def error(values: NDArray[Any], levels: Levels, weights: NDArray[Any] | None = None) -> float:
    return float(np.average((values - levels.centres[levels.codes(values)]) ** 2, weights=weights))


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("values", [BELL, TAILS])
def test_kmeans_is_better_than_a_uniform_grid(bits: int, values: NDArray[Any]) -> None:
    levels = kmeans(values, 1 << bits)
    assert len(levels.centres) == 1 << bits and (np.diff(levels.centres) > 0).all()
    assert error(values, levels) < 0.6 * mean_square_error(values, symmetric_grid(values, bits))


def test_kmeans_of_a_bell_is_that_of_the_literature() -> None:
    """Max 1960: 4 levels of a unit normal lie at ±0.4528 and ±1.510 with an error of 0.1175."""
    levels = kmeans(np.random.default_rng(2).normal(size=400_000), 4)
    assert np.abs(levels.centres) == pytest.approx([1.510, 0.4528, 0.4528, 1.510], abs=0.02)
    assert error(BELL, levels) == pytest.approx(0.1175, abs=0.005)


def test_few_values_are_kept_exactly() -> None:
    values = np.array([3.0, -1.0, 3.0, 0.5])
    levels = kmeans(values, 4)
    assert levels.centres[levels.codes(values)].tolist() == values.tolist() and len(levels.centres) == 3
    assert kmeans_errors(values, [2, 3, 4]) == pytest.approx([1.125, 0, 0])


def test_importance_moves_levels_to_where_it_matters() -> None:
    importance = np.where(BELL > 1, 50.0, 1.0)
    plain, weighted = kmeans(BELL, 8), kmeans(BELL, 8, importance)
    assert error(BELL, weighted, importance) < 0.7 * error(BELL, plain, importance)
    assert (weighted.centres > 1).sum() > (plain.centres > 1).sum()
    assert kmeans(BELL, 8, np.full(len(BELL), 7.0)).centres == pytest.approx(plain.centres)


def test_rate_buys_bits_with_error_at_the_better_price() -> None:
    plain, priced = kmeans(TAILS, 32), entropy_constrained(TAILS, 32, 1.0)
    bits = [entropy_bits(levels.codes(TAILS)) for levels in (plain, priced)]
    errors = [error(TAILS, levels) for levels in (plain, priced)]
    price = 2 * np.log(2) * errors[0]
    assert bits[1] < bits[0] - 0.2 and errors[1] + price * bits[1] < errors[0] + price * bits[0]
    coarser = min((kmeans(TAILS, count) for count in range(8, 33)), key=lambda each: abs(entropy_bits(each.codes(TAILS)) - bits[1]))
    assert errors[1] < 0.8 * error(TAILS, coarser), "k-means with as few bits is worse"
    assert entropy_constrained(TAILS, 32, 0.0).centres == pytest.approx(plain.centres)
    assert len(entropy_constrained(TAILS, 32, 100.0).centres) < 8


# ---- allotment
TABLE = st.lists(
    st.lists(st.builds(Choice, st.just("c"), st.integers(1, 30), st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(TABLE, st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_the_exact_program_is_exact_and_budgets_are_kept(rows: list[list[Choice]], budget: int) -> None:
    table = {str(index): choices for index, choices in enumerate(rows)}
    possible = [sum(c.loss for c in pick) for pick in itertools.product(*rows) if sum(c.cost for c in pick) <= budget]
    if not possible:
        with pytest.raises(TooTight):
            allot(table, budget, "exact")
        return
    for how in ("greedy", "exact"):
        chosen = allot(table, budget, how)
        assert sum(c.cost for c in chosen.values()) <= budget and list(chosen) == list(table)
    assert total_loss(chosen) == pytest.approx(min(possible))


def test_large_costs_are_counted_in_units() -> None:
    table = {str(i): [Choice(str(b), b * (100_003 + i), 4.0**-b) for b in range(2, 9)] for i in range(20)}
    budget = 4 * sum(100_003 + i for i in range(20))
    chosen = exact(table, budget)
    assert chosen is not None and 0.98 * budget < sum(c.cost for c in chosen.values()) <= budget
