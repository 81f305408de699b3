"""Damage that SQLite cannot see, inside what a row says: the file is set aside as any damaged one, and serving goes on."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from app.domain import Event, State
from app.store.base import StoreUnavailable
from app.store.recovery import catch_up
from app.store.sqlite import SqliteJournal
from tests.journal_story import deployed, desired, published
from tests.models import scaled
from tests.running_server import server

HALF = "'{\"half'"
NO_OBJECT = "'3'"
NO_TEXT = "CAST(x'a5ff' AS TEXT)"


def garble(path: Path, table: str, column: str, found: str, where: str = "1") -> None:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE {table} SET {column} = {found} WHERE {where}")


def filled(path: Path) -> State:
    with contextlib.closing(SqliteJournal(path)) as journal:
        for event in (deployed(), published("1.1"), desired("1.1"), Event("x.y", "m")):
            journal.append(event)
        return journal.state()


@pytest.mark.parametrize("found", [HALF, NO_OBJECT, NO_TEXT])
def test_an_event_that_cannot_be_read_is_damage_of_the_file(tmp_path: Path, found: str) -> None:
    path = tmp_path / "journal.db"
    known = filled(path)
    garble(path, "events", "data", found, "seq = 2")
    with contextlib.closing(SqliteJournal(path, known=known)) as journal:
        with pytest.raises(StoreUnavailable, match="set aside"):
            journal.append(Event("server.started"))
        state = catch_up(journal, known)
        assert (state.models["m"].desired, state.frozen) == ("1.1", True)
        assert "journal.db.damaged-1" in journal.warnings()[0]
        assert [event.kind for event in journal.read()] == ["journal.restarted", "journal.recovered"], "the gap says so"


def test_one_that_only_the_timeline_meets_is_damage_as_well(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    known = filled(path)
    with contextlib.closing(SqliteJournal(path)) as journal:
        journal.state()
        garble(path, "events", "data", HALF, "seq = 2")
        with pytest.raises(StoreUnavailable, match="set aside"):
            journal.read()
        assert catch_up(journal, known).models["m"].desired == "1.1"
        assert journal.read()


@pytest.mark.parametrize("found", [HALF, NO_TEXT])
def test_a_board_that_cannot_be_read_is_thrown_away(tmp_path: Path, found: str) -> None:
    with contextlib.closing(SqliteJournal(tmp_path / "journal.db")) as journal:
        journal.post("k", {"n": 1}, 60)
        garble(tmp_path / "board.db", "board", "value", found)
        assert journal.board() == {}
        journal.post("k", {"n": 2}, 60)
        assert journal.board() == {"k": {"n": 2}}


def test_a_server_that_starts_on_such_a_file_and_remembers_nothing_serves_its_models(tmp_path: Path) -> None:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    with server(tmp_path) as running:
        running.ready("m")
        running.process.terminate()
        running.process.wait(60)
        garble(tmp_path / "state" / "journal.db", "events", "data", HALF)
        (tmp_path / "state" / "last-state.json").unlink()
        running.restart().ready("m")
        assert "damaged-1" in running.admin("GET", "/admin/status")["frozen_because"]
