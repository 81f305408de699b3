"""What Hone costs beside the model: memory, time to ready, many models, a neighbour's overload, an optimization on the same cores, and
each default feature. Each part is one function that starts what it needs and returns its numbers.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import models, openloop, wrk
from benchmarks.machine import Quiet, process_seconds, rollup_bytes, status_bytes
from benchmarks.models import BenchModel, binary_body, json_body
from benchmarks.servers import HOST, Hone, HoneWorker

FORKS: Final = 20
BODIES: Final = 32
UNASKED_S, REST_S = 3.0, 35.0
"""After 30 s without a request a runner gives back what only batches need; after 1 s where nobody has asked it yet."""
WARM_ROWS: Final = 16
PROBES_PER_S: Final = 50.0
LIGHT_SHARE: Final = 0.2
HOT_ROWS: Final = (1, 32)
"""Rows a request of the neighbour that is overloaded: small ones keep the HTTP process busy with refusals, large ones the models' cores with work."""


@dataclass(frozen=True)
class Effort:
    rounds: int
    seconds: float
    models: int
    body_bytes: int


FULL: Final = Effort(rounds=7, seconds=10, models=50, body_bytes=100_000_000)
QUICK: Final = Effort(rounds=3, seconds=3, models=10, body_bytes=5_000_000)
Say = Callable[[str], None]


def measure(repository: Path, folder: Path, effort: Effort, say: Say) -> dict[str, Any]:
    quiet = Quiet()
    results: dict[str, Any] = {}
    parts: Sequence[tuple[str, Callable[[Path, Effort], Any]]] = (
        ("start", start), ("runner", runner), ("many", many), ("overload", overload), ("optimization", optimization), ("bodies", bodies), ("features", features),
    )  # fmt: skip
    for name, part in parts:
        place = folder / name
        place.mkdir()
        results[name] = part(place, effort)
        say(f"costs: {name}: {results[name]}")
    return results | {"quiet": quiet.report()}


def start(folder: Path, effort: Effort) -> dict[str, Any]:
    """Seconds from `hone serve` to an answer of a 45 MB model, on an empty state and again; memory of the HTTP process."""
    model = models.heavy(folder / "repository", "heavy")
    found: dict[str, Any] = {"model_mb": round(model.path.stat().st_size / 1e6, 1)}
    for name in ("first_s", "second_s"):
        with Hone(folder / "repository", folder / "state") as hone:
            found[name] = round(hone.wait_ready("heavy"), 2)
            body = binary_body(model, model.rows(1))
            assert hone.ask("POST", body.path, body.data, body.headers)[0] == 200
            if name == "first_s":
                hone.settle(1)
    found["idle_rss_mb"] = 0.0
    with Hone(folder / "repository", folder / "state") as hone:
        hone.wait_ready("heavy")
        found["idle_rss_mb"] = round(status_bytes(hone.pid) / 2**20, 1)
        wrk.run(HOST, hone.port, binary_body(model, model.rows(1)), 32, effort.seconds)
        found["busy_rss_mb"] = round(status_bytes(hone.pid) / 2**20, 1)
    return found


def runner(folder: Path, effort: Effort) -> dict[str, Any]:
    """Milliseconds until a forked runner process is ready for its session, and what it holds by itself."""
    from app.domain import RuntimeSettings, Signature, TensorSpec
    from app.serving.engine import Engine, RunnerSpec
    from app.serving.forkserver import ForkServer
    from app.serving.ledger import CoreLedger

    model = models.linear(folder / "repository")
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 3)),), True)
    spec = RunnerSpec("linear", "1", 1, str(model.path), signature, RuntimeSettings())
    forkserver = ForkServer()
    forkserver.start()

    async def forks() -> tuple[list[float], list[float]]:
        ready, private = [], []
        for _ in range(FORKS):
            engine = await Engine.start(spec, forkserver=forkserver, ledger=CoreLedger(1))
            ready.append(engine.opened.ready_s * 1e3)
            private.append(rollup_bytes(engine.pid, "Private_Dirty", "Private_Clean") / 2**20)
            await engine.stop()
        return ready, private

    try:
        ready, private = asyncio.run(forks())
    finally:
        forkserver.close()
    return {
        "ready_ms": round(statistics.median(ready), 1),
        "worst_ms": round(max(ready), 1),
        "private_mb": round(statistics.median(private), 1),
    }


def many(folder: Path, effort: Effort) -> dict[str, Any]:
    """One model's latency with and without many others loaded, in turns, and what each of the others holds beside its weights."""
    few, full = folder / "few", folder / "full"
    alone = models.linear(few)
    models.linear(full)
    others = [models.copied(models.DEMO, full, f"digits{number}") for number in range(effort.models - 1)]
    with Hone(few, folder / "state-few") as one, Hone(full, folder / "state-full") as crowd:
        one.wait_ready("linear")
        for model in others:
            crowd.wait_ready(model.name, 300)
        one.settle(1)
        crowd.settle(effort.models)
        weights = others[0].path.stat().st_size
        held = []
        for wait_s, rows in ((UNASKED_S, 0), (0.0, WARM_ROWS), (REST_S, 0)):
            for model in others if rows else ():
                body = binary_body(model, model.rows(rows))
                assert crowd.ask("POST", body.path, body.data, body.headers)[0] == 200
            time.sleep(wait_s)
            private = statistics.median(rollup_bytes(pid, "Private_Dirty", "Private_Clean") for pid in crowd.runners())
            held.append(round((private - weights) / 2**20, 1))
        body = binary_body(alone, alone.rows(1))
        with_one: list[float] = []
        with_many: list[float] = []
        for number in range(effort.rounds * 2):
            for server, latencies in ((one, with_one), (crowd, with_many)) if number % 2 else ((crowd, with_many), (one, with_one)):
                latencies.append(wrk.run(HOST, server.port, body, 1, 1).p50_ms)
        rss = status_bytes(crowd.pid)
    ratios = [b / a for a, b in zip(with_one, with_many, strict=True)]
    return {
        "models": effort.models, "p50_alone_ms": round(statistics.median(with_one), 3), "p50_with_many_ms": round(statistics.median(with_many), 3),
        "ratio": round(statistics.median(ratios), 3), "private_beside_weights_mb": held,
        "http_rss_mb": round(rss / 2**20, 1),
    }  # fmt: skip


def overload(folder: Path, effort: Effort) -> list[dict[str, Any]]:
    """A light model's p99 alone and while a neighbour gets three times what it can do, by small and by large requests."""
    repository = folder / "repository"
    light, hot = (models.copied(models.DEMO, repository, name) for name in ("light", "hot"))
    with Hone(repository, folder / "state") as hone:
        for model in (light, hot):
            hone.wait_ready(model.name)
        hone.settle(2)
        rate = _capacity(hone, light) * LIGHT_SHARE
        return [_flooded(hone, light, hot, rate, rows, effort) for rows in HOT_ROWS]


def _flooded(hone: Hone, light: BenchModel, hot: BenchModel, rate: float, rows: int, effort: Effort) -> dict[str, Any]:
    capacity = _capacity(hone, hot, rows)
    alone, beside = [], []
    for _ in range(max(2, effort.rounds // 2)):
        alone.append(_open(hone, light, rate, effort.seconds).result())
        flood = _open(hone, hot, capacity * 3, effort.seconds + 2, connections=1000, rows=rows)
        time.sleep(1.0)
        beside.append(_open(hone, light, rate, effort.seconds).result())
        flooded = flood.result()
    calm, pressed = (statistics.median(seen.quantile_ms(0.99) for seen in runs) for runs in (alone, beside))
    refused = sum(int((flooded.status == code).sum()) for code in (429, 503, 504))
    return {
        "hot_rows": rows, "light_per_s": round(rate, 1), "hot_per_s": round(capacity * 3, 1), "p99_alone_ms": round(calm, 2),
        "p99_beside_ms": round(pressed, 2), "ratio": round(pressed / calm, 2), "light_failed": sum(seen.failed for seen in beside),
        "hot_refused_share": round(refused / max(1, len(flooded.start)), 2),
    }  # fmt: skip


def optimization(folder: Path, effort: Effort) -> dict[str, Any]:
    """p99 at half of capacity without and while a job builds int8 on the same cores."""
    repository = folder / "repository"
    model = models.demo(repository)
    with Hone(repository, folder / "state") as hone:
        hone.wait_ready(model.name)
        hone.settle(1)
        rate = _capacity(hone, model) / 2
        worker = HoneWorker(repository, folder / "state")
        try:
            time.sleep(3.0)
            calm = _open(hone, model, rate, effort.seconds * 2).result()
            during = _open(hone, model, rate, 600)
            time.sleep(1.0)
            recipe = ["int8-static"]
            began = time.monotonic()
            job = hone.admin("POST", f"/models/{model.name}/optimize", {"recipe": recipe, "promote": "manual", "reason": "benchmark"})
            while (state := hone.admin("GET", f"/jobs/{job['id']}"))["state"] != "finished" and time.monotonic() - began < 300:
                time.sleep(0.2)
            ended = time.monotonic()
            during.stop()
            seen = during.result().between(began, ended)
        finally:
            worker.stop()
    return {
        "rate_per_s": round(rate, 1), "job_s": round(ended - began, 1), "outcome": state.get("outcome", ""), "failed": seen.failed,
        "p99_without_ms": round(calm.quantile_ms(0.99), 2), "p99_during_ms": round(seen.quantile_ms(0.99), 2),
        "ratio": round(seen.quantile_ms(0.99) / calm.quantile_ms(0.99), 2),
    }  # fmt: skip


def bodies(folder: Path, effort: Effort) -> list[dict[str, Any]]:
    """How long live and ready take, asked from another process, while large bodies come at once, in binary and as JSON."""
    repository = folder / "repository"
    model = models.linear(repository)
    found = []
    with Hone(repository, folder / "state") as hone:
        hone.wait_ready(model.name)
        hone.settle(1)
        for form, make in (("binary", binary_body), ("JSON", json_body)):
            some = make(model, model.rows(1000))
            body = make(model, np.tile(model.rows(1000), (effort.body_bytes // len(some.data), 1)))
            health = [
                f"GET {path} HTTP/1.1\r\nHost: {HOST}:{hone.port}\r\n\r\n".encode() for path in ("/v2/health/live", "/v2/health/ready")
            ]
            probes = openloop.Running(openloop.Plan(HOST, hone.port, health, PROBES_PER_S, 600.0, 64))
            time.sleep(1.0)
            began = time.monotonic()
            with ThreadPoolExecutor(BODIES) as pool:
                sent = [pool.submit(hone.ask, "POST", body.path, body.data, body.headers, 600.0) for _ in range(BODIES)]
                codes = [one.result()[0] for one in sent]
            ended = time.monotonic()
            probes.stop()
            seen = probes.result().between(began, ended)
            found.append({
                "form": form, "count": BODIES, "megabytes": round(len(body.data) / 1e6), "answered": codes.count(200), "refused": sum(code in (429, 503) for code in codes),
                "failed": sum(code not in (200, 429, 503) for code in codes), "asked": len(seen.start), "unwell": seen.failed, "seconds": round(ended - began, 1),
                "p99_ms": round(seen.quantile_ms(0.99), 1), "worst_ms": round(seen.quantile_ms(1.0), 1), "rss_mb": round(status_bytes(hone.pid) / 2**20),
            })  # fmt: skip
    return found


FEATURES: Final[tuple[tuple[str, dict[str, str], str], ...]] = (
    ("all on (default)", {}, ""),
    ("without version and Server-Timing headers", {"HONE_SHOW_INTERNALS": "false"}, ""),
    ("without /metrics and statistics", {"HONE_METRICS": "off"}, ""),
    ("without live capture", {}, 'capture: {mode: "off"}\n'),
    ("without deadlines", {"HONE_REQUEST_TIMEOUT_S": "0"}, ""),
)


def features(folder: Path, effort: Effort) -> list[dict[str, Any]]:
    """The linear model at 32 connections with each feature off, all variants in turns; CPU of the HTTP process a request is what it costs."""
    servers: list[Hone] = []
    try:
        for number, (_, environment, config) in enumerate(FEATURES):
            place = folder / str(number)
            model = models.linear(place / "repository")
            if config:
                (place / "repository" / model.name / "model.yaml").write_text(config)
            servers.append(Hone(place / "repository", place / "state", environment))
        body = binary_body(model, model.rows(1))
        for server in servers:
            server.wait_ready("linear")
            server.settle(1)
            wrk.run(HOST, server.port, body, 32, 1)
        per_s: list[list[float]] = [[] for _ in servers]
        cpu_us: list[list[float]] = [[] for _ in servers]
        for number in range(effort.rounds):
            for index in range(len(servers)) if number % 2 else reversed(range(len(servers))):
                before = process_seconds(servers[index].pid)
                run = wrk.run(HOST, servers[index].port, body, 32, 1)
                per_s[index].append(run.per_s)
                cpu_us[index].append((process_seconds(servers[index].pid) - before) / run.per_s * 1e6)
    finally:
        for server in servers:
            server.stop()
    return [
        {"variant": name, "per_s": round(statistics.median(rates), 0), "cpu_us": round(statistics.median(costs), 1)}
        for (name, _, _), rates, costs in zip(FEATURES, per_s, cpu_us, strict=True)
    ]


def _capacity(hone: Hone, model: BenchModel, rows: int = 1) -> float:
    body = binary_body(model, model.rows(rows))
    return max(wrk.run(HOST, hone.port, body, 32, 2).per_s for _ in range(2))


def _open(hone: Hone, model: BenchModel, rate: float, seconds: float, connections: int = 128, rows: int = 1) -> openloop.Running:
    request = binary_body(model, model.rows(rows)).http(HOST, hone.port)
    return openloop.Running(openloop.Plan(HOST, hone.port, [request], rate, seconds, connections))
