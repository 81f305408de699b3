"""Jobs as people ask for them, on a real server and real workers: built, judged, kept, promoted, cancelled, raced for, overtaken by events."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from optimizers.host import host_class
from optimizers.samples import Samples
from tests.models import heavy, scaled
from tests.odd_models import int8_linear, json_input
from tests.running_server import ROOT, Running, server
from tests.storage import small_disk
from tests.test_swap import children, command

WIDTH = 768
CONFIG = (
    "task: regression\nleast_gain: 0\nsamples: {reference: reference.npz, calibration: calibration.npz}\n"
    "quality: {metric: cosine, floor: 0.9, min_samples: 20}\n"
)


def net(folder: Path, name: str, width: int = WIDTH, version: str = "1") -> Path:
    """A model that int8 makes faster, with its owner's samples."""
    model = folder / "models" / name
    heavy(model / version / "model.onnx", width=width, layers=2)
    rng = np.random.default_rng(0)
    for kind, count in (("reference", 120), ("calibration", 64)):
        Samples({"x": rng.normal(size=(count, width)).astype(np.float32)}).save(model / f"{kind}.npz")
    (model / "model.yaml").write_text(CONFIG)
    return model


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("jobs")
    net(folder, "net")
    net(folder, "other")
    net(folder, "third")
    int8_linear(folder / "models" / "small" / "1" / "model.onnx")
    scaled(folder / "models" / "seen" / "1" / "model.onnx")
    with server(folder, viewer_token="only-looks") as running:
        yield running.ready("net", "other", "third", "small", "seen")


@pytest.fixture
def worker(running: Running) -> Iterator[int]:
    process = running.worker()
    yield process.pid
    process.terminate()
    process.wait(30)
    running.others.remove(process)


def ask(running: Running, model: str, **body: Any) -> str:
    identity: str = running.admin("POST", f"/admin/models/{model}/optimize", 202, json={"promote": "manual", **body})["id"]
    return identity


def events(running: Running, model: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = running.admin("GET", f"/admin/timeline?model={model}&limit=1000")["events"]
    return found


def held_in_mid_build(running: Running, worker: int, identity: str) -> int:
    """Stop the child that builds the job, so that the job stays in the middle of it; its pid."""

    def child() -> int:
        found = [pid for pid in children(worker) if b"task_child" in command(pid)]
        return found[0] if found else 0

    pid: int = running.until(child)
    os.kill(pid, signal.SIGSTOP)
    assert running.admin("GET", f"/admin/jobs/{identity}")["state"] == "building"
    return pid


def state_of(running: Running, identity: str) -> str:
    return str(running.admin("GET", f"/admin/jobs/{identity}")["state"])


def test_a_job_is_built_judged_and_kept_for_a_person_to_promote(running: Running, worker: int) -> None:
    identity = ask(running, "net", recipe=[{"method": "int8-static", "samples": 32}], reason="too slow")
    done = running.job_done(identity)
    assert done["outcome"] in {"kept", "inconclusive"} and done["reason"] == "too slow", done["report"]
    assert running.admin("GET", "/admin/models/net")["active"] == "1"
    golden, built = running.admin("GET", "/admin/models/net/versions")["versions"]
    assert (built["version"], built["parent"], built["recipe"], built["job"]) == ("1.1", "1", ["int8-static"], identity)
    assert built["bytes"] < golden["bytes"] / 2 and built["proof"]["fidelity"]["reference"]["value"] > 0.99
    viewer = running.call("GET", f"/admin/jobs/{identity}", headers={"Authorization": "Bearer only-looks"})
    assert viewer.status_code == 200 and str(running.folder) not in viewer.text

    force = {"version": "1.1", "force": done["outcome"] == "inconclusive"}
    promoted = running.admin("POST", "/admin/models/net/promote", 200, json=force)
    assert (promoted["active"], promoted["previous"]) == ("1.1", "1")
    assert running.call("GET", "/v2/models/net/versions/1/ready").status_code == 200
    assert "active" in running.admin("DELETE", "/admin/models/net/versions/1.1", 403)["error"]

    again = running.job_done(ask(running, "net", recipe=[{"method": "int8-static", "samples": 32}]))
    assert again["outcome"] == "nothing_changed", again["report"]
    back = running.admin("POST", "/admin/models/net/rollback", 200)
    assert back["active"] == "1"
    kinds = [event["kind"] for event in events(running, "net")]
    assert kinds.count("version.published") == 2 and "version.verified" in kinds and kinds.count("desired.changed") == 2
    began = time.monotonic()
    removed = running.admin("DELETE", "/admin/models/net/versions/1.1", 200)
    assert time.monotonic() - began < 15, "a version that is still warm goes at once, not when its time is over"
    assert removed["removed"] and not (running.folder / "state" / "models" / "net" / "1.1" / "model.onnx").exists()
    assert (running.folder / "state" / "models" / "net" / "1.1" / "card.json").exists()
    assert "removed" in running.admin("POST", "/admin/models/net/promote", 409, json={"version": "1.1"})["error"]


def test_what_cutting_each_layer_costs_is_shown_as_a_picture(running: Running, worker: int) -> None:
    recipe = [{"method": "low-rank", "rank": "sensitivity", "split": "fewer", "ratio": 0.1}]
    done = running.job_done(ask(running, "other", recipe=recipe))
    [version] = [one["version"] for one in running.admin("GET", "/admin/models/other/versions")["versions"] if one["recipe"]]
    path = f"/admin/models/other/versions/{version}/curves"
    picture = running.call("GET", path, headers={"Authorization": "Bearer only-looks"})
    assert picture.status_code == 200 and picture.headers["content-type"] == "image/svg+xml", done["report"]
    root = ElementTree.fromstring(picture.text)
    assert len(root.findall(".//{*}polyline")) == 2, "one line for each of the two layers"
    assert running.call("GET", path).status_code == 401
    assert "cut layers one by one" in running.admin("GET", "/admin/models/other/versions/1/curves", 404)["error"]
    assert "nothing is known" in running.admin("GET", "/admin/models/other/versions/1.9/curves", 404)["error"]


def test_what_is_built_for_its_bytes_need_not_be_faster(running: Running, worker: int) -> None:
    """A codebook that kept its quality was always refused for want of speed, and its file thrown away at once."""
    config = running.folder / "models" / "third" / "model.yaml"
    config.write_text(CONFIG.replace("least_gain: 0\n", ""))
    done = running.job_done(ask(running, "third", recipe=[{"method": "codebook", "bits": 6}]))
    assert done["outcome"] in {"kept", "inconclusive"}, done["report"]
    golden, built = running.admin("GET", "/admin/models/third/versions")["versions"]
    assert built["recipe"] == ["codebook"] and built["bytes"] < golden["bytes"] / 3
    assert (running.folder / "state" / "models" / "third" / built["version"] / "model.onnx").exists()
    config.write_text(CONFIG)


def test_methods_that_do_not_apply_say_why(running: Running, worker: int) -> None:
    identity = ask(running, "small", **{"try": [["int8-static"], ["int8-dynamic"]]})
    done = running.job_done(identity)
    assert done["outcome"] == "not_applicable", done
    reasons = {skipped["try"][0]: skipped["reason"] for skipped in done["report"]["skipped"]}
    assert set(reasons) == {"int8-static", "int8-dynamic"} and all("quantized" in reason for reason in reasons.values()), reasons


def test_what_cannot_be_asked_for_is_told_at_once(running: Running) -> None:
    refused = [
        ({"recipe": ["int8-statik"]}, "int8-static"),
        ({"recipe": [{"method": "int8-static", "sample": 3}]}, "sample"),
        ({"recipe": []}, "at least one step"),
        ({"recipe": ["graph"], "try": [["graph"]]}, "not both"),
        ({"recipe": ["tune", "graph"]}, "tune comes last"),
        ({"promote": "perhaps"}, "promote"),
        ({"recipes": ["graph"]}, "recipes"),
        ({"recipe": ["graph"] * 33}, "at most 32 items"),
        ({"try": [["graph"]] * 65}, "at most 64 items"),
        ({"recipe": [{"method": "int8-static", "samples": 10**30}]}, "64-bit range"),
        ({"recipe": [{"method": "int8-static", "exclude": ["\ud800"]}]}, "surrogates"),
        ({"recipe": [{"method": "low-rank", "ratio": 10**400}]}, "ratio must be a number"),
    ]
    for body, said in refused:
        answer = running.admin("POST", "/admin/models/net/optimize", 400, content=json.dumps(body))
        assert said in answer["error"], answer
    assert running.admin("POST", "/admin/models/nobody/optimize", 404)["error"]
    assert running.admin("GET", "/admin/jobs/nobody", 404)["error"]
    assert not running.admin("GET", "/admin/jobs?open=true")["jobs"]


def test_nothing_is_built_from_a_golden_that_does_not_load(running: Running) -> None:
    """It was accepted, and ended minutes later with advice about the worker's state folder."""
    broken = running.folder / "models" / "broken" / "1" / "model.onnx"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no model")

    def told() -> str:
        answer = running.call("POST", "/v2/models/broken/infer", json={"inputs": []}).json()["error"]
        return answer if "does not load" in answer else ""

    reason = running.until(told)
    for asked, body in (("optimize", {"recipe": ["graph"]}), ("verify", {})):
        refused = running.admin("POST", f"/admin/models/broken/{asked}", 409, json=body)["error"]
        assert (
            "golden 1 of 'broken' does not load, so nothing is built from it or proven: " in refused and refused.split(": ")[-1] in reason
        )
    shutil.rmtree(broken.parents[1])


def test_a_job_waits_for_a_worker_once_and_can_be_cancelled_meanwhile(running: Running) -> None:
    identity = ask(running, "other", recipe=["graph"])
    assert identity in running.admin("POST", "/admin/models/other/optimize", 409, json={"recipe": ["graph"]})["error"]
    assert state_of(running, identity) == "requested"
    assert running.admin("DELETE", f"/admin/jobs/{identity}", 202)["outcome"] == "cancelled"
    assert "finished already" in running.admin("DELETE", f"/admin/jobs/{identity}", 409)["error"]


def test_a_job_is_cancelled_while_it_is_built_and_while_it_is_judged(running: Running, worker: int) -> None:
    identity = ask(running, "other", recipe=[{"method": "int8-static", "samples": 16}])
    child = held_in_mid_build(running, worker, identity)
    running.admin("DELETE", f"/admin/jobs/{identity}", 202)
    assert running.job_done(identity, 60)["outcome"] == "cancelled"
    assert not command(child)

    identity = ask(running, "other", recipe=[{"method": "int8-static", "samples": 17}])
    running.until(lambda: state_of(running, identity) == "verifying")
    running.admin("DELETE", f"/admin/jobs/{identity}", 202)
    assert running.job_done(identity, 60)["outcome"] == "cancelled"
    assert running.admin("GET", "/admin/models/other")["active"] == "1"
    running.until(lambda: not [pid for pid in children(running.process.pid) if b"task_child" in command(pid)])
    assert not list((running.folder / "state" / "scratch").iterdir())


def test_frozen_means_that_nothing_changes_but_the_way_back(running: Running) -> None:
    running.admin("POST", "/admin/freeze", 200)
    try:
        assert "frozen" in running.admin("POST", "/admin/models/net/optimize", 403)["error"]
        assert "frozen" in running.admin("POST", "/admin/models/net/promote", 403, json={"version": "1"})["error"]
        assert running.admin("GET", "/admin/status")["frozen"] is True
        document = {"inputs": [json_input("x", "FP32", [1, 4], [1, 1, 1, 1])]}
        assert running.call("POST", "/v2/models/seen/infer", json=document).status_code == 200
    finally:
        running.admin("POST", "/admin/unfreeze", 200)


def test_two_workers_never_do_the_same_job(running: Running, worker: int) -> None:
    second = running.worker()
    try:
        jobs = [ask(running, model, recipe=["graph"]) for model in ("net", "other", "third", "seen")]
        for identity in jobs:
            running.job_done(identity)
        for model, identity in zip(("net", "other", "third", "seen"), jobs, strict=True):
            claims = [event for event in events(running, model) if event["kind"] == "job.claimed" and event["job"] == identity]
            assert len(claims) == 1
    finally:
        second.terminate()
        second.wait(30)
        running.others.remove(second)


def test_a_new_golden_or_no_model_at_all_overtakes_a_job(running: Running, worker: int) -> None:
    first = ask(running, "third", recipe=[{"method": "int8-static", "samples": 16}])
    child = held_in_mid_build(running, worker, first)
    heavy(running.folder / "models" / "third" / "2" / "model.onnx", width=WIDTH, layers=3)
    done = running.job_done(first, 60)
    assert done["outcome"] == "cancelled" and "golden changed" in done["report"]["reason"], done["report"]
    running.until(lambda: not command(child))
    running.until(lambda: running.admin("GET", "/admin/models/third")["active"] == "2")

    identity = ask(running, "third", recipe=[{"method": "int8-static", "samples": 16}])
    child = held_in_mid_build(running, worker, identity)
    running.admin("DELETE", "/admin/models/third", 200)
    done = running.job_done(identity, 60)
    assert done["outcome"] == "cancelled" and "removed" in done["report"]["reason"], done["report"]
    running.until(lambda: not command(child))
    assert not {event["job"] for event in events(running, "third") if event["kind"] == "version.published"} & {first, identity}
    kept = running.folder / "state" / "models" / "third"
    running.until(lambda: all(path.suffix == ".json" for path in kept.rglob("*") if path.is_file() and path.name != ".lock"))


def test_tune_and_verify_run_where_the_model_is_served(running: Running) -> None:
    """No worker is there: both are the server's own."""
    identity = ask(running, "seen", recipe=[{"method": "tune", "max_seconds": 2}], promote="auto")
    done = running.job_done(identity)
    assert done["worker"].startswith("server ") and done["outcome"] in {"promoted", "nothing_changed", "inconclusive"}, done["report"]
    assert running.admin("GET", "/admin/models/seen")["active"] == "1"
    proof = running.job_done(running.admin("POST", "/admin/models/seen/verify", 202)["id"])
    assert proof["outcome"] in {"proven", "inconclusive"}, proof["report"]
    [golden] = running.admin("GET", "/admin/models/seen/versions")["versions"]
    assert golden["proof"]["host_class"] == running.admin("GET", "/admin/status")["host"]["host_class"]
    assert "no version" in running.admin("POST", "/admin/models/seen/verify", 404, json={"version": "1.9"})["error"]


def test_a_proof_without_a_server_ends_with_the_status_of_its_verdict(tmp_path: Path) -> None:
    """It was 0 for a version that failed, and an upgrade that asks for it in a script went on."""
    model = tmp_path / "models" / "m"
    scaled(model / "1" / "model.onnx", -2.0)
    scaled(model / "2" / "model.onnx", 2.0)
    Samples({"x": np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)}).save(model / "reference.npz")
    (model / "model.yaml").write_text(CONFIG.replace(", calibration: calibration.npz", ""))
    with server(tmp_path) as running:
        running.ready("m")
        running.admin("POST", "/admin/models/m/versions/1/load", 200)  # so that it has a card
        running.until(lambda: (tmp_path / "state" / "models" / "m" / "reference").is_dir())
    for version, verdicts in (("1", {"failed"}), ("2", {"passed", "inconclusive"})):
        run = subprocess.run(
            [sys.executable, "-m", "app.cli", "verify", f"m:{version}", "--here", "--json"],
            cwd=ROOT, env=running.environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        verdict = json.loads(run.stdout)["verdict"]
        assert verdict in verdicts and run.returncode == (0 if verdict == "passed" else 1), run


def test_live_inputs_are_kept_within_bounds_and_deleted_on_request(running: Running) -> None:
    def captured() -> int:
        return int(running.admin("GET", "/admin/models/seen")["captured"])

    for number in range(40):
        document = {"inputs": [json_input("x", "FP32", [1, 4], [number, 1, 1, 1])]}
        assert running.call("POST", "/v2/models/seen/infer", json=document).status_code == 200
    running.until(lambda: captured() > 0)
    folder = running.folder / "state" / "models" / "seen" / "captured"
    running.until(lambda: [path for path in folder.rglob("*") if path.is_file()])
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert running.admin("DELETE", "/admin/models/seen/capture", 200)["deleted"] > 0
    assert captured() == 0 and not list(folder.rglob("*.npz"))
    assert [event["actor"] for event in events(running, "seen") if event["kind"] == "capture.cleared"] == ["admin"]
    (running.folder / "models" / "seen" / "model.yaml").write_text("capture: off\n")
    time.sleep(2)
    for number in range(20):
        document = {"inputs": [json_input("x", "FP32", [1, 4], [number, 2, 2, 2])]}
        assert running.call("POST", "/v2/models/seen/infer", json=document).status_code == 200
    time.sleep(1)
    assert captured() == 0


def test_a_job_needs_room_before_it_begins(tmp_path: Path) -> None:
    net(tmp_path, "net", width=1024)
    with small_disk(tmp_path / "state", 22 << 20), server(tmp_path) as running:
        running.ready("net").worker()
        done = running.job_done(ask(running, "net", recipe=["int8-static"]), 120)
        assert done["outcome"] == "failed" and "to spare are needed" in done["report"]["reason"], done["report"]
        assert running.call("GET", "/v2/models/net/ready").status_code == 200
        running.end()


def test_a_version_for_another_class_of_hosts_is_built_and_waits(running: Running, worker: int) -> None:
    """Also where `tune`, which runs on the server, comes last; without VNNI the form for it is what saturates here, and is refused."""
    here = host_class()
    target = "avx2" if here.has_vnni else "vnni"
    recipe = [{"method": "int8-static", "samples": 32}, {"method": "tune", "max_seconds": 2}]
    job = running.admin("POST", "/admin/models/net/optimize", 202, json={"recipe": recipe, "target": target, "promote": "auto"})
    done = running.job_done(job["id"])
    assert done["outcome"] in {"kept", "inconclusive", "refused"} and running.admin("GET", "/admin/models/net")["active"] == "1", done
    if done["outcome"] == "kept":
        assert f"it was made for {target}, and is unproven there" in done["report"]["waits"]
    card = next(v for v in running.admin("GET", "/admin/models/net/versions")["versions"] if v.get("job") == job["id"])
    facts = json.loads((running.folder / "state" / "models" / "net" / card["version"] / "card.json").read_text())
    assert f'"reduce_range": {str(here.has_vnni).lower()}' in json.dumps(facts), facts
    assert "avx2" in running.admin("POST", "/admin/models/net/optimize", 400, json={"recipe": ["graph"], "target": "avx3"})["error"]
