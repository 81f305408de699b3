"""Swaps under load: no request fails, no answer comes from another version than it says, and a kill at any step is repaired."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.serving.backoff import Backoff
from tests.models import scaled
from tests.running_server import Running, server

FACTORS = {"1": 2.0, "2": 3.0}


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    for version, factor in FACTORS.items():
        (tmp_path / "models" / "m" / version).mkdir(parents=True)
        scaled(tmp_path / "models" / "m" / version / "model.onnx", factor)
    with server(tmp_path) as running:
        yield running.ready("m")


class Load:
    """Callers in threads that note every status, and every answer whose value does not fit the version it names."""

    def __init__(self, running: Running, callers: int = 4) -> None:
        self.statuses: Counter[int] = Counter()
        self.versions: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._running = running
        self._threads = [threading.Thread(target=self._call) for _ in range(callers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        with httpx.Client(base_url=self._running.url, timeout=30) as client:
            metadata = client.get("/v2/models/m").json()
            name, width = metadata["inputs"][0]["name"], metadata["inputs"][0]["shape"][1]
            body = {"inputs": [{"name": name, "shape": [1, width], "datatype": "FP32", "data": [1.0] * width}]}
            while not self._stop.is_set():
                answer = client.post("/v2/models/m/infer", json=body)
                self.statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    said, header = answer.json(), answer.headers["hone-version"]
                    self.versions[header] += 1
                    values = said["outputs"][0]["data"]
                    if said["model_version"] != header or any(abs(value - FACTORS[header]) > 1e-6 for value in values):
                        self.wrong.append(answer.text)


def test_no_answer_fails_or_is_another_versions_during_swaps(running: Running) -> None:
    with Load(running) as load:
        for number in range(20):
            running.admin("POST", "/admin/models/m/promote", 200, json={"version": "12"[number % 2]})
    assert not load.wrong, load.wrong[:2]
    assert set(load.statuses) == {200}
    assert set(load.versions) == {"1", "2"}
    events = running.admin("GET", "/admin/timeline?limit=1000")["events"]
    assert len([event for event in events if event["kind"] == "version.activated"]) >= 21


def test_rollback_goes_back_at_once_and_forth_again(running: Running) -> None:
    running.admin("POST", "/admin/models/m/promote", 200, json={"version": "1"})
    assert running.admin("POST", "/admin/models/m/rollback", 200)["active"] == "2"
    assert running.admin("POST", "/admin/models/m/rollback", 200)["active"] == "1"


def test_a_golden_that_does_not_load_is_told_once_and_tried_ever_less_often(running: Running) -> None:
    """It is desired and golden: two who each try it again and again would fill the journal."""
    folder = running.folder / "models" / "m" / "3"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"no model at all")
    running.until(lambda: "3" in running.admin("GET", "/admin/models/m")["failed"], 30)
    time.sleep(5)
    told = running.admin("GET", "/admin/timeline?model=m&limit=1000")["events"]
    assert len([event for event in told if event["kind"] == "version.failed"]) == 1
    assert running.admin("GET", "/admin/models/m")["active"] == "2"


def test_settings_are_a_generation_that_can_be_undone(running: Running) -> None:
    before = running.admin("GET", "/admin/models/m")
    live = running.admin("PATCH", "/admin/models/m/settings", 200, json={"queue_limit": 7})
    assert live["settings"]["queue_limit"] == 7 and live["generation"] == before["generation"] + 1
    same = running.admin("PATCH", "/admin/models/m/settings", 200, json={"queue_limit": 7})
    assert same["generation"] == live["generation"], "what stands already is no change, and a rollback must undo the one before"
    with Load(running) as load:
        anew = running.admin("PATCH", "/admin/models/m/settings", 200, json={"intra_op_threads": 1, "spin_duration_us": 200})
    assert set(load.statuses) == {200} and not load.wrong
    assert anew["settings"]["spin_duration_us"] == 200 and anew["active"] == before["active"]
    undone = running.admin("POST", "/admin/models/m/rollback", 200)
    assert undone["settings"]["spin_duration_us"] == before["settings"]["spin_duration_us"]


def test_a_model_yaml_that_changes_how_versions_run_holds_for_those_that_run(running: Running) -> None:
    """Read when a version was loaded and never again, `rows: dependent` would leave rows mixed until the next restart."""
    path = running.folder / "models" / "m" / "model.yaml"

    def told(text: str, **settings: int) -> int:
        path.write_text(text)
        running.until(lambda: settings.items() <= running.admin("GET", "/admin/models/m")["settings"].items())
        return int(next(one["pid"] for one in running.admin("GET", "/admin/models/m")["loaded"] if one["version"] == "2"))

    def batching(version: str) -> str:
        return str(running.call("GET", f"/v2/models/m/versions/{version}").json()["properties"]["batching"])

    running.admin("POST", "/admin/models/m/versions/1/load", 200)
    with Load(running) as load:
        first = told("runtime: {instances: 1, lone_threads: 0}\n", instances=1, lone_threads=0)
        assert told("runtime: {instances: 2, queue_limit: 77, lone_threads: 0}\n", instances=2, queue_limit=77) == first
        assert told("runtime: {queue_limit: 78, threads: 1}\nbatching: {rows: dependent}\n", queue_limit=78, batch_limit=1) != first
        assert "stated by the owner" in batching("2")
        running.until(lambda: running.answers("/v2/models/m/versions/1/ready") and "stated by the owner" in batching("1"))
    assert set(load.statuses) == {200} and not load.wrong


def test_processing_that_model_yaml_or_a_file_beside_it_changes_is_taken_or_told(running: Running) -> None:
    folder = running.folder / "models" / "m"
    width = running.call("GET", "/v2/models/m").json()["outputs"][0]["shape"][1]

    def first_label() -> str:
        answer = running.call("POST", "/models/m/predict", json=[[float(at) for at in range(width)]]).json()
        return str(answer["predictions"][0][0]["label"]) if "predictions" in answer else ""

    (folder / "labels.txt").write_text("\n".join(f"a{at}" for at in range(width)))
    (folder / "model.yaml").write_text("task: classification\npostprocess: {labels: labels.txt}\n")
    running.until(lambda: first_label() == f"a{width - 1}")
    (folder / "labels.txt").write_text("\n".join(f"b{at}" for at in range(width)))
    running.until(lambda: first_label() == f"b{width - 1}")
    (folder / "labels.txt").write_text("alone")
    running.until(lambda: "labels has 1 names" in running.admin("GET", "/admin/models/m")["reason"])
    assert first_label() == f"b{width - 1}", "what fitted goes on"
    before = len(runners(running.process.pid))
    scaled(running.folder / "models" / "n" / "1" / "model.onnx", 2.0)
    (running.folder / "models" / "n" / "model.yaml").write_text("task: classification\npostprocess: {labels: [alone]}\n")
    running.until(lambda: "labels has 1 names" in running.call("GET", "/v2/models/n").text)
    assert len(runners(running.process.pid)) == before, "a model that never served leaves no process"


@pytest.mark.parametrize("victim", ["server", "runner"])
def test_a_kill_in_the_midst_of_swaps_is_repaired(running: Running, victim: str) -> None:
    stop = threading.Event()

    def swaps() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                running.admin("POST", "/admin/models/m/promote", json={"version": "12"[number % 2]})
            except httpx.HTTPError:
                time.sleep(0.05)

    thread = threading.Thread(target=swaps)
    thread.start()
    try:
        for pause in (0.05, 0.11, 0.23):
            time.sleep(pause)
            if victim == "server":
                running.restart(kill=True).ready("m")
            else:
                for pid in runners(running.process.pid):
                    os.kill(pid, signal.SIGKILL)
                running.ready("m")
    finally:
        stop.set()
        thread.join()
    model = running.until(lambda: (m := running.admin("GET", "/admin/models/m")) and m["active"] == m["desired"] and m)
    answer = running.call("GET", "/v2/models/m").json()
    assert answer["properties"]["version"] == model["desired"], running.admin("GET", "/admin/timeline?limit=12")
    pids = [pid for pid in children(running.process.pid) if b"hone" in command(pid)]
    assert len(pids) <= 8, [command(pid) for pid in pids]


def test_a_failure_answers_only_those_who_asked_before_it() -> None:
    """Who promotes a version waits for what becomes of *this* promotion: a load for an earlier one may fail in the meantime."""
    backoff = Backoff()
    assert not backoff.failed_for("1", 3)
    assert backoff.failed("1", "hash", 3) == 1
    assert backoff.failed_for("1", 3) and not backoff.failed_for("1", 4)
    assert backoff.failed("1", "hash", 4) == 2 and backoff.failed_for("1", 4)


def test_a_load_waits_whatever_failed_before(running: Running) -> None:
    file = running.folder / "models" / "m" / "1" / "model.onnx"
    running.until(lambda: len(running.admin("GET", "/admin/models/m")["loaded"]) == 1)
    file.write_bytes(b"this is no model")
    running.admin("POST", "/admin/models/m/promote", 409, json={"version": "1"})
    running.admin("POST", "/admin/models/m/rollback", 200)
    assert "1" in running.admin("GET", "/admin/models/m")["failed"]
    for call in ("unload", "load"):
        running.admin("POST", f"/v2/repository/models/m/{call}", 200)
    assert running.admin("GET", "/admin/models/m")["active"] == "2"


def test_a_golden_that_does_not_load_is_told_once_and_tried_ever_more_rarely(running: Running) -> None:
    folder = running.folder / "models" / "m" / "3"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"this is no model")
    running.until(lambda: running.log.count("version 3 does not load") >= 2)
    assert running.log.count("version 3 does not load (2)") == 1, running.log
    told = running.admin("GET", "/admin/timeline?model=m")["events"]
    assert [event["kind"] for event in told].count("version.failed") == 1
    assert "3 is not kept warm" not in running.log, "what is to be reached is not loaded beside as well"
    assert running.admin("GET", "/admin/models/m")["active"] == "2"


def test_the_desired_version_survives_a_restart(running: Running) -> None:
    running.admin("POST", "/admin/models/m/promote", 200, json={"version": "1"})
    running.restart().ready("m")
    assert running.admin("GET", "/admin/models/m")["active"] == "1"


def children(pid: int) -> list[int]:
    """All descendants."""
    try:
        direct = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*direct, *(grandchild for child in direct for grandchild in children(child))]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() or Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return b""


def runners(pid: int) -> list[int]:
    """Children of the fork server: they have a session, and many threads or a name of their own."""
    found = []
    for child in children(pid):
        try:
            name = Path(f"/proc/{child}/comm").read_text().strip()
        except OSError:
            continue
        if name.startswith("hone") and name != "hone":
            found.append(child)
    return found
