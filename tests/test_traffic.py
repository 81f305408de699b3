"""Who answers which request: shares of a version on trial, callers who stay with one, and the ladder under load."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.domain import Event
from app.store.open import open_journal
from tests.models import scaled, slow
from tests.running_server import Running, server


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """Golden 2 takes a while, version 1 is quick; what version answered is in the header."""
    for version in ("1", "2"):
        (tmp_path / "models" / "m" / version).mkdir(parents=True)
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx", 2.0)
    slow(tmp_path / "models" / "m" / "2" / "model.onnx")
    (tmp_path / "models" / "m" / "model.yaml").write_text(
        "mode: approve\nrollout: {header: X-User}\nruntime: {threads: 1, instances: 1, queue_limit: 6}\nbatching: {limit: 1}\ncapture: off\n"
    )
    with server(tmp_path) as running:
        yield running.ready("m")


def say(running: Running, kind: str, **data: Any) -> None:
    journal = open_journal(str(running.folder / "state" / "journal.db"))
    try:
        journal.append(Event(kind, "m", str(data.get("version", "")), data=data))
    finally:
        journal.close()


BODY = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0, 2.0, 3.0, 4.0]}]}


def ask(client: httpx.Client, user: str = "") -> str:
    """The version that answered."""
    answer = client.post("/v2/models/m/infer", json=BODY, headers={"X-User": user} if user else {})
    return str(answer.headers.get("hone-version", answer.status_code))


def test_a_version_on_trial_gets_its_share_and_a_caller_stays_with_one(running: Running) -> None:
    say(running, "traffic.split", version="1", share=0.25, stage="canary")
    running.until(lambda: running.admin("GET", "/admin/models/m")["split"], 20)
    with httpx.Client(base_url=running.url, timeout=30) as client:
        running.until(lambda: "1" in {ask(client) for _ in range(8)}, 20)
        versions: Counter[str] = Counter()
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            versions[ask(client)] += 1
        assert 0.15 <= versions["1"] / versions.total() <= 0.27, "in runs of a quarter of a second, one each second"
        for user in ("ann", "bob", "eve"):
            assert len({ask(client, user) for _ in range(5)}) == 1
        users = Counter(ask(client, f"user-{number}") for number in range(60))
        assert 5 <= users["1"] <= 27
        say(running, "traffic.split", version="", share=0.0, stage="canary")
        running.until(lambda: running.admin("GET", "/admin/models/m")["split"] is None, 20)
        running.until(lambda: {ask(client) for _ in range(12)} == {"2"}, 20)


def test_under_load_a_quicker_version_answers_and_goes_again_when_the_load_does(running: Running) -> None:
    assert running.admin("PUT", "/admin/models/m/ladder", 200, json={"rungs": ["1"]})["rungs"] == ["1"]
    assert "has no version" in running.admin("PUT", "/admin/models/m/ladder", 404, json={"rungs": ["7"]})["error"]
    assert "answers anyway" in running.admin("PUT", "/admin/models/m/ladder", 400, json={"rungs": ["2"]})["error"]
    running.until(lambda: "1" in [one["version"] for one in running.admin("GET", "/admin/models/m")["loaded"]], 20)
    stop = threading.Event()
    seen: Counter[str] = Counter()

    def call() -> None:
        with httpx.Client(base_url=running.url, timeout=30) as client:
            while not stop.is_set():
                seen[ask(client)] += 1

    callers = [threading.Thread(target=call) for _ in range(12)]
    for caller in callers:
        caller.start()
    try:
        running.until(lambda: running.admin("GET", "/admin/models/m")["stepped_down_to"] == "1", 30)
        before = seen.copy()
        time.sleep(1.5)
        quicker, slower = (seen[version] - before[version] for version in ("1", "2"))
        assert quicker >= 20 and quicker > slower, "the slower one answers what finds nobody waiting"
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    model = running.admin("GET", "/admin/models/m")
    assert (model["active"], model["desired"]) == ("2", "2"), "stepping is no swap"
    steps = [event for event in running.admin("GET", "/admin/timeline?model=m&limit=100")["events"] if event["kind"] == "ladder.stepped"]
    assert steps and steps[0]["data"]["from"] == "2" and "load" in steps[0]["data"]["summary"]
    running.until(lambda: running.admin("GET", "/admin/models/m")["stepped_down_to"] == "", 60)


def test_a_queue_that_is_longer_than_is_promised_is_a_step_down_though_it_is_not_full(running: Running) -> None:
    config = running.folder / "models" / "m" / "model.yaml"
    config.write_text(config.read_text() + "objective: {p95_ms: 40}\n")
    running.until(lambda: running.admin("GET", "/admin/models/m")["objective"].get("p95_ms") == 40, 20)
    running.admin("PATCH", "/admin/models/m/settings", 200, json={"queue_limit": 500})
    running.admin("PUT", "/admin/models/m/ladder", 200, json={"rungs": ["1"]})
    running.until(lambda: "1" in [one["version"] for one in running.admin("GET", "/admin/models/m")["loaded"]], 20)
    stop = threading.Event()

    def call() -> None:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            while not stop.is_set():
                ask(client)  # version 1 has its short queue, and refuses

    callers = [threading.Thread(target=call) for _ in range(40)]
    for caller in callers:
        caller.start()
    try:
        running.until(lambda: running.admin("GET", "/admin/models/m")["stepped_down_to"] == "1", 20)
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    step = next(e for e in running.admin("GET", "/admin/timeline?model=m&limit=100")["events"] if e["kind"] == "ladder.stepped")
    assert "what waits takes" in step["data"]["summary"] and "40 are promised" in step["data"]["summary"]
    running.until(lambda: running.admin("GET", "/admin/models/m")["stepped_down_to"] == "", 60)


def test_the_ladder_is_the_loops_in_auto_mode_and_a_persons_in_others(running: Running) -> None:
    running.admin("PUT", "/admin/models/m/mode", 200, json={"mode": "auto"})
    running.until(lambda: running.admin("GET", "/admin/models/m")["mode"] == "auto", 20)
    assert "hone mode m approve" in running.admin("PUT", "/admin/models/m/ladder", 409, json={"rungs": ["1"]})["error"]
    running.admin("PUT", "/admin/models/m/mode", 200, json={"mode": "approve"})
    running.until(lambda: running.admin("GET", "/admin/models/m")["mode"] == "approve", 20)
    running.admin("PUT", "/admin/models/m/ladder", 200, json={"rungs": ["1"]})
    running.until(lambda: running.admin("GET", "/admin/models/m")["rungs"] == ["1"], 20)


def test_a_model_yaml_that_becomes_wrong_changes_nothing_and_is_told(running: Running) -> None:
    config = running.folder / "models" / "m" / "model.yaml"
    right = config.read_text()
    config.write_text(right + "obective: {p95_ms: 5}\n")
    said = running.until(lambda: running.admin("GET", "/admin/models/m")["reason"], 20)
    assert "obective" in said and "objective" in said, "it names the key and the nearest valid one"
    assert running.log.count("goes on as it was") == 1 and "obective" in running.log, "once, in the log"
    model = running.admin("GET", "/admin/models/m")
    assert (model["state"], model["mode"], model["settings"]["queue_limit"]) == ("ready", "approve", 6)
    with httpx.Client(base_url=running.url, timeout=30) as client:
        assert ask(client) == "2"
    config.write_text(right)
    running.until(lambda: running.admin("GET", "/admin/models/m")["reason"] == "", 20)
