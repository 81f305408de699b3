"""Which version answers: a share in runs of requests, so that both versions are asked alike."""

from __future__ import annotations

from typing import Any

import pytest

from app.serving.slot import RUN_S, Share


def takers(share: Share, rate: float, seconds: float, began: float = 100.0) -> list[bool]:
    return [share.takes(None, began + number / rate) for number in range(round(rate * seconds))]


def runs(taken: list[bool]) -> list[int]:
    """Lengths of the runs of requests that it took."""
    found, length = [], 0
    for one in [*taken, False]:
        if not one and length:
            found.append(length)
        length = length + 1 if one else 0
    return found


@pytest.fixture
def loaded() -> Any:
    return None  # whose share it is makes no difference to when it is due


@pytest.mark.parametrize("rate", [0.7, 5.0, 40.0, 200.0, 1500.0])
@pytest.mark.parametrize("wanted", [0.05, 0.25, 0.5])
def test_a_share_is_taken_in_runs_and_never_exceeded(loaded: Any, rate: float, wanted: float) -> None:
    share, sent, took = Share(loaded, wanted, "canary"), 0, 0
    taken = takers(share, rate, max(60.0, 100 / rate / wanted))
    for one in taken:
        sent, took = sent + 1, took + one
        assert took <= wanted * sent
    assert took >= 0.9 * wanted * sent
    lengths = runs(taken)
    assert max(1.0, 0.6 * rate * RUN_S) <= sorted(lengths)[len(lengths) // 2] <= 1 + 2 * rate * RUN_S


def test_what_is_left_of_a_busy_time_is_not_taken_at_once(loaded: Any) -> None:
    share = Share(loaded, 0.05, "canary", due=100.0)
    taken = takers(share, 10.0, 60.0)
    assert max(runs(taken)) <= 1 + 2 * RUN_S * 10.0


def test_callers_with_a_key_stay_with_their_version(loaded: Any) -> None:
    share = Share(loaded, 0.3, "canary")
    first = [share.takes(str(number).encode(), 0.0) for number in range(2000)]
    assert first == [share.takes(str(number).encode(), 99.0) for number in range(2000)]
    assert 500 < sum(first) < 700
