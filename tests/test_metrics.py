"""What /metrics says after real traffic: every family there is, clean by promtool, scraped by a real Prometheus that answers the board."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import SEARCH_PATH
from tests.running_server import DEMO, ROOT, Running, free_port, server

FAMILIES = (
    "hone_requests_total",
    "hone_request_duration_seconds",
    "hone_phase_duration_seconds",
    "hone_batch_size",
    "hone_queue_depth",
    "hone_inflight_requests",
    "hone_rejections_total",
    "hone_model_memory_bytes",
    "hone_model_cpu_seconds_total",
    "hone_model_load_duration_seconds",
    "hone_swaps_total",
    "hone_swap_timestamp_seconds",
    "hone_model_info",
    "hone_requests_within_objective_total",
    "process_resident_memory_bytes",
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with server(tmp_path_factory.mktemp("metrics"), demo=True) as running:
        running.ready("digits")
        for _ in range(20):
            assert running.call("POST", "/models/digits/predict", content=(DEMO / "digit.png").read_bytes()).status_code == 200
        running.call("POST", "/v2/models/digits/infer", content=b"{")
        running.call("POST", "/v2/models/digits/versions/7.7/infer", content=b"{}")
        running.until(lambda: "hone_model_memory_bytes{" in text(running), 30)
        yield running


def text(running: Running) -> str:
    return running.call("GET", "/metrics").text


def samples(running: Running, name: str) -> list[str]:
    return [line for line in text(running).splitlines() if line.startswith(name) and not line.startswith("#")]


def test_every_family_is_there_after_traffic(running: Running) -> None:
    seen = text(running)
    missing = [name for name in FAMILIES if f"\n# TYPE {name} " not in seen]
    assert not missing
    assert 'hone_requests_total{code="200",model="digits",version="1"} 20.0' in seen
    assert 'code="400"' in seen
    phases = {line.split('phase="')[1].split('"')[0] for line in samples(running, "hone_phase_duration_seconds_count")}
    assert phases == {"decode", "queue", "compute", "encode"}


def test_statistics_and_metrics_tell_the_same(running: Running) -> None:
    stats = running.call("GET", "/v2/models/digits/stats").json()["model_stats"][0]
    [rows] = samples(running, "hone_inferences_total")
    assert float(rows.split()[-1]) == stats["inference_count"] == 20
    assert stats["execution_count"] <= 20


def test_unknown_names_make_no_series(running: Running) -> None:
    for number in range(5):
        running.call("POST", f"/v2/models/nobody{number}/infer", content=b"{}")
    assert "nobody" not in text(running)


@pytest.mark.needs("promtool")
def test_promtool_finds_nothing_to_say(running: Running) -> None:
    promtool = shutil.which("promtool", path=SEARCH_PATH)
    assert promtool is not None
    checked = subprocess.run([promtool, "check", "metrics"], input=text(running), capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.needs("prometheus")
def test_a_real_prometheus_answers_every_expression_of_the_board(running: Running, tmp_path: Path) -> None:
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "hone", "static_configs": [{"targets": [f"127.0.0.1:{running.port}"]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    program = shutil.which("prometheus", path=SEARCH_PATH)
    assert program is not None
    arguments = [
        program,
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(arguments, stdout=log, stderr=log) as process:
        try:
            wait_for(lambda: bool(ask(port, 'hone_requests_total{code="200"}')), process)
            assert float(ask(port, 'up{job="hone"}')[0]["value"][1]) == 1
            for expression in board():
                ask(port, expression)
        finally:
            process.terminate()


def board() -> list[str]:
    """Every expression of every panel and annotation, with Grafana's variables filled in."""
    found = []
    for path in sorted((ROOT / "grafana").rglob("*.json")):
        document = json.loads(path.read_text())
        targets = [target for panel in document.get("panels", []) for target in panel.get("targets", [])]
        found += [entry["expr"] for entry in [*targets, *document.get("annotations", {}).get("list", [])] if entry.get("expr")]
    assert len(found) >= 8
    variables = {"$__rate_interval": "1m", "$__interval": "15s", "$__range": "5m", "$model": ".*", "${model}": ".*", "$version": ".*"}
    for name, value in variables.items():
        found = [expression.replace(name, value) for expression in found]
    return found


def ask(port: int, expression: str) -> list[dict[str, Any]]:
    response = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": expression}, timeout=10)
    if response.status_code == 503:
        raise httpx.HTTPError("Prometheus is still starting")
    answer = response.json()
    assert answer["status"] == "success", f"{expression}: {answer}"
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def wait_for(reached: Any, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if reached():
                return
        except httpx.HTTPError:
            pass
        assert process.poll() is None, "prometheus ended by itself"
        time.sleep(0.3)
    raise AssertionError("Prometheus did not show the server's metrics in time")
