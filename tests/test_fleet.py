"""What the fleet tells the journal of the repository, and what it knows of the journal: without a runner."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.catalog.repository import Repository
from app.serving.fleet import Fleet
from app.serving.past_deaths import PastDeaths
from app.store.base import Journal
from app.store.open import open_journal
from app.telemetry.metrics import Metrics
from tests.models import scaled


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = open_journal(str(tmp_path / "journal.db"))
    yield found
    found.close()


@pytest.fixture
def fleet(tmp_path: Path, journal: Journal) -> Fleet:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    none: Any = SimpleNamespace()
    return Fleet(none, Repository(tmp_path / "models"), none, none, journal, none, Metrics(), none, 0.0, lambda state: None, PastDeaths())


def test_a_model_that_somebody_brings_is_announced_by_them(fleet: Fleet, journal: Journal) -> None:
    with fleet.deploying("m"):
        asyncio.run(fleet._scan())
        assert not journal.read(), "whoever uploads it is the actor of its deployment"
    asyncio.run(fleet._scan())
    assert [event.kind for event in journal.read()] == ["model.deployed"]


def test_what_happened_last_with_each_model_is_known(fleet: Fleet, journal: Journal) -> None:
    asyncio.run(fleet._scan())
    assert fleet.latest["m"]["kind"] == "model.deployed" and fleet.latest["m"]["at"] > 0


def test_a_journal_that_is_away_is_told_once_and_so_is_its_return(fleet: Fleet, journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hone.serving")
    there, fleet._journal = journal, open_journal("redis://user:secret@127.0.0.1:1/0")
    asyncio.run(fleet.refresh())
    asyncio.run(fleet.refresh())
    fleet._journal = there
    asyncio.run(fleet.refresh())
    asyncio.run(fleet.refresh())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "the journal is away" in told[0] and "127.0.0.1:1" in told[0] and "back" in told[1]
    assert "secret" not in caplog.text
