"""Swaps under load: versions and settings change through the admin side while requests arrive at half of capacity, whatever happens.

Every answer is checked: its status, and that its values are those of the version that its header names (outputs of the two versions lie
far apart). Latency counts from the intended start. Memory, open files and processes must stay where they are.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from app.serving.procfs import descendants
from benchmarks import models, openloop, wrk
from benchmarks.machine import Quiet, open_files, rollup_bytes, status_bytes
from benchmarks.models import BenchModel, binary_body
from benchmarks.servers import HOST, Hone

SHIFT: Final = 1000.0
STEADY_S: Final = 20.0
INPUTS: Final = 8
PAUSE_S: Final = 0.25
"""Between two swaps. Every sixth opens a session, which itself takes about this long on a core."""
NAME: Final = "swapped"


@dataclass(frozen=True, slots=True)
class Level:
    """What a server holds at one moment."""

    rss_mb: float
    pss_mb: float
    open_files: int
    processes: int


def level(hone: Hone) -> Level:
    pids = descendants(hone.pid)
    pss = sum(rollup_bytes(pid, "Pss") for pid in pids)
    return Level(status_bytes(hone.pid) / 2**20, pss / 2**20, open_files(hone.pid), len(pids))


def measure(repository: Path, folder: Path, swaps: int, say: Callable[[str], None], steady_s: float = STEADY_S) -> dict[str, Any]:
    """`swaps` swaps under open-loop load; every number of the issue's list."""
    first = models.copied(models.DEMO, repository, NAME)
    second = models.shifted(first, repository, "2", SHIFT)
    quiet = Quiet()
    with Hone(repository, folder / "state") as hone:
        hone.wait_ready(NAME)
        hone.settle(1)
        hone.admin("POST", f"/models/{NAME}/promote", {"version": "1", "reason": "both versions are warm"})
        bodies = [binary_body(first, first.rows(1, seed)) for seed in range(INPUTS)]
        capacity = max(_capacity(hone, bodies[0]) for _ in range(3))
        rate = capacity / 2
        say(f"swaps: capacity {capacity:.0f}/s, so requests arrive at {rate:.0f}/s")
        requests = [body.http(HOST, hone.port) for body in bodies]
        plan = openloop.Plan(HOST, hone.port, requests, rate, steady_s * 2 + swaps * 5.0 + 60, keep=True)
        running = openloop.Running(plan)
        try:
            marks, levels, took = _swap(hone, swaps, steady_s, say)
        finally:
            running.stop()
        seen = running.result()
    return _judged(seen, marks, levels, took, {"1": first, "2": second}, rate) | {"quiet": quiet.report(), "swaps": swaps}


def _swap(hone: Hone, swaps: int, steady_s: float, say: Callable[[str], None]) -> tuple[list[float], dict[str, Level], list[float]]:
    """Moments (steady from, swaps from, swaps until, steady until), levels, and seconds of each swap."""
    time.sleep(1.0)
    marks = [time.monotonic()]
    time.sleep(steady_s)
    marks.append(time.monotonic())
    early = max(1, min(100, swaps // 5))
    levels: dict[str, Level] = {}
    took = []
    for number, (method, path, content) in zip(range(1, swaps + 1), changes(), strict=False):
        began = time.monotonic()
        hone.admin(method, f"/models/{NAME}/{path}", content)
        took.append(time.monotonic() - began)
        time.sleep(PAUSE_S)
        if number == early:
            levels["early"] = level(hone)
        if number % max(1, swaps // 10) == 0:
            say(f"swaps: {number}, {level(hone)}")
    marks.append(time.monotonic())
    time.sleep(steady_s)
    levels["last"] = level(hone)
    marks.append(time.monotonic())
    return marks, levels, took


def changes() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The turn of changes: to a version and back, by promotion and by rollback, live settings, and settings that need a new session."""
    limits, spins = itertools.cycle((8, 16)), itertools.cycle((100, 0))
    while True:
        yield "POST", "promote", {"version": "2", "reason": "benchmark"}
        yield "POST", "rollback", {"reason": "benchmark"}
        yield "PATCH", "settings", {"batch_limit": next(limits), "reason": "benchmark: live"}
        yield "POST", "promote", {"version": "2", "reason": "benchmark"}
        yield "POST", "promote", {"version": "1", "reason": "benchmark"}
        yield "PATCH", "settings", {"spin_duration_us": next(spins), "reason": "benchmark: a new session"}


def _capacity(hone: Hone, body: models.Body) -> float:
    return wrk.run(HOST, hone.port, body, 32, 2).per_s


def _judged(
    seen: openloop.Seen, marks: list[float], levels: dict[str, Level], took: list[float], versions: dict[str, BenchModel], rate: float
) -> dict[str, Any]:
    begin, swaps_from, swaps_until, end = marks
    during = seen.between(swaps_from, swaps_until)
    before, after = seen.between(begin, swaps_from), seen.between(swaps_until, end)
    steady_p99 = statistics.mean((before.quantile_ms(0.99), after.quantile_ms(0.99)))
    early, last = levels["early"], levels["last"]
    return {
        "rate_per_s": round(rate, 1), "requests": len(seen.start), "failed": seen.failed, "wrong_version": wrong_answers(seen, versions),
        "answers_by_version": {v: int(np.count_nonzero(seen.version == v.encode())) for v in versions},
        "p99_ms": {"before": round(before.quantile_ms(0.99), 2), "swaps": round(during.quantile_ms(0.99), 2),
                   "after": round(after.quantile_ms(0.99), 2)},
        "p50_ms": {"before": round(before.quantile_ms(0.5), 2), "swaps": round(during.quantile_ms(0.5), 2)},
        "worst_ms": round(during.quantile_ms(1.0), 1), "p99_ratio": round(during.quantile_ms(0.99) / steady_p99, 2),
        "swap_s": {"median": round(statistics.median(took), 3), "worst": round(max(took), 3)},
        "rss_mb": [round(early.rss_mb, 1), round(last.rss_mb, 1)], "pss_mb": [round(early.pss_mb, 1), round(last.pss_mb, 1)],
        "open_files": [early.open_files, last.open_files], "processes": [early.processes, last.processes],
    }  # fmt: skip


def wrong_answers(seen: openloop.Seen, versions: dict[str, BenchModel]) -> int:
    """Answers (status 200) whose values are not those of the version they name, for the input they were asked with."""
    rows = np.concatenate([next(iter(versions.values())).rows(1, seed) for seed in range(INPUTS)])
    expected = {name: model.answer(rows) for name, model in versions.items()}
    wrong = 0
    for status, request, version, body in zip(seen.status, seen.request, seen.version, seen.body, strict=True):
        if status != 200:
            continue
        right = expected.get(version.decode())
        values = np.frombuffer(body, np.float32, count=-1, offset=len(body) % 4)[-expected["1"].shape[1] :]
        wrong += right is None or float(np.abs(values - right[request]).max()) > SHIFT / 10
    return wrong
