"""What every store must do: order, compare-and-set, waiting, leases, the board. One suite, over SQLite and a real Redis."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.domain import Event, Generation, JobState, State
from app.errors import Conflict
from app.store.base import Journal, StoreUnavailable
from app.store.fold import fold_all
from tests.journal_story import SHA, claimed, deployed, desired, published, requested
from tests.stores import Opener, another, journal, redis_server, url

__all__ = ["another", "journal", "redis_server", "url"]


# Events


def test_an_empty_store_has_an_empty_state(journal: Journal) -> None:
    assert journal.state() == State()
    assert list(journal.read()) == []
    assert journal.board() == {}


def test_append_gives_seq_and_time_and_read_gives_back_the_same(journal: Journal) -> None:
    before = time.time()
    stored = journal.append(Event("runner.died", "m", "1", "", "ann", {"reason": "größer ∞", "pid": 7, "list": [1, 2.5, None]}))
    assert stored.seq == 1
    assert before - 60 < stored.at < time.time() + 60
    assert list(journal.read()) == [stored]


def test_events_are_read_in_order_by_model_and_from_either_end(journal: Journal) -> None:
    for number in range(7):
        journal.append(Event("x.y", "mn"[number % 2], data={"n": number}))
    assert [event.data["n"] for event in journal.read()] == list(range(7))
    assert [event.data["n"] for event in journal.read(after=2, limit=3)] == [2, 3, 4]
    assert [event.data["n"] for event in journal.read(model="n")] == [1, 3, 5]
    assert [event.data["n"] for event in journal.read(newest_first=True, limit=2)] == [6, 5]
    assert [event.data["n"] for event in journal.read(after=3, model="m", newest_first=True)] == [6, 4]


def test_a_kind_that_nobody_knows_is_kept(journal: Journal) -> None:
    journal.append(Event("moon.landed", "m", schema=7, data={"crew": ["a", "b"]}))
    assert journal.read()[0].schema == 7
    assert journal.state().seq == 1


@pytest.mark.parametrize("event", [Event("desired.changed", "m"), Event("x.y", "m", data={"path": Path("/tmp")}), Event("", "m")])
def test_what_no_fold_could_read_is_refused(journal: Journal, event: Event) -> None:
    with pytest.raises(ValueError, match=r"need|not JSON"):
        journal.append(event)
    assert list(journal.read()) == []


def test_an_event_too_large_for_a_journal_is_refused(journal: Journal) -> None:
    with pytest.raises(ValueError, match="keep the bulk in a file"):
        journal.append(Event("x.y", "m", data={"bulk": "x" * (5 << 20)}))


def test_numbers_that_are_not_finite_become_null(journal: Journal) -> None:
    journal.append(Event("x.y", "m", data={"gain": math.nan, "all": [math.inf, 1.0]}))
    assert journal.read()[0].data == {"gain": None, "all": [None, 1.0]}


# State


def test_state_is_the_fold_of_what_is_read_in_every_process(journal: Journal, another: Opener) -> None:
    for event in (deployed(), published("1.1"), desired("1.1"), requested("j1"), claimed("j1"), deployed("n"), Event("model.removed", "n")):
        journal.append(event)
    folded = fold_all(State(), journal.read())
    assert journal.state() == folded
    assert another().state() == folded
    assert folded.models["m"].desired == "1.1"


def test_state_follows_what_others_write(journal: Journal, another: Opener) -> None:
    other = another()
    journal.append(deployed())
    assert other.state().models["m"].desired == "1"
    other.append(published("1.1"))
    other.append(desired("1.1"))
    assert journal.state().models["m"].desired == "1.1"
    other.append(Event("model.removed", "m"))
    assert journal.state().models == {}
    assert journal.state() == another().state()


def test_compare_and_set(journal: Journal, another: Opener) -> None:
    journal.append(deployed(), expect=Generation(1, 0))
    journal.append(published("1.1"))
    seen = journal.state().models["m"].generation
    another().append(desired("1.1"), expect=seen)
    with pytest.raises(Conflict, match="moved on"):
        journal.append(desired("1"), expect=seen)
    assert [event.kind for event in journal.read()] == ["model.deployed", "version.published", "desired.changed"]


def test_of_many_writers_at_one_generation_exactly_one_wins(journal: Journal, another: Opener) -> None:
    journal.append(deployed())
    for number in range(8):
        journal.append(published(f"1.{number}"))
    seen = journal.state().models["m"].generation
    journals = [another() for _ in range(8)]

    def promote(number: int) -> bool:
        try:
            journals[number].append(desired(f"1.{number}"), expect=seen)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(promote, range(8)))
    assert sum(wins) == 1
    assert journal.state().models["m"].desired == f"1.{wins.index(True)}"
    assert journal.state().models["m"].generation.n == 2


def test_writers_at_once_lose_nothing_and_share_one_order(journal: Journal, another: Opener) -> None:
    journals = [journal, another(), another(), another()]

    def write(number: int) -> list[int]:
        return [journals[number].append(Event("x.y", "m", data={"by": number, "n": n})).seq for n in range(15)]

    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(write, range(4)))
    events = journal.read()
    assert [event.seq for event in events] == list(range(1, 61))
    for number in range(4):
        assert [event.seq for event in events if event.data["by"] == number] == written[number] == sorted(written[number])


def test_one_journal_may_be_used_by_many_threads(journal: Journal) -> None:
    journal.append(deployed())

    def use(number: int) -> None:
        for n in range(10):
            journal.append(Event("x.y", "m", data={"n": n}))
            assert "m" in journal.state().models
            journal.post(f"t{number}", {"n": n}, 60)
            assert journal.acquire(f"lease-{number}", "me", 60)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(6)))
    assert journal.state().seq == 61
    assert len(journal.board("t")) == 6


CLAIM = """
import sys
from app.store.open import open_journal
from tests.journal_story import claimed
journal = open_journal(sys.argv[1])
wins = []
for number in range(10):
    journal.append(claimed(f"j{number}", sys.argv[2]))
    wins.append(journal.state().jobs[f"j{number}"].worker == sys.argv[2])
print("".join("01"[won] for won in wins))
"""


def test_processes_that_claim_the_same_jobs_agree_on_who_won(journal: Journal, url: str) -> None:
    journal.append(deployed())
    for number in range(10):
        journal.append(requested(f"j{number}"))
    workers = [subprocess.Popen([sys.executable, "-c", CLAIM, url, f"w{n}"], stdout=subprocess.PIPE, text=True) for n in range(3)]
    claims = [worker.communicate(timeout=120)[0].strip() for worker in workers]
    assert [sum(claim[job] == "1" for claim in claims) for job in range(10)] == [1] * 10
    assert all(job.state is JobState.BUILDING for job in journal.state().jobs.values())


# Waiting


def test_wait_sees_what_is_there_and_gives_up_in_time(journal: Journal) -> None:
    journal.append(deployed())
    assert journal.wait(0, 0.0)
    begun = time.monotonic()
    assert not journal.wait(1, 0.3)
    assert 0.25 < time.monotonic() - begun < 10


@pytest.mark.parametrize("by_another", [False, True])
def test_wait_wakes_soon_after_an_event(journal: Journal, another: Opener, by_another: bool) -> None:
    journal.append(deployed())
    writer = another() if by_another else journal
    timer = threading.Timer(0.3, lambda: writer.append(Event("x.y", "m")))
    timer.start()
    begun = time.monotonic()
    assert journal.wait(1, 60)
    assert time.monotonic() - begun < 10
    timer.join()
    assert journal.state().seq == 2


def test_wait_ends_when_the_journal_is_closed(another: Opener) -> None:
    journal = another()
    journal.append(deployed())
    results: list[object] = []

    def wait() -> None:
        try:
            results.append(journal.wait(1, 60))
        except StoreUnavailable:
            results.append(False)

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.2)
    journal.close()
    waiter.join(15)
    assert results == [False]


# Leases


def test_a_lease_has_one_holder_until_it_is_released(journal: Journal, another: Opener) -> None:
    other = another()
    assert journal.acquire("controller", "a", 60)
    assert not other.acquire("controller", "b", 60)
    assert journal.acquire("controller", "a", 60), "the holder renews"
    assert other.acquire("else", "b", 60)
    other.release("controller", "b")
    assert not other.acquire("controller", "b", 60), "only the holder releases"
    journal.release("controller", "a")
    assert other.acquire("controller", "b", 60)


def test_a_lease_that_is_not_renewed_passes_on(journal: Journal, another: Opener) -> None:
    assert journal.acquire("job:j1", "a", 0.3)
    time.sleep(0.4)
    assert another().acquire("job:j1", "b", 60)
    assert not journal.acquire("job:j1", "a", 60)


def test_a_wall_clock_that_jumps_moves_no_lease_no_board_and_no_order(
    journal: Journal, another: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, real = another(), time.time
    journal.append(deployed())
    assert journal.acquire("controller", "a", 60)
    journal.post("k", {"n": 1}, 60)
    for jump_s in (3600.0, -3600.0, -86400.0):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
        journal.append(Event("x.y", "m", data={"jump": jump_s}))
        assert not other.acquire("controller", "b", 60)
        assert other.board() == {"k": {"n": 1}}
        assert not journal.wait(journal.state().seq, 0.05)
        assert other.acquire("short", f"{jump_s}", 0.05)
        time.sleep(0.1)
    assert [event.data.get("jump") for event in journal.read()] == [None, 3600.0, -3600.0, -86400.0]


# The board


def test_the_board_keeps_the_latest_value_of_a_name(journal: Journal, another: Opener) -> None:
    journal.post("stats:m:1", {"p95": 1}, 60)
    journal.post("stats:m:1", {"p95": 2, "über": [1.5]}, 60)
    journal.post("stats:n:1", {"p95": 3}, 60)
    journal.post("else%_*", {}, 60)
    other = another()
    assert other.board("stats:m") == {"stats:m:1": {"p95": 2, "über": [1.5]}}
    assert list(other.board()) == ["else%_*", "stats:m:1", "stats:n:1"]
    assert list(other.board("else%")) == ["else%_*"]


def test_a_value_leaves_the_board_in_time(journal: Journal) -> None:
    journal.post("short", {"n": 1}, 0.2)
    journal.post("long", {"n": 2}, 60)
    time.sleep(0.3)
    assert journal.board() == {"long": {"n": 2}}


def test_a_closed_journal_says_so(another: Opener) -> None:
    journal = another()
    journal.append(deployed())
    journal.close()
    calls: list[Callable[[], Any]] = [journal.state, journal.read, lambda: journal.append(deployed()), lambda: journal.acquire("l", "a", 1)]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="closed"):
            call()


def test_sha_of_the_story_is_what_the_fold_holds(journal: Journal) -> None:
    journal.append(deployed())
    assert replace(journal.state().models["m"], stamp=(0, 0)).golden_sha256 == SHA
