"""The live runner beside a fresh one: when a probe has seen enough; and what is known of those that died before."""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.domain import Event, RuntimeSettings
from app.serving.past_deaths import DEATHS_S, PastDeath, PastDeaths, own_doing, past_deaths
from app.serving.vitals import Round, Vitals, _probe_of, _undecided
from app.store.open import open_journal

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


def test_deaths_of_an_earlier_life_count_until_another_version_was_wanted() -> None:
    def died(at: float, version: str = "1.1", reason: str = "a segmentation fault") -> Event:
        return Event("runner.died", "m", version, data={"reason": reason}, at=at)

    story = [
        died(600.0), died(750.0), Event("desired.changed", "other", "1", data={"version": "1"}, at=800.0), died(900.0, "1", "killed from outside (SIGKILL)"), died(960.0), died(1001.0),
    ]  # fmt: skip
    found = past_deaths(story[::-1], 1002.0, 300.0, before=1000.0)
    assert found == {("m", "1.1"): [PastDeath(42.0, False), PastDeath(252.0, False)], ("m", "1"): [PastDeath(102.0, True)]}
    anew = [*story[:4], Event("desired.changed", "m", "1.1", data={"version": "1.1"}, at=950.0), *story[4:]]
    again = past_deaths(anew[::-1], 1002.0, 300.0, 1000.0)
    assert again == {("m", "1.1"): [PastDeath(42.0, False)], ("m", "1"): [PastDeath(102.0, True)]}, "1.1 was given another chance"
    deployed = [*story[:4], Event("model.deployed", "m", "1", data={"golden": "1", "sha256": "0"}, at=950.0), *story[4:]]
    assert past_deaths(deployed[::-1], 1002.0, 300.0, 1000.0) == {("m", "1.1"): [PastDeath(42.0, False)]}


@pytest.mark.parametrize(
    ("reason", "own"),
    [
        ("the runner crashed: SIGSEGV", True),
        ("the runner was killed from outside (SIGTERM)", False),
        ("the runner was stopped from outside (state T) for 1.0 s", False),
        ("the runner ended, nobody could tell how", None),
    ],
)
def test_only_what_a_runner_did_by_itself_is_its_own_doing(reason: str, own: bool | None) -> None:
    assert own_doing(reason) is own
    told = past_deaths([Event("runner.died", "m", "1", data={"reason": reason}, at=900.0)], 1000.0, 300.0, 1000.0)
    assert [not death.outside for death in told.get(("m", "1"), ())] == ([] if own is None else [own])


def test_a_server_remembers_them_and_forgets_them_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(str(tmp_path / "journal.db"))
    for _ in range(3):
        journal.append(Event("runner.died", "m", "1.1", data={"reason": "a segmentation fault"}))
    parts: Any = None
    past = PastDeaths()
    vitals = Vitals(parts, parts, parts, 2, past)
    asyncio.run(past.remember(journal))
    journal.close()
    engine = SimpleNamespace(deaths=[], distinct_killers=0)
    admitted = SimpleNamespace(kind="onnx")
    active = SimpleNamespace(version="1.1", generation=1, settings=RuntimeSettings(), memory_bytes=0, engine=engine, admitted=admitted)
    slot: Any = SimpleNamespace(name="m", active=active, ready=True, versions={"1.1": active}, rung=None, failed={}, golden_kind="onnx")
    seen = vitals._view(slot)
    assert seen is not None and (seen.recent_deaths, seen.recent_kills) == (3, 0)
    monkeypatch.setattr("app.serving.past_deaths.monotonic", lambda: monotonic() + DEATHS_S)
    later = vitals._view(slot)
    assert later is not None and later.recent_deaths == 0
