"""The sketch against exact quantiles of the same values."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.telemetry.sketch import LogSketch

values = st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=200)
shares = st.floats(0, 1)


def sketch_of(seen: list[float]) -> LogSketch:
    sketch = LogSketch()
    for value in seen:
        sketch.add(value)
    return sketch


def exact(seen: list[float], share: float) -> float:
    return sorted(seen)[max(1, math.ceil(share * len(seen) - 1e-9)) - 1]


@given(values, shares)
def test_a_quantile_is_within_one_percent_of_the_exact_one(seen: list[float], share: float) -> None:
    assert sketch_of(seen).quantile(share) == pytest.approx(exact(seen, share), rel=0.01)


@given(values, values, shares)
def test_merged_is_as_if_one_had_seen_all(first: list[float], second: list[float], share: float) -> None:
    merged = sketch_of(first)
    merged.merge(sketch_of(second))
    whole = sketch_of(first + second)
    assert merged.quantile(share) == whole.quantile(share)
    assert merged.count == whole.count and merged.total == pytest.approx(whole.total)


@given(values, st.integers(1, 300))
def test_a_sample_is_spread_by_rank_and_invents_no_data(seen: list[float], n: int) -> None:
    sample = sketch_of(seen).sample(n)
    assert len(sample) == min(n, len(seen)) and sample == sorted(sample)
    for i, value in enumerate(sample):
        assert value == pytest.approx(exact(seen, (i + 0.5) / len(sample)), rel=0.0101)


@given(values)
def test_json_and_back(seen: list[float]) -> None:
    sketch = sketch_of([*seen, 0.0])
    again = LogSketch.from_json(json.loads(json.dumps(sketch.to_json())))
    assert again.to_json() == sketch.to_json() and again.count == sketch.count and again.quantile(0.5) == sketch.quantile(0.5)


def test_without_values_there_is_no_quantile_and_no_sample() -> None:
    assert LogSketch().quantile(0.5) is None and LogSketch().sample(5) == [] and LogSketch().share_above(1.0) == 0.0


def test_the_share_above_a_value_counts_what_is_clearly_above_it() -> None:
    sketch = sketch_of([0.0, 0.5, 1.0, 2.0, 4.0])
    assert [sketch.share_above(value) for value in (0.0, 0.4, 1.0, 3.0, 5.0)] == [0.8, 0.8, 0.4, 0.2, 0.0]


def test_zero_and_a_clock_that_went_back_are_the_smallest() -> None:
    sketch = sketch_of([0.0, -1e-7, 2.0])
    assert sketch.quantile(0.5) == 0.0 and sketch.quantile(1.0) == pytest.approx(2.0, rel=0.01)
    assert sketch.sample(3)[:2] == [0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_not_counted(value: float) -> None:
    sketch = sketch_of([1.0])
    with pytest.raises((ValueError, OverflowError)):
        sketch.add(value)
    assert sketch.count == 1 and sketch.total == 1.0 and sketch.sample(9) == pytest.approx([1.0], rel=0.01)


def test_equal_values_do_not_become_ties_in_a_sample() -> None:
    sample = sketch_of([0.01] * 50).sample(50)
    assert len(set(sample)) == 50 and sample == pytest.approx([0.01] * 50, rel=0.01)


def test_a_sketch_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width 0\.02"):
        LogSketch.from_json({"width": 0.02, "total": 1.0, "counts": [[1, 1]]})


def test_adding_takes_about_a_microsecond() -> None:
    sketch, seen = LogSketch(), [0.001 * 1.01**i for i in range(1000)]
    took = []
    for _ in range(20):
        began = time.thread_time()
        for value in seen:
            sketch.add(value)
        took.append(time.thread_time() - began)
    assert min(took) / len(seen) < 3e-6, "0.4 µs measured on a quiet machine"
