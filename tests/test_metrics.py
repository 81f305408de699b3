"""What Prometheus sees of a server that had real traffic: every metric with its labels, clean to promtool, whole to every panel of the board."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics

from app.domain import Observation
from app.telemetry.metrics import LADDER, Metrics
from app.telemetry.prometheus import PIECE, Exporter
from tests.conftest import SEARCH_PATH
from tests.models import KILLING_ROW, killer, scaled
from tests.odd_models import int8_linear, json_input, logarithm
from tests.running_server import ROOT, Running, free_port, server

BOARD = ROOT / "grafana" / "dashboards" / "hone.json"
LABELS = {
    "hone_requests_total": {"model", "version", "code"},
    "hone_request_duration_seconds_bucket": {"model", "version", "le"},
    "hone_phase_duration_seconds_bucket": {"model", "version", "phase", "le"},
    "hone_batch_size_bucket": {"model", "version", "le"},
    "hone_queue_depth": {"model", "version"},
    "hone_inflight_requests": {"model", "version"},
    "hone_rejections_total": {"model", "reason"},
    "hone_model_memory_bytes": {"model", "version"},
    "hone_model_cpu_seconds_total": {"model", "version"},
    "hone_model_yielding_seconds_total": {"model", "version"},
    "hone_model_load_duration_seconds_bucket": {"model", "le"},
    "hone_swaps_total": {"model", "outcome"},
    "hone_swap_duration_seconds_bucket": {"model", "le"},
    "hone_swap_timestamp_seconds": {"model"},
    "hone_jobs_total": {"optimizer", "outcome"},
    "hone_job_duration_seconds_bucket": {"optimizer", "le"},
    "hone_model_info": {"model", "version", "optimizer", "precision"},
    "hone_requests_within_objective_total": {"model"},
    "hone_runner_deaths_total": {"model", "version", "reason"},
    "hone_nonfinite_outputs_total": {"model", "version"},
    "hone_model_state": {"model", "state"},
    "hone_host_ratio": {"kind"},
    "hone_slo_attainment_ratio": {"model"},
    "process_resident_memory_bytes": set(),
    "process_cpu_seconds_total": set(),
}
SPARSE = {
    "hone_fidelity_ratio", "hone_class_fidelity_ratio", "hone_confidence_shift", "hone_drift_score", "hone_shape_shift_ratio", "hone_burn_rate",
    "hone_labelled_answers_total",
}  # fmt: skip
"""Figures that want more traffic than the test's, a version beside golden, or true labels: the board shows nothing rather than a number that nobody measured."""
X = json_input("x", "FP32", [1, 4], [1, 1, 1, 1])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a worker, after some of everything."""
    folder = tmp_path_factory.mktemp("metrics")
    for version, factor in (("1", 2.0), ("2", 3.0)):
        scaled(folder / "models" / "m" / version / "model.onnx", factor)
    (folder / "models" / "m" / "model.yaml").write_text("objective: {p95_ms: 60000}\n")
    logarithm(folder / "models" / "log" / "1" / "model.onnx")
    killer(folder / "models" / "killer" / "1" / "model.onnx")
    int8_linear(folder / "models" / "small" / "1" / "model.onnx")
    with server(folder, worker_port=str(free_port())) as running:
        running.ready("m", "log", "killer", "small").worker()
        make_traffic(running)
        yield running


def make_traffic(running: Running) -> None:
    for version in ("1", "2"):
        running.admin("POST", "/admin/models/m/promote", 200, json={"version": version})
        for _ in range(5):
            assert infer(running, "m", X).status_code == 200
    running.admin("PATCH", "/admin/models/m/settings", 200, json={"batch_limit": 4})
    assert infer(running, "m", X, parameters={"timeout": 1}).status_code == 504
    assert infer(running, "m", json_input("x", "FP32", [1, 4], ["a"] * 4)).status_code == 400
    assert infer(running, "nobody", X).status_code == 404
    assert infer(running, "log", json_input("x", "FP32", [1], [-1])).status_code == 200
    deadly = [json_input("x", "INT64", [1], [KILLING_ROW[0]]), json_input("d", "INT64", [1], [KILLING_ROW[1]])]
    assert infer(running, "killer", *deadly).status_code == 422
    job = running.admin("POST", "/admin/models/small/optimize", 202, json={"recipe": ["int8-dynamic"]})
    assert running.job_done(job["id"])["outcome"] == "not_applicable"
    awaited = {"hone_model_cpu_seconds_total", "hone_job_duration_seconds_count", "hone_suspicions_total"}
    running.until(lambda: awaited <= set(re.findall(r"^(\w+)\{", metrics(running), re.M)))


def infer(running: Running, model: str, *inputs: dict[str, Any], **top: Any) -> httpx.Response:
    return running.call("POST", f"/v2/models/{model}/infer", json={"inputs": list(inputs), **top})


def metrics(running: Running, port: str = "") -> str:
    return httpx.get(f"http://127.0.0.1:{port or running.port}/metrics", timeout=60).text


def value(text: str, name: str, **labels: str) -> float:
    """Sum over the samples that carry these labels."""
    lines = [line for line in text.splitlines() if re.match(rf"{name}(\{{| )", line)]
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(f'{key}="{wanted}"' in line for key, wanted in labels.items()))


def test_every_metric_is_there_with_its_labels(running: Running) -> None:
    text = metrics(running)
    for name, labels in LABELS.items():
        samples = [line for line in text.splitlines() if re.match(rf"{name}(\{{| )", line)]
        assert samples, name
        for sample in samples:
            assert set(re.findall(r'(\w+)="', sample.partition(" ")[0])) == labels, sample
    phases = set(re.findall(r'hone_phase_duration_seconds_count\{[^}]*phase="(\w+)"', text))
    assert phases == {"decode", "queue", "compute", "encode"}
    assert value(text, "hone_requests_total", model="m", code="200") == 10
    assert value(text, "hone_requests_within_objective_total", model="m") == 10
    assert value(text, "hone_rejections_total", model="m") >= 1
    assert value(text, "hone_jobs_total", optimizer="int8-dynamic", outcome="not_applicable") == 1
    assert 'hone_swaps_total{model="m",outcome="failed"} 0.0' in text and 'hone_suspicions_total{kind="errors",model="m"} 0.0' in text
    for born in (
        'hone_rejections_total{model="small",reason="queue_full"}', 'hone_runner_deaths_total{model="small",reason="hung",version="1"}',
        'hone_runner_deaths_total{model="small",reason="with_server",version="1"}', 'hone_nonfinite_outputs_total{model="small",version="1"}',
        'hone_store_errors_total{operation="append"}', 'hone_store_errors_total{operation="dropped"}',
    ):  # fmt: skip
        assert f"{born} 0.0" in text, "a counter that is born at 1 hides its first event"
    assert 'model="nobody"' not in text, "whoever asks for unknown names must not make series"
    ladders = {tuple(re.findall(rf'{name}_bucket\{{model="m",version="2",(?:phase="compute",)?le="([^"]+)"', text)) for name in ("hone_request_duration_seconds", "hone_phase_duration_seconds")}  # fmt: skip
    assert len(ladders) == 1, "one ladder of buckets for all"


def test_the_worker_exports_what_it_did_itself_alone(running: Running) -> None:
    text = metrics(running, running.environment["HONE_WORKER_PORT"])
    assert "process_resident_memory_bytes" in text and "hone_worker_busy" in text
    for name in ("hone_requests_total", "hone_swaps_total", "hone_model_info", "hone_jobs_total"):
        assert not value(text, name), name


@pytest.mark.needs("promtool")
def test_promtool_has_nothing_to_say(running: Running) -> None:
    for port in ("", running.environment["HONE_WORKER_PORT"]):
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=metrics(running, port), capture_output=True, text=True, env={"PATH": SEARCH_PATH}
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_statistics_and_metrics_agree(running: Running) -> None:
    text = metrics(running)
    found = {(one["name"], one["version"]): one for one in running.call("GET", "/v2/models/stats").json()["model_stats"]}
    for (model, version), stats in found.items():
        labels = {"model": model, "version": version}
        assert stats["inference_stats"]["success"]["count"] == value(text, "hone_requests_total", **labels, code="200")
        failures = value(text, "hone_requests_total", **labels) - value(text, "hone_requests_total", **labels, code="200")
        assert stats["inference_stats"]["fail"]["count"] == failures
        assert stats["inference_count"] == value(text, "hone_inferences_total", **labels)
        assert stats["execution_count"] == value(text, "hone_batch_size_count", **labels)
        seconds = value(text, "hone_phase_duration_seconds_sum", **labels, phase="compute")
        assert stats["inference_stats"]["compute_infer"]["ns"] == pytest.approx(seconds * 1e9, rel=1e-6)
    told = [
        value(one, "hone_model_memory_bytes", model="m", version="2") for one in (text, metrics(running))
    ]  # measured anew each few seconds
    assert found[("m", "2")]["memory_usage"][0]["byte_size"] in told and min(told) > 0


@pytest.mark.needs("prometheus")
def test_every_panel_of_the_board_has_an_answer(running: Running, tmp_path: Path) -> None:
    port = free_port()
    targets = [f"127.0.0.1:{running.port}", f"127.0.0.1:{running.environment['HONE_WORKER_PORT']}"]
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
        f"scrape_configs: [{{job_name: hone, static_configs: [{{targets: {json.dumps(targets)}}}]}}]\n"
    )
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stderr=log, env={"PATH": SEARCH_PATH}) as prometheus,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            running.until(lambda: query(client, "sum(up)") == ["2"])
            deadline = time.monotonic() + 60
            while not query(client, 'increase(hone_requests_total{model="m",version="2",code="200"}[30s]) > 2'):
                assert time.monotonic() < deadline, "Prometheus never saw the requests grow"
                infer(running, "m", X)
                time.sleep(0.1)
            infer(running, "m", X, parameters={"timeout": 1})
            for title, expression in expressions():
                answer = query(client, expression.replace("$__rate_interval", "30s").replace("$model", ".*"))
                assert answer or SPARSE & set(re.findall(r"hone_\w+", expression)), f"{title}: no data for {expression}"
            names = client.get("/api/v1/label/model/values", params={"match[]": "hone_model_ready"}).json()["data"]
            assert set(names) == {"m", "log", "killer", "small"}
        finally:
            prometheus.terminate()


def query(client: httpx.Client, expression: str) -> list[str]:
    """Values of an instant query; fails where Prometheus refuses the expression."""
    response = client.get("/api/v1/query", params={"query": expression})
    if response.status_code == 503:
        return []  # Prometheus is starting
    answer = response.json()
    assert answer["status"] == "success", (expression, answer)
    return [sample["value"][1] for sample in answer["data"]["result"]]


def expressions() -> Iterator[tuple[str, str]]:
    board = json.loads(BOARD.read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for annotation in board["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


def test_sides_can_be_parted_and_closed(tmp_path: Path) -> None:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    apart = free_port()
    with server(tmp_path, admin_port=str(apart), metrics="admin", show_internals="false") as running:
        running.ready("m")
        token = {"Authorization": f"Bearer {running.token}"}
        answer = infer(running, "m", X)
        assert answer.status_code == 200 and answer.headers["x-request-id"]
        assert not {"server-timing", "hone-version", "hone-generation"} & set(answer.headers)
        assert running.call("GET", "/metrics").status_code == 401 == running.call("GET", "/v2/models/stats").status_code
        assert running.call("GET", "/metrics", headers=token).status_code == 200
        for elsewhere in (("GET", "/admin/status"), ("POST", "/v2/repository/models/m/unload")):
            refused = running.call(*elsewhere, headers=token)
            assert refused.status_code == 404 and "the admin side of this server has a port of its own" in refused.json()["error"]
        admin = f"http://127.0.0.1:{apart}"
        assert httpx.get(f"{admin}/admin/status", headers=token).json()["ready"] is True
        assert httpx.get(f"{admin}/admin/status").status_code == 401
        assert httpx.get(f"{admin}/v2/health/ready").status_code == 200
        refused = httpx.post(f"{admin}/v2/models/m/infer", json={"inputs": [X]})
        assert refused.status_code == 404 and "inference is on the server's other one (HONE_PORT)" in refused.json()["error"]
        for port in (running.url, admin):
            for path in (path for path, methods in httpx.get(f"{port}/openapi.json").json()["paths"].items() if "get" in methods):
                if not path.endswith("timeline"):
                    there = httpx.get(port + path.replace("{model}", "m").replace("{version}", "1"), headers=token)
                    assert "nothing is at" not in there.text, f"{path} is described and not there"
        assert httpx.post(f"{admin}/v2/repository/models/m/unload", headers=token).status_code == 200
        assert infer(running, "m", X).status_code == 503


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_many_models_are_shown_in_small_pieces_that_are_one_whole(accept: str) -> None:
    """A hundred models are 15,000 samples: at once they took a seventh of a second in which nobody was answered."""
    counted = Metrics()
    versions = {(f"m{number}", "1") for number in range(40)}
    for model, version in versions:
        counted.observe(Observation(model, version, 200, 0.01, 0.001, 0.001, 0.007, 0.001, 4, 1, 0.006, 0.0))
        counted.gauge("hone_queue_depth", model, version, value=3.0)
    pieces, _ = Exporter(counted, lambda: versions).pieces(accept)
    parts = list(pieces)
    assert max(part.count(b"\n") for part in parts) <= PIECE + 3
    text = b"".join(parts).decode()
    parse = openmetrics.text_string_to_metric_families if accept else parser.text_string_to_metric_families
    families = list(parse(text))
    assert len({family.name for family in families}) == len(families) and text.count("# EOF") == bool(accept)
    found = {family.name: family.samples for family in families}
    for name, each in (("hone_requests", 1), ("hone_queue_depth", 1), ("hone_request_duration_seconds", len(LADDER) + 3)):
        assert {(one.labels["model"], one.labels["version"]) for one in found[name]} == versions
        assert len(found[name]) == each * len(versions)


def test_what_a_version_never_counted_leaves_the_export_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.telemetry.metrics.RETIRE_AFTER_S", 0.0)
    counted = Metrics()
    counted.from_zero = (("hone_runner_deaths", ("hung",)), ("hone_runner_deaths", ("crashed",)))
    counted.begin([("m", "1")])
    counted.count("hone_runner_deaths", "m", "1", "crashed")
    assert counted.counters["hone_runner_deaths"] == {("m", "1", "hung"): 0.0, ("m", "1", "crashed"): 1.0}
    for _ in range(5):
        counted.retire(set())
    assert counted.counters["hone_runner_deaths"] == {("m", "1", "crashed"): 1.0}
