"""What was at work when everything was killed at once, and what a server makes of it at its next start."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import pytest

from app.domain import Event, State
from app.serving.at_work import PLACES, AtWork, Unfinished
from app.serving.past_deaths import PastDeaths
from app.store.open import open_journal
from tests.models import scaled
from tests.running_server import ROOT, server
from tests.test_swap_faults import LONG, dawdling

KILLED = """
import os, signal, sys
from pathlib import Path
from app.serving.at_work import AtWork
at_work = AtWork(Path(sys.argv[1]), sys.argv[2])
idle, busy, twice, loaded = (at_work.mark("m", version) for version in ("1", "1.1", "1.2", "1.3"))
idle.begin(), idle.end()
busy.begin()
twice.begin(), twice.begin(), twice.end()
with loaded.loading():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(folder: Path, server_name: str = "") -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(folder), server_name], check=False)


def test_what_computed_or_was_loaded_is_known_after_a_kill_and_told_once(tmp_path: Path) -> None:
    killed(tmp_path)
    after = AtWork(tmp_path)
    assert {(one.version, one.loading) for one in after.unfinished} == {("1.1", False), ("1.2", False), ("1.3", True)}
    assert all(one.model == "m" and abs(one.at - time.time()) < 60 for one in after.unfinished)
    after.close()
    assert AtWork(tmp_path).unfinished == ()


def test_a_clean_end_and_a_server_that_lives_leave_nothing_to_tell(tmp_path: Path) -> None:
    drained = AtWork(tmp_path)
    drained.mark("m", "1").begin()
    assert AtWork(tmp_path).unfinished == (), "another server on this folder is alive, and what computes there is well"
    drained.close()
    drained.mark("m", "1").end()
    assert AtWork(tmp_path).unfinished == ()


def test_a_folder_that_takes_no_file_costs_only_the_memory_of_it(tmp_path: Path) -> None:
    at_work = AtWork(tmp_path / "absent")
    at_work.mark("m", "1").begin()
    at_work.mark("m", "1").end()
    assert at_work.unfinished == () and at_work.mark("m", "1").idle and not (tmp_path / "absent").exists()
    at_work.close()


def test_places_go_round(tmp_path: Path) -> None:
    at_work = AtWork(tmp_path)
    at_work.mark("m", "0").begin()
    for version in range(1, 2 * PLACES):
        at_work.mark("m", str(version)).begin()
        at_work.mark("m", str(version)).end()
    assert at_work.mark("m", "0")._map is not None and not at_work.mark("m", "0").idle


def deaths(folder: Path, *died: tuple[str, str], times: int = 3, ago_s: float = 10.0) -> PastDeaths:
    past = PastDeaths([Unfinished(model, version, False, time.time() - ago_s) for model, version in died for _ in range(times)])
    journal = open_journal(str(folder / "journal.db"))
    asyncio.run(past.remember(journal))
    told = [(event.model, event.version) for event in journal.read(0, 100) if event.kind == "runner.died"]
    assert told == [one for one in died for _ in range(times)]
    journal.close()
    return past


def test_three_ends_of_the_whole_server_are_a_versions_fault(tmp_path: Path) -> None:
    past = deaths(tmp_path, ("m", "1.1"))
    version, why = past.bearable("m", "1.1", "1", company=False)
    assert version == "1" and "died with it 3 times in five minutes" in why
    past.forgive("m")
    assert past.bearable("m", "1.1", "1", company=False) == ("1.1", "")


def test_what_the_store_lost_is_put_back_before_the_ends_are_told(tmp_path: Path) -> None:
    """What is told first would fill the gap: nobody could see it any more."""
    known = State(seq=3, frozen=True)
    journal = open_journal(str(tmp_path / "journal.db"), known)
    past = PastDeaths([Unfinished("m", "1.1", False, time.time() - 10.0) for _ in range(4)])
    asyncio.run(asyncio.wait_for(past.remember(journal, known), 20))
    assert [event.kind for event in journal.read()] == ["journal.recovered", *["runner.died"] * 4]
    assert journal.state().frozen
    journal.close()


def test_a_server_that_starts_on_an_older_copy_of_its_store_is_frozen(tmp_path: Path) -> None:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    store, copy = tmp_path / "state" / "journal.db", tmp_path / "copy"
    with server(tmp_path) as running:
        running.ready("m")
        copy.mkdir()
        with contextlib.closing(sqlite3.connect(store)) as whole, contextlib.closing(sqlite3.connect(copy / "journal.db")) as older:
            whole.backup(older)
        running.admin("POST", "/admin/freeze", 200)
        running.process.terminate()
        running.process.wait(60)
        for path in store.parent.glob("journal.db*"):
            path.unlink()
        shutil.copy(copy / "journal.db", store)
        running.restart()
        running.ready("m")
        assert running.admin("GET", "/admin/status")["frozen"] is True
        told = {event["kind"]: event["seq"] for event in running.admin("GET", "/admin/timeline?limit=200")["events"]}
        assert told["journal.recovered"] < told["server.started"]


@pytest.mark.parametrize(("times", "ago_s"), [(2, 10.0), (3, 400.0)])
def test_two_of_them_or_some_that_are_long_over_are_not(tmp_path: Path, times: int, ago_s: float) -> None:
    assert deaths(tmp_path, ("m", "1.1"), times=times, ago_s=ago_s).bearable("m", "1.1", "1", company=False) == ("1.1", "")


def test_three_servers_that_end_together_accuse_no_version_and_one_that_ends_again_and_again_does(tmp_path: Path) -> None:
    """A power cut, or an order to kill: each had requests under way."""
    journal = open_journal(str(tmp_path / "journal.db"))

    def ended(place: str) -> PastDeaths:
        (tmp_path / place).mkdir(exist_ok=True)
        killed(tmp_path / place, place)
        past = PastDeaths(AtWork(tmp_path / place).unfinished)
        asyncio.run(past.remember(journal))
        return past

    last = [ended(place) for place in ("a:8000", "b:8000", "c:8000")][-1]
    told = [event.data for event in journal.read(0, 100) if event.kind == "runner.died" and event.version == "1.1"]
    assert [data["server"] for data in told] == ["a:8000", "b:8000", "c:8000"] and all(data["ended_s_ago"] < 60 for data in told)
    assert last.bearable("m", "1.1", "1", company=False) == ("1.1", "") and len(last.recent("m", "1.1")) == 1
    for _ in range(2):
        last = ended("b:8000")
    assert last.bearable("m", "1.1", "1", company=False)[0] == "1"
    journal.close()


def test_a_clock_that_is_an_hour_off_hides_no_end_of_the_whole_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(str(tmp_path / "journal.db"))
    real = time.time
    monkeypatch.setattr("app.serving.past_deaths.time", lambda: real() + 3600)
    past = PastDeaths([Unfinished("m", "1.1", False, real() + 3590) for _ in range(3)])
    asyncio.run(past.remember(journal))
    assert past.bearable("m", "1.1", "1", company=False)[0] == "1"
    journal.close()


def test_a_golden_without_a_version_before_waits_only_where_that_helps_others(tmp_path: Path) -> None:
    past = deaths(tmp_path, ("m", "1"))
    assert past.bearable("m", "1", "1", company=False) == ("1", "")
    assert past.bearable("m", "1", "1", company=True)[0] == ""
    (tmp_path / "both").mkdir()
    both = deaths(tmp_path / "both", ("m", "1"), ("n", "1"))
    assert both.bearable("m", "1", "1", company=True)[0] == "1", "nobody can tell which of them it was"


def test_a_version_that_takes_the_whole_server_down_is_left_at_the_next_start(tmp_path: Path) -> None:
    dawdling(tmp_path / "models" / "m" / "1" / "model.onnx", 1)
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [LONG]}]}
    with server(tmp_path) as running:
        running.ready("m")
        dawdling(tmp_path / "made" / "model.onnx", 2)
        (tmp_path / "made").rename(tmp_path / "models" / "m" / "2")
        running.until(lambda: running.admin("GET", "/admin/models/m")["active"] == "2")
        for _ in range(3):
            running.ready("m")
            assert running.admin("GET", "/admin/models/m")["active"] == "2"
            asked = threading.Event()
            threads = [threading.Thread(target=_ask, args=(running.url, request, asked)) for _ in range(4)]
            for thread in threads:
                thread.start()
            asked.wait(30)
            time.sleep(0.5)
            running.restart(kill=True)
            for thread in threads:
                thread.join()
        running.ready("m")
        running.until(lambda: running.admin("GET", "/admin/models/m")["active"] == "1", 30)
        told = running.admin("GET", "/admin/timeline?model=m&limit=200")["events"]
        died = [event for event in told if event["kind"] == "runner.died"]
        assert len(died) == 3 and {event["version"] for event in died} == {"2"}
        left = [event for event in told if event["kind"] == "desired.changed"][-1]["data"]
        assert left["version"] == "1" and "the whole server died with it 3 times" in left["reason"]
        running.restart()
        running.ready("m")
        assert running.admin("GET", "/admin/models/m")["active"] == "1"
        told = running.admin("GET", "/admin/timeline?model=m&limit=200")["events"]
        assert [event["kind"] for event in told].count("runner.died") == 3, "this time it was asked to end"


def _ask(url: str, request: object, answered: threading.Event) -> None:
    """Until the server is gone."""
    while True:
        try:
            httpx.post(f"{url}/v2/models/m/infer", json=request, timeout=30)
            answered.set()
        except httpx.HTTPError:
            if answered.is_set():
                return


@pytest.mark.parametrize("remedy", ["/admin/models/digits/versions/1/load", "/v2/repository/models/digits/load"])
def test_a_golden_that_waits_for_its_deaths_to_be_over_answers_at_once_after_the_remedy_that_is_told(tmp_path: Path, remedy: str) -> None:
    """`hone load digits` was told, which is no command; and what is one loaded the version, and the model went on refusing."""
    with server(tmp_path, demo=True) as running:
        shutil.copytree(tmp_path / "models" / "digits", tmp_path / "models" / "other")
        running.ready("digits", "other")
        running.process.terminate()
        running.process.wait(60)
        journal = open_journal(str(tmp_path / "state" / "journal.db"))
        for _ in range(3):
            data = {"reason": "the whole server ended without a word", "ended_s_ago": 1.0, "server": "here:1"}
            journal.append(Event("runner.died", "digits", "1", data=data))
        journal.close()
        running.restart().ready("other")
        said = running.admin("GET", "/admin/models/digits")
        assert (said["state"], said["active"]) == ("unavailable", "") and "hone load digits:1" in said["reason"], said
        assert running.call("POST", remedy, headers={"Authorization": f"Bearer {running.token}"}).status_code == 200
        running.until(partial(running.answers, "/v2/models/digits/ready"), 10)
        picture = (ROOT / "app" / "demo_models" / "digit.png").read_bytes()
        assert running.call("POST", "/models/digits/predict", content=picture).json()["predictions"][0]["label"] == "6"
