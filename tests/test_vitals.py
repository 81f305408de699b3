"""The live runner beside a fresh one: when a probe has seen enough."""

from __future__ import annotations

import numpy as np

from app.serving.vitals import Round, _probe_of, _undecided

LIMITS = (1.15, 1.3)


def rounds(ratio: float, noise: float, count: int) -> list[Round]:
    """Rounds of a live runner whose calls take `ratio` × as long as a fresh one's, for the same CPU time."""
    rng = np.random.default_rng(7)
    wall = 0.01 * ratio * rng.lognormal(0, noise, (count, 2))
    return [([(0.01, float(one)) for one in turns], [(0.01, 0.01), (0.01, 0.01)]) for turns in wall]


def test_a_probe_goes_on_only_while_a_ratio_seems_to_be_above_its_limit_and_is_not_sure_to_be() -> None:
    assert _undecided(rounds(2.0, 1.5, 8), LIMITS), "twice as long, give or take as much"
    assert not _undecided(rounds(3.0, 0.1, 8), LIMITS), "clearly decayed"
    assert not _undecided(rounds(1.0, 0.1, 8), LIMITS), "clearly not"
    assert not _undecided(rounds(0.8, 0.8, 8), LIMITS), "neighbours move it, and not upwards"


def test_more_rounds_narrow_what_is_known_of_a_ratio() -> None:
    few, many = _probe_of(rounds(3.0, 0.8, 8)), _probe_of(rounds(3.0, 0.8, 30))
    assert few.wall[1] < many.wall[1] < 3.0 < many.wall[2] < few.wall[2] and few.cpu == (1.0, 1.0, 1.0)
