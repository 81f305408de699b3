"""The loop on a real server under real traffic: what is broken is found, blamed rightly, and undone or left alone."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from app.faulty_models import free_size, not_a_number
from app.scenes import CAUSES
from app.traffic import Traffic
from tests.loop_scene import GOLDEN, deploy, running, told, traffic
from tests.running_server import DEMO, Running

__all__ = ["running", "traffic"]  # fixtures


def test_a_new_model_that_answers_nan_is_taken_back_at_once_and_the_story_says_why(running: Running, traffic: Traffic) -> None:
    deploy(running, not_a_number)
    assert "began with this version" in told(running, "diagnosis.made", cause="version")["summary"]
    assert told(running, "plan.made", action="roll back")["version"] == "1"
    running.until(lambda: running.admin("GET", "/admin/models/digits")["active"] == "1", 20)
    assert told(running, "recovery.verified", cause="version")["took_s"] > 0
    explained = running.admin("GET", "/admin/models/digits/explain")
    assert {"suspicion.raised", "diagnosis.made", "plan.made", "desired.changed"} <= {event["kind"] for event in explained["story"]}
    metrics = running.call("GET", "/metrics").text
    assert 'hone_diagnoses_total{cause="version",model="digits"}' in metrics
    assert 'hone_rollbacks_total{model="digits",reason="version"} 1.0' in metrics
    assert traffic.failed == 0


def test_a_runner_killed_from_outside_is_the_hosts_doing_and_builds_nothing(running: Running, traffic: Traffic) -> None:
    for _ in range(3):
        model = running.admin("GET", "/admin/models/digits")
        pid = next(one["pid"] for one in model["loaded"] if one["version"] == "1")
        os.kill(pid, signal.SIGKILL)
        running.until(lambda before=pid: _pid(running) not in (0, before), 20)  # type: ignore[misc]
        time.sleep(0.3)
    assert told(running, "diagnosis.made", cause="host")["confidence"] > 0.5
    assert told(running, "plan.made")["action"] == "nothing"
    assert running.admin("GET", "/admin/jobs")["jobs"] == []
    assert traffic.failed == 0


def test_a_frozen_loop_only_says_what_it_would_do(running: Running, traffic: Traffic) -> None:
    running.admin("POST", "/admin/freeze", 200)
    deploy(running, not_a_number)
    plan = told(running, "plan.made", waits="all change is frozen")
    assert plan["action"] == "nothing" and "would roll back" in plan["summary"]
    assert running.admin("GET", "/admin/models/digits")["active"] == "2"


def test_labels_are_taken_once_by_request_id_and_only_with_their_token(running: Running) -> None:
    picture = (DEMO / "digit.png").read_bytes()
    answer = running.call("POST", "/models/digits/predict", content=picture, headers={"X-Request-Id": "r1"}).json()
    best = answer["predictions"][0]

    def send(label: Any, token: str = "labels", identity: str = "r1") -> Any:
        body = {"labels": [{"id": identity, "label": label}]}
        return running.call("POST", "/models/digits/feedback", json=body, headers={"Authorization": f"Bearer {token}"})

    assert send(best["index"], "wrong").status_code == 401
    assert send(best["index"], running.token).status_code == 401
    assert send("no such class").json()["taken"] == 0
    assert "neither the number of a class" in send("²").json()["refused"][0]["error"], "one odd label was the end of the whole batch"
    assert send(best["label"]).json() == {"model": "digits", "taken": 1, "right": 1, "refused": []}
    labels = {"right": 1, "labelled": 1, "usual": None}
    running.until(lambda: running.admin("GET", "/admin/models/digits")["loop"].get("labels") == labels, 20)
    shown = running.call("GET", "/metrics").text
    assert 'hone_labelled_answers_total{answer="right",model="digits",version="1"} 1.0' in shown
    assert 'hone_labelled_answers_total{answer="wrong",model="digits",version="1"} 0.0' in shown
    assert "labelled already" in send(best["index"]).json()["refused"][0]["error"]
    assert "no answer" in send(1, identity="never").json()["refused"][0]["error"]
    refused = send(True)
    assert refused.status_code == 400 and "labels.0.label is true; it should be a class's number" in refused.json()["error"]


def _pid(running: Running) -> int:
    model = running.admin("GET", "/admin/models/digits")
    return next((int(one["pid"]) for one in model["loaded"] if one["version"] == model["active"]), 0)


def test_the_demo_tells_which_causes_it_can_break(tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "demo", "--break", "nonsense"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "HONE_STATE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and "load, host, quota, process" in done.stderr
    told = subprocess.run([sys.executable, "-m", "app.cli", "demo", "--help"], capture_output=True, text=True, timeout=60)
    assert ", ".join(CAUSES) in " ".join(told.stdout.split())
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_the_version_for_images_of_any_size_answers_as_the_one_it_is_made_of(tmp_path: Path) -> None:
    import onnxruntime as ort

    free_size(GOLDEN, tmp_path / "free.onnx")
    own, free = (ort.InferenceSession(str(path)) for path in (GOLDEN, tmp_path / "free.onnx"))
    rows = np.random.default_rng(0).random((3, 1, 32, 32), np.float32)
    assert np.allclose(own.run(None, {"image": rows})[0], free.run(None, {"image": rows})[0], atol=1e-5)
    assert free.run(None, {"image": rows.repeat(2, -1).repeat(2, -2)})[0].shape == (3, 10)
