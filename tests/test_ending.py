"""The end of a server, asked for and not: what it still answers, what it leaves behind, and what a job that it cut off comes to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from app.domain import Event
from app.main import _listen
from app.store.open import open_journal
from optimizers.samples import Samples
from tests.models import endless, heavy, scaled
from tests.running_server import server, start
from tests.test_faults import TURNS, X, alive, infer, load, slow, wait_for
from tests.test_swap import children


def test_no_child_keeps_the_port_when_the_server_has_closed_it() -> None:
    """A check or a replay outlives the closing: who connected then was left waiting until the server's end."""
    with _listen("127.0.0.1", 0) as listener:
        held = os.readlink(f"/proc/self/fd/{listener.fileno()}")
        with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1, close_fds=False) as child:
            assert child.stdout is not None and child.stdout.readline()
            files = [os.readlink(entry) for entry in Path(f"/proc/{child.pid}/fd").iterdir()]
            child.communicate(b"\n")
    assert held.startswith("socket:") and held not in files


@pytest.mark.parametrize("command_name", ["serve", "worker"])
def test_an_order_to_end_is_heard_before_anything_was_begun(tmp_path: Path, command_name: str) -> None:
    """Process 1 of a container hears only what it has a handler for."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HONE_")} | {
        "HONE_STATE": str(tmp_path / "state")
    }
    process = start(command_name, tmp_path, environment)
    try:
        wait_for(lambda: _handles(process.pid, signal.SIGTERM))
        process.terminate()
        assert process.wait(30) == 0 and not (tmp_path / "state").exists()
    finally:
        process.kill()


def _handles(pid: int, number: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_the_end_of_a_server_by_signal_and_by_kill(tmp_path: Path) -> None:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    endless(tmp_path / "models" / "slow" / "1" / "model.onnx")
    shared = sorted(os.listdir("/dev/shm"))
    with server(tmp_path, lame_duck_s="4", grace_s="60") as running:
        running.ready("m", "slow")
        kept = httpx.Client(base_url=running.url, timeout=60)
        kept.get("/v2/health/live")
        done: list[int] = []
        lasting = threading.Thread(target=lambda: done.append(infer(running, "slow", *slow(30 * TURNS)).status_code))
        follower = threading.Thread(target=lambda: running.admin("GET", "/admin/status"))
        with load(running, callers=3) as (statuses, _):
            lasting.start()
            follower.start()
            time.sleep(0.3)
            began = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(running.url + "/v2/health/ready").status_code == 503, 3)
            answer = kept.post("/v2/models/m/infer", json={"inputs": [X]})
            assert answer.status_code == 200 and answer.headers["connection"] == "close"
            assert httpx.get(running.url + "/v2/health/live").status_code == 200
            assert running.process.wait(90) == 0, "an order to end that was obeyed is a success"
            assert 3.5 < time.monotonic() - began < 80
        lasting.join()
        follower.join()
        kept.close()
        assert done == [200], "what was accepted is answered"
        # A caller whose connection came as the listening socket closed may see it reset, then it is refused.
        assert set(statuses) <= {200, "ConnectError", "ReadError", "RemoteProtocolError"}, statuses
        assert statuses["ReadError"] + statuses["RemoteProtocolError"] <= 6 and statuses[200] > 3
        assert "Traceback" not in running.log

        running.restart().ready("m")
        family = [pid for pid in children(running.process.pid) if alive(pid)]
        running.process.kill()
        running.process.wait()
        wait_for(lambda: not [pid for pid in family if alive(pid)], 10)
        running.restart().ready("m")
        assert infer(running, "m", X).status_code == 200
    assert sorted(os.listdir("/dev/shm")) == shared
    assert not [path for folder in ("scratch", "staging") for path in (tmp_path / "state" / folder).iterdir()]


def test_a_job_survives_a_kill_at_each_of_its_steps(tmp_path: Path) -> None:
    """Worker killed when it claimed, server when built and when promoted: one version, published once, active in the end."""
    model = tmp_path / "models" / "net"
    heavy(model / "1" / "model.onnx", width=512, layers=2)
    rng = np.random.default_rng(0)
    for name, count in (("reference", 200), ("calibration", 64)):
        Samples({"x": rng.normal(size=(count, 512)).astype(np.float32)}).save(model / f"{name}.npz")
    (model / "model.yaml").write_text(
        "task: regression\nleast_gain: 0\nsamples: {reference: reference.npz, calibration: calibration.npz}\n"
        "quality: {metric: cosine, floor: 0.9, min_samples: 20}\n"
    )
    plan = [("job.claimed", "worker"), ("job.built", "server"), ("desired.changed", "server")]
    with server(tmp_path) as running:
        running.ready("net")
        worker = running.worker()
        job = running.admin("POST", "/admin/models/net/optimize", 202, json={"recipe": ["int8-static"], "promote": "auto"})
        journal = open_journal(str(tmp_path / "state" / "journal.db"))
        events: list[Event] = []
        after, deadline = 0, time.monotonic() + 400
        while time.monotonic() < deadline and not any(event.kind == "job.finished" for event in events):
            journal.wait(after, 0.5)
            for event in journal.read(after, 100):
                after, events = event.seq, [*events, event]
                if plan and event.kind == plan[0][0]:
                    if plan.pop(0)[1] == "server":
                        running.restart(kill=True)
                    else:
                        worker.kill()
                        worker.wait()
                        worker = running.worker()
        journal.close()
        finished = [event for event in events if event.kind == "job.finished"]
        assert len(finished) == 1 and finished[0].job == job["id"], [event.kind for event in events]
        assert sum(event.kind == "version.published" for event in events) == 1
        running.ready("net")
        outcome = finished[0].data["outcome"]
        assert outcome in {"promoted", "inconclusive"}, finished[0].data  # a loud machine may leave the gain open
        expected = "1.1" if outcome == "promoted" else "1"
        state = running.until(lambda: (now := running.admin("GET", "/admin/models/net"))["active"] == now["desired"] and now)
        assert (state["active"], state["golden"], state["failed"]) == (expected, "1", {})
        assert [one["version"] for one in running.admin("GET", "/admin/models/net/versions")["versions"]] == ["1", "1.1"]
        assert not list((tmp_path / "state" / "scratch").iterdir())
        assert running.call("GET", "/v2/models/net/versions/1/ready").status_code == 200, "golden answers beside what replaced it"
