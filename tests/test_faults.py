"""What breaks in production, done on purpose to a real server: killed and stopped processes, leaving clients, greedy models, a full house.

Always the same is asked afterwards: no answer was wrong, everything that was taken is given back, and the next request is served.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.models import KILLING_ROW, endless, failing, identity, killer, memory_eater, scaled
from tests.odd_models import binary_body, json_input
from tests.running_server import ROOT, Running, server
from tests.test_swap import children, command

MODELS = ("m", "killer", "slow", "plain", "failing")
X = json_input("x", "FP32", [1, 4], [1, 1, 1, 1])
TURNS = 60_000
"""Turns of `slow` that take some tens of milliseconds."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("faults")

    def at(name: str, version: str = "1") -> Path:
        return folder / "models" / name / version / "model.onnx"

    scaled(at("m", "1"), 2.0)
    scaled(at("m", "2"), 3.0)
    killer(at("killer"))
    endless(at("slow"))
    identity(at("plain"))
    failing(at("failing"))
    (folder / "models" / "slow" / "model.yaml").write_text("runtime: {queue_limit: 64}\n")
    (folder / "models" / "m" / "model.yaml").write_text("mode: observe\n")  # the loop would leave it for its stopped runners
    with server(folder, job_memory_bytes=str(1 << 30)) as running:
        yield running.ready(*MODELS)


def infer(running: Running, model: str, *inputs: dict[str, Any], **options: Any) -> httpx.Response:
    return running.call("POST", f"/v2/models/{model}/infer", json={"inputs": list(inputs), **options})


def slow(turns: int = TURNS) -> list[dict[str, Any]]:
    return [json_input("x", "FP32", [1], [1]), json_input("n", "INT64", [1], [turns])]


def loaded(running: Running, model: str, version: str = "") -> dict[str, Any]:
    found = running.admin("GET", f"/admin/models/{model}")
    return next(one for one in found["loaded"] if one["version"] == (version or found["active"]))


def gauges(running: Running, model: str) -> dict[str, float]:
    lines = running.call("GET", "/metrics").text.splitlines()
    wanted = ("hone_queue_depth", "hone_inflight_requests")
    return {
        line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(wanted) and f'model="{model}"' in line
    }


def alive(pid: int) -> bool:
    return bool(command(pid)) and (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(reached: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := reached():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not reached within {seconds} s")


@contextlib.contextmanager
def load(running: Running, model: str = "m", callers: int = 4) -> Iterator[tuple[Counter[object], list[float]]]:
    """Callers that never pause: statuses (or exceptions) by count, and how long each answer took."""
    statuses: Counter[object] = Counter()
    took: list[float] = []
    stop = threading.Event()

    def call() -> None:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    answer = client.post(f"/v2/models/{model}/infer", json={"inputs": [X]})
                    statuses[answer.status_code] += 1
                except httpx.HTTPError as error:
                    statuses[type(error).__name__] += 1
                    stop.wait(0.05)
                took.append(time.monotonic() - began)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield statuses, took
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_callers_of_a_dead_or_stopped_runner_get_the_next_ones_answer(running: Running, how: signal.Signals) -> None:
    with load(running) as (statuses, took):
        for _ in range(5):
            pid = wait_for(lambda: loaded(running, "m")["pid"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
            wait_for(partial(_another_runs, running, pid))
            time.sleep(0.2)
    assert set(statuses) <= {200, 503} and statuses[503] <= statuses[200] // 10, statuses
    assert max(took) < 10
    nothing = {"hone_queue_depth": 0.0, "hone_inflight_requests": 0.0}
    wait_for(lambda: gauges(running, "m") == nothing, 5)  # a live answer may just be asked again
    deaths = [line for line in running.call("GET", "/metrics").text.splitlines() if line.startswith("hone_runner_deaths_total{")]
    assert any('model="m"' in line and not line.endswith(" 0.0") for line in deaths)
    assert running.admin("GET", "/admin/models/m")["active"] == "2", "a killed runner is not the version's fault"


def test_a_row_that_kills_its_runner_is_refused_from_then_on(running: Running) -> None:
    deadly = [json_input("x", "INT64", [1], [KILLING_ROW[0]]), json_input("d", "INT64", [1], [KILLING_ROW[1]])]
    for _ in range(3):
        answer = infer(running, "killer", *deadly)
        assert answer.status_code == 422 and "SIGFPE" in answer.json()["error"], answer.text
    fine = infer(running, "killer", json_input("x", "INT64", [1], [8]), json_input("d", "INT64", [1], [2]))
    assert fine.json()["outputs"][0]["data"] == [4]
    kinds = [event["kind"] for event in running.admin("GET", "/admin/timeline?model=killer")["events"]]
    assert "runner.died" in kinds and "version.failed" not in kinds, "golden is never marked failed"


def test_models_that_take_all_memory_or_crash_leave_no_trace_and_the_next_one_loads(running: Running, tmp_path: Path) -> None:
    greedy, crashing = memory_eater(tmp_path / "eater.onnx").read_bytes(), killer(tmp_path / "killer.onnx", constant=True).read_bytes()
    before = set(children(running.process.pid))
    token = {"Authorization": f"Bearer {running.token}"}
    with load(running, callers=1) as (statuses, _):
        for body, status in [(greedy, 507), (crashing, 400)] * 2:
            answer = running.call("POST", "/admin/models", headers=token, data={"name": "greedy"}, files={"model.onnx": body})
            assert answer.status_code == status, answer.text
        good = scaled(tmp_path / "good.onnx").read_bytes()
        assert running.call("POST", "/admin/models", headers=token, data={"name": "good"}, files={"model.onnx": good}).status_code == 201
    assert set(statuses) == {200}
    running.admin("DELETE", "/admin/models/good", 200)
    wait_for(lambda: not {pid for pid in set(children(running.process.pid)) - before if alive(pid)})


def test_a_version_whose_folder_went_is_no_failed_one_any_more(running: Running) -> None:
    broken = running.folder / "models" / "plain" / "2"
    broken.mkdir()
    (broken / "model.onnx").write_bytes(b"no model")

    def failed() -> set[str]:
        return set(running.admin("GET", "/admin/models/plain")["failed"])

    wait_for(lambda: failed() == {"2"})
    shutil.rmtree(broken)
    wait_for(lambda: not failed())
    assert infer(running, "plain", X).status_code == 200


def test_slots_and_gauges_are_exactly_zero_after_a_mixed_crowd(running: Running) -> None:
    """A third of the callers leave while queued, a third name a deadline that cannot be met, some send nonsense; runners die in between."""
    statuses: Counter[int] = Counter()
    lock = threading.Lock()
    document = httpx.Request("POST", running.url, json={"inputs": slow(2 * TURNS)}).content
    head = f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(document)}\r\n\r\n".encode()

    def crowd(number: int) -> None:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            for turn in range(60):
                kind = (number + turn) % 4
                if kind == 0:
                    with socket.create_connection(("127.0.0.1", running.port)) as connection:
                        connection.sendall(head + document)
                        time.sleep(0.005)
                    continue
                body: Any = {"inputs": slow(100), "parameters": {"timeout": 2000}} if kind == 1 else {"inputs": slow(100)}
                body = body if kind < 3 else {"inputs": [json_input("x", "FP32", [1], ["nonsense"])]}
                answer = client.post("/v2/models/slow/infer", json=body)
                with lock:
                    statuses[answer.status_code] += 1

    threads = [threading.Thread(target=crowd, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.5)
        pid = loaded(running, "slow")["pid"]
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 400, 429, 503, 504}, statuses
    wait_for(lambda: gauges(running, "slow") == {"hone_queue_depth": 0.0, "hone_inflight_requests": 0.0})
    answers: list[int] = []
    batch = [threading.Thread(target=lambda: answers.append(infer(running, "slow", *slow(100)).status_code)) for _ in range(32)]
    for thread in batch:
        thread.start()
    for thread in batch:
        thread.join()
    assert answers == [200] * 32, "the full capacity is there again"


@pytest.mark.parametrize("path", ["/v2/models/slow/infer", "/models/slow/predict"])
def test_a_full_queue_refuses_before_it_reads_a_body(running: Running, path: str) -> None:
    running.admin("PATCH", "/admin/models/slow/settings", 200, json={"queue_limit": 1})
    checked = threading.Event()

    def ask() -> None:
        while not checked.is_set():  # some are refused themselves
            infer(running, "slow", *slow(1_000_000))
            time.sleep(0.05)

    def refused_unread() -> bool:
        """Of a request that sends not one byte of its body."""
        with socket.create_connection(("127.0.0.1", running.port), timeout=1) as connection, contextlib.suppress(TimeoutError):
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
            connection.sendall(head.encode())
            return connection.recv(64).startswith(b"HTTP/1.1 429 ")
        return False

    callers = [threading.Thread(target=ask) for _ in range(6)]
    for caller in callers:
        caller.start()
    try:
        wait_for(lambda: gauges(running, "slow")["hone_queue_depth"] == 1.0)
        wait_for(refused_unread)  # asked again where the queue had just moved on
    finally:
        checked.set()
        for caller in callers:
            caller.join()
        running.admin("PATCH", "/admin/models/slow/settings", 200, json={"queue_limit": 64})


def test_series_and_files_stay_level_over_swaps_and_loads(running: Running) -> None:
    def series() -> list[str]:
        return [line.rpartition(" ")[0] for line in running.call("GET", "/metrics").text.splitlines() if line.startswith("hone_")]

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{running.process.pid}/fd"))

    def turn(count: int) -> None:
        for _ in range(count):
            for version in ("1", "2"):
                running.admin("POST", "/admin/models/m/promote", 200, json={"version": version})
                sent[version] += infer(running, "m", X).status_code == 200
            running.admin("PATCH", "/admin/models/m/settings", 200, json={"batch_limit": 4 + _ % 3})

    sent: Counter[str] = Counter()
    token = {"Authorization": f"Bearer {running.token}"}
    before = requests_of(running, "m")
    turn(3)
    wait_for(lambda: sum(line.startswith("hone_model_cpu_seconds_total{") and '"m"' in line for line in series()) == 2)
    settled, files = series(), descriptors()
    turn(25)
    for _ in range(5):
        assert running.call("POST", "/v2/repository/models/plain/unload", headers=token).status_code == 200
        assert running.call("POST", "/v2/repository/models/plain/load", headers=token).status_code == 200
    wait_for(lambda: descriptors() <= files + 4)
    new = {line for line in series() if line not in settled}
    assert len(new) <= 2 and not [line for line in new if 'version="' in line], new
    after = requests_of(running, "m")
    assert {version: after[version] - before[version] for version in sent} == dict(sent), "no request is lost in the sums"


def _another_runs(running: Running, pid: int) -> bool:
    return loaded(running, "m")["pid"] not in (0, pid)


def requests_of(running: Running, model: str) -> Counter[str]:
    """Good answers by version, as counted by the server."""
    found: Counter[str] = Counter()
    for line in running.call("GET", "/metrics").text.splitlines():
        if line.startswith("hone_requests_total{") and f'model="{model}"' in line and 'code="200"' in line:
            found[line.partition('version="')[2].partition('"')[0]] += int(float(line.rpartition(" ")[2]))
    return found


def test_a_client_of_one_byte_a_second_holds_no_runner(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 200\r\n\r\n")
        for byte in b'{"i':
            connection.sendall(bytes([byte]))
            assert infer(running, "m", X).status_code == 200
            assert gauges(running, "m") == {"hone_queue_depth": 0.0, "hone_inflight_requests": 0.0}


def test_live_answers_while_large_bodies_come(running: Running) -> None:
    ones = np.ones((1, 1_500_000), np.float32)
    headers, body = binary_body({"x": ("FP32", ones.shape, ones.tobytes())}, outputs=[{"name": "y", "parameters": {"binary_data": True}}])
    answers: list[bool] = []

    def send() -> None:
        answer = running.call("POST", "/v2/models/plain/infer", headers=headers, content=body)
        answers.append(answer.status_code == 200 and answer.content.endswith(ones.tobytes()))

    senders = [threading.Thread(target=send) for _ in range(32)]
    took: list[float] = []
    for sender in senders:
        sender.start()
    with httpx.Client(base_url=running.url, timeout=60) as client:
        while any(sender.is_alive() for sender in senders):
            began = time.monotonic()
            assert client.get("/v2/health/live").status_code == 200
            took.append(time.monotonic() - began)
            time.sleep(0.01)
    for sender in senders:
        sender.join()
    assert answers == [True] * 32
    assert float(np.median(took)) < 0.1 and max(took) < 3, (np.median(took), max(took))


def test_live_runners_outlast_their_fork_server_and_the_next_load_works(running: Running) -> None:
    pid = loaded(running, "m")["pid"]
    forkserver = next(child for child in children(running.process.pid) if name_of(child) == "hone-forkserver")
    os.kill(forkserver, signal.SIGKILL)
    assert infer(running, "m", X).status_code == 200 and loaded(running, "m")["pid"] == pid
    running.admin("PATCH", "/admin/models/m/settings", 200, json={"spin_duration_us": 1})
    assert infer(running, "m", X).status_code == 200 and loaded(running, "m")["pid"] != pid
    assert any(name_of(child) == "hone-forkserver" and alive(child) for child in children(running.process.pid))


def name_of(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def test_who_asks_while_descriptors_are_short_is_told_so_and_answered_later(running: Running) -> None:
    """By default as many as the machine allows; below, a large answer as JSON needs some that are not there."""
    pid = running.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert soft == hard
    values = np.ones((1, 100_000), np.float32)
    body = {"inputs": [json_input("x", "FP32", list(values.shape), values.ravel().tolist())]}
    headers = {"Authorization": f"Bearer {running.token}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=60) as client:
        assert client.post("/v2/models/plain/infer", json=body).status_code == 200
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))  # bounds the number of the next one: those that are open stay
        try:
            short = client.post("/v2/models/plain/infer", json=body)
            mode = client.put("/admin/models/plain/mode", json={"mode": "auto"})
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert short.status_code == 503 and "no file descriptor left" in short.json()["error"] and "retry-after" in short.headers
        assert mode.status_code in (200, 503), mode.text
        assert client.post("/v2/models/plain/infer", json=body).status_code == 200


def test_what_large_requests_held_is_freed_when_they_fail(running: Running) -> None:
    """Not at the next collection of Python's, which a few dozen errors do not bring about."""
    index = np.zeros(2_000_000, np.int64)
    index[-1] = 99
    headers, body = binary_body({"index": ("INT64", index.shape, index.tobytes())})

    def resident_mb() -> int:
        with open(f"/proc/{running.process.pid}/statm") as file:
            return int(file.read().split()[1]) * 4096 >> 20

    before = resident_mb()
    for _ in range(16):
        assert running.call("POST", "/v2/models/failing/infer", content=body, headers=headers).status_code == 400
    assert resident_mb() < before + 120


def test_a_port_in_use_is_told_at_once(running: Running, tmp_path: Path) -> None:
    environment = running.environment | {"HONE_STATE": str(tmp_path / "state")}
    second = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert second.returncode != 0 and "Address already in use" in second.stderr and "--port" in second.stderr
    assert "Traceback" not in second.stderr and not (tmp_path / "state").exists()
