"""What a person or the loop may ask for: which event comes of it, on a real journal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.control.commands import Commands
from app.domain import Event, ModelState, RuntimeSettings, Verdict
from app.errors import Conflict, NotAllowed
from app.store.base import Journal
from app.store.open import open_journal
from tests.journal_story import deployed, desired, published, settings

SLOW = {"intra_op_threads": 1, "batch_limit": 4}
HERE = "x86_64-test"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = open_journal(str(tmp_path / "journal.db"))
    for event in (deployed(), published("1.1"), desired("1.1")):
        found.append(event)
    yield found
    found.close()


@pytest.fixture
def commands(journal: Journal) -> Commands:
    return Commands(journal, HERE)


def now(journal: Journal) -> ModelState:
    return journal.state().models["m"]


def test_a_rollback_undoes_the_last_change_and_no_other(journal: Journal, commands: Commands) -> None:
    stood = RuntimeSettings(2, 1, 16)
    commands.change_settings("m", RuntimeSettings(1, 1, 4), "ann", "a try", stood)
    commands.rollback("m", "ann", "worse")
    assert (now(journal).desired, now(journal).settings_of("1.1")) == ("1.1", stood)
    journal.append(desired("1"))
    commands.rollback("m", "ann", "back")
    assert (now(journal).desired, now(journal).previous) == ("1.1", "1")


def test_a_second_person_brings_nothing_back_that_was_left_a_moment_before(journal: Journal, commands: Commands) -> None:
    """Two who see the same trouble: the second meant the same."""
    commands.rollback("m", "admin:ann", "NaN")
    with pytest.raises(Conflict, match=r"admin:ann has taken 'm' from version 1.1 to 1 already.*hone promote m:1.1"):
        commands.rollback("m", "admin:ben", "NaN")
    commands.rollback("m", "admin:ann", "it was not that")
    commands.leave("m", "hone", "errors", fault=True)
    with pytest.raises(Conflict, match="hone has taken"):
        commands.rollback("m", "admin:ann", "NaN")
    commands.promote("m", "1.1", "admin:ann", "it was the load", force=True)
    commands.rollback("m", "admin:ben", "no")
    assert now(journal).desired == "1"


def test_nor_settings(journal: Journal, commands: Commands) -> None:
    stood = RuntimeSettings(2, 1, 16)
    commands.change_settings("m", RuntimeSettings(1, 1, 4), "admin:ann", "a try", stood)
    commands.rollback("m", "admin:ann", "worse")
    with pytest.raises(Conflict, match="put the settings of 'm' back already"):
        commands.rollback("m", "admin:ben", "worse")
    assert (now(journal).desired, now(journal).settings_of("1.1")) == ("1.1", stood)


def test_settings_that_nobody_noted_the_former_of_go_back_to_those_of_the_proof(journal: Journal, commands: Commands) -> None:
    journal.append(settings("1.1", SLOW))
    commands.rollback("m", "ann", "worse")
    assert (now(journal).desired, now(journal).settings_of("1.1")) == ("1.1", None)


def test_while_all_is_frozen_nothing_changes_but_back(journal: Journal, commands: Commands) -> None:
    stood = RuntimeSettings(2, 1, 16)
    commands.change_settings("m", RuntimeSettings(1, 1, 4), "ann", "a try", stood)
    commands.freeze(True, "ann")
    for change in (
        lambda: commands.change_settings("m", RuntimeSettings(1, 1, 8), "ann", "another", stood),
        lambda: commands.promote("m", "1", "ann", "another"),
        lambda: commands.optimize("m", [[{"method": "graph"}]], "another", "auto", "ann"),
    ):
        with pytest.raises(NotAllowed, match="hone unfreeze"):
            change()
    commands.rollback("m", "ann", "worse")
    assert (now(journal).desired, now(journal).settings_of("1.1")) == ("1.1", stood)


def test_a_version_is_left_whatever_changed_last(journal: Journal, commands: Commands) -> None:
    journal.append(settings("1.1", SLOW, stood={"batch_limit": 16}))
    commands.leave("m", "hone", "NaN", fault=True)
    assert (now(journal).desired, now(journal).left) == ("1", ("1.1",))


def test_a_version_that_failed_its_canary_is_no_rung_until_it_is_promoted_again(journal: Journal, commands: Commands) -> None:
    journal.append(desired("1"))
    commands.set_ladder("m", ["1.1"], "ann")
    journal.append(Event("canary.ended", "m", "1.1", data={"version": "1.1", "verdict": Verdict.FAILED.value}))
    assert (now(journal).left, now(journal).rungs) == (("1.1",), ())
    with pytest.raises(Conflict, match="failed its canary"):
        commands.set_ladder("m", ["1.1"], "ann")
    journal.append(Event("ladder.set", "m", data={"rungs": ["1.1"]}))
    assert now(journal).rungs == ()
    commands.promote("m", "1.1", "ann", "it is good", force=True)
    assert now(journal).left == ()
