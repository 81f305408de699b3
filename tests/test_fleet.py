"""What the fleet tells the journal of the repository, and what it knows of the journal: without a runner."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.catalog.cards import Cards
from app.catalog.repository import Repository
from app.catalog.state_folder import StateFolder
from app.domain import Event, Generation, ModelState, State
from app.errors import NotFound
from app.serving.admission import Admission
from app.serving.fleet import Fleet
from app.serving.past_deaths import PastDeaths
from app.store.base import Journal
from app.store.open import open_journal
from app.store.sqlite import SqliteJournal
from app.telemetry.metrics import Metrics
from tests.models import scaled
from tests.redis_server import RedisServer


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = open_journal(str(tmp_path / "journal.db"))
    yield found
    found.close()


def fleet_of(folder: Path, journal: Journal) -> Fleet:
    """With a repository and a state folder of its own."""
    none: Any = SimpleNamespace()
    (folder / "models").mkdir(parents=True, exist_ok=True)
    repository, state = Repository(folder / "models"), StateFolder(folder / "state").prepare()
    admission = Admission(repository, state, Cards(state), "here", 1, none)
    return Fleet(none, repository, admission, none, journal, none, Metrics(), none, 0.0, lambda state: None, PastDeaths())


@pytest.fixture
def fleet(tmp_path: Path, journal: Journal) -> Fleet:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    return fleet_of(tmp_path, journal)


def test_servers_whose_repositories_differ_do_not_put_each_others_version_back(tmp_path: Path, journal: Journal) -> None:
    """New files reach them one after the other, and one may have none at all."""
    first, second, empty = (tmp_path / name for name in ("first", "second", "empty"))
    for folder in (first, second):
        scaled(folder / "models" / "m" / "1" / "model.onnx")
    fleets = [fleet_of(folder, journal) for folder in (first, second, empty)]

    def told_by_looks(times: int = 2) -> list[tuple[str, str]]:
        before = journal.state().seq
        for fleet in fleets * times:
            asyncio.run(fleet._scan())
        return [(event.kind, event.version) for event in journal.read(before)]

    assert told_by_looks() == [("model.deployed", "1")]
    scaled(second / "models" / "m" / "2" / "model.onnx", 3.0)
    assert told_by_looks(3) == [("model.deployed", "2")]
    scaled(first / "models" / "m" / "2" / "model.onnx", 3.0)
    assert told_by_looks() == []
    shutil.rmtree(first / "models" / "m" / "2")
    assert told_by_looks() == [("model.deployed", "1"), ("version.removed", "2")]
    shutil.rmtree(second / "models" / "m")
    assert told_by_looks() == [("model.removed", "")]
    scaled(first / "models" / "m" / "1" / "model.onnx", 4.0)
    assert told_by_looks() == [("model.deployed", "1")]


def test_a_journal_that_was_rebuilt_is_not_told_an_older_golden(tmp_path: Path, journal: Journal) -> None:
    """The new files have not reached the first server yet: it would step golden back for everybody."""
    first, second = tmp_path / "first", tmp_path / "second"
    scaled(first / "models" / "m" / "1" / "model.onnx")
    fleets = [fleet_of(folder, journal) for folder in (first, second)]
    asyncio.run(fleets[0]._scan())
    scaled(second / "models" / "m" / "2" / "model.onnx", 3.0)
    asyncio.run(fleets[1]._scan())
    for path in tmp_path.glob("journal.db*"):
        path.unlink()
    for fleet in fleets * 2:
        asyncio.run(fleet._scan())
    assert journal.state().epoch == 2 and [event.kind for event in journal.read()] == ["journal.recovered"]
    assert journal.state().models["m"].golden == "2"


def test_a_journal_that_was_restored_is_told_the_golden_that_it_lacks_again(fleet: Fleet, journal: Journal, tmp_path: Path) -> None:
    asyncio.run(fleet._scan())
    journal.backup(tmp_path / "backup")
    scaled(tmp_path / "models" / "m" / "2" / "model.onnx", 3.0)
    asyncio.run(fleet._scan())
    journal.restore(tmp_path / "backup")
    assert journal.state().models["m"].golden == "1"
    for _ in range(2):
        asyncio.run(fleet._scan())
    assert journal.state().models["m"].golden == "2"
    assert [event.version for event in journal.read() if event.kind == "model.deployed"] == ["1", "2", "2"]


def test_a_model_whose_folder_went_while_no_server_ran_is_removed(tmp_path: Path, journal: Journal) -> None:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    asyncio.run(fleet_of(tmp_path, journal)._scan())
    StateFolder(tmp_path / "state").model("m").mkdir()  # as its first admission leaves it
    shutil.rmtree(tmp_path / "models" / "m")
    asyncio.run(fleet_of(tmp_path, journal)._scan())
    assert not journal.state().models


def test_a_model_that_somebody_brings_is_announced_by_them(fleet: Fleet, journal: Journal) -> None:
    with fleet.deploying("m"):
        asyncio.run(fleet._scan())
        assert not journal.read(), "whoever uploads it is the actor of its deployment"
    asyncio.run(fleet._scan())
    assert [event.kind for event in journal.read()] == ["model.deployed"]


@pytest.mark.parametrize(("went", "golden"), [("1", "2"), ("2", "1")])
def test_a_version_whose_folder_went_is_no_way_back(fleet: Fleet, journal: Journal, tmp_path: Path, went: str, golden: str) -> None:
    asyncio.run(fleet._scan())
    scaled(tmp_path / "models" / "m" / "2" / "model.onnx", 3.0)
    asyncio.run(fleet._scan())
    assert journal.state().models["m"].previous == "1"
    shutil.rmtree(tmp_path / "models" / "m" / went)
    for _ in range(2):
        asyncio.run(fleet._scan())
    model = journal.state().models["m"]
    assert (model.golden, model.desired, model.previous) == (golden, golden, "")
    assert [event.version for event in journal.read() if event.kind == "version.removed"] == [went], "told once"


def test_what_happened_last_with_each_model_is_known(fleet: Fleet, journal: Journal) -> None:
    asyncio.run(fleet._scan())
    assert fleet.latest["m"]["kind"] == "model.deployed" and fleet.latest["m"]["at"] > 0


class Counting(SqliteJournal):
    reads = 0

    def read(self, after: int = 0, limit: int = 1000, model: str = "", newest_first: bool = False) -> Sequence[Event]:
        self.reads += 1
        return super().read(after, limit, model, newest_first)


def test_an_event_that_the_store_has_let_go_is_looked_for_once(tmp_path: Path) -> None:
    """Redis reads its whole stream to find that it is not there."""
    with contextlib.closing(Counting(tmp_path / "journal.db")) as journal:
        fleet = fleet_of(tmp_path, journal)
        for _ in range(3):
            fleet._note_latest(State(models={"m": ModelState("m", "1", "sha", "1", "", Generation(1, 1), last_event=7)}))
        assert journal.reads == 1 and fleet.latest["m"] == {"seq": 7}


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


def test_a_freeze_and_its_end_are_in_the_log_with_the_reason(fleet: Fleet, journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever reads it next morning learns there why nothing was changed since."""
    caplog.set_level("INFO", "hone.serving")
    fleet.state = State(frozen=True)  # as the last process left it
    for frozen in (True, True, False):
        journal.append(Event("loop.frozen" if frozen else "loop.unfrozen", actor="admin:eve"))
        asyncio.run(fleet.refresh())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "frozen" in told[0] and "admin:eve" in told[0] and "allowed again" in told[1]


@pytest.mark.needs("redis-server")
def test_why_a_store_lost_keys_is_among_the_warnings_while_it_lacks_them(fleet: Fleet, tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    try:
        fleet._journal = open_journal(server.url)
        asyncio.run(fleet._scan())
        for command in (("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"), ("FLUSHALL",), ("CONFIG", "SET", "maxmemory", "1mb")):
            server.run(*command)
        asyncio.run(fleet.refresh())
        assert "memory is full" in fleet.store_error and any("set it to noeviction" in warning for warning in fleet.warnings)
    finally:
        fleet._journal.close()
        server.stop()


def test_a_store_that_refuses_to_be_written_is_told_once(fleet: Fleet, journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    """It is read all the while, so that only who writes learns of it."""
    fleet.refused = lambda: "its memory is full"
    asyncio.run(fleet.refresh())
    asyncio.run(fleet.refresh())
    assert [record.getMessage() for record in caplog.records if "memory is full" in record.getMessage()] == [
        caplog.records[-1].getMessage()
    ]
    assert fleet.store_error == "its memory is full"


def test_a_version_that_another_server_deployed_is_told_as_missing_here(fleet: Fleet) -> None:
    (found,) = fleet._repository.scan()
    want = ModelState("m", "2", "sha", "2", "1", Generation(1, 2))
    with pytest.raises(NotFound, match=r"version 2 of 'm' is not in this server's repository, which has 1; .* must come here too"):
        asyncio.run(fleet._admission.admit(found, want, "2"))
