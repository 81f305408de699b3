"""What every store must do when it lost its memory, and with backups. One suite, over SQLite and a real Redis."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from app.domain import Event, Generation, State
from app.errors import Conflict, InvalidRequest
from app.store import last_state, merge
from app.store.base import Journal, StoreWentBack
from app.store.open import open_journal
from app.store.recovery import catch_up
from tests.journal_story import OTHER_SHA, claimed, deployed, desired, job_event, published, requested
from tests.stores import Opener, another, journal, redis_server, url

__all__ = ["another", "journal", "redis_server", "url"]


@pytest.fixture
def empty_store(url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[], None]:
    """Makes the store lose everything behind the back of those who use it."""

    def lose() -> None:
        if url.startswith("redis"):
            request.getfixturevalue("redis_server").run("FLUSHALL")
        else:
            for path in tmp_path.glob("journal.db*"):
                path.unlink()

    return lose


def history(journal: Journal) -> State:
    for event in (deployed(), published("1.1"), desired("1.1"), requested("j1"), claimed("j1"), requested("j2"), deployed("n")):
        journal.append(event)
    journal.append(job_event("finished", "j2", outcome="kept"))
    return journal.state()


# Loss and return


def test_a_store_that_lost_what_was_seen_is_not_believed(journal: Journal, empty_store: Callable[[], None]) -> None:
    history(journal)
    empty_store()
    for call in (journal.state, lambda: journal.append(deployed("x")), lambda: journal.wait(8, 5)):
        with pytest.raises(StoreWentBack):
            call()


def test_what_was_lost_is_put_back_once(journal: Journal, another: Opener, empty_store: Callable[[], None]) -> None:
    other = another()
    known = history(journal)
    assert other.state() == known
    empty_store()
    after = journal.recover(known)
    assert (after.epoch, after.frozen, after.seq) == (2, True, known.seq + 1)
    assert after.models["m"].generation == Generation(2, known.models["m"].generation.n)
    assert after.models["m"].desired == "1.1"
    assert after.jobs == known.jobs
    assert other.recover(known) == after, "the second to come finds it done"
    assert another().state() == after
    assert [event.kind for event in other.read()] == ["journal.recovered"]


def test_after_a_recovery_late_writers_are_fenced_and_the_story_goes_on(journal: Journal, empty_store: Callable[[], None]) -> None:
    known = history(journal)
    empty_store()
    catch_up(journal, known)
    with pytest.raises(Conflict):
        journal.append(desired("1"), expect=known.models["m"].generation)
    stored = journal.append(desired("1"), expect=Generation(2, known.models["m"].generation.n))
    assert stored.seq == known.seq + 2
    assert journal.state().models["m"].generation == Generation(2, known.models["m"].generation.n + 1)
    assert journal.append(Event("loop.unfrozen", actor="ann")).seq == known.seq + 3
    assert not journal.state().frozen


def test_a_process_that_follows_sees_the_recovery_as_news(journal: Journal, another: Opener, empty_store: Callable[[], None]) -> None:
    known = history(journal)
    follower = another()
    follower.state()
    empty_store()
    another().recover(known)
    assert follower.wait(known.seq, 30)
    assert [event.kind for event in follower.read(after=known.seq)] == ["journal.recovered"]
    assert follower.state().epoch == 2


def test_the_highest_known_state_wins_whoever_comes_first(journal: Journal, another: Opener, empty_store: Callable[[], None]) -> None:
    early = history(journal)
    journal.append(desired("1"))
    late = journal.state()
    empty_store()
    assert another().recover(early).models["m"].desired == "1.1"
    after = catch_up(another(), late)
    assert (after.models["m"].desired, after.epoch) == ("1", 3)
    assert catch_up(another(), early) == after


def test_what_this_process_wrote_itself_is_put_back_though_the_caller_forgot(journal: Journal, empty_store: Callable[[], None]) -> None:
    forgetful = history(journal)
    journal.append(desired("1"))
    empty_store()
    assert catch_up(journal, forgetful).models["m"].desired == "1"


def test_who_saw_more_than_the_one_that_recovered_adds_it(journal: Journal, another: Opener, empty_store: Callable[[], None]) -> None:
    worker = another()
    known = history(journal)
    worker.append(published("1.2"))
    empty_store()
    assert [built.version for built in catch_up(journal, known).models["m"].built] == ["1.1"]
    with pytest.raises(StoreWentBack):
        worker.state()
    assert [built.version for built in catch_up(worker, known).models["m"].built] == ["1.1", "1.2"]
    assert journal.state() == worker.state()


def test_a_stranger_that_began_anew_does_not_win(journal: Journal, another: Opener, empty_store: Callable[[], None]) -> None:
    known = history(journal)
    empty_store()
    stranger = another()
    for number in range(known.seq + 5):
        stranger.append(Event("x.y", "m", data={"n": number}))
    stranger.append(deployed("m"))
    with pytest.raises(StoreWentBack):
        journal.state()
    assert catch_up(journal, known).models["m"].desired == "1.1"
    assert stranger.state().models["m"].desired == "1.1"


@pytest.mark.parametrize("grown", [0, 9])
def test_a_store_that_came_back_short_takes_nothing_from_a_server_that_starts(
    url: str, journal: Journal, another: Opener, empty_store: Callable[[], None], tmp_path: Path, grown: int
) -> None:
    """Power cut or failover: what the server remembers counts before it writes, and after others wrote past the gap."""
    history(journal)
    journal.append(Event("loop.frozen", actor="ann"))
    last_state.save(tmp_path / "last-state.json", journal.state())
    empty_store()
    other = another()
    history(other)
    for number in range(grown):
        other.append(Event("x.y", "m", data={"n": number}))
    assert not other.state().frozen
    known = last_state.load(tmp_path / "last-state.json")
    assert known is not None
    with contextlib.closing(open_journal(url, known)) as started:
        with pytest.raises(StoreWentBack):
            started.append(Event("server.started"))
        assert catch_up(started, known).frozen
        started.append(Event("server.started"))
        assert [event.kind for event in other.read()[-2:]] == ["journal.recovered", "server.started"]


def test_a_server_that_starts_on_what_it_remembers_changes_nothing(url: str, journal: Journal, tmp_path: Path) -> None:
    history(journal)
    last_state.save(tmp_path / "last-state.json", journal.state())
    journal.append(Event("x.y", "m"))
    known = last_state.load(tmp_path / "last-state.json")
    assert known is not None
    with contextlib.closing(open_journal(url, known)) as started:
        assert catch_up(started, known).epoch == 1
        assert started.append(Event("server.started")).seq == known.seq + 2


def test_nothing_is_put_back_where_nothing_is_lost(journal: Journal, another: Opener) -> None:
    old = history(journal)
    journal.append(desired("1"))
    now = journal.state()
    assert another().recover(old) == now
    assert catch_up(another(), None) == now
    assert now.epoch == 1


def test_an_empty_store_without_memory_begins_empty(journal: Journal) -> None:
    assert catch_up(journal, None) == State()


# Backup


def test_a_backup_restores_into_an_empty_store(journal: Journal, another: Opener, empty_store: Callable[[], None], tmp_path: Path) -> None:
    known = history(journal)
    journal.backup(tmp_path / "backup.jsonl")
    assert (tmp_path / "backup.jsonl").stat().st_mode & 0o777 == 0o600
    empty_store()
    fresh = another()
    after = fresh.restore(tmp_path / "backup.jsonl")
    assert (after.epoch, after.frozen) == (2, True)
    assert {name: model.desired for name, model in after.models.items()} == {"m": "1.1", "n": "1"}
    assert after.jobs == known.jobs
    kinds = [event.kind for event in fresh.read()]
    assert (len(kinds), kinds[0], kinds[-1]) == (known.seq + 1, "model.deployed", "journal.restored")
    assert catch_up(another(), known) == after, "what was known before does not outrank it"


def test_a_restore_is_one_event_that_those_who_follow_see(journal: Journal, another: Opener, tmp_path: Path) -> None:
    follower = another()
    history(journal)
    journal.backup(tmp_path / "backup.jsonl")
    journal.append(desired("1"))
    journal.append(deployed("later", "1", OTHER_SHA))
    before = follower.state()
    journal.restore(tmp_path / "backup.jsonl")
    assert follower.wait(before.seq, 30)
    after = follower.state()
    assert (after.models["m"].desired, list(after.models), after.seq) == ("1.1", ["m", "n"], before.seq + 1)
    assert not merge.behind(after, before)
    journal.append(desired("1"), expect=after.models["m"].generation)
    assert follower.state().models["m"].generation.epoch == 2


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-40], lambda text: "", lambda text: text.replace("hone_backup", "x"), lambda text: "[]"]
)
def test_half_a_backup_is_refused(journal: Journal, tmp_path: Path, damage: Callable[[str], str]) -> None:
    known = history(journal)
    journal.backup(tmp_path / "backup.jsonl")
    (tmp_path / "backup.jsonl").write_text(damage((tmp_path / "backup.jsonl").read_text()))
    with pytest.raises(InvalidRequest, match="not a whole backup"):
        journal.restore(tmp_path / "backup.jsonl")
    assert journal.state() == known
