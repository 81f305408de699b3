"""When a runner gives memory back, and when it makes way for a fresh one."""

from __future__ import annotations

from app.serving.upkeep import LOOK_S, RECYCLE_S, SLACK_BYTES, TRIM_BUSY_S, TRIM_IDLE_S, Upkeep

SETTLED = 100 << 20
FULL = SETTLED + SLACK_BYTES + 1


def test_memory_is_looked_at_now_and_then_and_whenever_there_is_nothing_to_do() -> None:
    upkeep = Upkeep()
    assert upkeep.due(True, 10.0)
    assert not upkeep.due(True, 10.0 + LOOK_S) and upkeep.due(False, 10.0 + LOOK_S)
    assert upkeep.due(True, 10.1 + 2 * LOOK_S)


def test_what_holds_much_more_than_at_first_gives_back_rarely_while_it_is_busy() -> None:
    upkeep = Upkeep()
    assert not upkeep.trims(SETTLED + SLACK_BYTES, SETTLED, False, 1.0)
    assert upkeep.trims(FULL, SETTLED, True, 1.0), "the first time at once"
    assert not upkeep.trims(FULL, SETTLED, True, 1.0 + TRIM_BUSY_S)
    assert upkeep.trims(FULL, SETTLED, False, 1.1 + TRIM_IDLE_S)


def test_what_grew_past_its_bound_is_replaced_once_a_minute_at_most() -> None:
    upkeep = Upkeep()
    assert not upkeep.recycles(FULL, 0, 1.0), "no bound"
    assert not upkeep.recycles(FULL, FULL, 1.0)
    assert upkeep.recycles(FULL, SETTLED, 1.0) and not upkeep.recycles(FULL, SETTLED, 1.0 + RECYCLE_S)
    assert upkeep.recycles(FULL, SETTLED, 1.1 + RECYCLE_S)
