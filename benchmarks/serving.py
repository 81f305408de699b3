"""Requests per second and latency of Hone beside what it can be held to: the runtime alone (the limit) and a plain FastAPI app (the control, in
both of its forms).

One run, one client (`wrk`), one host: they take turns in every round, so that a slow moment hits all of them, and ratios are made
within a round. A closed loop's p99 hides stalls; latency under a fixed rate is measured apart, from each request's intended start.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from benchmarks import openloop, wrk
from benchmarks.limit import Layout, Limit, many_layouts, single_layouts
from benchmarks.machine import Quiet
from benchmarks.models import BenchModel, Body, Floats, binary_body, json_body, plain_bodies
from benchmarks.servers import HOST, Control, Hone, ServerUnderTest
from optimizers.host import cpu_budget

CONNECTIONS: Final = (1, 8, 32)
OPEN_SHARE: Final = 0.5


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float
    sweep_s: float
    open_s: float
    warm_s: float = 1.0
    latencies: int = 40
    """A run lasts at least so many of its median latencies: what is under way at its end is not counted."""
    connections: tuple[int, ...] = CONNECTIONS


FULL: Final = Effort(rounds=7, seconds=4, sweep_s=0.5, open_s=20)
QUICK: Final = Effort(rounds=3, seconds=1, sweep_s=0.15, open_s=3, latencies=15)


@dataclass
class Series:
    """One number per round."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def to_json(self) -> dict[str, float]:
        return {"median": round(self.median, 4), "low": round(min(self.values), 4), "high": round(max(self.values), 4)}


def ratios(top: Series, bottom: Series) -> Series:
    """Round by round."""
    return Series([a / b for a, b in zip(top.values, bottom.values, strict=True)])


@dataclass
class Measured:
    """One server in one situation, round by round."""

    per_s: Series = field(default_factory=Series)
    p50_ms: Series = field(default_factory=Series)
    p99_ms: Series = field(default_factory=Series)
    failed: int = 0

    def add(self, run: wrk.Closed) -> None:
        self.per_s.values.append(run.per_s)
        self.p50_ms.values.append(run.p50_ms)
        self.p99_ms.values.append(run.p99_ms)
        self.failed += run.failed

    def to_json(self) -> dict[str, Any]:
        return {
            "per_s": self.per_s.to_json(), "p50_ms": self.p50_ms.to_json(), "p99_ms": self.p99_ms.to_json(), "failed": self.failed,
        }  # fmt: skip


class ModelBench:
    """All measurements of one model, against a Hone that already serves it."""

    def __init__(self, model: BenchModel, hone: Hone, effort: Effort, folder: Path, say: Callable[[str], None]) -> None:
        self._model, self._hone, self._effort, self._say = model, hone, effort, say
        rows = model.rows(1)
        self._plain = dict(zip(("binary", "json"), plain_bodies(rows), strict=True))
        self._own = {"binary": binary_body(model, rows), "json": json_body(model, rows)}
        self._control = Control(model.path, folder)
        self._limit = Limit(model.path)

    def run(self) -> dict[str, Any]:
        try:
            self._control.wait("/ready")
            check(self._model, self._hone, self._own["binary"], self._model.rows(1))
            cores = cpu_budget().cores
            singles = self._limit.sweep(single_layouts(cores), self._effort.sweep_s)
            many = self._limit.sweep(many_layouts(cores), self._effort.sweep_s)
            self._say(f"{self._model.name}: best single call {singles[0]}; best of many {many[0]}")
            found: dict[str, Any] = {"single": str(singles[0]), "many": str(many[0]), "closed": [], "open": []}
            for kind in self._own:
                for connections in self._effort.connections:
                    found["closed"].append(self._closed(kind, connections, singles if connections == 1 else many))
            capacity = max(row["hone"]["per_s"]["median"] for row in found["closed"] if row["body"] == "binary")
            found["open"] = self._open(capacity * OPEN_SHARE)
            return found
        finally:
            self._control.stop()
            self._limit.close()

    def _closed(self, kind: str, connections: int, leading: list[Layout]) -> dict[str, Any]:
        effort = self._effort
        limit, pooled, inline, hone = Series(), Measured(), Measured(), Measured()
        plain, own = self._plain[kind], self._own[kind]
        on_loop = replace(plain, path="/inline" + plain.path)
        turns: list[Callable[[], None]] = [
            lambda: limit.values.append(self._limit.best(leading, effort.seconds)),
            lambda: pooled.add(self._drive(self._control, plain, connections, seconds)),
            lambda: inline.add(self._drive(self._control, on_loop, connections, seconds)),
            lambda: hone.add(self._drive(self._hone, own, connections, seconds)),
        ]
        warm = [
            self._drive(server, body, connections, effort.warm_s)
            for server, body in ((self._control, plain), (self._control, on_loop), (self._hone, own))
        ]
        seconds = max(effort.seconds, *(run.p50_ms / 1e3 * effort.latencies for run in warm))
        for number in range(effort.rounds):
            for turn in rotated(turns, number):
                turn()
        row: dict[str, Any] = {
            "body": kind, "connections": connections, "limit": limit.to_json(), "threads": pooled.to_json(), "inline": inline.to_json(),
            "hone": hone.to_json(), "of_limit": ratios(hone.per_s, limit).to_json(), "of_threads": ratios(hone.per_s, pooled.per_s).to_json(),
            "of_inline": ratios(hone.per_s, inline.per_s).to_json(),
        }  # fmt: skip
        self._say(
            f"{self._model.name:16} {kind:6} {connections:2} connections: limit {limit.median:7.0f}/s  control in threads {pooled.per_s.median:7.0f}/s, "
            f"inline {inline.per_s.median:7.0f}/s  hone {hone.per_s.median:7.0f}/s = {row['of_limit']['median']:.2f} of the limit, "
            f"{row['of_threads']['median']:.2f} and {row['of_inline']['median']:.2f} × control"
        )
        return row

    def _open(self, rate: float) -> list[dict[str, Any]]:
        """The same rate for both, so that their latencies compare."""
        rows = []
        for name, server, body in (("control", self._control, self._plain["binary"]), ("hone", self._hone, self._own["binary"])):
            plan = openloop.Plan(HOST, server.port, [body.http(HOST, server.port)], rate, self._effort.open_s)
            seen = openloop.run_apart(plan)
            rows.append({"server": name, "per_s": round(rate, 1), **seen.summary()})
            self._say(f"{self._model.name:16} open loop at {rate:.0f}/s, {name}: {seen.summary()}")
        return rows

    def _drive(self, server: ServerUnderTest, body: Body, connections: int, seconds: float) -> wrk.Closed:
        run = wrk.run(HOST, server.port, body, connections, seconds)
        server.rest()
        return run


def rotated(turns: Sequence[Callable[[], None]], number: int) -> list[Callable[[], None]]:
    """A B C, B C A, C A B: nobody always follows the same one."""
    start = number % len(turns)
    return [*turns[start:], *turns[:start]]


def check(model: BenchModel, hone: Hone, body: Body, rows: Floats) -> None:
    """A benchmark of wrong answers is none."""
    import numpy as np

    status, headers, answer = hone.ask("POST", body.path, body.data, body.headers)
    if status != 200:
        raise RuntimeError(f"{model.name} answers {status}: {answer[:300]!r}")
    values = np.frombuffer(answer[int(headers["inference-header-content-length"]) :], np.float32)
    expected = model.answer(rows).ravel()
    if values.shape != expected.shape or float(np.abs(values - expected).max()) > 0.05 * max(1.0, float(np.abs(expected).max())):
        raise RuntimeError(f"{model.name} answers {values[:4]}…, not {expected[:4]}…")


def measure(models: Sequence[BenchModel], repository: Path, folder: Path, effort: Effort, say: Callable[[str], None]) -> dict[str, Any]:
    """Serve all of `models` with one Hone and measure each."""
    quiet = Quiet()
    with Hone(repository, folder / "state") as hone:
        hone.wait_ready()
        for model in models:
            hone.wait_ready(model.name)
        hone.settle(len(models))
        results = {model.name: ModelBench(model, hone, effort, folder, say).run() for model in models}
    return {
        "models": results,
        "quiet": quiet.report(),
        "effort": {"rounds": effort.rounds, "seconds": effort.seconds, "latencies": effort.latencies},
    }
